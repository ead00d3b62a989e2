"""Saved runs -> a table to fit, and the run that is asked about in the same columns."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records.outcomes import Outcome
from .mixed_model import Floats
from .pooling import Pooled
from .runs import MIN_TASKS, Ask, Run, Runs, alike, n_tasks, task_key

# Beyond the recorded range by this many half-ranges (at the least: the unit), nothing is said.
_TOO_FAR = 5.0
_UNITS = {"iimm": 0.05, "log_learning_rate": math.log(2), "log_steps": math.log(2)}
_WORDS = {"iimm": "IIMM", "log_learning_rate": "learning rate", "log_steps": "number of steps"}


@dataclass(frozen=True)
class Table:
    """Saved runs, as columns of length n.

    Attributes:
        tasks, methods, models: [n] names.
        target: [n] float64, what is to be predicted.
        features: Name -> [n] float64, what it is predicted from.
    """

    tasks: NDArray[np.str_]
    methods: NDArray[np.str_]
    models: NDArray[np.str_]
    target: Floats
    features: Mapping[str, Floats]

    def content(self) -> tuple[object, ...]:
        """Hashable: two tables with the same one are the same."""
        columns = (self.tasks, self.methods, self.models, self.target)
        named = sorted(self.features.items())
        return (*(c.tobytes() for c in columns), *((k, v.tobytes()) for k, v in named))

    @cached_property
    def task_index(self) -> NDArray[np.int64]:
        """[n] positions in the sorted names of tasks."""
        return np.unique(self.tasks, return_inverse=True)[1]

    @cached_property
    def weights(self) -> Floats:
        """[n] so that the runs of one task under one method of one model weigh 1 together."""
        cells = list(zip(self.tasks, self.methods, self.models, strict=True))
        counts = Counter(cells)
        return np.array([1 / counts[cell] for cell in cells])


@dataclass(frozen=True)
class Question:
    """The run that is asked about: its method, model and features."""

    method: str
    model: str
    features: Mapping[str, float]


def tabulate(
    runs: Runs, ask: Ask, quantity: str, share: float
) -> tuple[Table, Question, list[Run]]:
    """The runs as a table with this quantity at this share as target, and the question beside it.

    A feature is there only if the run that is asked about and enough of the saved runs have
    it; rows that lack it are then left out.

    Args:
        runs: To tabulate.
        ask: The run that is asked about.
        quantity: One of `QUANTITIES`.
        share: Of the steps, in (0, 1]; 1 is the end.

    Returns:
        Table, question, and the rows that made it into the table.
    """
    rows = [run for run in runs.rows if run.at(quantity, share) is not None]
    if ask.off_target and quantity != "gain":
        same = alike(rows, ask)
        rows = same if n_tasks(same) >= MIN_TASKS else rows
    measured = [r for r in rows if None not in (r.outcome.iimm, r.outcome.inter, r.outcome.intra)]
    # IIMM does not compare across models.
    use_iimm = runs.own and math.isfinite(ask.iimm) and _most(measured, rows)
    rows = measured if use_iimm else rows
    # A base rate is what other people's recipes did, whatever this one is.
    known_recipe = {} if runs.base_rate else ask.recipe
    recipe = [name for name in ("learning_rate", "steps") if _is_positive(known_recipe.get(name))]
    for name in list(recipe):
        known = [run for run in rows if _is_positive(run.outcome.recipe.get(name))]
        if _most(known, rows) and any(run.outcome.method == ask.method for run in known):
            rows = known
        else:
            recipe.remove(name)
    outcomes = [run.outcome for run in rows]
    methods = np.array([o.method for o in outcomes], dtype=str)
    target = np.array([run.at(quantity, share) for run in rows], dtype=float)
    features = {"zero_shot_error": np.array([1 - o.zero_shot_accuracy for o in outcomes])}
    asked = {"zero_shot_error": 1 - ask.zero_shot_accuracy}
    if use_iimm:
        for name in ("iimm", "inter", "intra"):
            features[name] = np.array([getattr(o, name) for o in outcomes], dtype=float)
            asked[name] = getattr(ask, name)
    for name in recipe:
        logs = np.array([math.log(o.recipe[name]) for o in outcomes])
        # A learning rate means something within its method only.
        centre = {m: logs[methods == m].mean() for m in set(methods)}
        features[f"log_{name}"] = logs - np.array([centre[m] for m in methods])
        asked[f"log_{name}"] = math.log(ask.recipe[name]) - centre[ask.method]
    others = _same_task(outcomes, methods, target, ask)
    if others is not None:
        features["same_task"], asked["same_task"] = others
    table = Table(
        np.array([o.task for o in outcomes], dtype=str),
        methods,
        np.array([o.model_fingerprint for o in outcomes], dtype=str),
        target,
        features,
    )
    return table, Question(ask.method, ask.model, asked), rows


def with_pooled(
    table: Table, question: Question, rows: list[Run], pooled: Pooled | None
) -> tuple[Table, Question, list[Run]]:
    """The same with the pooled forecast as a feature, where enough of the runs have one."""
    known = [run for run in rows if pooled is not None and run in pooled.left_out]
    if pooled is None or not _most(known, rows):
        return table, question, rows
    keep = np.array([run in pooled.left_out for run in rows])
    features = {name: column[keep] for name, column in table.features.items()}
    features["pooled"] = np.array([pooled.left_out[run] for run in known])
    kept = Table(
        table.tasks[keep], table.methods[keep], table.models[keep], table.target[keep], features
    )
    asked = {**question.features, "pooled": pooled.prediction.point}
    return kept, replace(question, features=asked), known


def beyond(
    table: Table, question: Question, features: Iterable[str] = tuple(_UNITS)
) -> tuple[float, list[str]]:
    """How far the question lies outside the saved runs for its method.

    Args:
        table: Of the runs.
        question: Beside it.
        features: To look at.

    Returns:
        The factor ≥ 1 that intervals are widened by, infinite where nothing should be said; and
        what lies outside, in words.
    """
    rows = table.methods == question.method
    if not rows.any():
        rows = np.ones(len(table.tasks), bool)
    factor, words = 1.0, []
    for name in features:
        if name not in table.features:
            continue
        values, value = table.features[name][rows], question.features[name]
        low, high = float(values.min()), float(values.max())
        excess = max(low - value, value - high, 0.0) / max((high - low) / 2, _UNITS[name])
        if excess > 1e-6:
            words.append(f"{_WORDS[name]} lies outside the range of the saved runs")
            factor = math.inf if excess > _TOO_FAR else factor + excess
    return factor, words


def within(table: Table, question: Question, features: Iterable[str]) -> Question:
    """The question with these features moved into the saved runs' range: never extrapolated."""
    rows = table.methods == question.method
    moved = {
        name: float(np.clip(question.features[name], values.min(), values.max()))
        for name in features
        if name in table.features and len(values := table.features[name][rows])
    }
    return replace(question, features={**question.features, **moved})


def _same_task(
    rows: Sequence[Outcome], methods: Any, target: Floats, ask: Ask
) -> tuple[Floats, float] | None:
    """By how much other runs on a run's own task were above the mean of their methods.

    What another method did on the same task is the best predictor there is of gain; better still
    what this method did. Those runs alone are taken where the task was learnt by it before,
    and enough other tasks were learnt twice by one method for the error of doing so to be known.
    """
    tasks = np.array([task_key(o) for o in rows], dtype=str)
    mine = tasks == task_key(ask)
    if not ask.task or not mine.any():
        return None
    # Above the mean of the method on *other* tasks: a run's own end must not hide in its feature.
    usual = []
    for task, method in zip(tasks, methods, strict=True):
        others = (methods == method) & (tasks != task)
        usual.append(target[others].mean() if others.any() else target[methods == method].mean())
    above = target - np.array(usual)
    cells = Counter(zip(tasks, methods, strict=True))
    repeated = {task for (task, _), n in cells.items() if n > 1}
    again = bool((mine & (methods == ask.method)).any()) and len(repeated) >= MIN_TASKS
    values = np.zeros(len(rows))
    for i in range(len(rows)):
        others = (tasks == tasks[i]) & ((methods == methods[i]) == again)
        others[i] = False
        values[i] = above[others].mean() if others.any() else 0.0
    use = mine & (methods == ask.method) if again else mine
    return values, float(above[use].mean())


def _most(some: Sequence[Run], runs: Sequence[Run]) -> bool:
    """Whether leaving out the others is worth what these have."""
    return len(some) == len(runs) or n_tasks(some) >= max(MIN_TASKS, n_tasks(runs) / 2)


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max
