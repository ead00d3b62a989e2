"""A picture once: as a PNG file, and as SVG inside a page, in the page's colours; that page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from .. import __version__
from .words import level_words, or_nothing, percent, printable

LIGHT = {
    "paper": "#ffffff", "panel": "#f3f5f8", "ink": "#1b1f24", "quiet": "#565d66",
    "rule": "#d5d9df", "edge": "#7b828b",
    "blue": "#1a5fb4", "red": "#b3261e", "green": "#1e6b3c", "amber": "#8a5200",
    "violet": "#7b3fa0", "teal": "#0b6e75",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "panel": "#1e2329", "ink": "#e8eaed", "quiet": "#aab2bb",
    "rule": "#3a414a", "edge": "#808993",
    "blue": "#7db4f5", "red": "#ff8f85", "green": "#74cf98", "amber": "#f0b65a",
    "violet": "#c9a0e8", "teal": "#62c9d1",
}  # fmt: skip
LEVEL = {"continue": "green", "warn": "amber", "stop": "red"}
SERIES = ("blue", "amber", "green", "violet", "red", "teal")  # of methods side by side
MARKS = ("o", "s", "^", "D", "v", "P")

WIDTH = 5.4  # inches; on a telephone it is shown at two thirds of that, and still read
_LARGEST = 10.0  # fraction; what is farther off is drawn there
_STYLE = {
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib; in a page CSS overrules it
    "font.size": 11, "legend.fontsize": 10.5, "axes.labelsize": 11,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": LIGHT["edge"], "axes.labelcolor": LIGHT["quiet"],
    "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "text.color": LIGHT["ink"], "xtick.color": LIGHT["edge"], "ytick.color": LIGHT["edge"],
    "xtick.labelcolor": LIGHT["quiet"], "ytick.labelcolor": LIGHT["quiet"],
    "axes.facecolor": "none", "legend.frameon": False, "legend.handlelength": 1.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "iimm",  # the same run gives the same page
    "text.parse_math": False,  # a "$" in a name is no formula
}  # fmt: skip
_NAMES = {colour: name for name, colour in LIGHT.items()}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_SIGNS = {"continue": "●", "warn": "▲", "stop": "■"}
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Attributes:
        name: Of its file, without the suffix; of letters, digits and ``_``.
        title: One line.
        alt: What is to be seen, with the numbers, for those who do not see it.
        caption: How to read it.
        figure: Of matplotlib.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Any


def require_matplotlib() -> None:
    """Raise an `ImportError` that says what to install, where matplotlib is not there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("the pictures need matplotlib: pip install matplotlib") from error


@contextmanager
def drawing() -> Iterator[None]:
    """Our style, and no warning of glyphs that a PNG shows as a box: the tables have the names.

    Raises:
        ImportError: As `require_matplotlib`.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure `WIDTH` wide, `height` inches high, and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def in_points(fractions: ArrayLike) -> NDArray[Any]:
    """Fractions as points to draw; those beyond ±10 at ±10, as no axis holds 1e308."""
    clipped: NDArray[Any] = np.clip(np.asarray(fractions, dtype=float), -_LARGEST, _LARGEST)
    return 100 * clipped


def legend_above(axis: Any, columns: int = 2) -> None:
    """The legend, where it hides no data."""
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
        columnspacing=1.2,
    )  # fmt: skip


def label(text: str, longest: int = 30) -> str:
    """A name as a picture shows it: no control codes, and cut where it is long."""
    text = re.sub("[\ufffe\uffff]", "?", printable(text))  # which no XML can hold
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def save_picture(picture: Picture, path: Path) -> None:
    """Write it with its title, on white, in whatever format the suffix names.

    Raises:
        OSError: The file cannot be written.
        ValueError: There is no such format.
    """
    with drawing():
        shown = picture.figure.suptitle(
            picture.title, fontsize=11, x=0.01, ha="left", color=LIGHT["ink"]
        )
        try:
            picture.figure.savefig(path, dpi=130, facecolor=LIGHT["paper"])
        finally:
            shown.remove()
            picture.figure._suptitle = None  # else there would be room for it in the next


def as_svg(picture: Picture) -> str:
    """The figure as an ``<svg>`` element to stand in HTML: no ids or styles of others are touched.

    Colours are the page's CSS variables, so it is light, dark or printed as the page is.
    """
    file = io.StringIO()
    with drawing():
        picture.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.tag.endswith("}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _make_own(element, picture.name)
    for size in ("width", "height"):
        root.attrib.pop(size, None)  # the view box keeps the shape, CSS gives the width
    root.attrib |= {"role": "img", "aria-label": printable(picture.alt)}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _make_own(element: ElementTree.Element, name: str) -> None:
    found = element.attrib
    if "id" in found:
        found["id"] = f"{name}-{found['id']}"
    if _HREF in found:
        found["href"] = f"#{name}-{found.pop(_HREF).removeprefix('#')}"
    for key, value in found.items():
        value = re.sub(r"url\(#", f"url(#{name}-", value)
        if key in ("style", "fill", "stroke"):
            value = re.sub(r"#[0-9a-f]{6}", _variable, value)
        found[key] = value


def _variable(found: re.Match[str]) -> str:
    named = _NAMES.get(found[0])
    return f"var(--{named})" if named else found[0]


# Text needs a contrast of 4.5 to what is behind it, lines and marks one of 3 (WCAG 2.2, 1.4.3 and
# 1.4.11); test_pages.py computes them. The light ones are also those of the PNG files.


def variables(colours: dict[str, str]) -> str:
    """CSS declarations: each colour under its name."""
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


def render(template: str, context: dict[str, Any]) -> str:
    """A page from one of our templates: whatever `context` holds is shown as text.

    Args:
        template: Name of its file.
        context: Its variables; only `shown` pictures are markup.
    """
    colours = {"light": Markup(variables(LIGHT)), "dark": Markup(variables(DARK))}
    style = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    page = _environment().get_template(template)
    return page.render(
        context, colours=colours, style=style, signs=_SIGNS, level_colours=LEVEL,
        level_words=level_words, version=__version__,
    )  # fmt: skip


def shown(picture: Picture) -> dict[str, Any]:
    """A picture as the templates take it."""
    # ElementTree wrote it: text and attributes are escaped.
    svg = Markup(as_svg(picture))
    return {"name": picture.name, "title": picture.title, "caption": picture.caption, "svg": svg}


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_as_text,
    )
    found.filters |= {"percent": percent, "or_nothing": or_nothing}
    return found


def _as_text(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
