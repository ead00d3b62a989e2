"""Measured tasks -> the most different ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def most_different(features: Sequence[Sequence[float]], n: int) -> list[int]:
    """The n rows that lie farthest from one another, by farthest-point sampling.

    Each column is scaled to unit variance. The first is the row farthest from the mean; each
    further one has the largest distance to the nearest that is chosen.

    Args:
        features: [N, F] finite numbers, such as IIMM, headroom and zero-shot accuracy.
        n: At least 1.

    Returns:
        [min(n, N)] positions, in the order in which they were chosen; ties go to the first.

    Example:
        >>> most_different([[0.0], [0.1], [1.0], [0.5]], 3)
        [2, 0, 3]
    """
    rows = np.asarray(features, dtype=float)
    rows = (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9)
    chosen = [int(np.argmax(np.linalg.norm(rows, axis=1)))]
    while len(chosen) < min(n, len(rows)):
        gaps = np.linalg.norm(rows[:, None] - rows[chosen], axis=2).min(axis=1)
        gaps[chosen] = -1.0
        chosen.append(int(np.argmax(gaps)))
    return chosen
