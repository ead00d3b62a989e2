"""Embeddings -> `Measurement`: both similarities, IIMM and its standard error, in one pass.

The textbook form of the measure averages N(N-1)/2 image pairs. With the sums ``s = Σ x_i`` and
``τ = Σ t_c`` of the normalised embeddings the same averages are exact in O(N·D):

    S_intra = (s·s - N) / (N(N-1))
    S_inter = (s·τ - Σ x_i·t_{y_i}) / (N(C-1))
    IIMM    = (S_inter + S_intra) / 2

so an accumulator holds sums only, and chunks and ranks merge by addition.
Source: arXiv 2407.15731 (ICCV 2025). The authors' code (mit-ll/IIMM) has its local names "inter"
and "intra" swapped; the words here are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .embeddings import ArrayLike, as_labels, as_matrix, autocast_off, row_norms, unit_rows
from .results import Measurement

GROUPS = 32  # of the jackknife
# Which jackknife group an image belongs to depends on its position alone, so that any chunking
# gives the same standard error. A fixed shuffle, because data sets often come sorted by class.
_GROUP_OF = torch.randperm(1024, generator=torch.Generator().manual_seed(0)) % GROUPS
# Which rows share a float32 sum depends on the chunks, and its rounding averages out over many
# images only. By position, not by chunk size, so that any chunking does the same.
_EXACT = 4096
_CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**26}  # CPU: what stays in a core's cache


@torch.no_grad()
def iimm(
    image_embeds: ArrayLike, text_embeds: ArrayLike, labels: ArrayLike | None = None
) -> Measurement:
    """The Inter-Intra Modal Measure of a set of images and class texts.

    ``IIMM = (S_inter + S_intra) / 2`` with ``S_inter = 1/N Σ_i 1/(C-1) Σ_{c≠y_i} x_i·t_c`` and
    ``S_intra = 2/(N(N-1)) Σ_{i<j} x_i·x_j`` (arXiv 2407.15731), exact, in one pass over the images.

    Args:
        image_embeds: [N, D], N ≥ 2, any float dtype, any device, any scale (it is normalised here).
        text_embeds: [C, D], C ≥ 2, one embedding per class; for several prompt templates per class
            pass the normalised mean of the normalised template embeddings (the CLIP convention).
        labels: [N] integers in [0, C). ``None`` means captions: text i belongs to image i, C = N.

    Returns:
        The `Measurement`, Python floats, accumulated in float64.

    Raises:
        TypeError: An argument is not a float tensor or array, or labels are not integers.
        ValueError: Shapes do not match, fewer than two images or classes, a label outside [0, C),
            or a zero or non-finite embedding.

    Example:
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> m = iimm(images, texts, torch.tensor([0, 1, 1]))
        >>> round(m.inter, 6), round(m.intra, 6), round(m.iimm, 6)
        (0.2, 0.466667, 0.333333)
    """
    images = as_matrix(image_embeds, "image_embeds")
    accumulator = IIMMAccumulator(text_embeds)
    if labels is None and len(images) != accumulator.n_classes:
        raise ValueError(
            f"`labels=None` means that text i belongs to image i, but there are {len(images)} "
            f"images and {accumulator.n_classes} texts; pass `labels`, or one text per image"
        )
    accumulator.update(images, labels)
    return accumulator.compute()


class IIMMAccumulator:
    """`iimm` for streams and ranks: update with chunks, merge by addition, compute at the end.

    The state is 32 jackknife groups' sums of D numbers in float64 (131 kB at D = 512), whatever the
    number of images. Whole, chunked and merged agree to 1e-9.

    Attributes:
        state: [32, D + 2] float64: of each jackknife group the sum of its normalised images, of
            their cosines with the text of their class, and their number. It merges by addition,
            such as ``torch.distributed.all_reduce(accumulator.state)``.

    Args:
        text_embeds: [C, D], C ≥ 2, one embedding per class, any float dtype and scale.
        offset: Position of the first image to come in the whole set. A rank that holds images
            ``[start, stop)`` of a set passes ``start``; the standard error of the merged
            accumulator is then the one of a single pass.
        owners: [C] integers, where images have several captions each: the image that a text
            belongs to. Each image's captions count together as much as those of another one.

    Raises:
        TypeError: `text_embeds` is not a float tensor or array.
        ValueError: Fewer than two texts, or a zero or non-finite text embedding.

    Example:
        >>> texts = torch.eye(2)
        >>> first, second = IIMMAccumulator(texts), IIMMAccumulator(texts, offset=2)
        >>> first.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> second.update(torch.tensor([[0.6, 0.8]]), torch.tensor([1]))
        >>> first.merge(second)
        >>> round(first.compute().iimm, 6)
        0.333333
    """

    @torch.no_grad()
    @autocast_off()
    def __init__(
        self, text_embeds: ArrayLike, *, offset: int = 0, owners: Tensor | None = None
    ) -> None:
        texts = as_matrix(text_embeds, "text_embeds")
        if len(texts) < 2:
            raise ValueError(
                f"`text_embeds` must hold at least 2 classes, got {len(texts)}: IIMM compares "
                "images with the texts of wrong classes; add the other class names"
            )
        self._texts = unit_rows(texts, "text_embeds")  # [C, D]
        if owners is not None:  # cosines are linear: those with a mean are the mean of cosines
            n = int(owners.max()) + 1
            sums = self._texts.new_zeros(n, texts.shape[1]).index_add_(0, owners, self._texts)
            self._texts = sums / torch.bincount(owners, minlength=n)[:, None]
        self._position = offset
        self.state = torch.zeros(
            GROUPS, texts.shape[1] + 2, dtype=torch.float64, device=texts.device
        )

    @property
    def n_classes(self) -> int:
        """Number of class texts, C."""
        return len(self._texts)

    @torch.no_grad()
    @autocast_off()
    def update(self, image_embeds: ArrayLike, labels: ArrayLike | None = None) -> None:
        """Add a chunk of images.

        Args:
            image_embeds: [n, D], any float dtype and scale; n may be 0.
            labels: [n] integers in [0, C). ``None`` means captions: the image at position i of the
                whole set belongs to text i.

        Raises:
            TypeError: Not float embeddings, or not integer labels.
            ValueError: Shapes do not match, a label is out of range, a zero or non-finite
                embedding. The accumulator is then unchanged.
        """
        images = as_matrix(image_embeds, "image_embeds").to(self._texts.device)
        if images.shape[1] != self._texts.shape[1]:
            raise ValueError(
                f"`image_embeds` and `text_embeds` must have the same width, got "
                f"{images.shape[1]} and {self._texts.shape[1]}; pass the projected embeddings of "
                "the joint space"
            )
        if labels is None:
            labels = torch.arange(self._position, self._position + len(images))
        index = as_labels(labels, len(images), self.n_classes).to(images.device)
        # Work on copies so that a bad row half-way leaves the state as it was.
        state = self.state.clone()
        sums, correct, counts = _columns(state)
        texts = self._texts.to(torch.promote_types(images.dtype, torch.float32))
        for rows in _chunks(images):
            x = images[rows].to(texts.dtype)
            weights = 1 / row_norms(x, "image_embeds", first_row=rows.start)
            place = self._position + rows.start
            group, order, starts, bag_group = _layout(place % len(_GROUP_OF), len(x), x.device)
            exact = torch.float64 if place < _EXACT else x.dtype
            # embedding_bag reads each row once, where index_add or a one-hot product takes 3 to 5
            # times as long. It adds in the rows' dtype, so bags are small and added in float64.
            bags = torch.nn.functional.embedding_bag(
                order, x.to(exact), starts, mode="sum", per_sample_weights=weights.to(exact)[order]
            )
            sums.index_add_(0, bag_group, bags.double())
            cosines = (x * texts.index_select(0, index[rows])).sum(1) * weights
            correct.index_add_(0, group, cosines.double())
            counts += torch.bincount(group, minlength=GROUPS)
        self.state = state
        self._position += len(images)

    def merge(self, other: IIMMAccumulator) -> None:
        """Add what `other` has seen; both must have been made with the same text embeddings.

        Raises:
            ValueError: The text embeddings differ.
        """
        theirs = other._texts.to(self._texts.device)
        if theirs.shape != self._texts.shape or not torch.allclose(theirs, self._texts, atol=1e-5):
            raise ValueError(
                f"`other` must be made with the same text embeddings, got "
                f"{tuple(theirs.shape)} against {tuple(self._texts.shape)}, or other values"
            )
        self._position = max(self._position, other._position)
        self.state = self.state + other.state.to(self.state.device)

    def compute(self) -> Measurement:
        """The `Measurement` of all images so far.

        Raises:
            ValueError: Fewer than two images so far.
        """
        sums, correct, counts = (column.numpy() for column in _columns(self.state.cpu()))
        n = int(counts.sum())
        if n < 2:
            raise ValueError(
                f"`image_embeds` must hold at least 2 images, got {n}: the intra-modal term is a "
                "mean over pairs of distinct images"
            )
        tau = self._texts.double().sum(0).cpu().numpy()

        def terms(s: np.ndarray, k: float, m: float) -> tuple[float, float]:
            inter = (s @ tau - k) / (m * (self.n_classes - 1))
            intra = (s @ s - m) / (m * (m - 1))
            # Means of cosines: rounding must not carry them out of their range.
            return float(np.clip(inter, -1, 1)), float(np.clip(intra, -1, 1))

        s, k = sums.sum(0), correct.sum()
        inter, intra = terms(s, k, n)
        value = (inter + intra) / 2
        groups = [
            (counts[g], sum(terms(s - sums[g], k - correct[g], n - counts[g])) / 2)
            for g in range(GROUPS)
            if counts[g] and n - counts[g] >= 2
        ]
        return Measurement(value, inter, intra, _jackknife(value, n, groups), n, self.n_classes)


@torch.no_grad()
@autocast_off()
def drift_bound(
    image_embeds_before: ArrayLike,
    image_embeds_after: ArrayLike,
    text_embeds_before: ArrayLike,
    text_embeds_after: ArrayLike,
    labels: ArrayLike,
) -> float:
    """How far IIMM can have moved at most: ``|ΔIIMM| ≤ d + (d + e)/2``.

    ``d`` is the mean of ``‖x'_i - x_i‖`` over images, ``e`` the mean of ``‖t'_c - t_c‖`` over
    (image, wrong class) pairs, all embeddings normalised. It follows from the Wasserstein bound of
    arXiv 2407.15731, always holds, and is loose: a large bound does *not* say that IIMM moved.

    Args:
        image_embeds_before: [N, D], the same images in the same order as `image_embeds_after`.
        image_embeds_after: [N, D].
        text_embeds_before: [C, D], the same classes as `text_embeds_after`.
        text_embeds_after: [C, D].
        labels: [N] integers in [0, C).

    Returns:
        The bound, in [0, 4].

    Raises:
        TypeError: As `iimm`.
        ValueError: As `iimm`, or before and after differ in shape.

    Example:
        >>> x, t = torch.eye(2), torch.eye(2)
        >>> drift_bound(x, x, t, t, torch.tensor([0, 1]))
        0.0
    """
    moved = []
    for name, before, after in (
        ("image_embeds", image_embeds_before, image_embeds_after),
        ("text_embeds", text_embeds_before, text_embeds_after),
    ):
        pair = [as_matrix(m, f"{name}_{w}") for m, w in ((before, "before"), (after, "after"))]
        if pair[0].shape != pair[1].shape or len(pair[0]) < 2:
            raise ValueError(
                f"`{name}_before` and `{name}_after` must have one shape with at least 2 rows, "
                f"got {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
            )
        a, b = (unit_rows(m, f"{name}_{w}") for m, w in zip(pair, ("before", "after"), strict=True))
        moved.append(torch.linalg.vector_norm(b - a, dim=1))
    images, texts = moved
    index = as_labels(labels, len(images), len(texts)).to(texts.device)
    d = float(images.mean())
    e = float((texts.sum() - texts[index].mean()) / (len(texts) - 1))
    return d + (d + e) / 2


def _columns(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a state, as views: Σ x_i [G, D], Σ x_i·t_{y_i} [G] and the number of images [G]."""
    return state[:, :-2], state[:, -2], state[:, -1]


def _chunks(matrix: Tensor) -> Iterator[slice]:
    size = _CHUNK_BYTES.get(matrix.device.type, 2**26) // (4 * matrix.shape[1])
    step = max(GROUPS, 2 ** (max(size, 1).bit_length() - 1))  # a power of 2: few layouts
    return (slice(i, min(i + step, len(matrix))) for i in range(0, len(matrix), step))


@lru_cache(maxsize=64)  # whole chunks all have the same one
def _layout(phase: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For n images from a position: their groups, order by group, and bags of up to 8 in a group.

    Returns:
        group [n], order [n], first row of each bag in that order, group of each bag.
    """
    group = _GROUP_OF[(phase + torch.arange(n)) % len(_GROUP_OF)]
    order = group.argsort()
    first = torch.searchsorted(group[order], torch.arange(GROUPS))
    rank = torch.arange(n) - first[group[order]]
    starts = (rank % 8 == 0).nonzero().squeeze(1)
    layout = group, order, starts, group[order][starts]
    return tuple(t.to(device) for t in layout)  # type: ignore[return-value]


def _jackknife(value: float, n: int, groups: list[tuple[float, float]]) -> float:
    # Delete-m_j jackknife for groups of unequal size (Busing, Meijer & van der Leeden 1999).
    if len(groups) < 2:
        return float("nan")
    sizes, left_out = np.array(groups).T
    h = n / sizes
    pseudo = h * value - (h - 1) * left_out
    centre = len(groups) * value - float(((1 - 1 / h) * left_out).sum())
    return float(np.sqrt((np.square(pseudo - centre) / (h - 1)).mean()))
