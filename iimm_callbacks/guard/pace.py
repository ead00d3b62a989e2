"""How many images a look shows, so that looks stay within the time that the user allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..data.training import SAMPLE_SIZE
from ..records.look import PARTS
from ..records.outcomes import OFF_TARGET_PROBE_SIZE
from .schedule import (
    DEFAULT_SHARES,
    Every,
    check_every,
    is_due,
    is_needed,
    looks_to_come,
    next_needed,
    next_share,
)

# What training on an image costs at the least, in forward passes: that, two for its gradients, and
# one for reading it and the optimizer's step. (Of the shipped model on a CPU it is six.)
_TRAINING_PASSES = 4
_ROUGHLY = 1.5  # by which an estimate of the looks' share must exceed what is allowed
_LEAST_OFF_TARGET = 48  # images of each off-target task in the look before training
_LEAST_TRAINING = 192  # training images that the linear probe learns from


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
        share = self.max_overhead
        is_number = isinstance(share, Real) and not isinstance(share, bool)
        if share is not None and not (is_number and 0 < share <= 1):
            raise (ValueError if is_number else TypeError)(
                f"`max_overhead` must be a fraction in (0, 1], or None for no limit, got {share!r}"
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


class Pace:
    """When a run is looked at, and at how many images: the schedule, kept within the budget.

    Args:
        every: As `schedule.check_every`.
        max_overhead: As `Budget`.
        guarded: Whether there is a limit: then looks are taken whatever they cost where
            `schedule.is_needed`.

    Attributes:
        budget: What looks cost so far.
        part: Share of the images that the look that is due shows.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(self, every: Every, max_overhead: float | None, *, guarded: bool) -> None:
        check_every(every)
        self.every = every
        self.budget = Budget(max_overhead)
        self.part = 1.0
        self._guarded = guarded
        self._is_paid = True  # whether the budget has room for the latest look that was due
        self._least = (0, 0, 0)  # images to train on, for the linear probe, looks that are needed
        self._first_step: int | None = None  # steps done when it began, as far as known
        self._last_step: int | None = None  # the first one asked about that is no less than all

    def first_look(
        self, recipe: Mapping[str, Any], n_task: int, n_off_target: int
    ) -> tuple[int, int]:
        """`first_look` of a run with this recipe; without ``steps`` or ``batch_size``, all."""
        told = [recipe.get(name) for name in ("steps", "batch_size")]
        steps, each = (number if isinstance(number, int) else 0 for number in told)
        sizes = first_look(self.budget.max_overhead, steps * each, n_task, n_off_target)
        looks = looks_to_come(None, 1, steps) if self._guarded else 0
        self._least = steps * each, sizes[1], looks
        return sizes

    def began(self, wall: float, look: float, *, resumed: bool) -> None:
        """Note the look before training: `Budget.began`.

        Args:
            wall: As there.
            look: As there.
            resumed: Whether steps were done before: how many is told by the first question only.
        """
        self.budget.began(wall, look)
        self._first_step = None if resumed else 0

    def is_scheduled(
        self, step: int, total_steps: int, event: str | None, since: int | None = None
    ) -> bool:
        """Whether a look is due, whatever it costs.

        Args:
            step: Optimizer steps done. The last one is due; steps beyond it go by `every`.
            total_steps: Of the whole training.
            event: One of `schedule.EVENTS`, or None.
            since: As `schedule.is_due`.
        """
        if self._first_step is None:
            self._first_step = step - 1
        if step >= total_steps and self._last_step is None:
            self._last_step = step
        due = self.every == event if event else is_due(self.every, step, total_steps, since)
        return due or step == self._last_step

    def pays(
        self,
        elapsed: float,
        step: int,
        total_steps: int,
        taken: int,
        agree: Callable[[float], float],
    ) -> bool:
        """Whether a look that is scheduled is taken; sets `part`.

        Args:
            elapsed: Seconds since training began, looks included.
            step: Optimizer steps done; of a resumed run those before `is_scheduled` was first asked
                do not count, so that each try stays within the budget of its own steps.
            total_steps: Of the whole training.
            taken: Looks in training so far.
            agree: A number of this rank -> the least over all ranks: all look or none, and at the
                same images.
        """
        self.part = 1.0
        if step == self._last_step:
            return True
        begun, total_steps = self._first_step or 0, max(step, total_steps)
        looks = looks_to_come(self.every, step, total_steps)
        part = agree(self.budget.part(elapsed, step - begun, total_steps - begun, looks))
        self._is_paid = part > 0
        if not part and self._guarded and is_needed(step, total_steps, taken):
            part = PARTS[-1]
        self.part = part or 1.0
        return part > 0

    def coming(self, step: int, total_steps: int, last_step: int, taken: int) -> float:
        """Share of the steps at which the look after this one will be.

        A stop is not put off to a look that the budget may drop.

        Args:
            step: Optimizer steps done.
            total_steps: Of the whole training.
            last_step: Steps done at the look before this one.
            taken: Looks in training, this one included.
        """
        due = next_share(self.every, step, total_steps, last_step)
        return due if self._is_paid else max(due, next_needed(step, total_steps, taken))

    def plan(self, n_images: int, off_target_size: int) -> str:
        """The looks to come, in words.

        Args:
            n_images: In the look before training.
            off_target_size: Of each off-target task, as `first_look` gave it.
        """
        every, max_overhead = self.every, self.budget.max_overhead
        if isinstance(every, str):
            when = {"epoch": "after each epoch", "evaluate": "at each evaluation"}[every]
        elif not isinstance(every, int | float):
            shares = sorted({*(every or DEFAULT_SHARES), 1.0})
            *early, last = (f"{100 * share:g}" for share in shares)
            when = f"at {', '.join(early)} and {last} % of the steps"
        else:
            when = f"every {every} steps" if isinstance(every, int) else f"every {100 * every:g} %"
        if max_overhead is None:
            return f"{when}, all {n_images} images each"
        few = math.ceil(PARTS[-1] * n_images)
        text = (
            f"{when}, {few} to {n_images} images each to stay within {100 * max_overhead:g} % of "
            "the run time; the last look has all"
        )
        images, training, looks = self._least
        passes = n_images + training + looks * few
        share = passes / (passes + _TRAINING_PASSES * images)
        if images > 0 and share > _ROUGHLY * max_overhead:
            text = (
                f"{when}, {few} images each and all {n_images} in the last one; the run is too "
                f"short for {100 * max_overhead:g} % of its time, looks may take "
                f"{100 * share:.0f} %"
            )
        if off_target_size < OFF_TARGET_PROBE_SIZE:
            text += (
                f"; {off_target_size} images of each off-target task instead of "
                f"{OFF_TARGET_PROBE_SIZE}, as the run is short (`max_overhead=None`: all)"
            )
        return text
