"""Saved runs + a measured task -> which recipe gains most within the limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from ...forecasting.candidates import MIN_TASKS
from ...records.forecast import Forecast, Prediction
from ...records.outcomes import Outcome
from ...records.verdict import Limits

RISK = 0.3  # of exceeding the limit that a choice may have
_LEVEL = 0.1  # of the test that two recipes gain differently


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
        mean = limits.limit_on == "mean"
        predicted = self.forecast.forgetting if mean else self.forecast.worst
        return None if predicted is None else predicted.probability_above(limits.max_forgetting)


def recipes_on_record(
    outcomes: Iterable[Outcome], model: str
) -> dict[tuple[str, float | None, int | None], set[str]]:
    """(method, learning rate, steps) of a model's complete runs -> the tasks they were run on."""
    found: dict[tuple[str, float | None, int | None], set[str]] = {}
    for o in outcomes:
        if o.complete and o.model_fingerprint == model:
            key = o.method, o.recipe.get("learning_rate"), o.recipe.get("steps")
            found.setdefault(key, set()).add(o.task)
    return found


def ranked(options: Sequence[Option], limits: Limits, risk: float = RISK) -> list[Option]:
    """Those that may be chosen, most gain first; then the others, the least risky first.

    Args:
        options: With their forecasts.
        limits: On forgetting.
        risk: Largest probability of exceeding the limit that a choice may have.
    """

    def order(option: Option) -> tuple[bool, float]:
        own = option.risk(limits)
        if own is None or own > risk or option.forecast.gain is None:
            return True, 1.0 if own is None else own
        return False, -option.forecast.gain.point

    return sorted(options, key=order)


def choice(options: Sequence[Option], limits: Limits, risk: float = RISK) -> Option | None:
    """The first of `ranked` if it may be chosen; else None.

    On the shipped runs, task left out, limits of 2, 3 and 5 points: see ``GRADES.txt``.
    """
    for option in ranked(options, limits, risk)[:1]:
        own = option.risk(limits)
        if own is not None and own <= risk and option.forecast.gain is not None:
            return option
    return None


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
    return bool(stats.ttest_1samp(differences, 0.0).pvalue < _LEVEL)


def observed(option: Option, outcome: Outcome) -> Option:
    """The option after it was tried on the task itself: what came of it is known."""

    def exactly(value: float | None) -> Prediction | None:
        return None if value is None else Prediction(value, 0.0, float("inf"))

    ends = {name: exactly(getattr(outcome, name)) for name in ("gain", "forgetting", "worst")}
    forecast = replace(option.forecast, **ends, basis="what is observed", base_rate=False)  # type: ignore[arg-type]
    return replace(option, forecast=forecast, is_tried=True)
