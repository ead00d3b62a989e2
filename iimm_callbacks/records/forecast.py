"""The forecast of a run: points with intervals, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from scipy import special  # `scipy.stats` would take longer to import than all of ours

QUANTITIES = ("gain", "forgetting", "worst")
COVERAGE = 0.9


@dataclass(frozen=True)
class Prediction:
    """A predicted quantity: ``point + scale · t(dof)``, Student-t distributed.

    Attributes:
        point: The most likely value, a fraction.
        scale: Standard error of a new observation, a fraction.
        dof: Degrees of freedom, ≥ 1; infinite for a normal distribution.
        least, most: What is possible: a gain cannot lift an accuracy above 1. The interval ends
            there.
    """

    point: float
    scale: float
    dof: float
    least: float = -math.inf
    most: float = math.inf

    @property
    def low(self) -> float:
        """Lower end of the 90 % prediction interval."""
        return min(max(self.point - self._half_width, self.least), self.most)

    @property
    def high(self) -> float:
        """Upper end of the 90 % prediction interval."""
        return max(min(self.point + self._half_width, self.most), self.least)

    @property
    def width(self) -> float:
        """Of that interval."""
        return self.high - self.low

    def probability_above(self, limit: float) -> float:
        """Probability that the value ends above `limit`, in [0, 1]."""
        if not self.least <= limit < self.most:
            return float(limit < self.least)
        if self.scale == 0:
            return float(self.point > limit)
        return float(special.stdtr(self.dof, (self.point - limit) / self.scale))

    @property
    def _half_width(self) -> float:
        return float(special.stdtrit(self.dof, (1 + COVERAGE) / 2)) * self.scale


@dataclass(frozen=True)
class Evidence:
    """What the forecast of one quantity rests on, and how good it was on the saved runs.

    Attributes:
        predictors: Name -> share of it in the forecast; they sum to 1.
        n_runs, n_tasks: That its errors were measured on.
        error: Its mean absolute error on them, their task or model left out, a fraction.
        error_of_mean: That of the plain mean of the method's runs.
        error_of_zero_shot: That of a line on the zero-shot error.
        coverage: Share of them inside their 90 % interval.
        left_out: What was left out in turn: "task"; "model" where none of them is of this model,
            all models of one source at once.
    """

    predictors: dict[str, float]
    n_runs: int
    n_tasks: int
    error: float
    error_of_mean: float | None
    error_of_zero_shot: float | None
    coverage: float
    left_out: str = "task"


@dataclass(frozen=True)
class Forecast:
    """The expected outcome of fine-tuning, and what that expectation rests on.

    Attributes:
        gain: Final gain on the task; ``None`` where nothing can be said.
        forgetting: Final mean forgetting over the off-target tasks; ``None`` likewise.
        worst: Final forgetting of the worst off-target task; ``None`` likewise.
        basis: In words: the outcomes it rests on, or why it is absent.
        n_outcomes: Number of outcomes it rests on.
        evidence: "gain", "forgetting", "worst" -> `Evidence`, where there is one.
        notes: What the reader should know: out of range, contradictions among the saved runs.
        base_rate: Whether no run of this model is saved, so that it is borrowed from runs of
            other models. It is shown, logged and graded like any other and may warn; it stops no
            run before the first look at how that one goes.
        in_range: Whether recipe and IIMM lie within the saved runs.
        next_look: "forgetting", "worst" -> `Prediction` for the next look, where that is known.
        off_target: Off-target task -> `Prediction` of its drop at the end, the largest first; empty
            where saved runs on too few tasks tell them apart.
    """

    gain: Prediction | None
    forgetting: Prediction | None
    worst: Prediction | None
    basis: str
    n_outcomes: int = 0
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base_rate: bool = False
    in_range: bool = True
    next_look: Mapping[str, Prediction] = field(default_factory=dict)
    off_target: Mapping[str, Prediction] = field(default_factory=dict)
    _asked: Any = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data: points and intervals in fractions, and all it rests on."""
        return {
            **{q: _interval(p) for q in QUANTITIES if (p := getattr(self, q)) is not None},
            "off_target": {name: _interval(p) for name, p in self.off_target.items()},
            "basis": self.basis,
            "n_outcomes": self.n_outcomes,
            "evidence": {name: asdict(found) for name, found in self.evidence.items()},
            "notes": list(self.notes),
            "base_rate": self.base_rate,
        }


def _interval(p: Prediction) -> dict[str, float]:
    return {"point": p.point, "low": p.low, "high": p.high}
