"""A run's record -> table, line, plot. People get points, everything else fractions.

Names and reasons may come from anyone's data: `page` is the one place that turns them into what a
terminal is shown.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..records import keys

WIDTH = 96
FEW = 4  # off-target tasks that are named
_LEVELS = {"continue": "ok", "warn": "warn", "stop": "over the limit"}
# What moves the cursor, ends a line, turns the writing direction or is half a character.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def preflight_table(record: dict[str, Any]) -> str:
    """Before training: the measure, the forecast, the limit and the verdict.

    Args:
        record: `IIMMMonitor.record`.

    Returns:
        Plain text, at most 96 columns.
    """
    row = record["looks"][0]
    table = Table(title=f"IIMM before training: {record['task']} ({record['method']})", width=WIDTH)
    table.add_column("measured", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("meaning")
    se = f" ± {row[keys.STANDARD_ERROR]:.3f}" if keys.STANDARD_ERROR in row else ""
    n, c = record["n_images"], record["n_classes"]
    table.add_row("IIMM", f"{row[keys.PREFIX]:.3f}{se}", f"{n} images, {c} class prompts")
    table.add_row("  inter-modal", f"{row[keys.INTER]:.3f}", "image to wrong-class text")
    table.add_row("  intra-modal", f"{row[keys.INTRA]:.3f}", "image to image")
    metrics = record.get("metrics", {})
    above = score_name(metrics, record["task"])
    table.add_row(above, percent(row[keys.ACCURACY]), record["task"])
    risks = record["forecast"].get("off_target", {})
    for name in record["off_target"]:
        score = score_name(metrics, name)
        value = percent(row[keys.accuracy_key(name)])
        risk = f", forecast drop {interval(risks[name])}" if name in risks else ""
        table.add_row("" if score == above else score, value, f"{name} (off-target){risk}")
        above = score
    if (probe := record.get("linear_probe")) is not None and probe["accuracy"] is not None:
        spread = f" ± {100 * probe['standard_error']:.1f}"
        table.add_row("linear probe", f"{percent(probe['accuracy'])}{spread}", probe["note"])
    trainable = f"{100 * record['recipe']['trainable_share']:.3g} %"
    table.add_row("trainable", trainable, f"of the parameters, method {record['method']!r}")
    forecast = record["forecast"]
    label = "borrowed forecast" if forecast["base_rate"] else "forecast"
    for name in ("gain", "forgetting"):
        meaning = "points at the end, 90 % interval" if name in forecast else ""
        table.add_row(f"{name} {label}", interval(forecast.get(name)), meaning)
    table.add_row("limit", *_limit(record))
    table.add_row("verdict", row["level"], row["reason"])
    return page(table, *forecast_lines(forecast))


def forecast_lines(forecast: dict[str, Any]) -> list[str]:
    """What a forecast rests on and how good it was, in words.

    Args:
        forecast: `Forecast.to_json`.

    Returns:
        Lines of at most 96 columns: the basis, then each quantity.
    """
    notes = [note for note in forecast["notes"] if note not in forecast["basis"]]
    sentences = [words[:1].upper() + words[1:] for words in (forecast["basis"], *notes)]
    lines = wrap(printable(". ".join(sentences)) + ".", WIDTH)
    for name, found in forecast["evidence"].items():
        predictors = [f"{k} {v:.0%}" for k, v in found["predictors"].items() if v >= 0.1]
        simpler = (("error_of_mean", "predicting the mean"),
                   ("error_of_zero_shot", "zero-shot error"))  # fmt: skip
        beside = [
            f"{words}: {_size(found[key])}" for key, words in simpler if found[key] is not None
        ]
        also = f" ({', '.join(beside)})" if beside else ""
        unit = "model" if found.get("left_out") == "model" else "task"
        same = any(k.startswith("other runs of the same task") for k in found["predictors"])
        seen = ", with other runs of that task known" if same else ""
        text = (
            f"{name}: from {', '.join(predictors) or 'many predictors'}; leave-one-{unit}-out "
            f"error {_size(found['error'])} points over {found['n_tasks']} tasks{also}{seen}; "
            f"90 % intervals covered {found['coverage']:.0%}"
        )
        lines += wrap(printable(text), WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def summary_table(record: dict[str, Any]) -> str:
    """After training: predicted against observed, and every off-target task.

    Args:
        record: `IIMMCallback.record`.

    Returns:
        Plain text, at most 96 columns.
    """
    first, last = record["looks"][0], record["looks"][-1]
    table = Table(
        title=f"Predicted and observed: {record['task']} ({record['method']})", width=WIDTH
    )
    forecast = record["forecast"]
    predicted = "predicted, borrowed" if forecast["base_rate"] else "predicted before training"
    for column in ("in points", predicted, "observed"):
        table.add_column(column, justify="left" if column == "in points" else "right")
    metrics = record.get("metrics", {})
    gain, own = points(last[keys.observed_key("gain")]), own_metric(metrics, record["task"])
    table.add_row(f"gain{own}", interval(forecast.get("gain")), gain)
    if record["off_target"]:
        mean = points(last[keys.observed_key("forgetting")])
        worst = points(last[keys.WORST])
        table.add_row("forgetting, mean", interval(forecast.get("forgetting")), mean)
        table.add_row("forgetting, worst", interval(forecast.get("worst")), worst)
    shown, n_more = most_forgotten(record)
    for name in shown:
        key = keys.accuracy_key(name)
        change = f"{percent(first[key])} -> {percent(last[key])}"
        table.add_row(f"  {name}{own_metric(metrics, name)}", "", change)
    if n_more:
        table.add_row(f"  {n_more} tasks that lost less", "", "")
    notes = [f"Run: {record['ended']}."]
    if last["reason"] not in record["ended"]:
        notes = [f"{notes[0]} Last verdict: {level_words(last['level'])} ({last['reason']})."]
    if record["looks_dropped"]:
        notes.append(f"{record['looks_dropped']} looks were dropped to keep to `max_overhead`.")
    if record["failures"]:
        notes.append(f"{record['failures']} looks failed; see the warning above.")
    return page(table, *notes)


def most_forgotten(record: dict[str, Any]) -> tuple[list[str], int]:
    """Off-target tasks to name, those with the largest drop where they are many; and how many not.

    Args:
        record: `IIMMCallback.record`.
    """
    names = list(record["off_target"])
    if len(names) <= FEW:
        return names, 0
    first, last = (
        {name: row[keys.accuracy_key(name)] for name in names}
        for row in (record["looks"][0], record["looks"][-1])
    )
    worst = sorted(names, key=lambda name: last[name] - first[name])[:FEW]
    return worst, len(names) - FEW


def level_words(level: str) -> str:
    """A verdict's level in words: a run that only warns, or has finished, does not "stop"."""
    return _LEVELS.get(level, level)


def plot_run(record: dict[str, Any], path: str | Path) -> None:
    """Write a picture of predicted versus observed gain and forgetting over the run.

    Args:
        record: `IIMMCallback.record`.
        path: Of the PNG, SVG or PDF.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plot_run` needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, squeeze=True)
    for axis, name in zip(axes, ("gain", "forgetting"), strict=True):
        _plot_outcome(axis, record, name)
    limit = record["limits"]["max_forgetting"]
    if limit is not None:
        axes[1].axhline(
            100 * limit,
            color="firebrick",
            ls=":",
            label=f"limit on the {record['limits']['limit_on']}",
        )
    for axis in axes:
        axis.legend(fontsize=8)
    ended = record["ended"].split(":")[0]
    title = printable(f"{record['task']}, {record['method']}: {ended}")
    figure.suptitle(title, parse_math=False)  # a "$" in a task's name is no formula
    figure.savefig(path, dpi=150)


def _plot_outcome(axis: Any, record: dict[str, Any], name: str) -> None:
    looks = [row for row in record["looks"] if keys.observed_key(name) in row]
    steps = [row["step"] for row in looks]
    observed = [100 * row[keys.observed_key(name)] for row in looks]
    axis.plot(steps, observed, "o-", color="black", label=f"observed {name}")
    if name == "forgetting" and looks:
        worst = [100 * row[keys.WORST] for row in looks]
        axis.plot(steps, worst, "--", color="grey", label="worst off-target task")
    forecast = [row for row in looks if keys.forecast_key(name) in row]
    if forecast:
        key = keys.forecast_key(name)
        at = [row["step"] for row in forecast]
        axis.plot(
            at, [100 * row[key] for row in forecast], color="tab:blue", label="forecast of the end"
        )
        axis.fill_between(
            at,
            [100 * row[f"{key}_low"] for row in forecast],
            [100 * row[f"{key}_high"] for row in forecast],
            color="tab:blue",
            alpha=0.2,
            label="90 % interval",
        )
    else:
        axis.text(0.5, 0.95, "no forecast", transform=axis.transAxes, ha="center", va="top")
    axis.axhline(0, color="lightgrey", lw=0.8, zorder=0)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(f"{name} (points)")


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


def _limit(record: dict[str, Any]) -> tuple[str, str]:
    limits = record["limits"]
    if limits["max_forgetting"] is None:
        return "none", "only measuring"
    return (
        points(limits["max_forgetting"]).removeprefix("+"),
        f"points of {limits['limit_on']} forgetting; stop from {limits['confidence']:.0%} sure",
    )


def points(fraction: float) -> str:
    """A fraction in points, with its sign."""
    return f"{100 * fraction:+.1f}"


def _size(fraction: float) -> str:
    return points(fraction).removeprefix("+")


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
