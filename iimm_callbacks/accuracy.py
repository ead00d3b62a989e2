"""Embeddings -> zero-shot accuracy; accuracies before and after -> gain and forgetting.

Signs, fixed once: gain is accuracy after minus before on the task being learnt; forgetting is
zero-shot accuracy before minus after on an off-target task, so positive means loss. Fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .embeddings import ArrayLike, as_labels, as_matrix, row_norms, unit_rows

NEAR_CEILING = 0.95  # above this zero-shot accuracy, gain over zero-shot error means nothing


@torch.no_grad()
def zero_shot_correct(
    image_embeds: ArrayLike, text_embeds: ArrayLike, labels: ArrayLike
) -> np.ndarray:
    """Which images have the text of their own class as the nearest one.

    ``correct_i = [argmax_c x_i·t_c / ‖t_c‖ = y_i]``: neither the images' scale nor the model's
    logit scale and bias can change the answer.

    Args:
        image_embeds: [N, D] float.
        text_embeds: [C, D] float, one per class.
        labels: [N] integers in [0, C).

    Returns:
        [N] bool.

    Raises:
        TypeError: Embeddings are not float, or labels not integers.
        ValueError: Shapes do not match, a label is out of range, or an embedding is zero or not
            finite.

    Example:
        >>> zero_shot_correct(torch.eye(2), torch.eye(2), torch.tensor([0, 0])).tolist()
        [True, False]
    """
    images, texts = as_matrix(image_embeds, "image_embeds"), as_matrix(text_embeds, "text_embeds")
    index = as_labels(labels, len(images), len(texts)).to(images.device)
    if len(texts) == 0 or images.ndim != 2 or images.shape[1:] != texts.shape[1:]:
        raise ValueError(
            "`image_embeds` and `text_embeds` must have the same width and at least one text, got "
            f"shapes {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    row_norms(images, "image_embeds")  # a zero row would count as class 0
    unit = unit_rows(texts, "text_embeds").to(images.device, images.dtype)
    scores = images @ unit.T  # [N, C]
    return (scores.argmax(1) == index).cpu().numpy()


def zero_shot_accuracy(image_embeds: ArrayLike, text_embeds: ArrayLike, labels: ArrayLike) -> float:
    """Share of images whose own class text is the nearest one, in [0, 1].

    Arguments and errors are those of `zero_shot_correct`. It depends on the prompts as much as on
    the model: compare only numbers with the same prompts, preprocessing and images.

    Example:
        >>> zero_shot_accuracy(torch.eye(2), torch.eye(2), torch.tensor([0, 0]))
        0.5
    """
    correct = zero_shot_correct(image_embeds, text_embeds, labels)
    if len(correct) == 0:
        raise ValueError("`image_embeds` must hold at least one image, got 0")
    return float(correct.mean())


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
class Drop:
    """Forgetting on one off-target task, or on the mean of several, with its sampling error.

    Attributes:
        value: Zero-shot accuracy before minus after, in [-1, 1]; positive means loss.
        standard_error: Of `value` over the drawing of the images. Before and after are measured
            on the *same* images, so only images that changed sides count.
    """

    value: float
    standard_error: float


@dataclass(frozen=True)
class Forgetting:
    """Forgetting over all off-target tasks: a mean hides disasters, so the worst stands beside it.

    Attributes:
        tasks: The drop of each off-target task.
        mean: Mean drop over tasks, every task with the same weight.
        worst_task: Name of the task with the largest drop.
    """

    tasks: dict[str, Drop]
    mean: Drop
    worst_task: str

    @property
    def worst(self) -> Drop:
        """The largest drop of any one task. Picked for being largest, so it is biased upwards."""
        return self.tasks[self.worst_task]

    def share_over(self, limit: float) -> float:
        """Share of off-target tasks whose drop is over `limit`, in [0, 1]."""
        return sum(d.value > limit for d in self.tasks.values()) / len(self.tasks)


def paired_drop(before: np.ndarray, after: np.ndarray) -> Drop:
    """Accuracy before minus after on the same images, with its paired standard error.

    ``value = mean(before_i - after_i)``, ``SE = sd(before_i - after_i)/√n``; one half image is
    counted on either side, so that a probe where nothing changed is not taken for certainty.

    Args:
        before: [n] bool, which images were right.
        after: [n] bool, the same images in the same order.

    Returns:
        The `Drop`; gain is its negative.

    Raises:
        ValueError: The shapes differ, or there are no images.

    Example:
        >>> paired_drop(np.array([True, True]), np.array([True, False])).value
        0.5
    """
    before, after = np.asarray(before), np.asarray(after)
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(
            "`after` must hold the same images as `before`, at least one, expected shape "
            f"{before.shape}, got {after.shape}"
        )
    change = before.astype(float) - after.astype(float)
    padded = np.concatenate([change, [0.5, -0.5]])
    return Drop(float(change.mean()), float(padded.std() / np.sqrt(len(change))))


def forgetting(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> Forgetting:
    """Forgetting per off-target task, its mean and its worst, each with a paired standard error.

    Each task's drop is `paired_drop`; the mean of K tasks has ``SE = √(Σ SE_k²)/K``.

    Args:
        before: Task name -> [n] bool, which images the untouched model had right.
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
