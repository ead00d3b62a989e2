"""`write_report`: one self-contained HTML page of a run, and its pictures as PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..records.outcomes import Outcome
from ..records.run_file import check_run
from . import facts
from .drawing import (
    DARK,
    LEVEL,
    LIGHT,
    Picture,
    as_svg,
    drawing,
    require_matplotlib,
    save_picture,
    variables,
)
from .figures import run_pictures
from .past import ceiling_note, past_pictures, past_runs
from .tables import mixed
from .terminal import INCOMPLETE, is_complete
from .words import level_words, printable, score_name

PAGE = "report.html"
PICTURES = (
    "gain", "forgetting", "off_target", "measure", "past_gain", "past_forgetting", "probability",
)  # fmt: skip
_SIGNS = {"continue": "●", "warn": "▲", "stop": "■"}
_HERE = Path(__file__).parent


def write_report(
    record: dict[str, Any], folder: str | Path, outcomes: Iterable[Outcome] = ()
) -> Path:
    """Write a run's page, ``report.html``, and its pictures as PNG files beside it.

    The page has everything inside it: no script, nothing that is fetched, no file beside it is
    needed. A run in any state has one: before its first step, while it runs, stopped, diverged.
    Numbers are in points; what went wrong, and where the forecast was no better than simpler ones,
    is shown like the rest.

    Args:
        record: `IIMMCallback.record`, or what `read_run` returns.
        folder: Where to write; made if it does not exist. Pictures of an earlier report there are
            replaced, or removed where this run has none.
        outcomes: Past runs to set this one beside, of any model: those of its model are shown, see
            `past.past_runs`. The forecast is not made again from them.

    Returns:
        Path of the page.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: A file cannot be written.
        ValueError: It is no record of a run; the message names the field.
    """
    require_matplotlib()
    record = check_run(record)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    past = past_runs(record, outcomes)
    with drawing():
        pictures = {p.name: p for p in (*run_pictures(record), *past_pictures(record, past))}
    for name in PICTURES:
        path = folder / f"{name}.png"
        if name in pictures:
            save_picture(pictures[name], path)
        else:
            path.unlink(missing_ok=True)
    html = render("report.html", _context(record, pictures, len(past)))
    page = folder / PAGE
    page.write_text(html, encoding="utf-8")
    return page


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


def _context(record: dict[str, Any], pictures: dict[str, Picture], n_past: int) -> dict[str, Any]:
    last, forecast = record["looks"][-1], record["forecast"]
    notes = [note for note in forecast["notes"] if note not in forecast["basis"]]
    metrics = record.get("metrics", {})
    return {
        "task": record["task"],
        "method": record["method"],
        "title": facts.title(record),
        "mixed": mixed(record) is not None,
        "rescue": facts.rescue(record),
        "score": score_name(metrics, record["task"]),
        "off_target_score": score_name(metrics, *record["off_target"]),
        "state": facts.state(record),
        "last": last,
        "incomplete": "" if is_complete(record) else INCOMPLETE,
        "base_rate": forecast["base_rate"],
        "headline": facts.headline(record),
        "predicted": facts.predicted_and_observed(record),
        "off_target": facts.off_target(record),
        "tasks_over": facts.tasks_over(record),
        "measure": facts.measure(record),
        "n_images": record["n_images"],
        "n_classes": record["n_classes"],
        "ceiling": ceiling_note(record),
        "n_past": n_past,
        "n_outcomes": forecast.get("n_outcomes", "an unknown number of"),
        "basis": [forecast["basis"], *notes],
        "grade": facts.grade(record),
        "left_out": facts.left_out(record),
        "turns": facts.turns(record),
        "history": facts.history(record),
        "recipe": facts.recipe(record),
        "pictures": {name: shown(picture) for name, picture in pictures.items()},
    }


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_as_text,
    )


def _as_text(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
