"""What looks and steps cost, and the seconds allowed -> which runs are done, and how long."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...reports.words import duration

# A run is not made shorter than this: forgetting would not have set in.
_LEAST_STEPS, _LEAST_SHARE = 20, 0.2
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Job:
    """One run of a calibration.

    Attributes:
        task: Position of the task.
        recipe: Position of the recipe.
        steps: Optimizer steps, maybe fewer than the recipe's.
        seconds: What it is expected to take.
    """

    task: int
    recipe: int
    steps: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What was timed before the runs, in seconds.

    Attributes:
        looks: [T] all looks of a run on each task.
        steps: [R] an optimizer step by each recipe.
    """

    looks: Sequence[float]
    steps: Sequence[float]

    def of(self, job: Job) -> float:
        """Seconds that a job takes."""
        return self.looks[job.task] + job.steps * self.steps[job.recipe]


def seconds_of(text: str) -> float:
    """Seconds in words such as 90s, 30m or 1h30m.

    Raises:
        ValueError: There is no time in it.

    Example:
        >>> seconds_of("1h30m"), seconds_of("45s"), seconds_of("2.5m")
        (5400.0, 45.0, 150.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or total <= 0:
        raise ValueError(f"`--budget` must be a time such as 90s, 30m or 1h30m, got {text!r}")
    return total


def fit(jobs: Sequence[Job], cost: Cost, seconds: float | None) -> list[Job]:
    """The jobs that fit: shorter ones first, then fewer.

    All are made shorter by one factor, down to a fifth of their steps or 20. If that is not enough,
    the last ones are left out.

    Args:
        jobs: All that are wanted, in their order.
        cost: As measured.
        seconds: That are left; ``None``: no limit.

    Returns:
        A part of `jobs`, with their steps and `Job.seconds`.

    Raises:
        ValueError: Not even one fits.

    Example:
        >>> [job.steps for job in fit([Job(0, 0, 100)] * 3, Cost([10.0], [1.0]), 180.0)]
        [50, 50, 50]
    """
    share = 1.0
    if seconds is not None:
        looks = sum(cost.looks[job.task] for job in jobs)
        training = sum(cost.of(job) for job in jobs) - looks
        share = min(max((seconds - looks) / max(training, 1e-9), _LEAST_SHARE), 1.0)
    found: list[Job] = []
    left = math.inf if seconds is None else seconds + 1e-6
    for job in jobs:
        steps = max(math.floor(share * job.steps + 1e-9), min(_LEAST_STEPS, job.steps))
        short = replace(job, steps=steps)
        short = replace(short, seconds=cost.of(short))
        left -= short.seconds
        if left < 0:
            break
        found.append(short)
    if not found:
        raise ValueError(
            f"`budget` must allow a run at least, which takes {duration(short.seconds)} with its "
            f"looks, got {duration(max(seconds or 0.0, 0.0))} after what was measured; "
            "allow more, or ask for fewer steps"
        )
    return found
