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
        data: dict[str, Any] = {"measurement": plain(self.measurement), "correct": bits}
        if self.parts:
            data["parts"] = list(map(plain, self.parts))
        if self.learnable is not None:
            data["learnable"] = asdict(self.learnable)
            if (probe := self.learnable.probe) is not None:
                known = {"penalty": _finite(probe.penalty), "curve": list(map(list, probe.curve))}
                data["learnable"]["probe"] |= known
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
        look = _BASELINE(data, "baseline")
        correct, scores = look["correct"], look.get("scores", {})
        for name, score in scores.items():
            if name not in correct or len(score.images) != len(correct[name]):
                raise ValueError(f"`baseline`: `scores` and `correct` of {name!r:.40} do not match")
        parts = tuple(look.get("parts", ()))
        return cls(0, look["measurement"], correct, 0.0, scores, look.get("learnable"), parts)


def plain(measurement: Measurement) -> dict[str, Any]:
    """Its fields as JSON-ready data."""
    return asdict(measurement) | {"standard_error": _finite(measurement.standard_error)}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no infinity and no NaN


def _bits(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, str) or not value or set(value) - {"0", "1"}:
        raise ValueError(f"`{name}` must be a string of 0 and 1, got {value!r:.40}")
    return np.array([bit == "1" for bit in value])


def _pair(value: Any, name: str) -> tuple[int, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"`{name}` must be a pair of a count and an accuracy, got {value!r:.40}")
    return checks.count(value[0], name), checks.FRACTION(value[1], name)


def _curve(value: Any, name: str) -> tuple[Any, ...]:
    return tuple(checks.list_of(_pair)(value, name))


def _numbers(value: Any, name: str) -> np.ndarray:
    return np.array(checks.list_of(checks.finite)(value, name))


def _made(kind: type, needed: dict[str, Any], optional: dict[str, Any] | None = None) -> Any:
    """Makes the check of an object that has the fields of a class, and returns one of that."""
    check = checks.object_of(needed, optional)
    return lambda value, name: kind(**check(value, name))


_MEASUREMENT = _made(
    Measurement,
    dict.fromkeys(("iimm", "inter", "intra"), checks.DIFFERENCE)
    | dict.fromkeys(("n_images", "n_classes"), checks.count)
    | {"standard_error": checks.or_none(checks.ERROR, math.nan)},
)
_PROBE = _made(
    LinearProbe,
    dict.fromkeys(("n_train", "n_scored"), checks.count)
    | {"accuracy": checks.FRACTION, "standard_error": checks.ERROR, "held_out": checks.flag}
    | {"penalty": checks.or_none(checks.finite, math.inf), "curve": _curve},
    {"step": checks.ERROR},
)
_LEARNABLE = _made(
    Learnable,
    {"probe": checks.or_none(_PROBE), "note": checks.text, "n_train": checks.or_none(checks.count)},
)
_SCORE = _made(Score, {"value": checks.FRACTION, "images": _numbers})
_BASELINE = checks.object_of(
    {"measurement": _MEASUREMENT, "correct": checks.dict_of(_bits)},
    {"scores": checks.dict_of(_SCORE), "parts": checks.list_of(_MEASUREMENT)}
    | {"learnable": _LEARNABLE},
)
