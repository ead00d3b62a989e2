"""Embeddings -> accuracy of a linear probe anchored at the zero-shot head.

It estimates how well a model can learn a task from the embeddings it has now. Across tasks it goes
with the accuracy after fine-tuning (Kornblith et al., arXiv 1805.08974).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from .embeddings import ArrayLike, as_labels, as_matrix, autocast_off, unit_rows

PENALTIES = tuple(10.0**power for power in (-4, -3, -2, -1, 0, 1, 2, 3))
STEPS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_Form = tuple[float, float]  # penalty and step
_FARTHEST = 16.0  # times the images
_LEAST = 32  # images in a part of the curve
_CHUNK = 4096 * 1024  # scores held at once


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy of a linear probe, and what it was measured on.

    Attributes:
        accuracy: Share of images that the probe classifies right, in [0, 1].
        standard_error: Of `accuracy`, sampling of the scored images only, a fraction.
        penalty: Strength λ chosen by leave-one-out log-loss; ``inf`` is the zero-shot classifier.
        n_train: Images that the probe was fitted to.
        n_scored: Images that `accuracy` is of.
        held_out: Whether they are other images; otherwise `accuracy` is leave-one-out.
        curve: Images fitted to -> accuracy on the same images, of nested balanced draws of about a
            quarter and a half of the training images, then of all.
        step: ``a``, chosen with `penalty`; 0 is the zero-shot classifier.
    """

    accuracy: float
    standard_error: float
    penalty: float
    n_train: int
    n_scored: int
    held_out: bool
    curve: tuple[tuple[int, float], ...] = ()
    step: float = 0.0

    def at(self, n_train: int | None) -> tuple[float, float]:
        """Accuracy and standard error, carried on to more training images.

        The error follows ``(1 - accuracy) · (n_train / self.n_train)^-b``, a power law; ``b`` in
        [0, 1] is the slope of log error over log images in `curve`. To its standard error half the
        difference between the slopes of the curve's two pieces is added, 0.05 at the least; 0.25
        where there is no curve. It goes no farther than 16 times the images.

        Args:
            n_train: Images that training will see; ``None``, or fewer than the probe saw: the
                accuracy as it was measured.
        """
        error = 1 - self.accuracy
        if n_train is None or n_train <= self.n_train or error <= 0:
            return self.accuracy, self.standard_error
        farther = math.log(min(n_train / self.n_train, _FARTHEST))
        slope, unsure = self._slope()
        carried = error * math.exp(-slope * farther)
        return 1 - carried, math.hypot(self.standard_error, carried * unsure * farther)

    def _slope(self) -> tuple[float, float]:
        """``b`` of the power law and its standard error."""
        points = [(math.log(n), math.log(1 - a)) for n, a in self.curve if a < 1]
        if len(points) < 2:
            return 0.0, 0.25
        pieces = [
            (one[1] - other[1]) / (other[0] - one[0]) for one, other in itertools.pairwise(points)
        ]
        (first, begin), (last, end) = points[0], points[-1]
        slope = min(max((begin - end) / (last - first), 0.0), 1.0)
        return slope, math.hypot(0.05, (max(pieces) - min(pieces)) / 2)


@autocast_off()
@torch.no_grad()
def linear_probe(
    image_embeds: ArrayLike,
    text_embeds: ArrayLike,
    labels: ArrayLike,
    *,
    logit_scale: float,
    held_out: tuple[ArrayLike, ArrayLike] | None = None,
) -> LinearProbe:
    """Fit a linear probe that starts at the zero-shot classifier, and score it.

    With unit rows ``x_i`` and ``t_c``, zero-shot logits ``z_i = s·x_i·t_c``, probabilities ``p_i =
    softmax(z_i)`` and one-hot labels ``y_i``, the probe's logits are ``z_i + a·W'x_i``, where ``W``
    solves the ridge regression ``min Σ ‖y_i - p_i - W'x_i‖² + λ‖W‖²``: a step along the gradient of
    the log-loss, preconditioned. ``a = 0`` is the zero-shot classifier (anchoring as in CLAP, arXiv
    2312.12730). What ``W`` would be without image i has a closed form (PRESS): the residual divided
    by ``1 - h_i``, ``h_i`` the leverage. The log-loss left out chooses λ and ``a``.

    It is *not* a forecast by itself, and not for ranking encoders. With ten images per class it
    underestimates what fine-tuning on all data reaches by 14 to 20 points. Methods that leave the
    towers nearly as they are (BitFit, CLIP-Adapter) reach only a part of it.

    Time is ``O(N·D² + D³)`` once, ``O(N·D·C)`` a penalty and ``O(N·C)`` a step of each; memory is
    linear in ``N·D + C·D + D²``.

    Args:
        image_embeds: [N, D] float, training images, any scale.
        text_embeds: [C, D] float, one per class, any scale.
        labels: [N] integers in [0, C).
        logit_scale: ``s``, the model's factor on cosines (not its logarithm), positive. It has no
            default: with another one the probe starts at another model's probabilities.
        held_out: Embeddings [M, D] and labels [M] to score on. ``None``: leave-one-out accuracy on
            the training images.

    Raises:
        TypeError: Embeddings are not float, or labels not integers.
        ValueError: Shapes do not match, fewer than two classes or images, at most one image of each
            class (captions), a label out of range, a zero or non-finite embedding, or a
            `logit_scale` that is not positive and finite.

    Example:
        >>> images = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.9, 1.0], [0.8, 1.0]])
        >>> linear_probe(images, torch.eye(2), torch.tensor([0, 0, 1, 1]), logit_scale=9.0).accuracy
        1.0
    """
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(
            f"`logit_scale` must be positive and finite, got {logit_scale}; pass `exp(logit_scale)`"
            " of the model"
        )
    texts = unit_rows(as_matrix(text_embeds, "text_embeds"), "text_embeds").float()  # [C, D]
    if len(texts) < 2:
        raise ValueError(f"`text_embeds` must hold at least 2 classes, got {len(texts)}")
    images, index = _checked(image_embeds, labels, texts, "image_embeds")
    if len(images) < 2:
        raise ValueError(f"`image_embeds` must hold at least 2 images, got {len(images)}")
    per_class = torch.bincount(index, minlength=len(texts))  # [C]
    if int(per_class.max()) < 2:
        raise ValueError(
            "`labels` must hold a class with at least 2 images, got at most 1 of each: leaving one "
            "out leaves nothing to learn; captions have no classes, so there is no linear probe"
        )
    missing = int((per_class == 0).sum())
    if missing:
        warnings.warn(
            f"{missing} of {len(texts)} classes have no training image: for these the probe is "
            "little better than the zero-shot classifier",
            stacklevel=2,
        )
    scored = None if held_out is None else _checked_pair(held_out, texts)
    accuracy, (penalty, step) = _fit_and_score(images, texts, index, logit_scale, scored)
    n = len(images if scored is None else scored[0])
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    order = balanced_order(index, len(texts))
    curve = []
    for part in (len(images) // 4, len(images) // 2):
        if part < max(2 * int((per_class > 0).sum()), _LEAST):
            continue  # what so few images teach says little of more
        rows = order[:part]
        found, _ = _fit_and_score(images[rows], texts, index[rows], logit_scale, scored)
        curve.append((part, found))
    curve.append((len(images), accuracy))
    return LinearProbe(
        accuracy, error, penalty, len(images), n, held_out is not None, tuple(curve), step
    )


def balanced_order(labels: Tensor, n_classes: int) -> Tensor:
    """[N] positions in which classes take turns, each class in a seeded random order.

    Args:
        labels: [N] integers in [0, n_classes).
        n_classes: Number of classes.
    """
    drawn = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    drawn = drawn.to(labels.device)
    turns = torch.zeros_like(labels)
    for c in range(n_classes):
        members = drawn[labels[drawn] == c]
        turns[members] = torch.arange(len(members), device=labels.device)
    return drawn[torch.argsort(turns[drawn], stable=True)]


def _fit_and_score(
    images: Tensor,
    texts: Tensor,
    labels: Tensor,
    scale: float,
    scored: tuple[Tensor, Tensor] | None,
) -> tuple[float, tuple[float, float]]:
    """Accuracy on other images, else leave-one-out; the penalty and the step."""
    ridge = _Ridge(images, texts, labels, scale)
    losses, correct = ridge.leave_one_out()
    if not all(map(math.isfinite, losses.values())):
        raise ValueError(
            "the linear probe did not converge: its leave-one-out log-loss is not finite; check "
            "`image_embeds` and `logit_scale`"
        )
    best = min(losses, key=lambda form: losses[form])
    if scored is None:
        return correct[best] / len(images), best
    return ridge.correct(*scored, *best) / len(scored[0]), best


class _Ridge:
    """The regression in the eigenbasis of ``X'X``, where every penalty costs one product."""

    def __init__(self, images: Tensor, texts: Tensor, labels: Tensor, scale: float) -> None:
        self._images, self._texts, self._labels, self._scale = images, texts, labels, scale
        self._rows = max(_CHUNK // len(texts), 1)
        gram = images.T.double() @ images.double()  # [D, D]
        values, basis = torch.linalg.eigh(gram)
        self._values = values.clamp_min(0.0)  # [D]
        self._basis = basis.to(images.dtype)  # [D, D]
        moment = images.new_zeros(images.shape[1], len(texts))
        for x, y in self._chunks(images, labels):
            moment += x.T @ (one_hot(y, len(texts)) - self._logits(x).softmax(1))
        self._moment = self._basis.T @ moment  # [D, C]
        # Relative to the mean eigenvalue: the same for any number of images.
        unit = float(self._values.mean())
        self.penalties = tuple(p * unit for p in PENALTIES)

    def leave_one_out(self) -> tuple[dict[_Form, float], dict[_Form, int]]:
        """Of each penalty and step: the summed log-loss left out, and images classified right."""
        losses: dict[_Form, float] = defaultdict(float)
        correct: dict[_Form, int] = defaultdict(int)

        def note(form: _Form, logits: Tensor, y: Tensor) -> None:
            losses[form] += float(cross_entropy(logits, y, reduction="sum"))
            correct[form] += int((logits.argmax(1) == y).sum())

        for x, y in self._chunks(self._images, self._labels):
            zero_shot = self._logits(x)
            lacking = one_hot(y, zero_shot.shape[1]) - zero_shot.softmax(1)
            rotated = x @ self._basis
            note((math.inf, 0.0), zero_shot, y)
            for penalty in self.penalties:
                shrunk = self._shrunk(penalty)
                leverage = (rotated**2 @ shrunk).clamp_max(1 - 1e-6)[:, None]  # [n, 1]
                fitted = (rotated * shrunk) @ self._moment
                left_out = lacking - (lacking - fitted) / (1 - leverage)
                for step in STEPS:
                    note((penalty, step), zero_shot + step * left_out, y)
        return losses, correct

    def correct(self, images: Tensor, labels: Tensor, penalty: float, step: float) -> int:
        """How many of other images are classified right."""
        weights = step * self._basis @ (self._shrunk(penalty)[:, None] * self._moment)  # [D, C]
        return sum(
            int(((self._logits(x) + x @ weights).argmax(1) == y).sum())
            for x, y in self._chunks(images, labels)
        )

    def _shrunk(self, penalty: float) -> Tensor:
        shrunk: Tensor = 1 / (self._values + penalty)  # [D]
        return shrunk.to(self._images.dtype)

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self._scale * (images @ self._texts.T)  # [n, C]
        return logits

    def _chunks(self, images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = (torch.split(rows, self._rows) for rows in (images, labels))
        return list(zip(*parts, strict=True))


def _checked(
    embeds: ArrayLike, labels: ArrayLike, texts: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    matrix = as_matrix(embeds, name)
    if matrix.shape[1] != texts.shape[1]:
        raise ValueError(
            f"`{name}` and `text_embeds` must have the same width, got {matrix.shape[1]} and "
            f"{texts.shape[1]}"
        )
    index = as_labels(labels, len(matrix), len(texts)).to(texts.device)
    return unit_rows(matrix, name).to(texts.device).float(), index


def _checked_pair(held_out: tuple[ArrayLike, ArrayLike], texts: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"`held_out` must be (embeddings, labels), got {type(held_out).__name__}")
    try:
        images, index = _checked(*held_out, texts, "held_out")
    except (TypeError, ValueError) as error:
        raise type(error)(f"`held_out`: {error}") from error
    if not len(images):
        raise ValueError("`held_out` must hold at least 1 image, got 0")
    return images, index
