"""Forecast + observation + limits -> verdict: continue, warn or stop, and why. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from scipy import special

from .accuracy import Forgetting
from .forecasting.forecast import Forecast, Prediction

LIMIT_ON = ("mean", "worst")
LEVELS = ("continue", "warn", "stop")
# A drop below this many standard errors is not told from no drop at all (one-sided 95 %).
_NOISE = 1.645
# The run will end over the limit: stop if the next look is over it with more than this probability.
_NEXT_LOOK = 0.5


@dataclass(frozen=True)
class Limits:
    """How much forgetting is too much, and how sure to be before acting.

    Attributes:
        max_forgetting: Largest acceptable drop of off-target accuracy, a fraction in (0, 1];
            ``None`` for no limit.
        limit_on: ``"mean"`` over the off-target tasks, or the ``"worst"`` of them.
        confidence: Probability of exceeding the limit from which to stop, in [0.5, 1).

    Raises:
        TypeError: A value is no number.
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
        if not isinstance(self.confidence, Real):
            raise TypeError(f"`confidence` must be a number, got {self.confidence!r}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"`confidence` must lie in [0.5, 1), got {self.confidence}")
        # What numpy made of them, JSON would not hold.
        object.__setattr__(self, "max_forgetting", None if limit is None else float(limit))
        object.__setattr__(self, "confidence", float(self.confidence))


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

    The probability of exceeding the limit is taken from the forecast of the end (Student-t) and
    from what is observed (normal, with the paired sampling error); the larger counts: above 0.5 it
    warns. It stops from ``limits.confidence`` on, but for the forecast's sake not before the limit
    is likely to be exceeded at the *next look*, where that is known: until then there is something
    to be gained within the limit. An observed drop within its own sampling error raises no alarm,
    whatever the limit. A forecast that is borrowed from other models' runs may warn before the
    first look in training; it stops no run there.

    Args:
        forecast: Of the end of the run; ``None`` or absent where there is none.
        observed: Forgetting so far; ``None`` before training.
        limits: The user's limits.

    Returns:
        A `Verdict`.
    """
    limit = limits.max_forgetting
    if limit is None:
        return Verdict("continue", None, "no limit set")
    quantity = "forgetting" if limits.limit_on == "mean" else "worst"
    candidates: list[tuple[float, str, bool]] = []
    borrowed = observed is None and forecast is not None and forecast.base_rate
    if forecast is not None:
        predicted: Prediction | None = getattr(forecast, quantity)
        if predicted is not None:
            text = (
                f"forecast {limits.limit_on} forgetting {_points(predicted.point)} "
                f"(90 % between {_points(predicted.low)} and {_points(predicted.high)})"
            )
            coming = forecast.next_look.get(quantity)
            now = coming is None or coming.probability_above(limit) > _NEXT_LOOK
            if forecast.base_rate:
                text = f"borrowed {text}"
                now = now and not borrowed
            candidates.append((predicted.probability_above(limit), text, now))
    if observed is not None:
        drop = observed.mean if limits.limit_on == "mean" else observed.worst
        above = float(special.ndtr((drop.value - limit) / max(drop.standard_error, 1e-12)))
        real = drop.value > _NOISE * drop.standard_error
        where = f" on {observed.worst_task!r}" if limits.limit_on == "worst" else ""
        text = (
            f"observed {limits.limit_on} forgetting{where} {_points(drop.value)} "
            f"± {_points(drop.standard_error)}"
        )
        candidates.append((above if real else min(above, 0.5), text, True))
    if not candidates:
        return Verdict("continue", None, "nothing to judge by yet")
    probability, text, _ = max(candidates)
    level: Literal["continue", "warn", "stop"] = "warn" if probability > 0.5 else "continue"
    stopping = [c for c in candidates if c[0] >= limits.confidence and c[2]]
    if stopping:
        level = "stop"
        probability, text, _ = max(stopping)
    elif level == "warn" and probability >= limits.confidence:
        why = "not yet seen in this run" if borrowed else "not yet at the next look"
        text = f"{text}, {why}"
    return Verdict(
        level,
        probability,
        f"{text}; limit {_points(limit)}, exceeded with probability {probability:.2f}",
    )


def recommend(forecasts: Mapping[str, Forecast], limits: Limits) -> str | None:
    """The method with the most forecast gain among those likely to stay within the limit.

    A forecast out of the range of the record recommends nothing.

    Args:
        forecasts: Method -> its forecast before training.
        limits: The user's limits; without one, every method stays within it.

    Returns:
        The method; None where no method has a forecast of gain, or none is more likely to stay
        within the limit than not. Borrowed forecasts are not told apart.
    """
    gains = {}
    for method, forecast in forecasts.items():
        predicted = forecast.forgetting if limits.limit_on == "mean" else forecast.worst
        limit = limits.max_forgetting
        inside = limit is None or (
            predicted is not None and predicted.probability_above(limit) <= 0.5
        )
        if forecast.gain is not None and inside and forecast.in_range:
            gains[method] = forecast.gain.point
    return max(gains, key=lambda method: gains[method], default=None)


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"
