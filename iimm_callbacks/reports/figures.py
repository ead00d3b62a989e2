"""The pictures of one run: what was forecast and observed, the measure, the verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..records import keys
from .drawing import LIGHT, WIDTH, Picture, drawing, in_points, label, legend_above, new_figure
from .words import (
    forecast_in,
    interval,
    level_words,
    own_metric,
    percent,
    points,
    printable,
    score_name,
    standard_error,
)

_MANY = 10  # looks that an alternative text names
_MOST_TASKS = 12  # that are drawn, the worst; the table has them all


def run_pictures(record: dict[str, Any]) -> list[Picture]:
    """The pictures for which this run has data; call it inside `drawing`.

    Args:
        record: What `check_run` returns.

    Returns:
        By name: ``gain``; with off-target tasks ``forgetting``; with something to judge by
        ``probability``; with more than one look ``measure`` and, of off-target tasks,
        ``off_target``.
    """
    found = [_outcome(record, "gain")]
    moves = len(record["looks"]) > 1  # else the tables say it all
    if record["off_target"]:
        found += [_outcome(record, "forgetting"), *([_off_target(record)] if moves else [])]
    found += [_measure(record)] if moves else []
    if any(keys.EXCEED in row for row in record["looks"]):
        found.append(_probability(record))
    return found


def total_steps(record: dict[str, Any]) -> int | None:
    """Steps that were planned, where the recipe says."""
    steps = record["recipe"].get("steps")
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    return steps if whole and 0 < steps < 2**63 else None


def told(rows: Sequence[dict[str, Any]], words: Callable[[dict[str, Any]], str]) -> str:
    """Looks in words, evenly chosen where there are many, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, _MANY).round().astype(int))
    said = "; ".join(f"step {rows[i]['step']}: {words(rows[i])}" for i in places)
    left_out = len(rows) - len(places)
    return f"{said} ({left_out} looks between these are in the table)" if left_out else said


def plot_run(record: dict[str, Any], path: str | Path) -> None:
    """Write one picture of predicted and observed gain and forgetting over the run.

    Args:
        record: `IIMMCallback.record`.
        path: Of the PNG, SVG or PDF.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
        ValueError: There is no such format.
    """
    names = ["gain", *(["forgetting"] if record["off_target"] else [])]
    with drawing():
        figure, axes = new_figure(4.0, columns=len(names))
        figure.set_figwidth(WIDTH * len(names))
        for axis, name in zip(axes, names, strict=True):
            _draw_outcome(axis, record, name)
        ended = label(record["ended"].split(":")[0], 60)
        figure.suptitle(f"{label(record['task'])}, {label(record['method'])}: {ended}", fontsize=11)
        figure.savefig(path, dpi=150, facecolor=LIGHT["paper"])


def _draw_outcome(axis: Any, record: dict[str, Any], name: str) -> None:
    """Observed gain or forgetting over the run, and at each look the forecast of the end."""
    rows, key = record["looks"], keys.forecast_key(name)
    steps = [row["step"] for row in rows]
    forecast = [row for row in rows if key in row]
    if forecast:
        _band(axis, forecast, key)
    observed = in_points([row[keys.observed_key(name)] for row in rows])
    errors = in_points([standard_error(row, name) or 0.0 for row in rows])
    axis.errorbar(
        steps, observed, errors, fmt=_points_or("o-", steps), color=LIGHT["ink"], ms=4.5, lw=1.4,
        elinewidth=1, label="observed, mean ± SE" if name == "forgetting" else "observed ± SE",
    )  # fmt: skip
    if name == "forgetting" and len(record["off_target"]) > 1:
        worst = in_points([row[keys.WORST] for row in rows])
        style = {"color": LIGHT["quiet"], "lw": 1.8, "label": "observed, worst task"}
        axis.plot(steps, worst, _points_or(":", steps, "v"), **style)
    if name == "forgetting":
        _limit(axis, record)
    _over_steps(axis, record, f"{name} (points)")
    legend_above(axis)


def _outcome(record: dict[str, Any], name: str) -> Picture:
    figure, (axis,) = new_figure(3.6)
    _draw_outcome(axis, record, name)
    rows = record["looks"]
    forecast = [row for row in rows if keys.forecast_key(name) in row]
    seen = told(rows, lambda row: points(row[keys.observed_key(name)]))
    alt = f"Line chart of {name} in points over the steps. Observed at {seen}."
    if forecast:
        ahead = told(forecast, lambda row: interval(forecast_in(row, name)))
        alt += f" Forecast of the end, with its 90 % interval, made at {ahead}."
    return Picture(
        name, f"{name.capitalize()}: forecast and observed", alt,
        _outcome_caption(record, name, bool(forecast)), figure,
    )  # fmt: skip


def _points_or(line: str, steps: Sequence[float], marker: str = "o") -> str:
    """The style of a line; of one or two looks their points, which are no curve."""
    return line if len(steps) > 2 else marker


def _band(axis: Any, forecast: list[dict[str, Any]], key: str) -> None:
    """The forecast of the end at each look, with its interval."""
    at, blue = [row["step"] for row in forecast], LIGHT["blue"]
    middle, low, high = (in_points([r[key + e] for r in forecast]) for e in ("", "_low", "_high"))
    if len(at) > 2:
        axis.fill_between(at, low, high, color=blue, alpha=0.22, lw=0, label="its 90 % interval")
        axis.plot(at, middle, "--", color=blue, lw=1.6, label="forecast of the end")
        return
    down, up = np.maximum(middle - low, 0), np.maximum(high - middle, 0)
    axis.errorbar(
        at, middle, [down, up], fmt="o", color=blue, mfc=LIGHT["paper"],
        label="forecast of the end, 90 % interval",
    )  # fmt: skip


def _outcome_caption(record: dict[str, Any], name: str, forecast: bool) -> str:
    metrics = record.get("metrics", {})
    learnt, others = score_name(metrics, record["task"]), score_name(metrics, *record["off_target"])
    what = {
        "gain": f"Rise of {learnt} on the task since before training.",
        "forgetting": f"Mean drop of {others} over the off-target tasks; above 0 is loss.",
    }[name] + " SE: standard error."
    if not forecast:
        return f"{what} There is no forecast of it."
    return (
        f"{what} The dashed line is the forecast of the last planned step, made at each look; 9 of "
        "10 runs should end inside the band."
    )


def _off_target(record: dict[str, Any]) -> Picture:
    """Each off-target task's drop over the run, the worst first."""
    rows, metrics = record["looks"], record.get("metrics", {})
    first, last = rows[0], rows[-1]
    drops = {
        n: [first[keys.accuracy_key(n)] - row[keys.accuracy_key(n)] for row in rows]
        for n in record["off_target"]
    }
    order = sorted(drops, key=lambda n: -drops[n][-1])
    shown = order[:_MOST_TASKS]
    said = "; ".join(
        f"{printable(n)}{own_metric(metrics, n)} {points(drops[n][-1])} "
        f"({percent(first[keys.accuracy_key(n)])} to {percent(last[keys.accuracy_key(n)])})"
        for n in shown
    )
    more = ""
    if len(order) > len(shown):
        more = f" The {len(shown)} with the largest drop of {len(order)}."
    ahead = "There is no forecast for single tasks."
    if record["forecast"].get("off_target"):
        ahead = "The table has the forecast of each."
    return Picture(
        "off_target", "Each off-target task",
        "Small line charts, one per off-target task, of its drop in points over the steps, at the "
        f"last look: {said}.{more}",
        f"Drop of {score_name(metrics, *order)} since before training, the worst first, one scale "
        f"for all; the number is that of the last look. {ahead}{more}",
        _small_charts({n: drops[n] for n in shown}, record),
    )  # fmt: skip


def _small_charts(drops: dict[str, list[float]], record: dict[str, Any]) -> Any:
    """One small chart per task, two in a row, one scale for all."""
    n_rows = -(-len(drops) // 2)
    figure, axes = new_figure(0.5 + 1.45 * n_rows, n_rows, 2)
    steps = [row["step"] for row in record["looks"]]
    everything = in_points([*itertools.chain.from_iterable(drops.values()), 0.0])
    margin = 0.08 * max(float(np.ptp(everything)), 1.0)
    for position, (axis, (name, drop)) in enumerate(zip(axes, drops.items(), strict=False)):
        colour = LIGHT["red" if drop[-1] > 0 else "green"]
        axis.plot(steps, in_points(drop), _points_or("o-", steps), color=colour, ms=3)
        axis.set_ylim(everything.min() - margin, everything.max() + margin)
        axis.set_title(f"{label(name, 22)}  {points(drop[-1])}")
        if record["limits"]["limit_on"] == "worst":
            _limit(axis, record)
        _over_steps(axis, record, "")
        axis.locator_params(nbins=4)
        axis.tick_params(labelbottom=position // 2 == n_rows - 1, labelleft=position % 2 == 0)
    for axis in axes[len(drops) :]:
        axis.set_axis_off()
    figure.supylabel("drop (points)", fontsize=11, color=LIGHT["quiet"])
    figure.supxlabel("step", fontsize=11, color=LIGHT["quiet"])
    return figure


def _measure(record: dict[str, Any]) -> Picture:
    """IIMM and its two terms over the run."""
    figure, (axis,) = new_figure(3.6)
    rows = record["looks"]
    steps = [row["step"] for row in rows]
    lines = ((keys.INTRA, "intra-modal", "teal", "^--"), (keys.PREFIX, "IIMM ± SE", "ink", "o-"),
             (keys.INTER, "inter-modal", "violet", "v--"))  # fmt: skip
    for key, words, colour, style in lines:
        errors = [
            min(r.get(keys.STANDARD_ERROR, 0.0), 2.0) if key == keys.PREFIX else 0.0 for r in rows
        ]
        axis.errorbar(
            steps, [r[key] for r in rows], errors, fmt=_points_or(style, steps, style[0]),
            color=LIGHT[colour], ms=5, lw=1.5, label=words,
        )  # fmt: skip
    _over_steps(axis, record, "cosine similarity", zero=False)
    legend_above(axis, 3)
    fewer = len({row.get("n_images") for row in rows}) > 1
    seen = told(
        rows, lambda r: f"{r[keys.PREFIX]:.3f}, {r[keys.INTER]:.3f} and {r[keys.INTRA]:.3f}"
    )
    return Picture(
        "measure", "IIMM and its two terms",
        f"Line chart over the steps of IIMM, its inter-modal and its intra-modal term, at {seen}.",
        "IIMM is the mean of the two terms. The forecast before training uses the value at step 0 "
        "only: that IIMM moves during training is no sign of forgetting by itself."
        + (" Of fewer images: the first look's, plus what changed on these." if fewer else ""),
        figure,
    )  # fmt: skip


def _probability(record: dict[str, Any]) -> Picture:
    """Probability of exceeding the limit over the run, and from where it warns and may stop."""
    figure, (axis,) = new_figure(3.2)
    rows = [row for row in record["looks"] if keys.EXCEED in row]
    steps = [row["step"] for row in rows]
    values = [row[keys.EXCEED] for row in rows]
    axis.plot(steps, values, _points_or("o-", steps), color=LIGHT["ink"], ms=4.5)
    confidence = record["limits"]["confidence"]
    for at, words, colour in ((0.5, "warns", "amber"), (confidence, "may stop", "red")):
        axis.axhline(at, color=LIGHT[colour], ls=":", lw=1.6, label=f"{words} from {at:.2g}")
    axis.set_ylim(-0.03, 1.03)
    _over_steps(axis, record, "probability of exceeding", zero=False)
    legend_above(axis)
    seen = told(rows, lambda row: f"{row[keys.EXCEED]:.2f}, {level_words(row['level'])}")
    return Picture(
        "probability", "Probability that the limit is exceeded",
        f"Line chart over the steps of the probability of exceeding the limit, at {seen}.",
        "The larger of two: that the end will be over the limit, by the forecast, and that the run "
        "is over it already, by what is observed. Where both are above 0.5 they add up: "
        "1 - (1 - p)(1 - q).",
        figure,
    )  # fmt: skip


def _limit(axis: Any, record: dict[str, Any]) -> None:
    limits = record["limits"]
    if limits["max_forgetting"] is not None:
        axis.axhline(
            100 * limits["max_forgetting"], color=LIGHT["red"], ls="-.", lw=1.3,
            label=f"limit on the {limits['limit_on']}",
        )  # fmt: skip


def _over_steps(axis: Any, record: dict[str, Any], words: str, zero: bool = True) -> None:
    last = max(row["step"] for row in record["looks"])
    end = float(max(last, total_steps(record) or 1))
    axis.set_xlim(-0.03 * end, 1.03 * end)
    if zero:
        axis.axhline(0, color=LIGHT["rule"], lw=1, zorder=0)
    if words:
        axis.set_ylabel(words)
        axis.set_xlabel("step")
