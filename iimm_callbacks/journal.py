"""A run so far, as checkpoints keep it: what was measured, and what the guard said."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from . import keys
from .checks import (
    DIFFERENCE,
    ERROR,
    FRACTION,
    count,
    dict_of,
    fields,
    finite,
    list_of,
    object_of,
    one_of,
    text,
)
from .guard import LEVELS, Verdict
from .outcomes import Outcome, parse_outcome
from .probe import Look


@dataclass
class Journal:
    """What a resumed run must know to go on as if it had never been interrupted.

    Attributes:
        start: The run before its first step.
        baseline: The look at the untouched model.
        fingerprints: Of the probe that took it: task name -> hash.
        n_outcomes: How many finished runs were on record when it began.
        history: One row per look: the logged keys, with ``step``, ``share``, ``level``, ``reason``.
        failures: Looks that failed.
        dropped: Looks that were dropped to keep within the overhead allowed.
    """

    start: Outcome
    baseline: Look
    fingerprints: dict[str, str]
    n_outcomes: int
    history: list[dict[str, Any]] = field(default_factory=list)
    failures: int = 0
    dropped: int = 0

    @property
    def verdict(self) -> Verdict:
        """The latest."""
        last = self.history[-1]
        return Verdict(last["level"], last.get(keys.EXCEED), last["reason"])

    @property
    def alarm(self) -> str:
        """The worst level so far."""
        return max((row["level"] for row in self.history), key=LEVELS.index, default=LEVELS[0])

    def outcome(self, complete: bool, ended: str) -> Outcome:
        """The outcome of the run, were it to end with its latest look."""
        return keys.as_outcome(self.start, self.history, complete, ended)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "start": asdict(self.start),
            "baseline": self.baseline.to_json(),
            "fingerprints": dict(self.fingerprints),
            "n_outcomes": self.n_outcomes,
            "history": [dict(row) for row in self.history],
            "failures": self.failures,
            "dropped": self.dropped,
        }

    @classmethod
    def from_json(cls, data: Any) -> Journal:
        """What `to_json` gave.

        Raises:
            ValueError: It is not that; the message names the field.
        """
        journal = cls(**fields(data, "", _FIELDS))
        off_target = list(journal.start.off_target_before)
        tasks = {journal.start.task, *off_target}
        if not journal.baseline.correct.keys() == journal.fingerprints.keys() == tasks:
            raise ValueError("`baseline`, `fingerprints` and `start` are of different tasks")
        accuracies = dict.fromkeys(map(keys.accuracy_key, off_target), FRACTION)
        for position, row in enumerate(journal.history):
            fields(row, f"history[{position}]", accuracies)
        if not journal.history:
            raise ValueError("`history` must hold the look before training, got none")
        return journal


_ROW = {
    "step": count,
    "share": FRACTION,
    "level": one_of(*LEVELS),
    "reason": text,
    "standard_errors": dict_of(ERROR),
    keys.PREFIX: DIFFERENCE,
    keys.INTER: DIFFERENCE,
    keys.INTRA: DIFFERENCE,
    keys.ACCURACY: FRACTION,
    keys.observed_key("gain"): DIFFERENCE,
}
_FIELDS = {
    "start": lambda value, name: parse_outcome(value),
    "baseline": lambda value, name: Look.from_json(value),
    "fingerprints": dict_of(text),
    "n_outcomes": count,
    "history": list_of(object_of(_ROW, rest=finite)),
    "failures": count,
    "dropped": count,
}
