"""When to look. Pure functions of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Forgetting comes early: look often at first, seldom later.
DEFAULT_SHARES = (0.05, 0.10, 0.20, 0.30, 0.50, 0.70, 1.00)
_LEAST_LOOKS = 6  # in training, where there is a limit to guard
EVENTS = ("epoch", "evaluate")

Every = int | float | str | Sequence[float] | None


def check_every(every: Every) -> None:
    """Raise unless `every` is None, steps, a fraction, fractions, "epoch" or "evaluate".

    Raises:
        ValueError: It is none of these.
    """
    good = (
        every is None
        or every in EVENTS
        or (isinstance(every, int) and not isinstance(every, bool) and every >= 1)
        or (isinstance(every, float) and 0 < every < 1)
        or (isinstance(every, list | tuple) and len(every) > 0 and all(map(_is_share, every)))
    )
    if not good:
        raise ValueError(
            "`every` must be None, a number of steps (1, 2, ...), a fraction of the training in "
            f"(0, 1), a list of fractions in (0, 1], 'epoch' or 'evaluate', got {every!r}"
        )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def whole(steps: Any, name: str) -> int:
    """A number of steps as the int that JSON holds: maybe one of numpy or torch, or a float.

    Args:
        steps: Such as ``numpy.int64(4)`` or ``4.0``.
        name: What it is called in errors.

    Raises:
        ValueError: It is no whole number, or negative.
    """
    try:
        number = int(steps)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0 or number != steps:
        raise ValueError(f"`{name}` must be a whole number of optimizer steps, got {steps!r}")
    return number


def moments(every: Sequence[float] | None, total_steps: int) -> list[int]:
    """The steps at which these shares of the training are done; ``None``: `DEFAULT_SHARES`."""
    shares = DEFAULT_SHARES if every is None else every
    return sorted({math.ceil(share * total_steps - 1e-9) for share in shares})


def is_due(every: Every, step: int, total_steps: int, since: int | None = None) -> bool:
    """Whether a look is due after this optimizer step, or was at one that nobody asked about.

    Args:
        every: As `check_every`; ``None`` means `DEFAULT_SHARES`. The last step is always due;
            "epoch" and "evaluate" are events and never due by step.
        step: Optimizer steps done, from 1.
        total_steps: Of the whole training.
        since: The step that was asked about before; ``None``: the one before this.

    Example:
        >>> [s for s in range(1, 101) if is_due(None, s, 100)]
        [5, 10, 20, 30, 50, 70, 100]
        >>> [s for s in range(8, 101, 8) if is_due(None, s, 100, since=s - 8)]
        [8, 16, 24, 32, 56, 72]
    """
    since = step - 1 if since is None else min(since, step - 1)
    if step == total_steps:
        return True
    if isinstance(every, str):
        return False
    if not isinstance(every, int | float):
        return any(since < due <= step for due in moments(every, total_steps))
    gap = _gap(every, total_steps)  # due where a multiple of it lies in (since, step]
    return math.floor((step + 1e-9) / gap) > math.floor((since + 1e-9) / gap)


def next_share(every: Every, step: int, total_steps: int, last_step: int) -> float:
    """Share of the steps at which the look after this one is due.

    Args:
        every: As `check_every`.
        step: Optimizer steps done.
        total_steps: Of the whole training.
        last_step: Steps done at the look before this one: with "epoch" and "evaluate" the next is
            expected as many steps on; before training, at the end.

    Example:
        >>> next_share(None, 10, 100, 5)
        0.2
    """
    if isinstance(every, str):
        due = step + (step - last_step) if step > last_step else total_steps
    elif not isinstance(every, int | float):
        due = next((s for s in moments(every, total_steps) if s > step), total_steps)
    else:
        gap = _gap(every, total_steps)
        due = max(math.ceil((math.floor((step + 1e-9) / gap) + 1) * gap - 1e-9), step + 1)
    return min(due, total_steps) / max(total_steps, 1)


def waits_for_end(every: Every, total_steps: int) -> bool:
    """Whether the first look in training is the last; of "epoch" and "evaluate" that is not known.

    Args:
        every: As `check_every`.
        total_steps: Of the whole training.

    Example:
        >>> waits_for_end(500, 100), waits_for_end(None, 100)
        (True, False)
    """
    return (
        not isinstance(every, str) and total_steps > 1 and next_share(every, 0, total_steps, 0) == 1
    )


def looks_to_come(every: Every, step: int, total_steps: int) -> int:
    """Looks that are due from this step on, itself included and the last one apart.

    Args:
        every: As `check_every`; of "epoch" and "evaluate" only this one is known.
        step: Optimizer steps done.
        total_steps: Of the whole training.

    Example:
        >>> looks_to_come(None, 10, 100)
        5
    """
    if isinstance(every, str):
        return 1
    if not isinstance(every, int | float):
        return len([due for due in moments(every, total_steps) if step <= due < total_steps])
    return max(math.ceil((total_steps - step) / _gap(every, total_steps) - 1e-9), 1)


def _gap(every: float, total_steps: int) -> float:
    """Steps from one look to the next."""
    return every if isinstance(every, int) else every * total_steps


def is_needed(step: int, total_steps: int, looks: int) -> bool:
    """Whether fewer looks were taken in training than `DEFAULT_SHARES` have gone by, and than 6.

    Args:
        step: Optimizer steps done.
        total_steps: Of the whole training.
        looks: Taken so far, the one before training apart.
    """
    passed = [due for due in moments(None, total_steps) if due <= step]
    return looks < min(len(passed), _LEAST_LOOKS)


def next_needed(step: int, total_steps: int, looks: int) -> float:
    """Share of the steps at which the next look is needed, see `is_needed`; 1 at the latest.

    Args:
        step: Optimizer steps done.
        total_steps: Of the whole training.
        looks: Taken so far, one at this step included and the one before training apart.

    Example:
        >>> next_needed(10, 100, 2), next_needed(12, 100, 4)
        (0.2, 0.5)
    """
    later = (d for d in moments(None, total_steps) if d > step and is_needed(d, total_steps, looks))
    return next(later, total_steps) / max(total_steps, 1)
