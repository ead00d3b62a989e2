"""Which saved runs a forecast may rest on, and what can be read from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..measures.results import Measurement
from ..records.outcomes import Outcome

MIN_TASKS = 3  # with fewer, leaving one out leaves no error to speak of


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
        recipe: Where known, ``learning_rate`` and ``steps`` are compared with the saved runs'.
        off_target: Names of the off-target tasks, where known.
        off_target_accuracies: Their zero-shot accuracies, where known.
        linear_probe_accuracy, linear_probe_standard_error: As `Outcome`; NaN where not known.
        n_train: As `Outcome`.
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
    off_target_accuracies: tuple[float, ...] = ()
    linear_probe_accuracy: float = math.nan
    linear_probe_standard_error: float = math.nan
    n_train: int | None = None


def about(outcome: Outcome) -> dict[str, Any]:
    """Keyword arguments of `Forecaster.predict` for a run, without its measurement."""
    return {
        "method": outcome.method,
        "zero_shot_accuracy": outcome.zero_shot_accuracy,
        "model": outcome.model_fingerprint,
        "task": outcome.task,
        "task_fingerprint": outcome.task_fingerprint,
        "recipe": outcome.recipe,
        "off_target": outcome.off_target_before,
        "linear_probe_accuracy": outcome.linear_probe_accuracy,
        "linear_probe_standard_error": outcome.linear_probe_standard_error,
        "n_train": outcome.n_train,
    }


def measured(outcome: Outcome) -> Measurement:
    """The measure of the untouched model that a run was saved with; NaN where there is none."""
    terms = (outcome.iimm, outcome.inter, outcome.intra, outcome.standard_error)
    iimm, inter, intra, error = (math.nan if term is None else term for term in terms)
    return Measurement(iimm, inter, intra, error, outcome.n_images or 0, outcome.n_classes or 0)


class Run:
    """An outcome, read for forecasting.

    Attributes:
        outcome: The outcome.
        off_target: Its off-target tasks.
    """

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.off_target = frozenset(outcome.off_target_before)
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

    @cached_property
    def metric(self) -> frozenset[str]:
        """`metrics` of its task."""
        return metrics(self.outcome, [self.outcome.task])

    @cached_property
    def metrics_kept(self) -> frozenset[str]:
        """`metrics` of its off-target tasks."""
        return metrics(self.outcome, self.outcome.off_target_before)

    def drops_at(self, share: float) -> dict[str, float] | None:
        """What each off-target task had lost at this share of the steps, between looks a mix.

        None where no look tells, or none so late.
        """
        looks = [look for look in self._looks if "drops" in look]
        if not looks or looks[-1]["share"] < share:
            return None
        shares = [0.0, *(look["share"] for look in looks)]
        return {
            name: float(np.interp(share, shares, [0.0, *(look["drops"][name] for look in looks)]))
            for name in set.intersection(*(set(look["drops"]) for look in looks))
        }

    def noise_at(self, quantity: str, share: float) -> float | None:
        """Standard error of the look next to this share, where it is saved."""
        key = f"{quantity}_se", share
        if key not in self._known:
            self._known[key] = self._read_noise(*key)
        return self._known[key]

    def _read_noise(self, name: str, share: float) -> float | None:
        looks = [look for look in self._looks if name in look]
        if not looks:
            return None
        nearest = min(looks, key=lambda look: abs(look["share"] - share))
        return float(nearest[name])

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
        own: Whether they are all of the model that is asked about, and on tasks enough to learn
            from them alone.
        base_rate: Whether none of them is of that model.
        notes: What the reader should know about them.
        other_off_target: Whether too few were probed on the off-target tasks that are asked about.
    """

    rows: list[Run]
    label: str
    own: bool
    base_rate: bool
    notes: tuple[str, ...]
    other_off_target: bool = False


def choose(record: Sequence[Run], borrowed: Sequence[Run], ask: Ask) -> Runs:
    """The model's own runs; where they are of too few tasks, those of all models beside them.

    Args:
        record: Complete saved runs.
        borrowed: Of other models, shipped with the package.
        ask: The run that is asked about.

    Returns:
        `Runs`; without rows, where nothing suits, and the label then says why.
    """
    own = [run for run in record if run.outcome.model_fingerprint == ask.model]
    notes = _contradictions(record, own, ask)
    if n_tasks(own) >= MIN_TASKS:
        n = len([run for run in own if run.outcome.method == ask.method])
        label = f"{_count(own)} of this model, {n} of them under method {ask.method!r}"
        other = bool(ask.off_target) and n_tasks(alike(own, ask)) < MIN_TASKS
        if other and any(run.off_target for run in own):
            notes.append(
                "the saved runs used other off-target tasks, so the forgetting may "
                "differ by more than the interval"
            )
        notes += _unseen(own, ask)
        return Runs(own, label, True, False, tuple(notes), other_off_target=other)
    notes.append(_too_few(own))
    others = [run for run in (*record, *borrowed) if run.outcome.model_fingerprint != ask.model]
    rows = [*own, *others]
    if not rows:
        return Runs([], f"no forecast: {'; '.join(notes)}", False, False, ())
    models = len({run.outcome.model_fingerprint for run in others})
    of_others = f"{_count(others)} of {models} other model{'s' if models != 1 else ''}"
    if not own:
        label = f"base rates: borrowed from {of_others}, with other recipes"
    else:
        label = f"{_count(own)} of this model" + (f", pooled with {of_others}" if others else "")
    return Runs(rows, label, False, not own, (*notes, *_unseen(rows, ask)))


def metrics(run: Outcome | Ask, tasks: Iterable[str]) -> frozenset[str]:
    """The score of these tasks of a run: "accuracy", or the metric that replaces it."""
    named = run.recipe.get("metrics")
    found = named if isinstance(named, dict) else {}
    return frozenset(str(found.get(task, "accuracy")) for task in tasks)


def of_a_kind(runs: Iterable[Run], ask: Ask, quantity: str) -> list[Run]:
    """The model's own runs, and those of others whose numbers mean the same.

    A recall of captions is no accuracy: what other models gained there says nothing of it.
    """
    gain = quantity == "gain"
    asked = metrics(ask, [ask.task] if gain else ask.off_target)
    return [
        run
        for run in runs
        if run.outcome.model_fingerprint == ask.model
        or not asked
        or (run.metric if gain else run.metrics_kept) == asked
    ]


def alike(runs: Sequence[Run], ask: Ask) -> list[Run]:
    """The runs with the off-target tasks that are asked about, but for the task each learns.

    A set of canaries serves every run, and a run that learns one of them is measured on the others.
    """
    tasks = frozenset(ask.off_target)
    sets = tasks, tasks | {ask.task}
    return [run for run in runs if any(run.off_target == s - {run.outcome.task} for s in sets)]


def task_key(run: Outcome | Ask) -> str:
    """What makes two tasks the same: name, images, prompts and preprocessing."""
    return f"{run.task}\n{run.task_fingerprint}"


def saved_name(record: Sequence[Run], ask: Ask) -> str:
    """The name under which the task that is asked about is saved; else its own.

    The command line names a task after its folder and a script as it likes; images, prompts and
    preprocessing tell that it is one.
    """
    prints = [run.outcome for run in record if run.outcome.task_fingerprint]
    names = {o.task for o in prints if o.task_fingerprint == ask.task_fingerprint}
    return names.pop() if len(names) == 1 else ask.task


def _too_few(own: Sequence[Run]) -> str:
    if not own:
        return "no complete run of this model is saved"
    if len(own) >= MIN_TASKS:
        tasks = sorted({run.outcome.task for run in own})
        return (
            f"all {_count(own)} of this model are of {' and '.join(map(repr, tasks))}, which says "
            f"nothing of how tasks differ; runs on {MIN_TASKS} tasks are needed"
        )
    are = "is" if len(own) == 1 else "are"
    return (
        f"only {_count(own)} of this model {are} saved; runs on {MIN_TASKS} tasks speak for "
        "themselves"
    )


def _unseen(runs: Sequence[Run], ask: Ask) -> list[str]:
    if any(run.outcome.method == ask.method for run in runs):
        return []
    return [f"no run under method {ask.method!r} is saved: its interval is a guess"]


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
            f"saved under one name with other images, prompts or preprocessing: "
            f"{', '.join(map(repr, mixed))}; such numbers do not compare"
        )
    probed = [run for run in own if run.off_target]
    asked = frozenset[str]().union(*(run.off_target for run in probed))
    n_sets = len({run.off_target | ({run.outcome.task} & asked) for run in probed})
    if n_sets > 1:
        notes.append(
            f"the saved runs used {n_sets} different sets of off-target tasks: their forgetting "
            "does not quite compare"
        )
    former = [run for run in own if run.outcome.linear_probe_form == "probabilities"]
    if former:
        notes.append(
            f"{_count(former)} of this model were saved with the linear probe in its former form, "
            "some points off the present one; the gain's forecast uses it as it is"
        )
    bare = [run for run in own if not run.off_target]
    if bare and len(bare) < len(own):
        notes.append(f"{_count(bare)} without off-target tasks have only a gain")
    return notes


def n_tasks(runs: Iterable[Run]) -> int:
    """Number of different tasks."""
    return len({run.outcome.task for run in runs})


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} complete run{'s' if len(runs) != 1 else ''}"
