"""Make the pretraining set and the labelled tasks from the downloaded pictures.

    python make_data.py --work build/sample

Writes pretrain.npz (uint8 pictures of 56 px), captions.json (several per picture) and
sample/tasks/<name>/{train,test}.parquet (48 px).
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections import Counter
from pathlib import Path

import datasets
import glyphs
import numpy as np
import pictures
from PIL import Image
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

Rows = list[tuple[Image.Image, str]]


def fit(classes: list[str], options: dict[str, list[Image.Image]], each: int, seed: int) -> Rows:
    """At most `each` pictures per class, in a mixed order."""
    rng = random.Random(seed)
    rows: Rows = []
    for name in classes:
        found = options.get(name, [])
        rows += [(image, name) for image in rng.sample(found, min(each, len(found)))]
    rng.shuffle(rows)
    return rows


class Glyphs:
    """Draws characters with the fonts of one split."""

    def __init__(self, fonts: list[glyphs.Font], split: str, seed: int) -> None:
        self.fonts = [f for f in fonts if f.split == split]
        self.rng = random.Random(seed)
        self.split = split

    def draw(
        self, text: str, fonts: list[glyphs.Font] | None = None, tilt: float = 8.0
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
                pretraining = self.split == "pretrain"
                square = glyphs.place(mask, STORED if pretraining else SHOWN, self.rng, tilt)
                image = glyphs.ink(square, self.rng, pretraining)
                image.info["box"] = text.isalpha() and glyphs.looks_like_box(mask)
                return image, font
        return None

    def many(self, texts: list[str], n: int, tilt: float = 8.0) -> list[Image.Image]:
        """About `n` pictures, each of one of `texts`."""
        known = frozenset().union(*(f.chars for f in self.fonts))
        texts = [t for t in texts if all(ord(c) in known for c in t)]
        drawn = (self.draw(self.rng.choice(texts), tilt=tilt) for _ in range(n if texts else 0))
        return [d[0] for d in drawn if d]

    def styled(self, style: str, n: int) -> list[Image.Image]:
        """About `n` pictures of short words in fonts of one style."""
        fonts = [f for f in self.fonts if f.style == style]
        words = [self.rng.choice((w, w.title())) for w in self.rng.choices(WORDS, k=n)]
        drawn = (self.draw(w, fonts, 4.0) for w in words)
        return [d[0] for d in drawn if d]


def glyph_tasks(drawer: Glyphs, n: dict[str, int]) -> dict[str, Rows]:
    """The tasks that are drawn with fonts; `n` is the number of pictures per class."""
    rows: dict[str, Rows] = {}

    def add(task: str, options: dict[str, list[Image.Image]]) -> None:
        rows[task] = fit(TASKS[task]["classes"], options, n[task], seed=1)

    def ask(texts: dict[str, list[str]], task: str, tilt: float = 8.0) -> None:
        more = n[task] + 15  # some draws fail
        add(task, {name: drawer.many(t, more, tilt) for name, t in texts.items()})

    ask({name: [str(i)] for i, name in enumerate(DIGITS)}, "printed_digits")
    ask({c: [c] for c in LETTERS}, "printed_letters")
    ask({name: list(chars) for name, chars in glyphs.SCRIPTS.items()}, "writing_scripts")
    # A tilt would blur up and left; arrows stay straight.
    ask({name: list(c) for name, c in glyphs.arrow_chars().items()}, "arrow_directions", 0.0)
    ask({name: list(chars) for name, chars in glyphs.SYMBOLS.items()}, "symbol_kinds")
    task = "font_styles"
    add(task, {word: drawer.styled(style, n[task] + 15) for style, word in STYLES.items()})
    return rows


def picture_tasks(rows: list[pictures.Picture], splits: list[str], task: str) -> dict[str, Rows]:
    """Train and test rows of a task of pictures, on white paper."""
    found: dict[str, dict[str, list[Image.Image]]] = {"train": {}, "test": {}}
    for row, split in zip(rows, splits, strict=True):
        if split in found and row.label and "tone" not in row.words:
            sheet = pictures.on_paper(row.image, SHOWN, 2, (255, 255, 255))
            found[split].setdefault(row.label, []).append(sheet)
    most = TASKS[task].get("most", 60)
    parts = {s: fit(TASKS[task]["classes"], options, most, 2) for s, options in found.items()}
    # Some territories fly one and the same flag.
    tested = {image.tobytes() for image, _ in parts["test"]}
    parts["train"] = [row for row in parts["train"] if row[0].tobytes() not in tested]
    return parts


def digit_tasks(source: Path) -> dict[str, Rows]:
    """Handwritten digits as they are, white on black; pretraining sees none of them."""
    found: dict[str, list[Image.Image]] = {}
    for image, digit in pictures.mnist(source):
        sheet = Image.new("L", (SHOWN, SHOWN))
        sheet.paste(image.resize((40, 40), Image.Resampling.BICUBIC), (4, 4))
        found.setdefault(DIGITS[digit], []).append(sheet.convert("RGB"))
    rows = fit(DIGITS, found, 80, 3)
    seen: Counter[str] = Counter()
    parts: dict[str, Rows] = {"train": [], "test": []}
    for image, name in rows:
        parts["train" if seen[name] < 50 else "test"].append((image, name))
        seen[name] += 1
    return parts


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
    into: PretrainingSet, rows: list[pictures.Picture], splits: list[str], source: str, copies: int
) -> None:
    """Pictures left for pretraining, each on several papers, white first."""
    rng = random.Random(5)
    for row, split in zip(rows, splits, strict=True):
        for copy in range(copies if split == "pretrain" else 0):
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
        if name in ("emoji_groups", "clipart_folders", "flag_regions"):
            image.save(data, "WEBP", quality=88, method=6)
        else:
            image.convert("L").save(data, "PNG", optimize=True)
        encoded.append({"bytes": data.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    labels = [classes.index(label) for _, label in rows]
    table = datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)
    (folder / name).mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / name / f"{split}.parquet")
    print(f"{name:18} {split:5} {len(rows):4}", dict(Counter(label for _, label in rows)))


def unlike(train: Rows, test: Rows) -> Rows:
    """The rows of `train` whose pixels are not a test picture's (files with two names exist)."""
    seen = {image.convert("RGB").tobytes() for image, _ in test}
    return [row for row in train if row[0].convert("RGB").tobytes() not in seen]


def _thumbs(images: list[np.ndarray]) -> np.ndarray:
    small = [np.asarray(Image.fromarray(i).resize((12, 12), Image.Resampling.BOX)) for i in images]
    return np.stack(small).astype(np.float32).reshape(len(small), -1) / 255


def drop_near_copies(into: PretrainingSet, tasks: dict[str, Rows]) -> None:
    """Take out of pretraining whatever looks like a held-out picture (renamed copies exist)."""
    images = [np.asarray(i.convert("RGB")) for rows in tasks.values() for i, _ in rows]
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
    print("font files:", Counter(f.split for f in fonts))

    tasks: dict[str, dict[str, Rows]] = {name: {} for name in TASKS}
    for split, seed in (("train", 11), ("test", 12)):
        per_class = {n: int(c.get(f"{split}_each", 0)) for n, c in TASKS.items()}
        for name, rows in glyph_tasks(Glyphs(fonts, split, seed), per_class).items():
            tasks[name][split] = rows
    tasks["handwritten_digits"] = digit_tasks(source)

    into = PretrainingSet()
    add_glyphs(into, Glyphs(fonts, "pretrain", 13))
    drawer = Glyphs(fonts, "pretrain", 14)
    for path, char, words in pictures.icon_names(source):
        mask = glyphs.draw_mask(char, glyphs.Font(path, "pretrain", "none", frozenset({ord(char)})))
        if mask is not None:
            square = glyphs.ink(glyphs.place(mask, STORED, drawer.rng, 0.0), drawer.rng, True)
            into.add(square, [f"an icon of {words}", words, f"{words} icon"], "icons")

    emoji = list(pictures.emoji(source))
    splits = pictures.held_out(emoji, test=0.2, train=0.2)
    tasks["emoji_groups"] = picture_tasks(emoji, splits, "emoji_groups")
    add_pictures(into, emoji, splits, "emoji", 2)

    clipart = list(pictures.clipart(source))
    splits = pictures.held_out(clipart, test=0.24, train=0.24)
    tasks["clipart_folders"] = picture_tasks(clipart, splits, "clipart_folders")
    add_pictures(into, clipart, splits, "clipart", 2)
    tango = list(pictures.tango(source))
    add_pictures(into, tango, ["pretrain"] * len(tango), "tango", 2)

    # The other vendor's drawings of the same flags: known countries in an unknown style.
    noto = list(pictures.flags(source, "google"))
    add_pictures(into, noto, ["pretrain"] * len(noto), "flags", 8)
    flags = [*pictures.flags(source, "twitter"), *pictures.clipart_flags(source)]
    splits = pictures.held_out(flags, test=0.55, train=0.45)
    tasks["flag_regions"] = picture_tasks(flags, splits, "flag_regions")

    # Characters are drawn again with fonts of another split; only copied files can leak.
    copied = ("emoji_groups", "clipart_folders", "flag_regions")
    both = {f"{n}/{s}": rows for n in copied for s, rows in tasks[n].items()}
    drop_near_copies(into, both)
    for name, parts in tasks.items():
        parts["test"] = [row for row in parts["test"] if not row[0].info.get("box")]
        parts["train"] = [row for row in parts["train"] if not row[0].info.get("box")]
        parts["train"] = unlike(parts["train"], parts["test"])
        for split, rows in parts.items():
            write_task(work / "sample" / "tasks", name, split, rows)
    np.savez(work / "pretrain.npz", images=np.stack(into.images), sources=np.array(into.sources))
    (work / "captions.json").write_text(json.dumps(into.captions))
    write(work / "sample" / "tasks.json")
    print("pretraining pictures:", len(into.images), dict(Counter(into.sources)))


if __name__ == "__main__":
    main()
