"""Embeddings and labels as they come from users -> checked tensors, and zero-shot accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from .results import forgetting, gain_over_zero_shot_error  # noqa: F401, their former place

ArrayLike = Tensor | np.ndarray
_DEVICES = ("cpu", "cuda", "xpu", "mps")  # on which torch may autocast


@contextmanager
def autocast_off() -> Iterator[None]:
    """Inside, no autocast of a caller rounds a product; otherwise classes would tie."""
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, _DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


class NotFiniteError(ValueError):
    """An embedding is infinite or NaN: the model that made it is broken, or has diverged."""


def as_matrix(values: ArrayLike, name: str) -> Tensor:
    """Embeddings as a float tensor [N, D] without gradient; shares memory where it can.

    Args:
        values: Torch tensor or numpy array of any float dtype, on any device.
        name: Of the argument, for the error.

    Raises:
        TypeError: Neither tensor nor array, or not of a float dtype.
        ValueError: Not a matrix.
    """
    if not isinstance(values, Tensor | np.ndarray):
        raise TypeError(f"`{name}` must be a torch tensor or numpy array, got {type(values)}")
    matrix = _native(values).detach()
    if not matrix.is_floating_point():
        raise TypeError(f"`{name}` must be of a float dtype, got {matrix.dtype}")
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(
            f"`{name}` must be a matrix with one embedding per row, got shape {tuple(matrix.shape)}"
        )
    return matrix.cpu() if matrix.device.type == "mps" else matrix  # MPS has no float64


def as_labels(labels: ArrayLike, n_images: int, n_classes: int) -> Tensor:
    """Labels as a 1-D int64 tensor, or an error that names what is wrong with them.

    Args:
        labels: [N] integers in [0, C), tensor, array or sequence.
        n_images: N.
        n_classes: C.

    Returns:
        [N] int64, on the device of `labels`.

    Raises:
        TypeError: Labels are not integers.
        ValueError: Not one per image, or one outside [0, C).
    """
    try:
        index = _native(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # strings, ragged lists, None
        kind = type(labels).__name__
        raise TypeError(f"`labels` must be integers, got {kind} ({error})") from error
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if not whole and index.numel():  # an empty list becomes an empty float tensor
        raise TypeError(f"`labels` must be integers, got {index.dtype}")
    if index.shape != (n_images,):
        raise ValueError(
            f"`labels` must hold one integer per image, expected shape ({n_images},), "
            f"got {tuple(index.shape)}"
        )
    index = index.long()
    if len(index) and not 0 <= (low := int(index.min())) <= (high := int(index.max())) < n_classes:
        raise ValueError(
            f"`labels` must lie in [0, {n_classes}) for {n_classes} class texts, got "
            f"{low if low < 0 else high}; pass one text per class"
        )
    return index


def _native(values: ArrayLike) -> Tensor:
    """A tensor; of an array in native byte order, without long doubles and negative strides."""
    if not isinstance(values, np.ndarray):
        return torch.as_tensor(values)
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in values.strides):
        values = values.copy()
    with warnings.catch_warnings():  # read-only memory is fine: nothing here writes to it
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.as_tensor(values)


def row_norms(rows: Tensor, name: str, first_row: int = 0) -> Tensor:
    """Lengths of the rows [n]; a zero or non-finite row is an error.

    Args:
        rows: [n, D] float.
        name: Of the argument, for the error.
        first_row: Position of the first row in the whole set, for the error.

    Raises:
        ValueError: A row is zero, or so short that its numbers have lost digits; names it.
        NotFiniteError: A row is not finite; names it.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    if not _usable(norms):  # the squares of huge or tiny numbers leave the range of float32
        norms = torch.linalg.vector_norm(rows.double(), dim=1).to(rows.dtype)
    if not _usable(norms):
        bad = int((~(norms > 0) | ~norms.isfinite()).nonzero()[0])
        error = ValueError if norms[bad] == 0 else NotFiniteError
        raise error(
            f"`{name}` must be finite and non-zero, row {first_row + bad} has norm "
            f"{float(norms[bad])}; check the model's weights and the input of that row"
        )
    tiny = torch.finfo(norms.dtype).tiny
    if len(norms) and 0 < float(norms.min()) < tiny:
        raise ValueError(
            f"`{name}` must have rows of a norm from {tiny:.3g} for {rows.dtype}, row "
            f"{first_row + int(norms.argmin())} has {float(norms.min()):.3g}; multiply all rows by "
            "a number, which changes no cosine"
        )
    return norms


def unit_rows(rows: Tensor, name: str) -> Tensor:
    """Rows [n, D] scaled to length 1, in float64.

    Raises:
        ValueError: As `row_norms`.
    """
    wide = rows.double()
    return wide / row_norms(wide, name)[:, None]


def _usable(norms: Tensor) -> bool:
    return len(norms) == 0 or 0 < float(norms.min()) <= float(norms.max()) < float("inf")


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
    scores = zero_shot_scores(image_embeds, text_embeds)
    index = as_labels(labels, *scores.shape)
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
    if len(texts) == 0 or images.shape[1] != texts.shape[1]:
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
