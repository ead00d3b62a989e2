"""Measured tasks -> the most different ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
