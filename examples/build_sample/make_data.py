"""Make the pretraining set and the labelled tasks from the downloaded pictures.

    python make_data.py --work build/sample

Writes pretrain.npz (uint8 pictures of 56 px), captions.json (several per picture) and
sample/tasks/<name>/{train,test}.parquet (48 px). A task's pictures are one pool, of which 60 %,
drawn at random, are for training. Only `flag_regions` is shifted: its test flags are of other
countries.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import glyphs
import numpy as np
import pictures
from PIL import Image
from sklearn.datasets import load_digits
from task_cards import TASKS, write

# Eight pixels more than the model sees: training crops at random.
STORED, SHOWN = 56, 48
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LETTERS = [chr(c) for c in range(65, 91)]
STYLES = {"serif": "serif", "sans": "sans serif", "mono": "typewriter", "script": "handwriting"}
WORDS = (
    "sun map tree milk iron wolf ring leaf hill jazz fig lamp rain ship gold kite moon frog bell "
    "silk wind film tile city limb vine quiz mill will elm gym fox"
).split()

TRAIN = 0.6  # of a pool

Rows = list[tuple[Image.Image, str]]
Pools = dict[str, list[Image.Image]]  # pictures by class
Paint = Callable[[Image.Image, random.Random], Image.Image]


def drawn_from(pools: Pools, each: int, seed: int) -> Pools:
    """At most `each` pictures of every class, no two of the same pixels (two names of a file)."""
    rng, seen = random.Random(seed), set()
    found: Pools = {}
    for name, pool in pools.items():
        for image in rng.sample(pool, len(pool)):
            pixels = image.convert("RGB").tobytes()
            if pixels not in seen and len(found.setdefault(name, [])) < each:
                seen.add(pixels)
                found[name].append(image)
    return found


def split(pools: Pools, seed: int) -> dict[str, Rows]:
    """Training and test rows in a mixed order, every class in the same proportion."""
    rng = random.Random(seed)
    parts: dict[str, Rows] = {"train": [], "test": []}
    for name, pool in pools.items():
        cut = round(TRAIN * len(pool))
        for i, image in enumerate(rng.sample(pool, len(pool))):
            parts["train" if i < cut else "test"].append((image, name))
    for rows in parts.values():
        rng.shuffle(rows)
    return parts


class Glyphs:
    """Draws characters: with the fonts of pretraining, or with those held out from it."""

    def __init__(self, fonts: list[glyphs.Font], pretraining: bool, seed: int) -> None:
        self.fonts = [f for f in fonts if f.pretraining == pretraining]
        self.rng = random.Random(seed)
        self.side = STORED if pretraining else SHOWN
        self.paint: Paint = partial(glyphs.ink, colour=pretraining)

    def draw(
        self,
        text: str,
        fonts: list[glyphs.Font] | None = None,
        tilt: float = 8.0,
        paint: Paint | None = None,
    ) -> tuple[Image.Image, glyphs.Font] | None:
        """A picture of `text` and the font used, or None where no font has it."""
        able = [f for f in fonts or self.fonts if all(ord(c) in f.chars for c in text)]
        # By folder first: a package of 40 weights must not outvote one with a single face.
        folders = sorted({f.path.parent for f in able})
        for _ in range(4 if folders else 0):
            folder = self.rng.choice(folders)
            font = self.rng.choice([f for f in able if f.path.parent == folder])
            mask = glyphs.draw_mask(text, font)
            if mask is not None:
                square = glyphs.place(mask, self.side, self.rng, tilt)
                image = (paint or self.paint)(square, self.rng)
                image.info["box"] = text.isalpha() and glyphs.looks_like_box(mask)
                return image, font
        return None

    def many(
        self, texts: list[str], n: int, tilt: float = 8.0, paint: Paint | None = None
    ) -> list[Image.Image]:
        """About `n` pictures, each of one of `texts`."""
        known = frozenset().union(*(f.chars for f in self.fonts))
        texts = [t for t in texts if all(ord(c) in known for c in t)]
        choices = (self.rng.choice(texts) for _ in range(n if texts else 0))
        drawn = [self.draw(text, tilt=tilt, paint=paint) for text in choices]
        return [image for image, _ in filter(None, drawn) if not image.info["box"]]

    def styled(self, style: str, n: int) -> list[Image.Image]:
        """About `n` pictures of short words in fonts of one style."""
        fonts = [f for f in self.fonts if f.style == style]
        words = [self.rng.choice((w, w.title())) for w in self.rng.choices(WORDS, k=n)]
        drawn = (self.draw(w, fonts, 4.0) for w in words)
        return [d[0] for d in drawn if d]


def glyph_pools(drawer: Glyphs) -> dict[str, Pools]:
    """The tasks that are drawn with fonts."""

    def ask(texts: dict[str, list[str]], task: str, tilt: float = 8.0) -> Pools:
        more = TASKS[task]["each"] + 20  # some draws fail
        return {name: drawer.many(t, more, tilt) for name, t in texts.items()}

    def styles() -> Pools:
        more = TASKS["font_styles"]["each"] + 20
        return {word: drawer.styled(style, more) for style, word in STYLES.items()}

    def colours() -> Pools:
        more, texts = TASKS["ink_colours"]["each"] + 20, [*LETTERS, *"0123456789"]
        paints = {name: partial(glyphs.coloured_ink, name=name) for name in glyphs.COLOURS}
        return {name: drawer.many(texts, more, paint=paint) for name, paint in paints.items()}

    def turns() -> Pools:
        more = TASKS["letter_turns"]["each"] + 20
        upright = {name: drawer.many(list(glyphs.ONE_WAY_UP), more) for name in glyphs.TURNS}
        return {
            name: [i.transpose(turn) if turn is not None else i for i in upright[name]]
            for name, turn in glyphs.TURNS.items()
        }

    def counts() -> Pools:
        more = TASKS["symbol_counts"]["each"] + 20
        texts = [*LETTERS, *"".join(glyphs.SYMBOLS[kind] for kind in glyphs.COUNTED)]
        paints = {
            name: partial(glyphs.copies, count=n) for n, name in enumerate(glyphs.COUNTS, start=1)
        }
        return {name: drawer.many(texts, more, paint=paint) for name, paint in paints.items()}

    return {
        "printed_digits": ask({n: [str(i)] for i, n in enumerate(DIGITS)}, "printed_digits"),
        "printed_letters": ask({c: [c] for c in LETTERS}, "printed_letters"),
        "writing_scripts": ask({n: list(c) for n, c in glyphs.SCRIPTS.items()}, "writing_scripts"),
        # A tilt would blur up and left; arrows stay straight.
        "arrow_directions": ask(
            {n: list(c) for n, c in glyphs.arrow_chars().items()}, "arrow_directions", 0.0
        ),
        "symbol_kinds": ask({n: list(c) for n, c in glyphs.SYMBOLS.items()}, "symbol_kinds"),
        "font_styles": styles(),
        "ink_colours": colours(),
        "letter_turns": turns(),
        "symbol_counts": counts(),
    }


def picture_pools(rows: list[pictures.Picture], held: list[bool]) -> Pools:
    """Held-out pictures by class, on white paper; a skin tone is no picture of its own."""
    found: Pools = {}
    for row, out in zip(rows, held, strict=True):
        if out and row.label and "tone" not in row.words:
            sheet = pictures.on_paper(row.image, SHOWN, 2, (255, 255, 255))
            found.setdefault(row.label, []).append(sheet)
    return found


def flags_of_other_countries(rows: list[pictures.Picture], seed: int) -> dict[str, Rows]:
    """The shifted task: the test flags are of countries that training does not see."""
    test = pictures.held_out(rows, 1 - TRAIN)
    parts: dict[str, Rows] = {}
    for name, held in (("train", [not out for out in test]), ("test", test)):
        pools = drawn_from(picture_pools(rows, held), 1000, seed)
        parts[name] = [(image, label) for label, pool in pools.items() for image in pool]
        random.Random(seed).shuffle(parts[name])
    # Some territories fly one and the same flag.
    tested = {image.tobytes() for image, _ in parts["test"]}
    parts["train"] = [row for row in parts["train"] if row[0].tobytes() not in tested]
    return parts


def digit_pools(source: Path) -> dict[str, Pools]:
    """Handwritten and scanned digits, white on black; pretraining sees none of them."""
    scanned = load_digits()
    scans = [Image.fromarray((16 * i).clip(0, 255).astype(np.uint8)) for i in scanned.images]
    found: dict[str, Pools] = {}
    for task, pairs in (
        ("handwritten_digits", pictures.mnist(source)),
        ("scanned_digits", zip(scans, scanned.target, strict=True)),
    ):
        for image, digit in pairs:
            sheet = Image.new("L", (SHOWN, SHOWN))
            sheet.paste(image.resize((40, 40), Image.Resampling.BICUBIC), (4, 4))
            pools = found.setdefault(task, {})
            pools.setdefault(DIGITS[digit], []).append(sheet.convert("RGB"))
    return found


class PretrainingSet:
    """Pictures of 56 px with their captions and the source that each comes from."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []
        self.captions: list[list[str]] = []
        self.sources: list[str] = []

    def add(self, image: Image.Image, captions: list[str], source: str) -> None:
        self.images.append(np.asarray(image.convert("RGB"), dtype=np.uint8))
        self.captions.append([" ".join(c.lower().split()) for c in captions])
        self.sources.append(source)


def add_glyphs(into: PretrainingSet, drawer: Glyphs) -> None:
    """Characters and words with what they are, their script and the style of their font."""

    def put(text: str, captions: list[str], n: int, source: str, tilt: float = 8.0) -> None:
        for _ in range(n):
            drawn = drawer.draw(text, tilt=tilt)
            if drawn:
                style = STYLES.get(drawn[1].style)
                extra = [f"{captions[0]} in {style} type"] if style else []
                into.add(drawn[0], captions + extra, source)

    for value, name in enumerate(DIGITS):
        said = [f"the number {name}", f"the digit {name}", f"a printed {name}", f"number {value}"]
        put(str(value), [*said, f"a picture of the number {name}"], 220, "digits")
    for letter in LETTERS:
        said = [f"the letter {letter}", f"a capital {letter}", f"a printed letter {letter}"]
        put(letter, [*said, "a Latin letter"], 110, "letters")
        small = letter.lower()
        said = [f"the small letter {small}", f"a small {small}", "Latin writing"]
        put(small, said, 25, "letters")
    for script, chars in glyphs.SCRIPTS.items():
        for char in chars:
            said = [f"a {script} letter", f"{script} writing", f"a letter of the {script} script"]
            said += [f"a character in {script}", glyphs.char_name(char)]
            put(char, said, 340 // len(chars) + 1, "scripts")
    for style, word in STYLES.items():
        for image in drawer.styled(style, 750):
            said = [f"a word in {word} type", f"{word} text", f"text in a {word} font"]
            into.add(image, said, "styles")
    for direction, chars in glyphs.arrow_chars().items():
        for char in chars:
            said = [f"an arrow pointing {direction}", f"arrow {direction}", f"{direction} arrow"]
            said += [glyphs.char_name(char)]
            put(char, said, 330 // len(chars) + 1, "arrows", 0.0)
    for kind, chars in glyphs.SYMBOLS.items():
        for char in chars:
            name = glyphs.char_name(char)
            said = [f"a {kind}", f"{name}, a {kind}", f"the {kind} {name}", f"{name} symbol"]
            put(char, said, 300 // len(chars) + 1, "symbols")


def add_pictures(
    into: PretrainingSet, rows: list[pictures.Picture], held: list[bool], source: str, copies: int
) -> None:
    """Pictures left for pretraining, each on several papers, white first."""
    rng = random.Random(5)
    for row, out in zip(rows, held, strict=True):
        for copy in range(0 if out else copies):
            tint = tuple(rng.randrange(170, 256) for _ in range(3))
            paper = (255, 255, 255) if copy % 2 == 0 else (tint[0], tint[1], tint[2])
            sheet = pictures.on_paper(row.image, STORED, rng.randrange(4, 9), paper)
            into.add(sheet, row.captions, source)


def write_task(folder: Path, name: str, split: str, rows: Rows) -> None:
    """One parquet file with Image and ClassLabel features in its schema."""
    classes = TASKS[name]["classes"]
    encoded = []
    for image, _ in rows:
        data = io.BytesIO()
        if image.convert("L").convert("RGB").tobytes() == image.tobytes():
            image.convert("L").save(data, "PNG", optimize=True)
        else:
            image.save(data, "WEBP", quality=88, method=6)
        encoded.append({"bytes": data.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    labels = [classes.index(label) for _, label in rows]
    table = datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)
    (folder / name).mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / name / f"{split}.parquet")
    print(f"{name:18} {split:5} {len(rows):4}", dict(Counter(label for _, label in rows)))


def _thumbs(images: list[np.ndarray]) -> np.ndarray:
    small = [np.asarray(Image.fromarray(i).resize((12, 12), Image.Resampling.BOX)) for i in images]
    return np.stack(small).astype(np.float32).reshape(len(small), -1) / 255


def drop_near_copies(into: PretrainingSet, rows: Rows) -> None:
    """Take out of pretraining whatever looks like a held-out picture (renamed copies exist)."""
    images = [np.asarray(i.convert("RGB")) for i, _ in rows]
    held, seen = _thumbs(images), _thumbs(into.images)
    nearest = np.full(len(seen), np.inf, dtype=np.float32)
    norms = (held**2).sum(1)
    for start in range(0, len(seen), 2000):
        part = seen[start : start + 2000]
        distance = (part**2).sum(1)[:, None] + norms - 2 * part @ held.T
        nearest[start : start + 2000] = distance.min(1) / held.shape[1]
    # A root mean square of 4 % of the range: the same drawing, at most re-encoded.
    keep = nearest > 0.04**2
    print(f"near copies of held-out pictures taken out of pretraining: {int((~keep).sum())}")
    into.images = [x for x, k in zip(into.images, keep, strict=True) if k]
    into.captions = [x for x, k in zip(into.captions, keep, strict=True) if k]
    into.sources = [x for x, k in zip(into.sources, keep, strict=True) if k]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/sample"))
    work = parser.parse_args().work
    source = work / "src"
    datasets.disable_progress_bars()
    fonts = glyphs.load_fonts(source)
    print("font files of pretraining and held out:", Counter(f.pretraining for f in fonts))

    pools = glyph_pools(Glyphs(fonts, False, 11)) | digit_pools(source)

    into = PretrainingSet()
    add_glyphs(into, Glyphs(fonts, True, 13))
    drawer = Glyphs(fonts, True, 14)
    for path, char, words in pictures.icon_names(source):
        mask = glyphs.draw_mask(char, glyphs.Font(path, True, "none", frozenset({ord(char)})))
        if mask is not None:
            square = glyphs.ink(glyphs.place(mask, STORED, drawer.rng, 0.0), drawer.rng, True)
            into.add(square, [f"an icon of {words}", words, f"{words} icon"], "icons")

    emoji = list(pictures.emoji(source))
    held = pictures.held_out(emoji, 0.52)
    pools["emoji_groups"] = picture_pools(emoji, held)
    add_pictures(into, emoji, held, "emoji", 2)
    clipart = list(pictures.clipart(source))
    held = pictures.held_out(clipart, 0.62)
    pools["clipart_folders"] = picture_pools(clipart, held)
    add_pictures(into, clipart, held, "clipart", 2)
    tango = list(pictures.tango(source))
    add_pictures(into, tango, [False] * len(tango), "tango", 2)
    # The other vendor's drawings of the same flags: known countries in an unknown style.
    noto = list(pictures.flags(source, "google"))
    add_pictures(into, noto, [False] * len(noto), "flags", 8)

    tasks = {
        name: split(drawn_from(pool, TASKS[name].get("each", 1000), 1), 2)
        for name, pool in pools.items()
    }
    flags = [*pictures.flags(source, "twitter"), *pictures.clipart_flags(source)]
    tasks["flag_regions"] = flags_of_other_countries(flags, 3)

    # Characters are drawn again with held-out fonts; only copied files can leak.
    copied = ("emoji_groups", "clipart_folders", "flag_regions")
    drop_near_copies(into, [row for n in copied for rows in tasks[n].values() for row in rows])
    for name in TASKS:
        for part, rows in tasks[name].items():
            write_task(work / "sample" / "tasks", name, part, rows)
    np.savez(work / "pretrain.npz", images=np.stack(into.images), sources=np.array(into.sources))
    (work / "captions.json").write_text(json.dumps(into.captions))
    write(work / "sample" / "tasks.json")
    print("pretraining pictures:", len(into.images), dict(Counter(into.sources)))


if __name__ == "__main__":
    main()
