"""Pictures of written characters, drawn with free fonts.

A font is for pretraining or held out from it (fonts.tsv), so that a task never shows a design that
pretraining has seen.
"""

from __future__ import annotations

import random
import re
import unicodedata
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageColor, ImageDraw, ImageFont

TABLE = Path(__file__).with_name("fonts.tsv")


@dataclass(frozen=True)
class Font:
    """One font file, its characters, and whether pretraining has it or the tasks."""

    path: Path
    pretraining: bool
    style: str
    chars: frozenset[int]


def _style(style: str, name: str) -> str:
    if style != "auto":
        return style
    if re.search("mono|courier", name, re.I):
        return "mono"
    return "serif" if re.search("serif", name, re.I) else "sans"


def load_fonts(folder: Path) -> list[Font]:
    """Every font file under `folder`/<package>, with its use and style."""
    fonts = []
    for line in TABLE.read_text().splitlines():
        if line.startswith("#"):
            continue
        package, use, style = line.split("\t")[:3]
        files = sorted(p for p in (folder / package).rglob("*") if p.suffix in (".ttf", ".otf"))
        seen = set()
        for path in files:
            # Some packages hold one design as .ttf and .otf, or links to other packages.
            if path.stem in seen or not path.exists():
                continue
            seen.add(path.stem)
            try:
                chars = frozenset(TTFont(path, lazy=True).getBestCmap() or {})
            except Exception as error:  # a few old symbol fonts have no Unicode table
                print(f"skipped {path.name}: {error}")
                continue
            family = re.split(r"[-_]?(Bold|Regular|Medium|Book|Light|Demi|CLM)", path.stem)[0]
            family = "_".join(family.split("_")[:2])
            by_family = zlib.crc32(family.encode()) % 3 == 0
            pretraining = by_family if use == "family" else use == "pretrain"
            fonts.append(Font(path, pretraining, _style(style, path.stem), chars))
    return fonts


@lru_cache(maxsize=64)
def _face(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), 64)


def draw_mask(text: str, font: Font) -> Image.Image | None:
    """The inked part of `text`, or None where the font draws nothing or a bare box."""
    if not all(ord(c) in font.chars for c in text):
        return None
    try:
        face = _face(font.path)
        left, top, right, bottom = face.getbbox(text)
        if not (4 < right - left < 600 and 4 < bottom - top < 200):
            return None
        mask = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
        ImageDraw.Draw(mask).text((4 - left, 4 - top), text, fill=255, font=face)
    except OSError:
        return None
    # A face may promise a character and still draw its box for unknown ones.
    if bytes(face.getmask(text)) == bytes(face.getmask("\U0010ffff")):
        return None
    box = mask.getbbox()
    return mask.crop(box) if box else None


def looks_like_box(mask: Image.Image) -> bool:
    """Whether a mask is a hollow upright rectangle, as fonts draw for what they do not have."""
    ink = np.asarray(mask) > 127
    edges = np.concatenate([ink[1], ink[-2], ink[:, 1], ink[:, -2]])
    height, width = ink.shape
    inside = ink[height // 3 : -height // 3, width // 3 : -width // 3]
    return bool(edges.mean() > 0.97 and not inside.any())


def place(mask: Image.Image, side: int, rng: random.Random, tilt: float = 8.0) -> Image.Image:
    """Set an inked mask on a square, with a random size, place and slight tilt."""
    mask = mask.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC, expand=True)
    scale = side * rng.uniform(0.5, 0.85) / max(mask.size)
    size = [max(2, round(n * scale)) for n in mask.size]
    mask = mask.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    square = Image.new("L", (side, side))
    free = [side - n for n in size]
    # Near the middle: the task is to read, not to search.
    at = [round(f / 2 + rng.uniform(-0.35, 0.35) * f) for f in free]
    square.paste(mask, (at[0], at[1]))
    return square


def ink(mask: Image.Image, rng: random.Random, colour: bool) -> Image.Image:
    """Colour a mask: dark ink on light paper, or, one time in four, the reverse."""
    if colour and rng.random() < 0.6:
        dark = tuple(rng.randrange(0, 150) for _ in range(3))
        light = tuple(rng.randrange(180, 256) for _ in range(3))
    else:
        d, p = rng.randrange(0, 90), rng.randrange(200, 256)
        dark, light = (d, d, d), (p, p, p)
    if rng.random() < 0.25:
        dark, light = light, dark
    return Image.composite(
        Image.new("RGB", mask.size, dark), Image.new("RGB", mask.size, light), mask
    )


# Hue in degrees, saturation and value in percent: from, to.
COLOURS = {
    "red": ((352, 366), (85, 100), (75, 95)),
    "orange": ((22, 34), (90, 100), (90, 100)),
    "yellow": ((50, 60), (85, 100), (90, 100)),
    "green": ((100, 140), (60, 100), (45, 80)),
    "blue": ((205, 235), (70, 100), (60, 100)),
    "purple": ((268, 285), (60, 100), (45, 80)),
    "pink": ((325, 342), (35, 60), (95, 100)),
    "brown": ((20, 32), (60, 85), (32, 50)),
    "grey": ((0, 359), (0, 4), (42, 62)),
    "black": ((0, 359), (0, 4), (0, 12)),
}


def coloured_ink(mask: Image.Image, rng: random.Random, name: str) -> Image.Image:
    """Ink of a named colour on paper of nearly white."""
    hue, saturation, value = (rng.randint(*span) for span in COLOURS[name])
    ink_colour = ImageColor.getrgb(f"hsv({hue % 360},{saturation}%,{value}%)")
    paper = tuple(rng.randrange(225, 256) for _ in range(3))
    inked = Image.new("RGB", mask.size, ink_colour)
    return Image.composite(inked, Image.new("RGB", mask.size, paper), mask)


def copies(mask: Image.Image, rng: random.Random, count: int) -> Image.Image:
    """`count` small copies of what a mask shows, none on another, dark on light or the reverse."""
    side, piece = mask.width, mask.crop(mask.getbbox())
    scale = side * rng.uniform(0.2, 0.28) / max(piece.size)
    width, height = (max(2, round(n * scale)) for n in piece.size)
    piece = piece.resize((width, height), Image.Resampling.LANCZOS)
    at: list[tuple[int, int]] = []
    tries = 0
    while len(at) < count:
        if tries % 100 == 0:  # no room is left: begin again
            at.clear()
        tries += 1
        x, y = rng.randint(1, side - width - 1), rng.randint(1, side - height - 1)
        if all(abs(x - a) > width or abs(y - b) > height for a, b in at):
            at.append((x, y))
    sheet = Image.new("L", mask.size)
    for corner in at:
        sheet.paste(piece, corner)
    return ink(sheet, rng, False)


# Letters that look like no other letter when they are turned.
ONE_WAY_UP = "ABDEFGJKLPQRTVYaefghkrty"
TURNS = {
    "upright": None,
    "upside down": Image.Transpose.ROTATE_180,
    "turned left": Image.Transpose.ROTATE_90,
    "turned right": Image.Transpose.ROTATE_270,
}


# What is counted: letters, and signs that are in one piece.
COUNTED = ("star", "geometric shape", "card suit", "chess piece", "currency sign", "music note")
COUNTS = ["one symbol", *(f"{n} symbols" for n in ("two", "three", "four", "five", "six"))]


def char_name(char: str) -> str:
    """The Unicode name, in lower case, without what a reader would not say."""
    name = unicodedata.name(char, "").lower()
    return re.sub(r"\b(black|white|heavy|sign|symbol|with.*)\b", "", name).strip()


SCRIPTS = {
    "Latin": "ABCDEFGHKLMNPQRSUVWXYZabdefghkmnqrty",
    "Greek": "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψω",
    "Cyrillic": "БГДЖЗИЙЛПФЦЧШЩЪЫЬЭЮЯбджзийлпфцчшщыэюя",
    "Hebrew": "אבגדהזחטכלמנסעפצקרשת",
    "Arabic": "ابتجحدرسصطعفقكلمنهوي",
    "Armenian": "ԱԲԳԴԵԶԷԸԹԺԻԽԾԿՀՁՂՃՄՅՆՇՉՊՋՌՍՎՏՐաբգդեզէըթժխծկհձղճմշչպջռվտրփք",
    "Georgian": "აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ",
    "Thai": "กขคฆงจฉชซญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ",
    "Devanagari": "अआइईउऊएऐकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसह",
    "Korean": "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부",
    "Japanese": "あいうえおかきくけこさしすせそたちつてとなにぬ"
    "ねのはひふへほまみむめもやゆよらりるれろん",
}

ARROWS = {
    "left": "LEFTWARDS",
    "right": "RIGHTWARDS",
    "up": "UPWARDS",
    "down": "DOWNWARDS",
    "left and right": "LEFT RIGHT",
    "up and down": "UP DOWN",
}


def arrow_chars() -> dict[str, str]:
    """Unicode's arrows by direction, read off their names."""
    blocks = (
        (0x2190, 0x2200),
        (0x2794, 0x27C0),
        (0x27F0, 0x2800),
        (0x2900, 0x2980),
        (0x2B00, 0x2B50),
    )
    found = {direction: "" for direction in ARROWS}
    for start, end in blocks:
        for code in range(start, end):
            name = unicodedata.name(chr(code), "")
            # Two arrows in one sign, or a bent one, do not point one way.
            odd = r"OVER|CORNER|HOOK|LOOP|TIP|PAIRED|TO BAR|TURN|CURV|THEN|CIRCLE|ABOVE|BELOW|WAVE"
            if "ARROW" not in name or re.search(odd, name):
                continue
            hits = [d for d, word in ARROWS.items() if name.startswith(word) or f" {word} " in name]
            if len(hits) == 1:
                found[hits[0]] += chr(code)
    return found


def _span(start: int, end: int) -> str:
    return "".join(chr(c) for c in range(start, end + 1))


SYMBOLS = {
    "mathematical sign": "∀∂∃∅∇∈∉∋∏∑√∝∞∠∧∨∩∪∫≈≠≡≤≥⊂⊃⊆⊇⊕⊗⊥±÷",
    "currency sign": "$¢£¥€₡₤₦₧₨₩₪₫₭₮₱₲₴₵₹₽",
    "punctuation mark": "!?&@#%;:“”()[]{}«»¿¡§¶†‡…*/\\",
    "fraction": "¼½¾⅓⅔⅛⅜⅝⅞⅕⅖⅗⅘⅙⅚",
    "geometric shape": "■□▪▲△▶▷▼▽◀◁◆◇◈○◎●◐◑◒◓◢◣◤◥▬▭▮▯◊◫",
    "chess piece": _span(0x2654, 0x265F),
    "star": "★☆✦✧✩✪✫✬✭✮✯✰✱✲✳✴✵✶✷✸✹✺✻✼",
    "zodiac sign": _span(0x2648, 0x2653),
    "card suit": _span(0x2660, 0x2667),
    "music note": "♩♪♫♬♭♮♯",
    "Roman numeral": "ⅠⅡⅢⅣⅤⅥⅦⅧⅨⅪⅫ",
    "number in a circle": _span(0x2460, 0x2473) + _span(0x2776, 0x277F) + _span(0x2780, 0x2789),
}
