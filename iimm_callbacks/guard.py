"""Forecast + observation + limits -> verdict: continue, warn or stop, and why. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

from scipy import stats

from .accuracy import Forgetting
from .forecast import Forecast, Prediction

LIMIT_ON = ("mean", "worst")
LEVELS = ("continue", "warn", "stop")
# A drop below this many standard errors is not told from no drop at all (one-sided 95 %).
_NOISE = 1.645


@dataclass(frozen=True)
class Limits:
    """How much forgetting is too much, and how sure to be before acting.

    Attributes:
        max_forgetting: Largest acceptable drop of off-target accuracy, a fraction in (0, 1];
            ``None`` for no limit.
        limit_on: ``"mean"`` over the off-target tasks, or the ``"worst"`` of them.
        confidence: Probability of exceeding the limit from which to stop, in [0.5, 1).

    Raises:
        ValueError: A value is out of its range.
    """

    max_forgetting: float | None = 0.05
    limit_on: Literal["mean", "worst"] = "mean"
    confidence: float = 0.8

    def __post_init__(self) -> None:
        limit = self.max_forgetting
        if limit is not None and not isinstance(limit, Real):
            raise TypeError(f"`max_forgetting` must be a number or None, got {limit!r}")
        if limit is not None and not 0 < limit <= 1:
            hint = f"; write {limit / 100} for {limit} points" if 1 < limit <= 100 else ""
            raise ValueError(
                f"`max_forgetting` must be a fraction in (0, 1], or None for no limit, got "
                f"{limit}{hint}"
            )
        if self.limit_on not in LIMIT_ON:
            raise ValueError(f"`limit_on` must be 'mean' or 'worst', got {self.limit_on!r}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"`confidence` must lie in [0.5, 1), got {self.confidence}")


@dataclass(frozen=True)
class Verdict:
    """What the guard says at one look.

    Attributes:
        level: ``"continue"``, ``"warn"`` (exceeding is more likely than not) or ``"stop"``.
        exceed_probability: Of exceeding the limit, the larger of forecast and observed, in [0, 1];
            ``None`` where there is nothing to judge by.
        reason: In words.
    """

    level: Literal["continue", "warn", "stop"]
    exceed_probability: float | None
    reason: str

    def worse_than(self, other: Verdict | None) -> bool:
        """Whether this verdict is a step up from `other` (``None`` counts as continue)."""
        return LEVELS.index(self.level) > (0 if other is None else LEVELS.index(other.level))


def judge(forecast: Forecast | None, observed: Forgetting | None, limits: Limits) -> Verdict:
    """The verdict on a run.

    The probability of exceeding the limit is taken from the forecast (Student-t) and from what is
    observed (normal, with the paired sampling error); the larger counts. An observed drop within
    its own sampling error raises no alarm, whatever the limit.

    Args:
        forecast: Of the end of the run; ``None`` or absent where there is none.
        observed: Forgetting so far; ``None`` before training.
        limits: The user's limits.

    Returns:
        A `Verdict`: warn above probability 0.5, stop from ``limits.confidence`` on.
    """
    limit = limits.max_forgetting
    if limit is None:
        return Verdict("continue", None, "no limit set")
    candidates: list[tuple[float, str]] = []
    predicted: Prediction | None = None
    if forecast is not None:
        predicted = forecast.forgetting if limits.limit_on == "mean" else forecast.worst
    if predicted is not None:
        candidates.append(
            (
                predicted.probability_above(limit),
                f"forecast {limits.limit_on} forgetting {_points(predicted.point)} "
                f"(90 % between {_points(predicted.low)} and {_points(predicted.high)})",
            )
        )
    if observed is not None:
        drop = observed.mean if limits.limit_on == "mean" else observed.worst
        above = float(stats.norm.sf((limit - drop.value) / max(drop.standard_error, 1e-12)))
        real = drop.value > _NOISE * drop.standard_error
        where = f" on {observed.worst_task!r}" if limits.limit_on == "worst" else ""
        text = (
            f"observed {limits.limit_on} forgetting{where} {_points(drop.value)} "
            f"± {_points(drop.standard_error)}"
        )
        candidates.append((above if real else min(above, 0.5), text))
    if not candidates:
        return Verdict("continue", None, "nothing to judge by yet")
    probability, text = max(candidates)
    level: Literal["continue", "warn", "stop"] = "continue"
    if probability > 0.5:
        level = "stop" if probability >= limits.confidence else "warn"
    return Verdict(
        level,
        probability,
        f"{text}; limit {_points(limit)}, exceeded with probability {probability:.2f}",
    )


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"
