"""Embeddings -> zero-shot accuracy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .embeddings import ArrayLike, as_labels, as_matrix, autocast_off, row_norms, unit_rows
from .results import forgetting, gain_over_zero_shot_error  # noqa: F401, their former place


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
    n_images = len(as_matrix(image_embeds, "image_embeds"))
    index = as_labels(labels, n_images, len(as_matrix(text_embeds, "text_embeds")))
    scores = zero_shot_scores(image_embeds, text_embeds)
    return (scores.argmax(1) == index.to(scores.device)).cpu().numpy()


@torch.no_grad()
@autocast_off()
def zero_shot_scores(image_embeds: ArrayLike, text_embeds: ArrayLike) -> Tensor:
    """How near each text is to each image: ``x_i·t_c / ‖t_c‖``.

    They order the texts of one image. They are not for comparing two images: the length of
    an image's embedding is in them.

    Args:
        image_embeds: [N, D] float.
        text_embeds: [C, D] float, one per class.

    Returns:
        [N, C], float32 or wider, where the images are.

    Raises:
        TypeError: Embeddings are not float.
        ValueError: Shapes do not match, or an embedding is zero or not finite.

    Example:
        >>> zero_shot_scores(torch.eye(2), 9 * torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    images, texts = as_matrix(image_embeds, "image_embeds"), as_matrix(text_embeds, "text_embeds")
    if len(texts) == 0 or images.ndim != 2 or images.shape[1:] != texts.shape[1:]:
        raise ValueError(
            "`image_embeds` and `text_embeds` must have the same width and at least one text, got "
            f"shapes {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    row_norms(images, "image_embeds")  # a zero row would count as class 0
    unit = unit_rows(texts, "text_embeds").to(images.device, images.dtype)
    return images @ unit.T  # [N, C]


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
