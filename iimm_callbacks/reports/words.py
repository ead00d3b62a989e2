"""Numbers and names in words, as all reports have them. People get points, the rest fractions.

Names and reasons may come from anyone's data: `page` is the one place that turns them into what a
terminal is shown.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..records import keys

WIDTH = 96
_LEFT = {  # columns of words
    "", "ended", "forecast of", "in points", "meaning", "measured", "method", "model", "needed for",
    "of", "package", "policy", "recipe", "run", "state", "task", "verdict", "version", "why",
    "worst task",
}  # fmt: skip
_LEVELS = {"continue": "ok", "warn": "warn", "stop": "over the limit"}
# What moves the cursor, ends a line, turns the writing direction or is half a character.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def level_words(level: str) -> str:
    """A verdict's level in words: a run that only warns, or has finished, does not "stop"."""
    return _LEVELS.get(level, level)


def page(*parts: Table | str) -> str:
    """Tables and lines as plain text of 96 columns, one below the other, without a control code.

    Args:
        parts: Whatever a part holds is shown as it is written, and a `str` stays one line.
    """
    console = _Console(
        width=WIDTH, file=io.StringIO(), color_system=None, markup=False, emoji=False
    )
    shown = []
    for part in parts:
        if isinstance(part, str):
            shown.append(printable(part))
            continue
        with console.capture() as capture:
            console.print(part)
        shown.append("\n".join(line.rstrip() for line in capture.get().splitlines()))
    return "\n".join(shown)


def new_table(
    title: str,
    *columns: str,
    unbroken: Collection[str] | None = None,
    overflow: Literal["fold", "ellipsis"] = "ellipsis",
) -> Table:
    """A table with words left and numbers right.

    Args:
        title: Of the table.
        columns: Their heads.
        unbroken: Those whose cells stay on one line; ``None``: numbers.
        overflow: What is done with a word that is longer than its column.
    """
    table = Table(title=title, width=WIDTH)
    for column in columns:
        words = column in _LEFT
        whole = not words if unbroken is None else column in unbroken
        side: Literal["left", "right"] = "left" if words else "right"
        table.add_column(column, justify=side, no_wrap=whole, overflow=overflow)
    return table


def printable(text: str) -> str:
    r"""`text` with its control codes, line breaks and turns of direction written out.

    Example:
        >>> print(printable("digits\x1b[2J\n[red]größe"))
        digits\x1b[2J\n[red]größe
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Console(Console):
    def render_str(self, text: str, **settings: Any) -> Text:  # of each cell and title
        return super().render_str(printable(text), **settings)


def score_name(metrics: Mapping[str, str], *tasks: str) -> str:
    """Name of the score of these tasks: "zero-shot accuracy", or their own metrics.

    Args:
        metrics: Task name -> what stands in for accuracy there, as a record's ``metrics``.
        tasks: Their names.

    Example:
        >>> score_name({"captions": "recall@5"}, "digits", "captions")
        'zero-shot accuracy or recall@5'
    """
    own = dict.fromkeys(metrics.get(task, "accuracy") for task in tasks)
    return " or ".join("zero-shot accuracy" if m == "accuracy" else printable(m) for m in own)


def own_metric(metrics: Mapping[str, str], task: str) -> str:
    """Suffix of a task's name: its metric in brackets; empty for accuracy."""
    metric = metrics.get(task, "accuracy")
    return "" if metric == "accuracy" else f" ({printable(metric)})"


def standard_error(row: dict[str, Any], name: str) -> float | None:
    """Of what a look observed, a fraction; None where it is not saved."""
    errors = row.get("standard_errors")
    found = errors.get(name) if isinstance(errors, dict) else None
    real = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < math.inf
    return float(found) if real else None  # type: ignore[arg-type]


def observed(row: dict[str, Any], name: str) -> float | None:
    """What a look observed of "gain", "forgetting" or "worst"; None without off-target tasks."""
    value: float | None = row.get(keys.WORST if name == "worst" else keys.observed_key(name))
    return value


def with_error(row: dict[str, Any], name: str) -> str:
    """What a look observed, in points, with its standard error where that is known."""
    value, error = observed(row, name), standard_error(row, name)
    if value is None:
        return "none"
    return points(value) if error is None else f"{points(value)} ± {size(error)}"


def forecast_in(row: dict[str, Any], name: str) -> dict[str, float] | None:
    """The forecast of "gain" or "forgetting" at a look, as `interval` takes it; None without."""
    key = keys.forecast_key(name)
    if key not in row:
        return None
    return {"point": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]}


def interval(prediction: dict[str, float] | None) -> str:
    """A prediction of `Forecast.to_json` in points, with its 90 % interval."""
    if prediction is None:
        return "none"
    point, low, high = (points(prediction[k]) for k in ("point", "low", "high"))
    return f"{point} [{low}, {high}]"


def points(fraction: float) -> str:
    """A fraction in points, with its sign."""
    return f"{100 * fraction:+.1f}"


def or_nothing(fraction: float | None) -> str:
    """Points with their sign; empty where there is no number."""
    return "" if fraction is None else points(fraction)


def gained(gain: float, forgetting: float | None) -> str:
    """What a run came to, in points."""
    drop = "" if forgetting is None else f", forgetting {points(forgetting)}"
    return f"gain {points(gain)}{drop} points"


def size(fraction: float | None) -> str:
    """Points without a plus; empty where there is no number."""
    return "" if fraction is None else points(fraction).removeprefix("+")


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(42.2), duration(150), duration(5400)
        ('42 s', '2 min 30 s', '1 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(fraction: float) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.1f} %"
