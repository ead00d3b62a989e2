"""When to look, and when a look would cost more than the user allows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Forgetting comes early: look often at first, seldom later.
DEFAULT_SHARES = (0.05, 0.10, 0.20, 0.30, 0.50, 0.70, 1.00)
EVENTS = ("epoch", "evaluate")

Every = int | float | str | None


def check_every(every: Every) -> None:
    """Raise unless `every` is None, a number of steps, a fraction, "epoch" or "evaluate".

    Raises:
        ValueError: It is none of these.
    """
    good = (
        every is None
        or every in EVENTS
        or (isinstance(every, int) and not isinstance(every, bool) and every >= 1)
        or (isinstance(every, float) and 0 < every < 1)
    )
    if not good:
        raise ValueError(
            "`every` must be None, a number of steps (1, 2, ...), a fraction of the training in "
            f"(0, 1), 'epoch' or 'evaluate', got {every!r}"
        )


def is_due(every: Every, step: int, total_steps: int) -> bool:
    """Whether a look is due after this optimizer step.

    Args:
        every: As `check_every`; ``None`` means `DEFAULT_SHARES`. The last step is always due;
            "epoch" and "evaluate" are events and never due by step.
        step: Optimizer steps done, from 1.
        total_steps: Of the whole training.

    Example:
        >>> [s for s in range(1, 101) if is_due(None, s, 100)]
        [5, 10, 20, 30, 50, 70, 100]
    """
    if step == total_steps:
        return True
    if isinstance(every, str):
        return False
    if isinstance(every, int):
        return step % every == 0
    if every is None:
        return step in {math.ceil(share * total_steps - 1e-9) for share in DEFAULT_SHARES}
    gap = every * total_steps  # due where a multiple of it lies in (step - 1, step]
    return math.floor((step + 1e-9) / gap) > math.floor((step - 1 + 1e-9) / gap)


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
    elif every is None:
        steps = (math.ceil(share * total_steps - 1e-9) for share in DEFAULT_SHARES)
        due = next((s for s in steps if s > step), total_steps)
    else:
        gap = every if isinstance(every, int) else every * total_steps
        due = max(math.ceil((math.floor((step + 1e-9) / gap) + 1) * gap - 1e-9), step + 1)
    return min(due, total_steps) / max(total_steps, 1)


@dataclass
class Budget:
    """Keeps the looks within a share of the wall time of the whole training.

    The measurement before training and the last look are always taken; time for the last one is
    set aside.

    Attributes:
        max_overhead: Share of the wall time that looks may take, in (0, 1]; ``None``: no limit.
        spent: Seconds spent in looks since training began.
    """

    max_overhead: float | None
    spent: float = 0.0
    _costs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_overhead is not None and not 0 < self.max_overhead <= 1:
            raise ValueError(
                "`max_overhead` must be a fraction in (0, 1], or None for no limit, got "
                f"{self.max_overhead}"
            )

    def allows(self, elapsed: float, step: int, total_steps: int) -> bool:
        """Whether one more look fits, with the last one still to come.

        Args:
            elapsed: Seconds since training began, looks included.
            step: Optimizer steps done, ≥ 1.
            total_steps: Of the whole training.
        """
        if self.max_overhead is None or not self._costs:
            return True
        cost = self._costs[-1]
        training = (elapsed - self.spent) * total_steps / step
        # Looks are a share of the total, themselves included.
        allowed = self.max_overhead * training / (1 - min(self.max_overhead, 0.99))
        return self.spent + 2 * cost <= allowed

    def took(self, seconds: float, *, counts: bool = True) -> None:
        """Note what a look cost; the one before training does not count as spent."""
        self._costs.append(seconds)
        if counts:
            self.spent += seconds
