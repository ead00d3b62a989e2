"""Runs of many models, methods and tasks -> the prediction of a mixed model.

A linear mixed model: ``target = Σ_e u_e[group of the row] · x_e + noise``, every effect ``u`` drawn
from a normal distribution around 0 whose spread is set beforehand. The best linear unbiased
prediction (Henderson 1975, https://doi.org/10.2307/2529430) shrinks each group to what the others
say by as much as its number of runs asks for: without any run of a model its effect is 0, the first
run moves it, and many runs take over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """One effect: ``u[group] · column``, ``u`` normal with standard deviation `spread`.

    Attributes:
        column: What it multiplies; "one" is 1 throughout.
        by: Columns whose values together name the group; none: all rows are one group.
        spread: Standard deviation over groups, in units of target over column.
    """

    column: str
    by: tuple[str, ...]
    spread: float


@dataclass(frozen=True)
class Rows:
    """Runs as columns of length n.

    Attributes:
        numbers: Name -> [n] float64; "noise" is the standard deviation of the row's own noise.
        groups: Name -> [n] str; "task", "model" and so on.
        target: [n] float64; NaN where it is asked for.
    """

    numbers: Mapping[str, Floats]
    groups: Mapping[str, NDArray[np.str_]]
    target: Floats

    def __len__(self) -> int:
        return len(self.target)

    def take(self, rows: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(
            {name: column[rows] for name, column in self.numbers.items()},
            {name: column[rows] for name, column in self.groups.items()},
            self.target[rows],
        )


def predict(known: Rows, asked: Rows, effects: Sequence[Effect]) -> tuple[Floats, Floats]:
    """Best linear unbiased prediction of rows from others.

    Args:
        known: [n] rows with their targets; may be empty.
        asked: [m] rows.
        effects: Of the mixed model.

    Returns:
        [m] prediction, and [m] standard deviation of a new observation about it. Time is
        ``O(n³)``: for a few hundred rows, after runs of one cell are averaged.
    """
    own = asked.numbers["noise"] ** 2 + np.diag(_covariance(asked, asked, effects))
    if not len(known):
        return np.zeros(len(asked)), np.sqrt(own)
    among = _covariance(known, known, effects) + np.diag(known.numbers["noise"] ** 2)
    return _solve(among, _covariance(asked, known, effects), own, known.target)


def left_out(
    known: Rows, effects: Sequence[Effect], rows: NDArray[np.bool_], by: str
) -> tuple[Floats, Floats]:
    """Prediction of some of the rows from those of all other groups.

    Args:
        known: [n] rows with their targets.
        effects: Of the mixed model.
        rows: [n] which to predict.
        by: Column of the groups, such as "task".

    Returns:
        [n] predictions and [n] standard deviations as `predict`; NaN for the other rows.
    """
    points, scales = np.full(len(known), np.nan), np.full(len(known), np.nan)
    if not rows.any():
        return points, scales
    among = _covariance(known, known, effects) + np.diag(known.numbers["noise"] ** 2)
    precision = np.linalg.inv(among)
    weighted = precision @ known.target
    groups = known.groups[by]
    for group in sorted(set(groups[rows].tolist())):
        # Of normal variables with precision Q, those in b given all others have covariance Q_bb⁻¹
        # and lie Q_bb⁻¹ (Q y)_b below what was seen: no fit of its own for each group.
        own = np.flatnonzero(groups == group)
        covariance = np.linalg.inv(precision[np.ix_(own, own)])
        asked = rows[own]
        points[own[asked]] = (known.target[own] - covariance @ weighted[own])[asked]
        scales[own[asked]] = np.sqrt(np.maximum(np.diag(covariance), 1e-12))[asked]
    return points, scales


def _solve(among: Floats, across: Floats, own: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Conditional mean and standard deviation of normal variables, ``across`` [m, n]."""
    solved = np.linalg.solve(among, np.column_stack([target, across.T]))
    explained = np.einsum("mn,nm->m", across, solved[:, 1:])
    return across @ solved[:, 0], np.sqrt(np.maximum(own - explained, 1e-12))


def _covariance(one: Rows, other: Rows, effects: Sequence[Effect]) -> Floats:
    """[n, m] covariance of the rows' targets, their own noise apart."""
    total = np.zeros((len(one), len(other)))
    for effect in effects:
        term = np.outer(one.numbers[effect.column], other.numbers[effect.column])
        for name in effect.by:
            _, codes = np.unique(
                np.concatenate([one.groups[name], other.groups[name]]), return_inverse=True
            )
            term *= codes[: len(one), None] == codes[None, len(one) :]
        total += effect.spread**2 * term
    return total
