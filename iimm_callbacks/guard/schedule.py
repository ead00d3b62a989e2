"""When to look, and when a look would cost more than the user allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.tasks import OFF_TARGET_PROBE_SIZE
from ..data.training import SAMPLE_SIZE

# Forgetting comes early: look often at first, seldom later.
DEFAULT_SHARES = (0.05, 0.10, 0.20, 0.30, 0.50, 0.70, 1.00)
PARTS = (1.0, 0.5, 0.25, 0.125)  # of the images that a look shows
_LEAST_LOOKS = 6  # in training, where there is a limit to guard
# What training on an image costs at the least, in forward passes: that, two for its gradients, and
# one for reading it and the optimizer's step. (Of the shipped model on a CPU it is six.)
_TRAINING_PASSES = 4
_LEAST_OFF_TARGET = 48  # images of each off-target task in the look before training
_LEAST_TRAINING = 192  # training images that the linear probe learns from
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
    if every is None:
        shares = (math.ceil(share * total_steps - 1e-9) for share in DEFAULT_SHARES)
        return len({due for due in shares if step <= due < total_steps})
    gap = every if isinstance(every, int) else every * total_steps
    return max(math.ceil((total_steps - step) / gap - 1e-9), 1)


def is_needed(step: int, total_steps: int, looks: int) -> bool:
    """Whether fewer looks were taken in training than `DEFAULT_SHARES` have gone by, and than 6.

    Args:
        step: Optimizer steps done.
        total_steps: Of the whole training.
        looks: Taken so far, the one before training apart.
    """
    passed = {
        due for share in DEFAULT_SHARES if (due := math.ceil(share * total_steps - 1e-9)) <= step
    }
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
    moments = (math.ceil(share * total_steps - 1e-9) for share in DEFAULT_SHARES)
    later = (due for due in moments if due > step and is_needed(due, total_steps, looks))
    return next(later, total_steps) / max(total_steps, 1)


def first_look(
    max_overhead: float | None, images: int, n_task: int, n_off_target: int
) -> tuple[int, int]:
    """What the look before training may show, in a run too short to pay for the defaults.

    Counted in forward passes, not by the clock, so that the same run shows the same images every
    time. Half of what looks may take goes to this one. It shows the task first, then gives a third
    of what is left to the training sample, and the rest to the off-target tasks.

    Args:
        max_overhead: As `Budget`.
        images: That the run trains on, repeats counted: steps times batch size; 0: not known.
        n_task: Images of the task being learnt in the probe.
        n_off_target: Off-target tasks.

    Returns:
        Images of each off-target task, and training images for the linear probe.

    Example:
        >>> first_look(0.05, 9_600, 500, 9), first_look(0.05, 30_000, 500, 9)
        ((48, 192), (185, 833))
    """
    if max_overhead is None or not images:
        return OFF_TARGET_PROBE_SIZE, SAMPLE_SIZE
    left = max_overhead * _TRAINING_PASSES * images / 2 - n_task
    training = min(max(int(left / 3), _LEAST_TRAINING), SAMPLE_SIZE)
    each = int((left - training) / max(n_off_target, 1))
    return min(max(each, _LEAST_OFF_TARGET), OFF_TARGET_PROBE_SIZE), training


def plan(every: Every, max_overhead: float | None, n_images: int, off_target_size: int) -> str:
    """The looks to come, in words.

    Args:
        every: As `check_every`.
        max_overhead: As `Budget`.
        n_images: In the look before training.
        off_target_size: Of each off-target task, as `first_look` gave it.
    """
    if isinstance(every, str):
        when = {"epoch": "after each epoch", "evaluate": "at each evaluation"}[every]
    elif every is None:
        *early, last = (f"{100 * share:.0f}" for share in DEFAULT_SHARES)
        when = f"at {', '.join(early)} and {last} % of the steps"
    else:
        when = f"every {every} steps" if isinstance(every, int) else f"every {100 * every:g} %"
    if max_overhead is None:
        return f"Looks {when}, at all {n_images} images."
    few = math.ceil(PARTS[-1] * n_images)
    text = (
        f"Looks {when}: at {few} to {n_images} images, as {100 * max_overhead:g} % of the run time "
        "allows; the last look at all of them."
    )
    if off_target_size < OFF_TARGET_PROBE_SIZE:
        text += (
            f" The run is short, so the probe holds {off_target_size} images of each off-target "
            f"task, not {OFF_TARGET_PROBE_SIZE}; `max_overhead=None` or `probe_size` holds more."
        )
    return text


@dataclass
class Budget:
    """Keeps the looks within a share of the wall time of the whole training.

    A look that cannot be paid for shows fewer images: a half, a quarter or an eighth of them. The
    one before training counts; the last one is always taken, and apart.

    Attributes:
        max_overhead: Share of the wall time that looks may take, in (0, 1]; ``None``: no limit.
        before: Seconds that the look before training took.
        spent: Seconds spent in looks since training began.
    """

    max_overhead: float | None
    before: float = 0.0
    spent: float = 0.0
    _full: float = 0.0  # seconds of a look at all images, as far as known

    def __post_init__(self) -> None:
        if self.max_overhead is not None and not 0 < self.max_overhead <= 1:
            raise ValueError(
                "`max_overhead` must be a fraction in (0, 1], or None for no limit, got "
                f"{self.max_overhead}"
            )

    def part(self, elapsed: float, step: int, total_steps: int, looks: int) -> float:
        """Share of the images that can be paid for now, if each look to come costs the same.

        It is one of `PARTS`; 0 where not even the smallest can.

        Args:
            elapsed: Seconds since training began, looks included.
            step: Optimizer steps done, ≥ 1.
            total_steps: Of the whole training.
            looks: To come, this one included and the last one apart.
        """
        if self.max_overhead is None:
            return 1.0
        training = max(elapsed - self.spent, 0.0) * total_steps / step
        # Looks are a share of the total, themselves included.
        allowed = self.max_overhead * training / (1 - min(self.max_overhead, 0.99))
        each = (allowed - self.before - self.spent) / max(looks, 1)
        return next((part for part in PARTS if part * self._full <= each), 0.0)

    def took(self, seconds: float, part: float = 1.0) -> None:
        """Note what a look in training cost that showed this share of the images."""
        self._full = seconds / part
        self.spent += seconds

    def began(self, wall: float, look: float) -> None:
        """Note the look before training.

        Args:
            wall: Seconds that it took in all, reading and preprocessing the images included.
            look: Seconds of that which a later look will take again.
        """
        self.before, self._full = wall, look
