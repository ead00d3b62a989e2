"""A run so far, as checkpoints keep it: what was measured, and what the guard said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import keys
from .checks import (
    DIFFERENCE,
    ERROR,
    FRACTION,
    anything,
    count,
    dict_of,
    finite,
    flag,
    list_of,
    object_of,
    or_none,
    text,
)
from .look import Learnable, Look, plain
from .outcomes import Outcome, library_versions, parse_outcome, provenance
from .run_file import ROW
from .verdict import LEVELS, Verdict


@dataclass
class Journal:
    """What a resumed run needs to continue as if it had never been interrupted.

    Attributes:
        start: The run before its first step.
        baseline: The look at the untouched model.
        fingerprints: Of the probe that took it: task name -> hash.
        off_target_size: Images of each off-target task that was given no `probe_size`; ``None``:
            the default.
        n_outcomes: How many runs were saved when it began.
        history: One row per look: the logged keys, with ``step``, ``share``, ``level``, ``reason``.
        failures: Looks that failed.
        dropped: Looks that were dropped to keep within the overhead allowed.
        is_later_phase: Whether the model had been trained already when it began: its outcome is
            then that of several trainings.
    """

    start: Outcome
    baseline: Look
    fingerprints: dict[str, str]
    n_outcomes: int
    history: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    dropped: int = 0
    off_target_size: int | None = None
    is_later_phase: bool = False

    @property
    def verdict(self) -> Verdict:
        """The latest."""
        last = self.history[-1]
        return Verdict(last["level"], last.get(keys.EXCEED), last["reason"])

    @property
    def looks_taken(self) -> int:
        """In training, whether or not they failed."""
        return len(self.history) - 1 + self.failures

    @property
    def linear_probe(self) -> dict[str, Any] | None:
        """Of the untouched model, as JSON-ready data; None where none was asked for."""
        start, found = self.start, self.baseline.learnable
        if found is None:
            return None
        return {
            "accuracy": start.linear_probe_accuracy,
            "standard_error": start.linear_probe_standard_error,
            "note": found.note,
        }

    def outcome(self, complete: bool, ended: str) -> Outcome:
        """The outcome of the run if it ended with its latest look."""
        last = self.history[-1]
        return replace(
            self.start,
            final_accuracy=last[keys.ACCURACY],
            off_target_after={
                name: last[keys.accuracy_key(name)] for name in self.start.off_target_after
            },
            trajectory=list(map(_trajectory_row, self.history)),
            complete=complete,
            ended=ended,
        )

    def plan(self, steps: int) -> None:
        """Go on to another number of steps than was planned: shares done are shares of these.

        Args:
            steps: In all.
        """
        self.start = replace(self.start, recipe=self.start.recipe | {"steps": steps})
        for row in self.history:
            row["share"] = min(row["step"] / steps, 1.0)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return vars(self) | {
            "start": asdict(self.start),
            "baseline": self.baseline.to_json(),
            "fingerprints": dict(self.fingerprints),
            "history": list(map(dict, self.history)),
        }

    @classmethod
    def from_json(cls, data: Any) -> Journal:
        """What `to_json` gave.

        Raises:
            ValueError: It is not that; the message names the field.
        """
        journal = cls(**_JOURNAL(data, ""))
        off_target = list(journal.start.off_target_before)
        tasks = {journal.start.task, *off_target}
        if not journal.baseline.correct.keys() == journal.fingerprints.keys() == tasks:
            raise ValueError("`baseline`, `fingerprints` and `start` are of different tasks")
        check = object_of(dict.fromkeys(map(keys.accuracy_key, off_target), FRACTION))
        for position, row in enumerate(journal.history):
            check(row, f"history[{position}]")
        if not journal.history:
            raise ValueError("`history` must hold the look before training, got none")
        return journal


class Journaled:
    """The state of a run, and how it is resumed.

    Attributes:
        verdict: The latest `Verdict`.
    """

    def __init__(self) -> None:
        self.verdict = Verdict("continue", None, "nothing measured yet")
        self._journal: Journal | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per look: logged keys, ``step``, ``share``, ``level``, ``reason`` and so on."""
        return self._journal.history if self._journal else []

    @property
    def failures(self) -> int:
        """Number of looks that failed."""
        return self._journal.failures if self._journal else 0

    @property
    def alarm(self) -> str:
        """The worst level of all verdicts so far."""
        return max((row["level"] for row in self.history), key=LEVELS.index, default=LEVELS[0])

    @property
    def is_later_phase(self) -> bool:
        """Whether the model had been trained already when the run began."""
        return self._journal is not None and self._journal.is_later_phase

    @is_later_phase.setter
    def is_later_phase(self, value: bool) -> None:
        if self._journal is not None:
            self._journal.is_later_phase = value

    def state_dict(self) -> dict[str, Any]:
        """The run so far as JSON-ready data, for a checkpoint; empty before `begin`."""
        return self._journal.to_json() if self._journal else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state_dict`: call it before `begin`.

        The baseline is the recorded one; a half-trained model is never taken for it. Runs that
        ended since are not learnt from, so the verdicts are those of an uninterrupted run.

        Raises:
            ValueError: It is not what `state_dict` gave; the message names the field.
        """
        self._journal = Journal.from_json(state)
        self.verdict = self._journal.verdict


def checked_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, with steps that a division made a float, such as 8.0, as a whole number.

    Raises:
        ValueError: A value that a JSON file could not hold; the message names it.
    """
    settings: dict[str, Any] = dict_of(anything)(dict(recipe), "recipe")
    steps = settings.get("steps")
    if isinstance(steps, float) and steps.is_integer():
        settings["steps"] = int(steps)
    return settings


def opening(look: Look, *, fingerprint: str, **known: Any) -> Outcome:
    """The outcome of a run before its first step: nothing gained, nothing lost.

    Args:
        look: At the untouched model; the task being learnt comes first in it.
        fingerprint: Of the task.
        known: ``model``, ``model_fingerprint``, ``method``, ``recipe`` and ``run`` of `Outcome`.
    """
    task, *off_target = look.correct
    accuracies = {name: look.accuracy(name) for name in off_target}
    learnable = look.learnable or Learnable(None, "")
    probe, n_train = learnable.probe, learnable.n_train
    carried, error = (None, None) if probe is None else probe.at(n_train)
    shown = f"{len(look.correct[task])} probe images of the task"
    images = dict.fromkeys(("zero_shot_accuracy", "final_accuracy"), shown)
    if probe is not None:
        images["linear_probe_accuracy"] = learnable.note
    return Outcome(
        task=task,
        task_fingerprint=fingerprint,
        **known,
        **plain(look.measurement),
        zero_shot_accuracy=look.accuracy(task),
        final_accuracy=look.accuracy(task),
        off_target_before=accuracies,
        off_target_after=accuracies,
        versions=library_versions(),
        provenance=provenance(),
        n_train=n_train,
        linear_probe_accuracy=carried,
        linear_probe_standard_error=error,
        linear_probe_n_train=None if probe is None else probe.n_train,
        images=images,
    )


def _trajectory_row(row: dict[str, Any]) -> dict[str, Any]:
    kept = {n: keys.observed_key(n) for n in ("gain", "forgetting")} | {"worst": keys.WORST}
    values = {k: row[key] for k, key in kept.items() if key in row}
    errors = {f"{k}_se": row["standard_errors"][k] for k in values if k in row["standard_errors"]}
    known = {"iimm": keys.PREFIX, "training_loss": "training_loss", "drops": "drops"}
    beside = {name: row[key] for name, key in known.items() if key in row}
    return {"share": row["share"]} | values | errors | beside


_ROW = object_of(ROW | {"standard_errors": dict_of(ERROR)}, {"drops": dict_of(DIFFERENCE)}, finite)
_JOURNAL = object_of(
    {
        "start": lambda value, name: parse_outcome(value),
        "baseline": lambda value, name: Look.from_json(value),
        "history": list_of(_ROW),
        "fingerprints": dict_of(text),
        **dict.fromkeys(("n_outcomes", "failures", "dropped"), count),
    },
    # Checkpoints of earlier releases lack them.
    {"off_target_size": or_none(count), "is_later_phase": flag},
)
