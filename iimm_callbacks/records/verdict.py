"""Limits, which the guard is given, and verdicts, which it returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from typing import Any, Literal

from .log import get_logger

logger = get_logger(__name__)

WATCH = "IIMM_CALLBACKS_WATCH"  # environment variable: no guard has a limit, whatever it is told
_OFF = ("", "0", "false")  # values that are none
LIMIT_ON = ("mean", "worst")
LEVELS = ("continue", "warn", "stop")


@cache  # once
def _say_watching(value: str) -> None:
    logger.warning("%s=%s: guards only watch, no limit applies; unset it to have one", WATCH, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # True is no 100 points


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
        if limit is not None and not _is_number(limit):
            raise TypeError(f"`max_forgetting` must be a number or None, got {limit!r}")
        if limit is not None and not 0 < limit <= 1:
            hint = f"; write {limit / 100} for {limit} points" if 1 < limit <= 100 else ""
            raise ValueError(
                f"`max_forgetting` must be a fraction in (0, 1], or None for no limit, got "
                f"{limit}{hint}"
            )
        if self.limit_on not in LIMIT_ON:
            raise ValueError(f"`limit_on` must be 'mean' or 'worst', got {self.limit_on!r}")
        if not _is_number(self.confidence):
            raise TypeError(f"`confidence` must be a number, got {self.confidence!r}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"`confidence` must lie in [0.5, 1), got {self.confidence}")
        # What numpy made of them, JSON would not hold.
        object.__setattr__(self, "max_forgetting", None if limit is None else float(limit))
        object.__setattr__(self, "confidence", float(self.confidence))

    @classmethod
    def of(cls, limit: float | Limits | None, **former: Any) -> Limits:
        """`limit` as `Limits`; `former` are other fields, given by former arguments."""
        return replace(limit if isinstance(limit, Limits) else cls(limit), **former)

    def unless_watching(self) -> Limits:
        """These limits; none where the environment says that guards only watch."""
        if self.max_forgetting is None or os.environ.get(WATCH, "").strip().lower() in _OFF:
            return self
        _say_watching(os.environ[WATCH])
        return replace(self, max_forgetting=None)


@dataclass(frozen=True)
class Verdict:
    """What the guard says at one look.

    Attributes:
        level: ``"continue"``, ``"warn"`` (exceeding is more likely than not) or ``"stop"``.
        exceed_probability: Of exceeding the limit, in [0, 1], see `guard.judging.judge`; ``None``
            where there is nothing to judge by.
        reason: In words.
    """

    level: Literal["continue", "warn", "stop"]
    exceed_probability: float | None
    reason: str

    def worse_than(self, other: Verdict | None) -> bool:
        """Whether this verdict is a step up from `other` (``None`` counts as continue)."""
        return LEVELS.index(self.level) > (0 if other is None else LEVELS.index(other.level))
