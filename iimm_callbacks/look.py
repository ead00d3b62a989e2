"""What one probe of a model saw: IIMM of the task, and which images of each task are right."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import checks
from .measure import Measurement


@dataclass(frozen=True)
class Look:
    """What one probe of a model saw.

    Attributes:
        step: Optimizer steps taken before it.
        measurement: IIMM of the task being learnt.
        correct: Task name -> [n] bool, which of its probe images are classified right; the task
            being learnt comes first, then the off-target tasks.
        runtime: Wall time of the probe without the first preprocessing, seconds.
    """

    step: int
    measurement: Measurement
    correct: dict[str, np.ndarray]
    runtime: float

    def accuracy(self, task: str) -> float:
        """Zero-shot accuracy on a task, a fraction."""
        return float(self.correct[task].mean())

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, without step and runtime: the baseline of a run, for a checkpoint."""
        measurement = asdict(self.measurement)
        if math.isnan(measurement["standard_error"]):  # JSON has no NaN
            measurement["standard_error"] = None
        bits = {name: "".join("01"[int(c)] for c in row) for name, row in self.correct.items()}
        return {"measurement": measurement, "correct": bits}

    @classmethod
    def from_json(cls, data: Any) -> Look:
        """The baseline that `to_json` gave.

        Raises:
            ValueError: It is not that; the message names the field.
        """
        look = checks.fields(data, "baseline", _BASELINE)
        if look["measurement"]["standard_error"] is None:
            look["measurement"]["standard_error"] = math.nan
        return cls(0, Measurement(**look["measurement"]), look["correct"], 0.0)


def _bits(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, str) or not value or set(value) - {"0", "1"}:
        raise ValueError(f"`{name}` must be a string of 0 and 1, got {value!r:.40}")
    return np.array([bit == "1" for bit in value])


_MEASUREMENT = {
    "iimm": checks.DIFFERENCE,
    "inter": checks.DIFFERENCE,
    "intra": checks.DIFFERENCE,
    "standard_error": checks.or_none(checks.ERROR),
    "n_images": checks.count,
    "n_classes": checks.count,
}
_BASELINE = {"measurement": checks.object_of(_MEASUREMENT), "correct": checks.dict_of(_bits)}
