"""What all ranks saw of the probed tasks -> which images are right, and scores by metric."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from ..data.metrics import Metric
from ..data.tasks import Task
from ..measures.accuracy import Score
from ..models.undisturbed import undisturbed
from . import ranks
from .share import ProbeTask

logger = logging.getLogger(__name__)


@dataclass
class Scored:
    """What `score` makes of what is seen.

    Attributes:
        correct, scores: As `Look`.
        seconds: That the metrics took.
    """

    correct: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    seconds: float = 0.0


def score(tasks: Sequence[ProbeTask], seen: Sequence[Tensor]) -> Scored:
    """Which images of each task are right, and the score by its metric.

    A metric is anybody's code: the first rank computes it and tells the others, so what it fails
    on or draws at random is the same on all ranks. They must all call this together.

    Args:
        tasks: As they are probed.
        seen: Of each task [N] float64 numbers: 1 where an image is right, or what its metric sees.

    Raises:
        ValueError: A metric failed, or left [0, 1]; on all ranks.
    """
    if not any(isinstance(shown.task.metric, Metric) for shown in tasks):
        return _score(tasks, seen)
    with undisturbed(nn.Identity()):  # for the random streams: a metric may draw from them
        return ranks.from_first(lambda: _score(tasks, seen))


def _score(tasks: Sequence[ProbeTask], seen: Sequence[Tensor]) -> Scored:
    found = Scored()
    for shown, numbers in zip(tasks, seen, strict=True):
        name, metric = shown.task.name, shown.task.metric
        if metric is None:
            found.correct[name] = numbers.numpy() > 0.5
            continue
        start = time.perf_counter()
        found.correct[name], by_metric = metric.judge(
            numbers.numpy().astype(np.int64), shown.labels.numpy()
        )
        if by_metric is not None:
            found.scores[name] = by_metric
        found.seconds += time.perf_counter() - start
    return found


def fingerprint(shown: ProbeTask) -> str:
    """Of a task's images, labels, prompts and preprocessing, and of its metric if it has one."""
    if shown.task.metric is None:
        return shown.fingerprint
    both = f"{shown.fingerprint} {shown.task.metric.name}"
    return hashlib.sha256(both.encode()).hexdigest()[:16]


def warn_of_mixed_units(off_target: Sequence[Task]) -> None:
    """Say so, on the first rank, where the mean over these tasks is of different metrics."""
    units = {t.name: "accuracy" if t.metric is None else t.metric.name for t in off_target}
    if len(set(units.values())) > 1 and ranks.world()[0] == 0:
        logger.warning(
            "The mean forgetting mixes units, the off-target tasks being measured by different "
            "metrics (%s): read each task's own, or set the limit on the worst task",
            ", ".join(f"{name}: {unit}" for name, unit in units.items()),
        )
