"""What is measured, as plain numbers; accuracies before and after -> gain and forgetting.

Signs, fixed once: gain is accuracy after minus before on the task being learnt; forgetting is
zero-shot accuracy before minus after on an off-target task, so positive means loss. Fractions.
Nothing here needs torch, so neither do forecasts from saved runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NEAR_CEILING = 0.95  # above this zero-shot accuracy, gain over zero-shot error means nothing


@dataclass(frozen=True)
class Measurement:
    """IIMM of one task: how close its images are to each other and to the wrong classes' texts.

    A higher IIMM went, across tasks of one model, with more gain and more forgetting when that
    model was fine-tuned (arXiv 2407.15731). It is *not* for ranking encoders, nor for comparing
    measurements that differ in prompts, preprocessing, subset or dtype.

    Attributes:
        iimm: ``(inter + intra) / 2``, in [-1, 1].
        inter: Mean cosine of an image and the text of a wrong class, in [-1, 1].
        intra: Mean cosine of two distinct images, same class included, in [-1, 1].
        standard_error: Of `iimm` over the drawing of the images, prompts held fixed (delete-a-group
            jackknife, up to 32 groups); NaN below 3 images. In captions mode the texts are drawn
            together with the images, so it is a little too small there.
        n_images: N.
        n_classes: C; the number of captions in captions mode.
    """

    iimm: float
    inter: float
    intra: float
    standard_error: float
    n_images: int
    n_classes: int


def gain_over_zero_shot_error(before: float, after: float) -> float | None:
    """``(after - before) / (1 - before)``, the target of arXiv 2407.15731.

    Args:
        before: Zero-shot accuracy of the untouched model, a fraction.
        after: Accuracy of the fine-tuned model with the same prompts, a fraction.

    Returns:
        The share of the zero-shot error that fine-tuning removed, at most 1; ``None`` above a
        zero-shot accuracy of 0.95, where a handful of images decides it.

    Example:
        >>> gain_over_zero_shot_error(0.5, 0.75)
        0.5
    """
    return None if before > NEAR_CEILING else (after - before) / (1 - before)


@dataclass(frozen=True)
class Score:
    """A task's score by a metric that is no mean over its images, such as macro-F1.

    Attributes:
        value: In [0, 1], higher is better.
        images: [n] float, what each image adds to it: its jackknife pseudo-value
            ``n·value - (n-1)·value without image i``. For accuracy that is 1 where the image is
            right and 0 where not. Their mean is *not* the value, unless the metric is linear.
    """

    value: float
    images: np.ndarray


@dataclass(frozen=True)
class Drop:
    """Forgetting on one off-target task, or on the mean of several, with its sampling error.

    Attributes:
        value: Zero-shot accuracy, or the task's own metric, before minus after, in [-1, 1];
            positive means loss.
        standard_error: Of `value` over the drawing of the images. Before and after are measured
            on the *same* images, so only images that changed sides count.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class Forgetting:
    """Forgetting over all off-target tasks: the mean hides disasters, so the worst is given too.

    Attributes:
        tasks: The drop of each off-target task.
        mean: Mean drop over tasks, every task with the same weight.
        worst_task: Name of the task with the largest drop.
    """

    tasks: dict[str, Drop]
    mean: Drop
    worst_task: str

    @property
    def values(self) -> dict[str, float]:
        """Task name -> its drop, a fraction."""
        return {name: drop.value for name, drop in self.tasks.items()}

    @property
    def worst(self) -> Drop:
        """The largest drop of any one task. Picked for being largest, so it is biased upwards."""
        return self.tasks[self.worst_task]

    def share_over(self, limit: float) -> float:
        """Share of off-target tasks whose drop is over `limit`, in [0, 1]."""
        return sum(d.value > limit for d in self.tasks.values()) / len(self.tasks)


def paired_drop(before: np.ndarray | Score, after: np.ndarray | Score) -> Drop:
    """Accuracy before minus after on the same images, with its paired standard error.

    ``value = mean(before_i - after_i)``, ``SE = sd(before_i - after_i)/√n``; one half image is
    counted on either side, so that a probe where nothing changed is not taken for certainty. Of two
    scores by a metric the value is their difference, and the standard error the jackknife's, which
    is the same formula on what each image adds to them.

    Args:
        before: [n] bool, which images were right; or the `Score` by a metric.
        after: The same of the same images in the same order.

    Returns:
        The `Drop`; gain is its negative.

    Raises:
        ValueError: The shapes differ, there are no images, or only one of them is a `Score`.

    Example:
        >>> paired_drop(np.array([True, True]), np.array([True, False])).value
        0.5
    """
    if isinstance(before, Score) != isinstance(after, Score):
        raise ValueError(
            "`before` and `after` must be measured by the same metric, got which images are right "
            "on one side and a `Score` on the other"
        )
    then, now = (np.asarray(s.images if isinstance(s, Score) else s) for s in (before, after))
    if then.shape != now.shape or then.ndim != 1 or len(then) == 0:
        raise ValueError(
            "`after` must hold the same images as `before`, at least one, expected shape "
            f"{then.shape}, got {now.shape}"
        )
    change = then.astype(float) - now.astype(float)
    padded = np.concatenate([change, [0.5, -0.5]])
    error = float(padded.std() / np.sqrt(len(change)))
    if isinstance(before, Score) and isinstance(after, Score):
        return Drop(before.value - after.value, error)
    return Drop(float(change.mean()), error)


def forgetting(
    before: Mapping[str, np.ndarray | Score], after: Mapping[str, np.ndarray | Score]
) -> Forgetting:
    """Forgetting per off-target task, its mean and its worst, each with a paired standard error.

    Each task's drop is `paired_drop`; the mean of K tasks has ``SE = √(Σ SE_k²)/K``. Where tasks
    are measured by different metrics the mean mixes their units: read each task's own drop.

    Args:
        before: Task name -> [n] bool, which images the untouched model had right; or its `Score`.
        after: The same tasks and the same images in the same order.

    Returns:
        `Forgetting`.

    Raises:
        ValueError: No tasks, other tasks, or another number of images than before.

    Example:
        >>> f = forgetting({"a": np.array([True] * 4)}, {"a": np.array([True, True, True, False])})
        >>> f.mean.value
        0.25
    """
    if not before:
        raise ValueError("`before` must hold at least one off-target task, got none")
    if set(before) != set(after):
        raise ValueError(
            f"`after` must hold the off-target tasks of `before`, expected {sorted(before)}, "
            f"got {sorted(after)}"
        )
    drops = {name: paired_drop(before[name], after[name]) for name in before}
    k = len(drops)
    mean = Drop(
        sum(d.value for d in drops.values()) / k,
        float(np.sqrt(sum(d.standard_error**2 for d in drops.values()))) / k,
    )
    return Forgetting(drops, mean, max(drops, key=lambda name: drops[name].value))
