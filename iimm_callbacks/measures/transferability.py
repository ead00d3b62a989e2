"""Image embeddings + labels -> transfer scores: what IIMM is to be measured against.

H-Score, GBC, LogME, TransRate and EMMS, written from the papers' formulas. They were made to rank
*source models* for one task. Across tasks of one model H-Score, GBC and TransRate also follow the
number of classes and of images per class, whatever the embeddings: H-Score and GBC sum over classes
or pairs of classes, and the coding rate of a class with fewer images than dimensions is short of
those. Only EMMS sees texts, and it does not know the zero-shot accuracy either; none was made for
forgetting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

Floats = NDArray[np.float64]

EPSILON = 1e-4  # of TransRate, as in its paper's listing
N_COMPONENTS = 64  # of GBC's PCA, as in its paper
ITERATIONS = 100  # of LogME's fixed point; a handful is the rule


def h_score(embeds: ArrayLike, labels: ArrayLike) -> float:
    """How much of the embeddings' variance lies between classes, each direction counting the same.

    ``H = tr(cov(f)⁺ cov(E[f|y]))``: Bao et al. 2019, "An Information-Theoretic Approach to
    Transferability in Task Transfer Learning" (arXiv 2212.10082); ⁺ is the pseudo-inverse.

    Args:
        embeds: [N, D] floats; any invertible linear map of them gives the same score.
        labels: [N] class labels.

    Returns:
        In [0, min(D, C - 1)]; higher is said to transfer better. *Not* for N near D or below, where
        any labels separate, nor for tasks with different numbers of classes, its upper bound.

    Raises:
        ValueError: Shapes do not match, a value is not finite, or fewer than two classes.
    """
    features, index, counts = _checked(embeds, labels)
    features = features - features.mean(0)
    means = _class_means(features, index, counts)
    covariance = features.T @ features / len(features)  # [D, D]
    between = (means * counts[:, None]).T @ means / len(features)  # [D, D]
    inverse = np.linalg.pinv(covariance, rcond=1e-10, hermitian=True)
    return float(np.sum(inverse * between))


def gbc(embeds: ArrayLike, labels: ArrayLike) -> float:
    """How little the classes overlap, each taken for a spherical Gaussian.

    ``GBC = -Σ_{a≠b} exp(-B(a, b))`` over ordered pairs of classes, with the Bhattacharyya distance
    ``B = ‖µ_a - µ_b‖²/(8 σ²) + D/2 · ln(σ²/(σ_a σ_b))``, ``σ² = (σ_a² + σ_b²)/2``: Pándy et al.
    2022 (arXiv 2111.12780), *spherical* covariances after PCA to 64 dimensions. (The code in
    google-research's `stable_transfer` has D = 1 in the logarithm's factor; this is the formula.)

    Args:
        embeds: [N, D] floats; shift, rotation and scale make no difference.
        labels: [N] class labels.

    Returns:
        In [-C(C - 1), 0]; higher (nearer 0) is said to transfer better. *Not* for tasks with
        different numbers of classes, whose sums have different lengths.

    Raises:
        ValueError: Shapes do not match, a value is not finite, or fewer than two classes.
    """
    features, index, counts = _checked(embeds, labels)
    left, singular, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    features = left[:, :N_COMPONENTS] * singular[:N_COMPONENTS]  # principal components
    means = _class_means(features, index, counts)
    dim = features.shape[1]
    squares = ((features - means[index]) ** 2).mean(1)
    variances = np.bincount(index, squares) / counts  # [C], of one dimension
    # A class of identical images has none: a floor relative to the whole, so that scale is free.
    variances = np.maximum(variances, 1e-6 * features.var(0).mean())
    middle = (variances[:, None] + variances) / 2  # [C, C]
    apart = ((means[:, None] - means) ** 2).sum(2)  # [C, C]
    logs = np.log(variances)
    distance = apart / (8 * middle) + dim / 2 * (np.log(middle) - (logs[:, None] + logs) / 2)
    overlap = np.exp(-distance)
    return float(np.trace(overlap) - overlap.sum())


def logme(embeds: ArrayLike, labels: ArrayLike) -> float:
    """How probable the labels are under the best Bayesian linear model of the embeddings.

    ``L = 1/(C·N) Σ_c max_{α,β} ln p(y_c | F, α, β)`` with one-against-rest ``y_c`` in {0, 1}, prior
    ``w ~ N(0, 1/α)``, noise ``1/β`` and

    ``ln p = N/2 ln β + D/2 ln α - N/2 ln 2π - β/2 ‖Fm - y‖² - α/2 m·m - 1/2 ln|A|``,
    ``A = αI + βFᵀF``, ``m = βA⁻¹Fᵀy``: You et al. 2021 (arXiv 2102.11005). α and β come from
    MacKay's fixed point ``γ = Σ βs/(α + βs)``, ``α = γ/m·m``, ``β = (N - γ)/‖Fm - y‖²``, where s
    are the eigenvalues of ``FᵀF``. As in the paper there is no intercept.

    Args:
        embeds: [N, D] floats; a rotation makes no difference, nor does scale.
        labels: [N] class labels.

    Returns:
        Nats per image; higher is said to transfer better. *Not* for tasks with different class
        balance: rarer classes are easier to call by "no".

    Raises:
        ValueError: Shapes do not match, a value is not finite, or fewer than two classes.
    """
    features, index, counts = _checked(embeds, labels)
    targets = np.eye(len(counts))[index]  # [N, C]
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    keep = singular > 1e-10 * singular[0]
    spectrum, within = singular[keep] ** 2, (left[:, keep].T @ targets) ** 2  # [R], [R, C]
    # What no linear map of the embeddings can reach; rounding must not make it negative.
    beyond = np.maximum((targets**2).sum(0) - within.sum(0), 0)
    pairs = zip(within.T, beyond, strict=True)
    return float(np.mean([_evidence(spectrum, w, b, *features.shape) for w, b in pairs]))


def transrate(embeds: ArrayLike, labels: ArrayLike) -> float:
    """How many nats the labels save when the embeddings are coded up to a distortion.

    ``T = R(Z, ε) - Σ_c n_c/N R(Z_c, ε)`` with ``R(Z, ε) = 1/2 ln|I + ZᵀZ/(nε)|``, Z centred over
    all classes, ``ε = 1e-4``: Huang et al. 2022 (arXiv 2106.09362). (Its listing takes 1/C instead
    of n_c/N, the same for balanced classes; with n_c/N it cannot be negative.)

    Args:
        embeds: [N, D] floats; their scale matters, since ε is absolute.
        labels: [N] class labels.

    Returns:
        At least 0; higher is said to transfer better. *Not* for tasks with different numbers of
        images per class: below D, fewer of them make a class look cheaper to code.

    Raises:
        ValueError: Shapes do not match, a value is not finite, or fewer than two classes.
    """
    features, index, counts = _checked(embeds, labels)
    features = features - features.mean(0)
    rates = [_coding_rate(features[index == c]) for c in range(len(counts))]
    return _coding_rate(features) - float(np.dot(counts / len(features), rates))


def emms(embeds: ArrayLike, labels: ArrayLike, texts: ArrayLike) -> float:
    """How well a linear map of the images' embeddings meets those of their labels.

    ``EMMS = -min_{W, t} ‖X W - Σ_k t_k Z_k‖²/N``, t in the simplex, with Z_k the images' labels as
    the k-th text encoder embeds them: Meng et al. 2023 (arXiv 2308.06262). They alternate between W
    and t. For any t the best W leaves ``R_k = Z_k - X X⁺ Z_k``, so here t is the shortest point
    ``Σ_k t_k R_k`` of a convex hull, which non-negative least squares finds at once.

    The paper takes the texts of several large encoders. Which ones is a choice: with the model's
    own class embeddings, one encoder, t is 1 and the score a least-squares error.

    Args:
        embeds: [N, D] floats; any invertible linear map of them gives the same score.
        labels: [N] integers in [0, C).
        texts: [C, E] or [K, C, E] floats, the class texts by each encoder; their scale matters.

    Returns:
        At most 0; higher is said to transfer better. *Not* for N near D or below, where any labels
        are met, nor for tasks whose class texts lie differently far apart.

    Raises:
        ValueError: As `h_score`, or `texts` do not suit the labels.

    Example:
        >>> round(emms([[1.0], [1.0]], [0, 1], [[0.0], [2.0]]), 6)  # 1 for both: off by 1 each
        -1.0
    """
    features, _, _ = _checked(embeds, labels)
    index, targets = np.asarray(labels), np.asarray(texts, dtype=np.float64)
    targets = targets[None] if targets.ndim == 2 else targets  # [K, C, E]
    if targets.ndim != 3 or not np.isfinite(targets).all():
        raise ValueError(
            f"`texts` must be [C, E] or [K, C, E] and finite, got shape {targets.shape}"
        )
    if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= targets.shape[1]:
        raise ValueError(
            f"`labels` must be integers in [0, {targets.shape[1]}), one for each class of `texts`, "
            f"got {index.min()} to {index.max()}"
        )
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    basis = left[:, singular > 1e-10 * singular[0]]  # [N, R]
    beyond = targets[:, index]  # [K, N, E]
    beyond = (beyond - basis @ (basis.T @ beyond)).reshape(len(targets), -1)
    gram = beyond @ beyond.T  # [K, K]
    # min t'Gt + (1 - Σt)² over t >= 0 has the direction of the best t in the simplex.
    values, vectors = np.linalg.eigh(gram / max(float(np.trace(gram)), 1e-300))
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    goal = np.append(np.zeros(len(gram)), 1.0)
    share, _ = optimize.nnls(np.vstack([root, np.ones(len(gram))]), goal)
    share = share / share.sum()
    return -max(float(share @ gram @ share), 0.0) / len(features)


SCORES: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "H-Score": h_score,
    "GBC": gbc,
    "LogME": logme,
    "TransRate": transrate,
}


def _checked(embeds: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[Any], NDArray[Any]]:
    """Float64 embeddings [N, D], class index [N] from 0 without gaps, images per class [C]."""
    features = np.asarray(embeds, dtype=np.float64)
    labels = np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "`embeds` must be [N, D] and `labels` [N], got shapes "
            f"{features.shape} and {labels.shape}"
        )
    if not np.isfinite(features).all():
        raise ValueError("`embeds` must be finite")
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"`labels` must hold at least 2 classes, got {len(classes)}")
    return features, index, counts


def _class_means(features: Floats, index: NDArray[Any], counts: NDArray[Any]) -> Floats:
    means: Floats = np.eye(len(counts))[index].T @ features / counts[:, None]  # [C, D]
    return means


def _coding_rate(features: Floats) -> float:
    n, dim = features.shape
    return 0.5 * float(np.linalg.slogdet(np.eye(dim) + features.T @ features / (n * EPSILON))[1])


def _evidence(spectrum: Floats, within: Floats, beyond: float, n: int, dim: int) -> float:
    """Maximum log evidence per image of one target.

    In the embeddings' singular basis all is diagonal: `spectrum` [R] are the eigenvalues of FᵀF,
    `within` [R] the target's squared coordinates there, `beyond` its squared length outside.
    """
    alpha, beta = 1 / spectrum.mean(), 1.0  # a start in the embeddings' own unit: scale is free
    # A target that is met exactly, or not at all, has no maximum: floors in the data's own units.
    least_error, least_norm = 1e-12 * n, 1e-12 / spectrum.mean()
    for _ in range(ITERATIONS):
        shrunk = alpha + beta * spectrum
        norm = (beta**2 * spectrum * within / shrunk**2).sum()  # m·m
        error = ((alpha / shrunk) ** 2 * within).sum() + beyond  # ‖Fm - y‖²
        gamma = (beta * spectrum / shrunk).sum()
        before = alpha / beta
        alpha, beta = gamma / max(norm, least_norm), (n - gamma) / max(error, least_error)
        if abs(alpha / beta / before - 1) < 1e-6:
            break
    shrunk = alpha + beta * spectrum
    norm = (beta**2 * spectrum * within / shrunk**2).sum()
    error = ((alpha / shrunk) ** 2 * within).sum() + beyond
    # ln|A| has (dim - R) more eigenvalues, all α: they cancel against D/2 ln α.
    log_determinant = np.log(shrunk).sum() + (dim - len(spectrum)) * np.log(alpha)
    evidence = n * np.log(beta) + dim * np.log(alpha) - n * np.log(2 * np.pi)
    return float((evidence - beta * error - alpha * norm - log_determinant) / (2 * n))
