"""One measurement of a model: IIMM of the task, and which images of each task are right."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..measures.probe_accuracy import LinearProbe
from ..measures.results import Measurement, Score
from . import checks

PARTS = (1.0, 0.5, 0.25, 0.125)  # of the images that a look may show


@dataclass(frozen=True)
class Learnable:
    """The linear probe of a look at the untouched model.

    Attributes:
        probe: ``None`` where there is none.
        note: Which images it learnt from, or why there is none.
        n_train: Images in the training set; ``None`` where none was read.
    """

    probe: LinearProbe | None
    note: str
    n_train: int | None = None


@dataclass(frozen=True)
class Look:
    """One measurement of a model.

    Attributes:
        step: Optimizer steps taken before it.
        measurement: IIMM of the task being learnt.
        correct: Task name -> [n] bool, which of its probe images are classified right, or have the
            right text among the first k where ``recall@k`` is its metric; the task being learnt
            comes first, then the off-target tasks.
        runtime: Wall time of the probe without the first preprocessing, seconds.
        scores: Task name -> its score by its metric; none of the tasks of which `correct` says all.
        learnable: The linear probe, of a first look that was asked for it.
        parts: `measurement` of the first images alone, for each number of them that a later look
            may show; of a first look that was asked for the linear probe.
    """

    step: int
    measurement: Measurement
    correct: dict[str, np.ndarray]
    runtime: float
    scores: dict[str, Score] = field(default_factory=dict)
    learnable: Learnable | None = None
    parts: tuple[Measurement, ...] = ()

    def accuracy(self, task: str) -> float:
        """Zero-shot accuracy on a task, or the task's own metric in its place; a fraction."""
        score = self.scores.get(task)
        return float(self.correct[task].mean()) if score is None else score.value

    def seen(self, task: str) -> np.ndarray | Score:
        """What `accuracy` is made of, image by image: for `results.paired_drop`."""
        return self.scores.get(task, self.correct[task])

    def first(self, other: Look) -> Look:
        """This look on the images of another one, which may have shown fewer: for pairs."""
        if self.scores:
            return self
        correct = {name: row[: len(other.correct[name])] for name, row in self.correct.items()}
        n_images = other.measurement.n_images
        fits = (part for part in self.parts if part.n_images == n_images)
        return replace(self, correct=correct, measurement=next(fits, self.measurement))

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, without step and runtime: the baseline of a run, for a checkpoint."""
        bits = {name: "".join("01"[int(c)] for c in row) for name, row in self.correct.items()}
        data: dict[str, Any] = {"measurement": _plain(self.measurement), "correct": bits}
        if self.parts:
            data["parts"] = [_plain(part) for part in self.parts]
        if self.learnable is not None:
            data["learnable"] = asdict(self.learnable)
            if self.learnable.probe is not None:
                probe = self.learnable.probe
                plain = {"penalty": _finite(probe.penalty), "curve": [list(p) for p in probe.curve]}
                data["learnable"]["probe"] |= plain
        if self.scores:
            data["scores"] = {
                name: {"value": score.value, "images": score.images.tolist()}
                for name, score in self.scores.items()
            }
        return data

    @classmethod
    def from_json(cls, data: Any) -> Look:
        """The baseline that `to_json` gave.

        Raises:
            ValueError: It is not that; the message names the field.
        """
        look = checks.fields(data, "baseline", _BASELINE, _OPTIONAL)
        correct, scores = look["correct"], look.get("scores", {})
        for name, score in scores.items():
            if name not in correct or len(score.images) != len(correct[name]):
                raise ValueError(f"`baseline`: `scores` and `correct` of {name!r:.40} do not match")
        learnable = look.get("learnable")
        parts = tuple(look.get("parts", ()))
        return cls(0, look["measurement"], correct, 0.0, scores, learnable, parts)


def _bits(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, str) or not value or set(value) - {"0", "1"}:
        raise ValueError(f"`{name}` must be a string of 0 and 1, got {value!r:.40}")
    return np.array([bit == "1" for bit in value])


def _plain(measurement: Measurement) -> dict[str, Any]:
    error = measurement.standard_error
    return asdict(measurement) | {"standard_error": _finite(error)}


def _measurement(value: Any, name: str) -> Measurement:
    found = checks.fields(value, name, _MEASUREMENT)
    error = found["standard_error"]
    return Measurement(**found | {"standard_error": math.nan if error is None else error})


def _score(value: Any, name: str) -> Score:
    found = checks.fields(value, name, _SCORE)
    return Score(found["value"], np.array(found["images"]))


def _pair(value: Any, name: str) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"`{name}` must be a pair of a count and an accuracy, got {value!r:.40}")
    return checks.count(value[0], name), checks.FRACTION(value[1], name)


_MEASUREMENT = {
    "iimm": checks.DIFFERENCE,
    "inter": checks.DIFFERENCE,
    "intra": checks.DIFFERENCE,
    "standard_error": checks.or_none(checks.ERROR),
    "n_images": checks.count,
    "n_classes": checks.count,
}
_SCORE = {"value": checks.FRACTION, "images": checks.list_of(checks.finite)}
_PROBE = {
    "accuracy": checks.FRACTION,
    "standard_error": checks.ERROR,
    "penalty": checks.or_none(checks.finite),
    "n_train": checks.count,
    "n_scored": checks.count,
    "held_out": checks.flag,
    "curve": checks.list_of(_pair),
}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no infinity and no NaN


def _learnable(value: Any, name: str) -> Learnable:
    found = checks.fields(
        value,
        name,
        {"probe": checks.anything, "note": checks.text, "n_train": checks.or_none(checks.count)},
    )
    probe = None
    if found["probe"] is not None:
        row = checks.fields(found["probe"], f"{name}.probe", _PROBE, {"step": checks.ERROR})
        penalty = math.inf if row["penalty"] is None else row["penalty"]
        probe = LinearProbe(**row | {"penalty": penalty, "curve": tuple(row["curve"])})
    return Learnable(probe, found["note"], found["n_train"])


_OPTIONAL = {
    "scores": checks.dict_of(_score),
    "learnable": _learnable,
    "parts": checks.list_of(_measurement),
}
_BASELINE = {"measurement": _measurement, "correct": checks.dict_of(_bits)}
