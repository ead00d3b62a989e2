"""The outcomes of a calibration -> what they taught: errors of the forecast, and what to expect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ...forecasting.forecaster import Forecaster
from ...forecasting.runs import about, measured
from ...records.outcomes import Outcome

QUANTITIES = ("gain", "forgetting")
_DRAWS = 3  # sets of known tasks of one size, for each task that is forecast


@dataclass(frozen=True)
class Error:
    """Mean absolute error of the forecasts before training, each without its own task. Fractions.

    Attributes:
        quantity: ``"gain"`` or ``"forgetting"`` (mean).
        method: Of the runs; ``"all"``.
        n_runs: That were forecast.
        borrowed: From runs of other models only: what was known before the calibration.
        own: From the calibration's runs on the other tasks as well.
    """

    quantity: str
    method: str
    n_runs: int
    borrowed: float
    own: float


@dataclass(frozen=True)
class Expected:
    """What the runs by one recipe came to. Fractions; means over the tasks.

    Attributes:
        method: Fine-tuning method.
        learning_rate: Of the recipe.
        steps: Of the runs.
        n_tasks: That were learnt.
        gain, forgetting: ``forgetting`` is None without off-target tasks.
        is_frontier: No other recipe has more gain and less forgetting.
    """

    method: str
    learning_rate: float | None
    steps: int | None
    n_tasks: int
    gain: float
    forgetting: float | None
    is_frontier: bool


def errors(own: Sequence[Outcome], others: Sequence[Outcome]) -> list[Error]:
    """How good forecasts were before the calibration, and are now.

    Args:
        own: Complete runs of one model.
        others: Runs of other models on record; those that ship count as well.

    Returns:
        A row for each quantity and method, ``"all"`` first; none where fewer than two tasks were
        learnt.
    """
    tasks = sorted({o.task for o in own})
    if len(tasks) < 2:
        return []
    borrowed = _misses(own, others)
    now: list[dict[str, float | None]] = []
    for task in tasks:
        known = [o for o in own if o.task != task]
        now += _misses([o for o in own if o.task == task], [*others, *known])
    asked = [o for task in tasks for o in own if o.task == task]
    before = {id(o): row for o, row in zip(own, borrowed, strict=True)}
    rows = []
    for quantity in QUANTITIES:
        for method in ("all", *sorted({o.method for o in own})):
            pairs = [
                (was, is_)
                for o, row in zip(asked, now, strict=True)
                if method in ("all", o.method)
                and (was := before[id(o)][quantity]) is not None
                and (is_ := row[quantity]) is not None
            ]
            if pairs:
                was, is_ = np.mean(pairs, axis=0)
                rows.append(Error(quantity, method, len(pairs), float(was), float(is_)))
    return rows


def learning_curve(
    own: Sequence[Outcome], others: Sequence[Outcome]
) -> list[dict[str, float | int | None]]:
    """The errors by how many other tasks of the model are on record: is a further one worth it?

    Args:
        own: As `errors`.
        others: As `errors`.

    Returns:
        ``n_tasks``, from 0 to all but one, and the error of each quantity, in fractions; None where
        nothing is forecast.
    """
    tasks = sorted({o.task for o in own})
    rows: list[dict[str, float | int | None]] = []
    for n in range(len(tasks) if len(tasks) > 1 else 0):
        found: list[dict[str, float | None]] = []
        for i, task in enumerate(tasks):
            rest = [t for t in tasks if t != task]
            draws = list(combinations(rest, n))
            rng = np.random.default_rng(i)
            for j in rng.permutation(len(draws))[:_DRAWS]:
                known = [o for o in own if o.task in draws[j]]
                found += _misses([o for o in own if o.task == task], [*others, *known])
        means: dict[str, float | int | None] = {"n_tasks": n}
        for quantity in QUANTITIES:
            values = [row[quantity] for row in found if row[quantity] is not None]
            means[quantity] = float(np.mean(values)) if values else None  # type: ignore[arg-type]
        rows.append(means)
    return rows


def expected(own: Iterable[Outcome]) -> list[Expected]:
    """What each recipe gains and forgets, and which of them are worth choosing from.

    Args:
        own: Complete runs of one model.

    Returns:
        A row for each method, learning rate and number of steps. Of recipes that were run on
        different tasks the means do not quite compare.
    """
    groups: dict[tuple[str, float | None, int | None], list[Outcome]] = {}
    for o in own:
        key = o.method, o.recipe.get("learning_rate"), o.recipe.get("steps")
        groups.setdefault(key, []).append(o)
    found = []
    for key, runs in groups.items():
        drops = [o.forgetting for o in runs if o.forgetting is not None]
        gain = float(np.mean([o.gain for o in runs]))
        found.append((key, runs, gain, float(np.mean(drops)) if drops else None))
    return [
        Expected(*key, len({o.task for o in runs}), gain, drop, not any(
            other >= gain and (less or 0.0) <= (drop or 0.0)
            and (other, less) != (gain, drop)
            for _, _, other, less in found
        ))
        for key, runs, gain, drop in found
    ]  # fmt: skip


def _misses(asked: Sequence[Outcome], known: Sequence[Outcome]) -> list[dict[str, float | None]]:
    """Absolute error of the forecast of each run, by quantity; None where there was none."""
    forecaster = Forecaster().fit(known)
    rows = []
    for o in asked:
        forecast = forecaster.predict(measured(o), **about(o))
        row: dict[str, float | None] = {}
        for quantity in QUANTITIES:
            prediction, end = getattr(forecast, quantity), getattr(o, quantity)
            missing = prediction is None or end is None
            row[quantity] = None if missing else abs(prediction.point - end)
        rows.append(row)
    return rows
