"""`write_report`: one self-contained HTML page of a run, and its pictures as PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..forecasting.runs import MIN_TASKS
from ..measures.results import NEAR_CEILING
from ..records import keys
from ..records.forecast import COVERAGE
from ..records.outcomes import Outcome, one_of_each_run
from ..records.run_file import check_run
from . import facts
from .drawing import (
    LIGHT,
    Picture,
    drawing,
    in_points,
    legend_above,
    new_figure,
    render,
    save_picture,
    shown,
)
from .figures import run_pictures
from .tables import WORDS, mixed
from .terminal import INCOMPLETE, is_complete
from .words import interval, percent, points, score_name

PAGE = "report.html"
PICTURES = (
    "gain", "forgetting", "off_target", "measure", "past_gain", "past_forgetting", "probability",
)  # fmt: skip


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
            `past_runs`. The forecast is not made again from them.

    Returns:
        Path of the page.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: A file cannot be written.
        ValueError: It is no record of a run; the message names the field.
    """
    record = check_run(record)
    past, folder = past_runs(record, outcomes), Path(folder)
    kinds = ("gain", "forgetting") if record["off_target"] else ("gain",)
    with drawing():
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [*run_pictures(record), *(_scatter(record, past, kind) for kind in kinds)]
    pictures = {picture.name: picture for picture in drawn if picture is not None}
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


def _context(record: dict[str, Any], pictures: dict[str, Picture], n_past: int) -> dict[str, Any]:
    last, forecast = record["looks"][-1], record["forecast"]
    notes = [note for note in forecast["notes"] if note not in forecast["basis"]]
    metrics = record.get("metrics", {})
    told = (
        facts.title, facts.state, facts.headline, facts.off_target, facts.tasks_over, facts.measure,
        facts.grade, facts.left_out, facts.turns, facts.history, facts.rescue, facts.recipe,
    )  # fmt: skip
    return {fact.__name__: fact(record) for fact in told} | {
        "task": record["task"],
        "method": record["method"],
        "mixed": mixed(record) is not None,
        "score": score_name(metrics, record["task"]),
        "off_target_score": score_name(metrics, *record["off_target"]),
        "last": last,
        "incomplete": "" if is_complete(record) else INCOMPLETE,
        "base_rate": forecast["base_rate"],
        "predicted": facts.predicted_and_observed(record),
        "n_images": record["n_images"],
        "n_classes": record["n_classes"],
        "ceiling": ceiling_note(record),
        "n_past": n_past,
        "n_outcomes": forecast.get("n_outcomes", "an unknown number of"),
        "basis": [forecast["basis"], *notes],
        "pictures": {name: shown(picture) for name, picture in pictures.items()},
    }


def past_runs(record: dict[str, Any], outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes to compare this run with, by the rules of the forecaster.

    Complete runs of the same weights, each once, with a measure; not the run itself. IIMM does
    not compare across models, so runs of others, from which a forecast may have to be made, are not
    among them.

    Args:
        record: What `check_run` returns.
        outcomes: Of any models and methods.
    """
    return [
        o
        for o in one_of_each_run(outcomes)
        if o.complete
        and o.iimm is not None
        and o.model_fingerprint == record.get("model_fingerprint")
        and (not o.run or o.run != record.get("run"))
    ]


@dataclass(frozen=True)
class Line:
    """A least-squares line through past runs, for the eye: no forecast is read from it.

    Attributes:
        intercept, slope: Of the line, fractions.
        r2: Share of the variance it explains, in [0, 1].
        p_value: That a slope as steep comes about by chance; the runs of one task count as
            independent, which they are not, so it is too small.
    """

    intercept: float
    slope: float
    r2: float
    p_value: float
    _x: NDArray[np.float64]
    _spread: float

    def at(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        r"""Line and half the width of its 90 % prediction band.

        ``t · s · √(1 + 1/n + (x - x̄)² / Σ (x_i - x̄)²)`` with ``n - 2`` degrees of freedom.

        Args:
            x: [M] IIMM.

        Returns:
            Two arrays [M], fractions.
        """
        n, mean = len(self._x), self._x.mean()
        far = (x - mean) ** 2 / ((self._x - mean) ** 2).sum()
        t = stats.t.ppf((1 + COVERAGE) / 2, n - 2)
        return self.intercept + self.slope * x, t * self._spread * np.sqrt(1 + 1 / n + far)


def fit_line(runs: Sequence[Outcome], values: Sequence[float]) -> Line | None:
    """The line of `values` on IIMM; None with fewer than three tasks, or all of one IIMM.

    Args:
        runs: Past runs with a measure.
        values: One fraction for each.
    """
    x, y = np.array([o.iimm for o in runs], dtype=float), np.array(values, dtype=float)
    if len({o.task for o in runs}) < MIN_TASKS or np.ptp(x) < 1e-6:
        return None
    if np.ptp(y) == 0:  # nothing to explain
        return Line(float(y[0]), 0.0, 0.0, 1.0, x, 0.0)
    fit = stats.linregress(x, y)
    left = y - fit.intercept - fit.slope * x
    spread = float(np.sqrt((left**2).sum() / (len(x) - 2)))
    return Line(fit.intercept, fit.slope, fit.rvalue**2, fit.pvalue, x, spread)


def _scatter(record: dict[str, Any], past: Sequence[Outcome], name: str) -> Picture | None:
    """Gain or forgetting of past runs against IIMM, this run marked; None without such runs."""
    runs = [o for o in past if getattr(o, name) is not None]
    if not runs:
        return None
    same = [o for o in runs if o.method == record["method"]]
    figure, (axis,) = new_figure(4.2)
    for some, colour, mark, size, words in (
        ([o for o in runs if o not in same], "quiet", "x", 18, "other methods"),
        (same, "blue", "o", 24, "this method"),
    ):
        if some:
            y = in_points([getattr(o, name) for o in some])
            axis.scatter(
                [o.iimm for o in some], y, s=size, marker=mark, alpha=0.55 if mark == "x" else 0.75,
                color=LIGHT[colour], linewidths=1 if mark == "x" else 0,
                label=f"{words} ({len(some)})",
            )  # fmt: skip
    line = fit_line(same, [getattr(o, name) for o in same])
    if line is not None:
        measured = np.array([o.iimm for o in runs], dtype=float)
        x = np.linspace(measured.min(), measured.max(), 50)
        y, half = line.at(x)
        axis.plot(x, in_points(y), color=LIGHT["blue"], lw=1.5, label="line through these")
        axis.fill_between(
            x, in_points(y - half), in_points(y + half), color=LIGHT["blue"], alpha=0.13, lw=0,
            label="its 90 % band",
        )  # fmt: skip
    here = _mark(axis, record, name)
    axis.axhline(0, color=LIGHT["rule"], lw=1, zorder=0)
    axis.set_xlabel("IIMM before training")
    axis.set_ylabel(f"{WORDS[name]} (points)")
    legend_above(axis)
    told = _told(name, runs, same, line)
    if n := _of_another_kind(record, runs, name):
        what = "Another metric" if name == "gain" else "Other off-target tasks or metrics"
        told += f" {what} than this run had {n}: these do not compare with it."
    return Picture(
        f"past_{name}", f"{WORDS[name].capitalize()} of past runs against IIMM",
        f"Scatter plot of {WORDS[name]} in points against IIMM before training. {told} {here}",
        told, figure,
    )  # fmt: skip


def _mark(axis: Any, record: dict[str, Any], name: str) -> str:
    """This run: its forecast as a bar, what was observed as a diamond; and that in words."""
    first, last = record["looks"][0], record["looks"][-1]
    x, said = first[keys.PREFIX], [f"This run has IIMM {first[keys.PREFIX]:.3f}"]
    predicted = record["forecast"].get(name)
    if predicted is not None:
        low, middle, high = in_points([predicted[k] for k in ("low", "point", "high")])
        axis.errorbar(
            [x], [middle], [[max(middle - low, 0)], [max(high - middle, 0)]], fmt="s", ms=7,
            color=LIGHT["red"], mfc=LIGHT["paper"], capsize=4, lw=1.8, zorder=4,
            label="this run, forecast",
        )  # fmt: skip
        said.append(f"forecast {interval(predicted)}")
    if last["step"] > first["step"]:
        value = last[keys.observed_key(name)]
        axis.plot(
            [x], in_points([value]), "D", ms=7, color=LIGHT["red"], mec=LIGHT["paper"], zorder=5,
            ls="none", label="this run, observed",
        )  # fmt: skip
        said.append(f"observed {points(value)} at step {last['step']}")
    else:
        axis.axvline(x, color=LIGHT["red"], lw=1, ls=":", zorder=3)
    return ", ".join(said) + "."


def _told(name: str, runs: Sequence[Outcome], same: Sequence[Outcome], line: Line | None) -> str:
    values = [getattr(o, name) for o in runs]
    tasks = len({o.task for o in same})
    said = (
        f"{len(runs)} complete runs of these weights, from {points(min(values))} to "
        f"{points(max(values))}; {len(same)} of them, on {tasks} task{'s' * (tasks != 1)}, under "
        "this method."
    )
    if line is None:
        return f"{said} No line: that takes runs of this method on {MIN_TASKS} tasks."
    verb = "rises" if line.slope > 0 else "falls"
    chance = "not more than chance gives" if line.p_value >= 0.05 else "more than chance gives"
    return (
        f"{said} Their line {verb} by {abs(10 * line.slope):.1f} points per 0.1 of IIMM and "
        f"explains {percent(line.r2)} of the variance, {chance} (p = {line.p_value:.2g}). It is "
        "for the eye: runs of one task are not independent, and the forecast weighs other "
        "predictors too."
    )


def _of_another_kind(record: dict[str, Any], runs: Sequence[Outcome], name: str) -> int:
    """Runs whose gain is by another metric, or forgetting by one or on other off-target tasks.

    A run on one of the off-target tasks is measured on the rest of them.
    """

    def scored(recipe: Mapping[str, Any], tasks: Iterable[str]) -> set[tuple[str, str]]:
        named = recipe.get("metrics")
        found = named if isinstance(named, dict) else {}
        return {(task, str(found.get(task, "accuracy"))) for task in tasks}

    learnt, recipe = record["task"], record["recipe"]
    if name == "gain":
        ((_, own),) = scored(recipe, [learnt])
        return sum(scored(o.recipe, [o.task]) != {(o.task, own)} for o in runs)
    tasks = set(record["off_target"])
    sets = tasks, tasks | {learnt}
    return sum(
        all(scored(o.recipe, o.off_target_before) != scored(recipe, s - {o.task}) for s in sets)
        for o in runs
    )


def ceiling_note(record: dict[str, Any]) -> str:
    """A note if there is almost nothing to gain; empty otherwise."""
    accuracy = record["looks"][0][keys.ACCURACY]
    if accuracy <= NEAR_CEILING:
        return ""
    score = score_name(record.get("metrics", {}), record["task"])
    return (
        f"{score[:1].upper()}{score[1:]} is {percent(accuracy)}: so near the ceiling, gain says "
        "little of how well a model learns."
    )
