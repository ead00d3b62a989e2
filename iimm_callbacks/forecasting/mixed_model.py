"""Runs of many models, methods and tasks -> rows of a mixed model -> its prediction.

A linear mixed model: ``target = Σ_e u_e[group of the row] · x_e + noise``, every effect ``u`` drawn
from a normal distribution around 0 whose spread is set beforehand. The best linear unbiased
prediction (Henderson 1975, https://doi.org/10.2307/2529430) shrinks each group to what the others
say by as much as its number of runs asks for: without any run of a model its effect is 0, the first
run moves it, and many runs take over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..records.outcomes import OFF_TARGET_PROBE_SIZE
from .runs import Ask, Run

Floats = NDArray[np.float64]
Extra = Callable[[Run | None], dict[str, float]]

_ROUNDS = 5  # of reweighting at most
# They leave the towers' weight matrices as they are.
LIGHT = frozenset(
    ("bitfit", "clip_adapter", "ia3", "l_lora", "p_tuning", "prefix_tuning", "prompt_tuning")
)
_SHARE_OF_LIGHT = 0.5
_MOST_CELLS = 600
_IMAGES = 2000  # of an accuracy, where their number is unknown
# Training over this many images adds nothing to the probe; over so many, all of `q`.
_SHORT, _LONG = 5_000, 128_000


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
    across = covariance(asked, known, effects)
    solved = np.linalg.solve(among, np.column_stack([known.target, across.T]))
    explained = np.einsum("mn,nm->m", across, solved[:, 1:])
    return across @ solved[:, 0], np.sqrt(np.maximum(own - explained, 1e-12))


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


# --- runs -> rows ---


def group(runs: Sequence[Run], ask: Ask) -> list[list[Run]]:
    """Runs that differ in nothing but seed and learning rate together, the most relevant first.

    Args:
        runs: Of any models.
        ask: The run that is asked about.

    Returns:
        At most 600 cells: a mixed model's time grows with their third power.
    """
    cells: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        o = run.outcome
        key = (o.model_fingerprint, o.task, o.method, o.recipe.get("steps"))
        cells.setdefault(key, []).append(run)
    ranked = sorted(
        cells.values(),
        key=lambda cell: (
            cell[0].outcome.model_fingerprint != ask.model,
            cell[0].outcome.method != ask.method,
        ),
    )
    return ranked[:_MOST_CELLS]


def describe(
    cell: Sequence[Run], quantity: str, target: Callable[[Run], float], more: Extra | None
) -> dict[str, float | str]:
    """A cell as a row of the mixed model.

    Args:
        cell: Runs.
        quantity: "gain", "forgetting" or "worst".
        target: Run -> what is to be predicted of it.
        more: Run -> further numbers; ``None``: none.
    """
    o = cell[0].outcome
    row = _facts(
        o.source or o.model_fingerprint, o.model_fingerprint, o.method, o.task,
        _mean([run.outcome.zero_shot_accuracy for run in cell]),
        o.linear_probe_accuracy, o.linear_probe_standard_error, _seen(o.recipe, bool(o.source)),
        n_images=_n_images(quantity, o.n_images, len(o.off_target_before)), n_runs=len(cell),
    )  # fmt: skip
    if more is not None:
        described = [more(run) for run in cell]
        row |= {name: _mean([d[name] for d in described]) for name in described[0]}
    row["target"] = _mean([target(run) for run in cell])
    return row


def describe_ask(
    ask: Ask, quantity: str, cells: Sequence[Sequence[Run]], more: Extra | None
) -> dict[str, float | str]:
    """The run that is asked about as a row, its target NaN.

    Args:
        ask: The run.
        quantity: As `describe`.
        cells: Of the saved runs. Where the budget of `ask` is unknown, the model's usual one is
            taken.
        more: As `describe`, of None.
    """
    probe, seen = ask.linear_probe_accuracy, _seen(ask.recipe, False)
    if seen is None:  # as long as the model was trained before
        own = [run.outcome for cell in cells for run in cell]
        past = [_seen(o.recipe, False) for o in own if o.model_fingerprint == ask.model]
        known = [number for number in past if number is not None]
        seen = float(np.median(known)) if known else None
    row = _facts(
        ask.model, ask.model, ask.method, ask.task or "\n", ask.zero_shot_accuracy,
        probe if math.isfinite(probe) else None, ask.linear_probe_standard_error,
        seen, n_images=_n_images(quantity, ask.n_images, len(ask.off_target)), n_runs=1,
    )  # fmt: skip
    if more is not None:
        row |= more(None)
    return row | {"target": math.nan}


def _facts(
    world: str,
    model: str,
    method: str,
    task: str,
    zero_shot: float,
    probe: float | None,
    probe_error: float | None,
    seen: float | None,
    *,
    n_images: int | None,
    n_runs: int,
) -> dict[str, float | str]:
    """A row of the mixed model but for its target."""
    light = method in LIGHT
    error = 1 - (zero_shot if probe is None else probe)
    way = 1 - zero_shot - error
    share = 0.5
    if seen is not None:  # 0 for a short training, 1 for one as long as the published ones
        share = math.log(max(seen, 1.0) / _SHORT) / math.log(_LONG / _SHORT)
        share = min(max(share, 0.0), 1.3)
    return {
        "world": world,
        "model": model,
        "method": method,
        "task": task,
        "kind": "light" if light else "tower",
        "lesson": f"{model}\n{task}",
        "run": f"{model}\n{method}\n{task}",
        "one": 1.0,
        "zero_shot_error": 1 - zero_shot,
        "error": error,
        "long_error": share * error,
        "unknown_error": error if seen is None else 0.0,
        "tower_way": 0.0 if light else way,
        "light_way": way if light else 0.0,
        "probe_noise": (probe_error or 0.0) * (_SHARE_OF_LIGHT if light else 1.0),
        # What tasks differ by: the more, the further there is to go.
        "size": math.sqrt(0.005**2 + (0.15 * error) ** 2 + (0.1 * max(way, 0.0)) ** 2),
        "way": way * (_SHARE_OF_LIGHT if light else 1.0),
        "noise": 0.4 / math.sqrt((n_images or _IMAGES) * n_runs),
    }


def _n_images(quantity: str, n_images: int | None, n_off_target: int) -> int | None:
    """Images that a quantity is measured on, where that is known."""
    if quantity == "gain":
        return n_images or None
    return OFF_TARGET_PROBE_SIZE * (max(n_off_target, 1) if quantity == "forgetting" else 1)


def as_rows(facts: Sequence[Mapping[str, float | str]]) -> Rows:
    """Rows of the mixed model from what `describe` gave of each."""
    names = list(facts[0]) if facts else []
    words = ("world", "model", "method", "task", "kind", "lesson", "run")
    numbers = {n: np.array([f[n] for f in facts], dtype=float) for n in names if n not in words}
    groups = {n: np.array([f[n] for f in facts], dtype=str) for n in names if n in words}
    return Rows(numbers, groups, numbers.pop("target"))


def _seen(recipe: Mapping[str, object], published: bool) -> float | None:
    """Images that training shows, repetitions counted; None where it is not known.

    Published runs whose budget is not stated are taken for as long as the others of their source.
    """
    steps, batch = recipe.get("steps"), recipe.get("batch_size", 32)
    if isinstance(steps, int | float) and isinstance(batch, int | float) and steps > 0 < batch:
        return float(steps * batch)
    return float(_LONG) if published else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
