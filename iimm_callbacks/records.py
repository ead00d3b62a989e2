"""Which runs on record a forecast may rest on, and what can be read from them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .candidates import MIN_TASKS, Floats, Question, Table
from .outcomes import Outcome

_TOY = "sample/model"  # the shipped one: its runs say nothing of others
QUANTITIES = ("gain", "forgetting", "worst")
# Beyond the recorded range by this many half-ranges (at the least: the unit), nothing is said.
_TOO_FAR = 5.0
_UNITS = {"iimm": 0.05, "log_learning_rate": math.log(2), "log_steps": math.log(2)}
_WORDS = {"iimm": "IIMM", "log_learning_rate": "learning rate", "log_steps": "number of steps"}


@dataclass(frozen=True)
class Ask:
    """What is known of the run that is asked about, before it begins.

    Attributes:
        method: Fine-tuning method.
        model: `model_fingerprint`.
        zero_shot_accuracy: On the task, a fraction.
        iimm, inter, intra: The measure of the untouched model; NaN where it is not known.
        n_images: Of the measure.
        task, task_fingerprint: Where known, past runs on the same task are used.
        recipe: Where known, ``learning_rate`` and ``steps`` are compared with those on record.
        off_target: Names of the off-target tasks, where known.
    """

    method: str
    model: str
    zero_shot_accuracy: float
    iimm: float
    inter: float
    intra: float
    n_images: int
    task: str = ""
    task_fingerprint: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    off_target: tuple[str, ...] = ()


class Run:
    """An outcome, read for forecasting.

    Attributes:
        outcome: The outcome.
        off_target: Its off-target tasks.
        guarded: These and the task itself: the same set where every task is guarded by all others.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.off_target = frozenset(outcome.off_target_before)
        self.guarded = self.off_target | {outcome.task}
        self._looks = sorted(outcome.trajectory, key=lambda look: look["share"])
        self._known: dict[tuple[str, float], float | None] = {}

    def at(self, quantity: str, share: float) -> float | None:
        """What the run had gained or lost at this share of its steps, interpolated between looks.

        None where it has no looks, none so late, or no off-target tasks; 1 is the end.
        """
        key = quantity, share
        if key not in self._known:
            self._known[key] = self._read(quantity, share)
        return self._known[key]

    def noise_at(self, quantity: str, share: float) -> float | None:
        """Standard error of the look next to this share, where it is on record."""
        looks = [look for look in self._looks if f"{quantity}_se" in look]
        if not looks:
            return None
        return min(looks, key=lambda look: abs(look["share"] - share))[f"{quantity}_se"]

    def _read(self, quantity: str, share: float) -> float | None:
        if share >= 1:
            end: float | None = getattr(self.outcome, quantity)
            return end
        looks = [look for look in self._looks if quantity in look]
        if not looks or looks[-1]["share"] < share:
            return None
        shares = [0.0, *(look["share"] for look in looks)]
        return float(np.interp(share, shares, [0.0, *(look[quantity] for look in looks)]))


@dataclass(frozen=True)
class Runs:
    """The runs a forecast rests on.

    Attributes:
        rows: Complete runs.
        label: In words.
        own: Whether they are all of the model that is asked about.
        base_rate: Whether they are published figures of other people's models.
        notes: What the reader should know about them.
        repeats: Whether they are all of the very task and method that is asked about.
        other_off_target: Whether too few were probed on the off-target tasks that are asked about.
    """

    rows: list[Run]
    label: str
    own: bool
    base_rate: bool
    notes: tuple[str, ...]
    repeats: bool = False
    other_off_target: bool = False


def choose(record: Sequence[Run], base_rates: Sequence[Run], ask: Ask) -> Runs:
    """The model's own runs; failing these, all runs on record; failing these, base rates.

    Args:
        record: Complete runs on record.
        base_rates: Published figures.
        ask: The run that is asked about.

    Returns:
        `Runs`; without rows, where nothing suits, and the label then says why.
    """
    own = [run for run in record if run.outcome.model_fingerprint == ask.model]
    notes = _contradictions(record, own, ask)
    if _n_tasks(own) >= MIN_TASKS:
        n = len([run for run in own if run.outcome.method == ask.method])
        label = f"{_count(own)} of this model, {n} of them under method {ask.method!r}"
        other = bool(ask.off_target) and _n_tasks(_alike(own, ask)) < MIN_TASKS
        if other and any(run.off_target for run in own):
            notes.append(
                "the off-target tasks on record are not those of this run, so its forgetting may "
                "differ by more than the interval"
            )
        notes += _unseen(own, ask)
        return Runs(own, label, True, False, tuple(notes), other_off_target=other)
    notes.append(_too_few(own))
    repeats = [
        run
        for run in own
        if run.outcome.method == ask.method and _task_key(run.outcome) == _task_key(ask)
    ]
    if len(repeats) > 1:
        label = f"{_count(repeats)} of this model on this very task under method {ask.method!r}"
        return Runs(repeats, label, True, False, tuple(notes), repeats=True)
    real = [run for run in record if run.outcome.model != _TOY]
    if _n_tasks(real) >= MIN_TASKS:
        models = len({run.outcome.model_fingerprint for run in real})
        label = f"{_count(real)} of {models} model{'s' if models > 1 else ''}"
        return Runs(real, label, False, False, (*notes, *_unseen(real, ask)))
    published = [run for run in base_rates if run.outcome.method == ask.method]
    if published:
        models = len({run.outcome.model_fingerprint for run in published})
        label = (
            f"base rates: {_count(published)} of {models} CLIP model{'s' if models > 1 else ''}, "
            "published elsewhere, with recipes of their own"
        )
        return Runs(published, label, False, True, tuple(notes))
    return Runs([], f"no forecast: {'; '.join(notes)}", False, False, ())


def tabulate(
    runs: Runs, ask: Ask, quantity: str, share: float
) -> tuple[Table, Question, list[Run]]:
    """The runs as a table with this quantity at this share as target, and the question beside it.

    A feature is there only if the run that is asked about and enough of the runs on record have
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
        alike = _alike(rows, ask)
        rows = alike if _n_tasks(alike) >= MIN_TASKS else rows
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
    same = _same_task(outcomes, methods, target, ask)
    if same is not None:
        features["same_task"], asked["same_task"] = same
    table = Table(
        np.array([o.task for o in outcomes], dtype=str),
        methods,
        np.array([o.model_fingerprint for o in outcomes], dtype=str),
        target,
        features,
    )
    return table, Question(ask.method, ask.model, asked), rows


def beyond(
    table: Table, question: Question, features: Iterable[str] = tuple(_UNITS)
) -> tuple[float, list[str]]:
    """How far the question lies outside what is on record for its method.

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
            words.append(f"{_WORDS[name]} lies outside the range on record")
            factor = math.inf if excess > _TOO_FAR else factor + excess
    return factor, words


def within(table: Table, question: Question, features: Iterable[str]) -> Question:
    """The question with these features moved into the range on record: never extrapolated."""
    rows = table.methods == question.method
    moved = {
        name: float(np.clip(question.features[name], values.min(), values.max()))
        for name in features
        if name in table.features and len(values := table.features[name][rows])
    }
    return replace(question, features={**question.features, **moved})


def _alike(runs: Sequence[Run], ask: Ask) -> list[Run]:
    """The runs with the off-target tasks that are asked about."""
    tasks = frozenset(ask.off_target)
    return [run for run in runs if run.off_target == tasks or run.guarded == tasks | {ask.task}]


def _same_task(
    rows: Sequence[Outcome], methods: Any, target: Floats, ask: Ask
) -> tuple[Floats, float] | None:
    """By how much other runs on a run's own task were above the mean of their methods.

    What another method did on the same task is the best predictor there is of gain; better still
    what this very method did. Those runs alone are taken where the task was learnt by it before,
    and enough other tasks were learnt twice by one method for the error of doing so to be known.
    """
    tasks = np.array([_task_key(o) for o in rows], dtype=str)
    mine = tasks == _task_key(ask)
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


def _task_key(run: Outcome | Ask) -> str:
    return f"{run.task}\n{run.task_fingerprint}"


def _too_few(own: Sequence[Run]) -> str:
    if not own:
        return "no complete run of this model is on record"
    if len(own) >= MIN_TASKS:
        tasks = sorted({run.outcome.task for run in own})
        return (
            f"all {_count(own)} of this model are of {' and '.join(map(repr, tasks))}, which says "
            f"nothing of how tasks differ; runs on {MIN_TASKS} tasks are needed"
        )
    are = "is" if len(own) == 1 else "are"
    return f"only {_count(own)} of this model {are} on record; {MIN_TASKS} are needed"


def _unseen(runs: Sequence[Run], ask: Ask) -> list[str]:
    if any(run.outcome.method == ask.method for run in runs):
        return []
    return [f"no run under method {ask.method!r} is on record: its spread is a guess"]


def _contradictions(record: Sequence[Run], own: Sequence[Run], ask: Ask) -> list[str]:
    notes = []
    names = {run.outcome.model for run in own} - {""}
    strangers = [
        run
        for run in record
        if run.outcome.model in names and run.outcome.model_fingerprint != ask.model
    ]
    if strangers:
        notes.append(
            f"{_count(strangers)} of a model of the same name but with other weights not taken for "
            "this model's"
        )
    fingerprints: dict[str, set[str]] = {}
    for run in own:
        fingerprints.setdefault(run.outcome.task, set()).add(run.outcome.task_fingerprint)
    if ask.task_fingerprint and ask.task in fingerprints:
        fingerprints[ask.task].add(ask.task_fingerprint)
    mixed = sorted(task for task, found in fingerprints.items() if len(found - {""}) > 1)
    if mixed:
        notes.append(
            f"on record under one name with other images, prompts or preprocessing: "
            f"{', '.join(map(repr, mixed))}; such numbers do not compare"
        )
    probed = [run for run in own if run.off_target]
    n_sets = min(len({run.off_target for run in probed}), len({run.guarded for run in probed}))
    if n_sets > 1:
        notes.append(
            f"{n_sets} different sets of off-target tasks on record: their forgetting does not "
            "quite compare"
        )
    bare = [run for run in own if not run.off_target]
    if bare and len(bare) < len(own):
        notes.append(f"{_count(bare)} without off-target tasks tell of gain only")
    return notes


def _most(some: Sequence[Run], runs: Sequence[Run]) -> bool:
    """Whether leaving out the others is worth what these have."""
    return len(some) == len(runs) or _n_tasks(some) >= max(MIN_TASKS, _n_tasks(runs) / 2)


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max


def _n_tasks(runs: Iterable[Run]) -> int:
    return len({run.outcome.task for run in runs})


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} complete run{'s' if len(runs) != 1 else ''}"
