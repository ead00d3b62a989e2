"""Runs of many models, methods and tasks -> the prediction of a mixed model.

A linear mixed model: ``target = Σ_e u_e[group of the row] · x_e + noise``, every effect ``u`` drawn
from a normal distribution around 0 whose spread is set beforehand. The best linear unbiased
prediction (Henderson 1975, https://doi.org/10.2307/2529430) shrinks each group to what the others
say by as much as its number of runs asks for: without any run of a model its effect is 0, the first
run moves it, and many runs take over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ROUNDS = 5  # of reweighting at most


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
        numbers: Name -> [n] float64; "noise" is the standard deviation of the row's own noise, and
            "odd", where it is there, of what `heavy_tailed` adds to it.
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
    own = asked.numbers["noise"] ** 2 + np.diag(covariance(asked, asked, effects))
    if not len(known):
        return np.zeros(len(asked)), np.sqrt(own)
    among = covariance(known, known, effects) + np.diag(known.numbers["noise"] ** 2 + _odd(known))
    return _solve(among, covariance(asked, known, effects), own, known.target)


def left_out(known: Rows, among: Floats, rows: NDArray[np.bool_], by: str) -> tuple[Floats, Floats]:
    """Prediction of some of the rows from those of all other groups.

    Args:
        known: [n] rows with their targets.
        among: [n, n] `covariance` of `known` with itself.
        rows: [n] which to predict.
        by: Column of the groups, such as "task".

    Returns:
        [n] predictions and [n] standard deviations as `predict`, of a row that is not known to be
        odd; NaN for the other rows.
    """
    points, scales = np.full(len(known), np.nan), np.full(len(known), np.nan)
    odd = _odd(known)
    precision = np.linalg.inv(among + np.diag(known.numbers["noise"] ** 2 + odd))
    weighted = precision @ known.target
    # Of normal variables with precision Q, those in b given all others have covariance Q_bb⁻¹ and
    # lie Q_bb⁻¹ (Q y)_b below what was seen: no fit of its own for each group, and one inverse for
    # all groups of a size.
    _, codes, sizes = np.unique(known.groups[by], return_inverse=True, return_counts=True)
    for size in np.unique(sizes[codes[rows]]):
        of_size = np.flatnonzero(sizes[codes] == size)
        own = of_size[np.argsort(codes[of_size], kind="stable")].reshape(-1, size)
        covariance = np.linalg.inv(precision[own[:, :, None], own[:, None, :]])
        points[own] = known.target[own] - np.einsum("gij,gj->gi", covariance, weighted[own])
        variance = np.diagonal(covariance, axis1=1, axis2=2) - odd[own]
        scales[own] = np.sqrt(np.maximum(variance, 1e-12))
    points[~rows] = scales[~rows] = np.nan
    return points, scales


def heavy_tailed(known: Rows, among: Floats, by: str, dof: float) -> Rows:
    """The rows with the noise of odd groups widened, so that they count less for all others.

    Args:
        known: [n] rows with their targets.
        among: [n, n] `covariance` of `known` with itself.
        by: Column of the groups.
        dof: ν, of the tails: 1 lets an odd group count for almost nothing, infinite as any other.
    """
    every = np.ones(len(known), bool)
    _, codes = np.unique(known.groups[by], return_inverse=True)
    rows, odd = known, np.zeros(len(known))
    for _ in range(_ROUNDS):
        points, scales = left_out(rows, among, every, by)
        squares = surprises(rows, points, scales, every, by)[codes]
        # One over its weight; none counts for more than a task.
        more = np.maximum(1 + (squares - 1) / (dof + 1), 1.0)
        last, odd = odd, scales * np.sqrt(more - 1)
        rows = replace(known, numbers={**known.numbers, "odd": odd})
        if np.allclose(odd, last, rtol=0.05, atol=1e-6):
            break
    return rows


def surprises(
    known: Rows, points: Floats, scales: Floats, rows: NDArray[np.bool_], by: str
) -> Floats:
    """[G] mean squared miss of each group, sorted, in units of what was expected."""
    squares = (((known.target - points) / scales) ** 2)[rows]
    _, codes = np.unique(known.groups[by][rows], return_inverse=True)
    return np.asarray(np.bincount(codes, squares) / np.bincount(codes))


def _odd(known: Rows) -> Floats:
    """[n] variance that `heavy_tailed` adds."""
    return known.numbers.get("odd", np.zeros(len(known))) ** 2


def _solve(among: Floats, across: Floats, own: Floats, target: Floats) -> tuple[Floats, Floats]:
    """Conditional mean and standard deviation of normal variables, ``across`` [m, n]."""
    solved = np.linalg.solve(among, np.column_stack([target, across.T]))
    explained = np.einsum("mn,nm->m", across, solved[:, 1:])
    return across @ solved[:, 0], np.sqrt(np.maximum(own - explained, 1e-12))


def covariance(one: Rows, other: Rows, effects: Sequence[Effect]) -> Floats:
    """[n, m] covariance of the rows' targets, their own noise apart."""
    same: dict[tuple[str, ...], NDArray[np.bool_]] = {(): np.ones((len(one), len(other)), bool)}
    for by in sorted({effect.by for effect in effects}, key=len):
        for n, name in enumerate(by):
            if by[: n + 1] not in same:
                _, codes = np.unique(
                    np.concatenate([one.groups[name], other.groups[name]]), return_inverse=True
                )
                alike = codes[: len(one), None] == codes[None, len(one) :]
                same[by[: n + 1]] = same[by[:n]] & alike
    total = np.zeros((len(one), len(other)))
    for effect in effects:
        own = effect.spread * one.numbers[effect.column]
        total += np.outer(own, effect.spread * other.numbers[effect.column]) * same[effect.by]
    return total
