"""Tasks that can be learnt: measured once, chosen, and written as folders for a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...data.tasks import TASK_PROBE_SIZE, Task
from ...data.training import SAMPLE_SIZE, training_task
from ...probing.learnable import TrainingSet
from ...probing.probe import Probe
from ...records.outcomes import OFF_TARGET_PROBE_SIZE
from .runs import LOOKS

_CHOOSING = 256  # training images that the linear probe of a task to choose from learns from


@dataclass(frozen=True)
class Lesson:
    """A task that can be learnt.

    Attributes:
        task: Its held-out images.
        train: Its training images.
        fingerprint: Of the held-out ones.
        features: IIMM, headroom of the linear probe, zero-shot accuracy.
        seconds: That a look at one image takes.
    """

    task: Task
    train: Task
    fingerprint: str
    features: tuple[float, float, float]
    seconds: float


def measure(
    model: nn.Module,
    tasks: Sequence[tuple[Task, Any]],
    processor: Any,
    n_tasks: int,
    device: torch.device,
) -> list[Lesson]:
    """The tasks that are learnt, measured; the model is left where it was."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        found = [_lesson(model, task, train, processor) for task, train in tasks]
    finally:
        model.to(home)
    if len(found) <= n_tasks:
        return found
    chosen = most_different([lesson.features for lesson in found], n_tasks)
    return [found[i] for i in sorted(chosen)]


def most_different(features: Sequence[Sequence[float]], n: int) -> list[int]:
    """A row in the middle and the n - 1 farthest from it and one another: farthest-point sampling.

    Each column is scaled to unit variance. The first is the row nearest to the mean; each further
    one has the largest distance to the nearest that is chosen. On the study's runs four tasks
    chosen like this taught the forgetting of others more than four that began at an extreme.

    Args:
        features: [N, F] finite numbers, such as IIMM, headroom and zero-shot accuracy.
        n: At least 1.

    Returns:
        [min(n, N)] positions, in the order in which they were chosen; ties go to the first.

    Example:
        >>> most_different([[0.0], [0.1], [1.0], [0.5]], 3)
        [3, 0, 2]
    """
    rows = np.asarray(features, dtype=float)
    rows = (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9)
    chosen = [int(np.argmin(np.linalg.norm(rows, axis=1)))]
    while len(chosen) < min(n, len(rows)):
        gaps = np.linalg.norm(rows[:, None] - rows[chosen], axis=2).min(axis=1)
        gaps[chosen] = -1.0
        chosen.append(int(np.argmax(gaps)))
    return chosen


def seconds_of_looks(
    task: Task, train: Task, off_target: Sequence[Task] | None, seconds: float
) -> float:
    """What all looks of a run take.

    Args:
        task: That is learnt.
        train: Its training images.
        off_target: As `IIMMCallback`.
        seconds: That a look at one image takes.
    """
    from ...sample import off_target_tasks

    others = off_target_tasks(task, off_target)
    sizes = [min(len(other), other.probe_size or OFF_TARGET_PROBE_SIZE) for other in others]
    own = min(len(task), task.probe_size or TASK_PROBE_SIZE)
    images = (len(LOOKS) + 2) * (own + sum(sizes)) + min(len(train), SAMPLE_SIZE)
    return images * seconds


def _lesson(model: nn.Module, task: Task, train: Any, processor: Any) -> Lesson:
    read = training_task(train, task)
    probe = Probe(task, processor=processor, progress=False, train=TrainingSet(read))
    probe.training_size = _CHOOSING
    look = probe.look(model, 0, linear_probe=True)
    assert look.learnable is not None
    zero_shot, learnable = look.accuracy(task.name), look.learnable
    headroom = 0.0
    if learnable.probe is not None:
        headroom = learnable.probe.at(learnable.n_train)[0] - zero_shot
    iimm = look.measurement.iimm
    features = (iimm if math.isfinite(iimm) else 0.0, headroom, zero_shot)
    seconds = probe.seconds / max(len(look.correct[task.name]), 1)
    return Lesson(task, read, probe.fingerprints[task.name], features, seconds)


def write_folder(task: Task, folder: Path) -> None:
    """The task's images as PNG files in a folder of each class; what is there already is kept."""
    if (folder / ".complete").exists():
        return
    width = len(str(len(task.class_names)))
    for i, name in enumerate(task.class_names):
        safe = "".join(c if c.isalnum() or c in " -" else "_" for c in name)
        (folder / f"{i:0{width}}_{safe}").mkdir(parents=True, exist_ok=True)
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    for i in range(len(task)):
        image, (label,) = task.images([i])[0], task.labels([i])
        if not hasattr(image, "save"):
            raise ValueError(f"`script` needs tasks of pictures, got others in {task.name!r}")
        image.save(folders[label] / f"{i:06}.png")
    (folder / ".complete").touch()
