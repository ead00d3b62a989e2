"""A model's saved runs -> what they taught: errors of forecasts, and which recipe to choose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ...forecasting.forecaster import Forecaster
from ...forecasting.runs import MIN_TASKS, about, measured
from ...records.forecast import Forecast, Prediction
from ...records.outcomes import Outcome
from ...records.verdict import Limits

Key = tuple[str, float | None, int | None]  # method, learning rate, steps
QUANTITIES = ("gain", "forgetting")
RISK = 0.3  # of exceeding the limit that a choice may have
_LEVEL = 0.1  # of the test that two recipes gain differently
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


def grade(
    own: Sequence[Outcome], others: Sequence[Outcome]
) -> tuple[list[Error], list[dict[str, float | int | None]]]:
    """How good forecasts were before the calibration and are now, and whether to learn more tasks.

    Args:
        own: Complete runs of one model.
        others: Runs of other models on record; those that ship count as well.

    Returns:
        ``(errors, curve)``; empty where fewer than two tasks were learnt. ``errors``: a row for
        each quantity and method, ``"all"`` first. ``curve``: the errors by how many other tasks of
        the model are on record, ``n_tasks`` from 0 to all but one, and the error of each quantity,
        in fractions; None where nothing is forecast.
    """
    tasks = sorted({o.task for o in own})
    missed = [_missed(own, others, tasks, n) for n in range(len(tasks)) if len(tasks) > 1]
    errors, curve = [], []
    for n, rows in enumerate(missed):
        means: dict[str, float | int | None] = {"n_tasks": n}
        for quantity in QUANTITIES:
            known = [miss for _, row in rows if (miss := row[quantity]) is not None]
            means[quantity] = float(np.mean(known)) if known else None
        curve.append(means)
    for quantity in QUANTITIES if missed else ():
        for method in ("all", *sorted({o.method for o in own})):
            pairs = [
                (was, is_)
                for (o, before), (_, now) in zip(missed[0], missed[-1], strict=True)
                if method in ("all", o.method)
                and (was := before[quantity]) is not None
                and (is_ := now[quantity]) is not None
            ]
            if pairs:
                was, is_ = np.mean(pairs, axis=0)
                errors.append(Error(quantity, method, len(pairs), float(was), float(is_)))
    return errors, curve


def _missed(
    own: Sequence[Outcome], others: Sequence[Outcome], tasks: Sequence[str], n: int
) -> list[tuple[Outcome, dict[str, float | None]]]:
    """Each run, and what its forecasts missed by with n other tasks of the model on record."""
    found: list[tuple[Outcome, dict[str, float | None]]] = []
    for i, task in enumerate(tasks):
        asked = [o for o in own if o.task == task]
        draws = list(combinations([other for other in tasks if other != task], n))
        for j in np.random.default_rng(i).permutation(len(draws))[:_DRAWS]:
            known = [o for o in own if o.task in draws[j]]
            forecaster = Forecaster().fit([*others, *known])
            for o in asked:
                forecast, row = forecaster.predict(measured(o), **about(o)), {}
                for quantity in QUANTITIES:
                    prediction, end = getattr(forecast, quantity), getattr(o, quantity)
                    is_known = prediction is not None and end is not None
                    row[quantity] = abs(prediction.point - end) if is_known else None
                found.append((o, row))
    return found


def expected(own: Iterable[Outcome]) -> list[Expected]:
    """What each recipe gains and forgets, and which of them are worth choosing from.

    Args:
        own: Complete runs of one model.

    Returns:
        A row for each method, learning rate and number of steps. Of recipes that were run on
        different tasks the means do not quite compare.
    """
    groups: dict[Key, list[Outcome]] = {}
    for o in own:
        groups.setdefault(key_of(o), []).append(o)
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


@dataclass(frozen=True)
class Option:
    """One way to fine-tune, and what is to be expected of it.

    Attributes:
        method: Fine-tuning method.
        recipe: ``learning_rate`` and ``steps``, where they are known.
        n_tasks: On which it was run with this model.
        forecast: For the task that is asked about; of an option that was tried, what was observed.
        is_tried: Whether it was run on this very task.
    """

    method: str
    recipe: Mapping[str, Any]
    n_tasks: int
    forecast: Forecast
    is_tried: bool = False

    @property
    def name(self) -> str:
        """Method, learning rate and number of steps, for people."""
        rate, steps = self.recipe.get("learning_rate"), self.recipe.get("steps")
        rates = [] if rate is None else [f"{rate:g}"]
        return " ".join([self.method, *rates, *([] if steps is None else [f"× {steps}"])])

    def risk(self, limits: Limits) -> float | None:
        """Probability of exceeding the limit; None without a forecast, 0 without a limit."""
        if limits.max_forgetting is None:
            return 0.0
        found = self.forecast
        predicted = found.forgetting if limits.limit_on == "mean" else found.worst
        return None if predicted is None else predicted.probability_above(limits.max_forgetting)

    def is_allowed(self, limits: Limits, risk: float) -> bool:
        """Whether it may be chosen: its gain is forecast, and its risk known and no larger."""
        own = self.risk(limits)
        return own is not None and own <= risk and self.forecast.gain is not None


def key_of(outcome: Outcome) -> Key:
    """The recipe that a run was made by."""
    return outcome.method, outcome.recipe.get("learning_rate"), outcome.recipe.get("steps")


def recipes_on_record(outcomes: Iterable[Outcome], model: str) -> dict[Key, set[str]]:
    """The recipes of a model's complete runs -> the tasks they were run on."""
    found: dict[Key, set[str]] = {}
    for o in outcomes:
        if o.complete and o.model_fingerprint == model:
            found.setdefault(key_of(o), set()).add(o.task)
    return found


def ranked(options: Sequence[Option], limits: Limits, risk: float = RISK) -> list[Option]:
    """Those that may be chosen, most gain first; then the others, the least risky first.

    Args:
        options: With their forecasts.
        limits: On forgetting.
        risk: Largest probability of exceeding the limit that a choice may have.
    """

    def order(option: Option) -> tuple[bool, float]:
        if option.forecast.gain is not None and option.is_allowed(limits, risk):
            return False, -option.forecast.gain.point
        own = option.risk(limits)
        return True, 1.0 if own is None else own

    return sorted(options, key=order)


def choice(options: Sequence[Option], limits: Limits, risk: float = RISK) -> Option | None:
    """The first of `ranked` if it may be chosen; else None.

    On the shipped runs, task left out, limits of 2, 3 and 5 points: see ``GRADES.txt``.
    """
    return next((o for o in ranked(options, limits, risk) if o.is_allowed(limits, risk)), None)


def told_apart(one: Option, other: Option, outcomes: Iterable[Outcome], model: str) -> bool:
    """Whether saved runs show that one of them gains more: a paired t-test over common tasks.

    Args:
        one: Of `recipes_on_record`.
        other: Likewise.
        outcomes: Saved runs.
        model: Fingerprint.

    Returns:
        False where they have fewer than 3 tasks in common.
    """
    gains: list[dict[str, list[float]]] = [{}, {}]
    for o in outcomes:
        if not o.complete or o.model_fingerprint != model:
            continue
        for found, option in zip(gains, (one, other), strict=True):
            if o.method == option.method and all(
                o.recipe.get(name) == value for name, value in option.recipe.items()
            ):
                found.setdefault(o.task, []).append(o.gain)
    common = sorted(gains[0].keys() & gains[1].keys())
    if len(common) < MIN_TASKS:
        return False
    differences = [np.mean(gains[0][task]) - np.mean(gains[1][task]) for task in common]
    if np.ptp(differences) == 0:
        return bool(differences[0] != 0)
    from scipy import stats  # takes time to import

    return bool(stats.ttest_1samp(differences, 0.0).pvalue < _LEVEL)


def observed(option: Option, outcome: Outcome) -> Option:
    """The option after it was tried on the task itself: what came of it is known."""

    def exactly(value: float | None) -> Prediction | None:
        return None if value is None else Prediction(value, 0.0, float("inf"))

    ends = {name: exactly(getattr(outcome, name)) for name in ("gain", "forgetting", "worst")}
    forecast = replace(option.forecast, **ends, basis="what is observed", base_rate=False)  # type: ignore[arg-type]
    return replace(option, forecast=forecast, is_tried=True)
