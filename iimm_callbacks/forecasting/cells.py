"""Runs -> rows of the mixed model: what is known of each before it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..records.outcomes import OFF_TARGET_PROBE_SIZE
from .mixed_model import Rows
from .runs import Ask, Run

Extra = Callable[[Run | None], dict[str, float]]

# They leave the towers' weight matrices as they are.
LIGHT = frozenset(
    ("bitfit", "clip_adapter", "ia3", "l_lora", "p_tuning", "prefix_tuning", "prompt_tuning")
)
_SHARE_OF_LIGHT = 0.5
_MOST_CELLS = 600
_IMAGES = 2000  # of an accuracy, where their number is unknown
# Training over this many images adds nothing to the probe; over so many, all of `q`.
_SHORT, _LONG = 5_000, 128_000


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
    cell: Sequence[Run],
    quantity: str,
    target: Callable[[Run], float],
    more: Extra | None,
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
    ask: Ask,
    quantity: str,
    cells: Sequence[Sequence[Run]],
    more: Extra | None,
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
    share = 0.5 if seen is None else _budget(seen)
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


def _budget(seen: float) -> float:
    """0 for a short training, 1 for one as long as the published ones."""
    share = math.log(max(seen, 1.0) / _SHORT) / math.log(_LONG / _SHORT)
    return min(max(share, 0.0), 1.3)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
