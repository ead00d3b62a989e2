"""Measurement + method + outcomes on record (+ what was seen so far) -> forecast with intervals.

No coefficients of the paper are published, so every forecast is fitted on recorded outcomes of the
model at hand, and says which and how many. Without them it is absent, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from .accuracy import NEAR_CEILING, gain_over_zero_shot_error
from .measure import Measurement
from .outcomes import Outcome

MIN_OUTCOMES = 3  # a line through two points has no error to speak of
COVERAGE = 0.9


@dataclass(frozen=True)
class Prediction:
    """A predicted quantity: ``point + scale · t(dof)``, Student-t distributed.

    Attributes:
        point: The most likely value, a fraction.
        scale: Standard error of a new observation, a fraction.
        dof: Degrees of freedom, ≥ 1; infinite for a normal distribution.
    """

    point: float
    scale: float
    dof: float

    @property
    def low(self) -> float:
        """Lower end of the 90 % prediction interval."""
        return self.point - self._half_width

    @property
    def high(self) -> float:
        """Upper end of the 90 % prediction interval."""
        return self.point + self._half_width

    def probability_above(self, limit: float) -> float:
        """Probability that the value ends above `limit`, in [0, 1]."""
        if self.scale == 0:
            return float(self.point > limit)
        return float(stats.t.sf((limit - self.point) / self.scale, self.dof))

    @property
    def _half_width(self) -> float:
        return float(stats.t.ppf((1 + COVERAGE) / 2, self.dof)) * self.scale


@dataclass(frozen=True)
class Forecast:
    """What fine-tuning is expected to do, and what that expectation rests on.

    Attributes:
        gain: Final gain on the task; ``None`` where nothing can be said.
        forgetting: Final mean forgetting over the off-target tasks; ``None`` likewise.
        worst: Final forgetting of the worst off-target task; ``None`` likewise.
        basis: In words: the outcomes and the predictor it rests on, or why it is absent.
        n_outcomes: Number of outcomes it rests on.
    """

    gain: Prediction | None
    forgetting: Prediction | None
    worst: Prediction | None
    basis: str
    n_outcomes: int = 0


class Forecaster:
    """Learns from outcomes on record how IIMM and early losses went with the end of a run.

    Before training: a straight line on IIMM for gain over zero-shot error (the target of
    arXiv 2407.15731), mean and worst forgetting, one per model and method, with Student-t
    prediction intervals. During training: the same line on what was gained or lost at this share of
    the steps, taken where it leaves less spread. Never an extrapolation in steps.

    It is *not* valid for another model, method or recipe than the recorded ones; a recipe that
    differs is not noticed.

    Example:
        >>> Forecaster().fit([]).predict(Measurement(0.4, 0.2, 0.6, 0.01, 512, 10),
        ...     method="full", zero_shot_accuracy=0.3, model="1f").basis
        "no forecast: no complete run of this model under method 'full' is on record"
    """

    def __init__(self) -> None:
        self._outcomes: list[Outcome] = []

    def fit(self, outcomes: Iterable[Outcome]) -> Forecaster:
        """Take these outcomes as the record. Interrupted and stopped runs are left out.

        Args:
            outcomes: Outcomes of any models and methods.

        Returns:
            Itself.
        """
        self._outcomes = [outcome for outcome in outcomes if outcome.complete]
        return self

    def predict(
        self,
        measurement: Measurement,
        *,
        method: str,
        zero_shot_accuracy: float,
        model: str | None = None,
    ) -> Forecast:
        """The forecast before training.

        Args:
            measurement: IIMM of the task, untouched model.
            method: Fine-tuning method of the run.
            zero_shot_accuracy: On the task, a fraction.
            model: `model_fingerprint` of the model; ``None`` where all outcomes are of one model.

        Returns:
            A `Forecast`; absent, with the reason, below 3 outcomes of the model and method or
            where they all have the same IIMM.

        Raises:
            ValueError: `model` is None and the outcomes are of several models.
        """
        models = {outcome.model_fingerprint for outcome in self._outcomes}
        if model is None:
            if len(models) > 1:
                raise ValueError(
                    f"`model` must be given: the outcomes are of {len(models)} models, and IIMM "
                    "does not compare across models; pass `model_fingerprint(model)`"
                )
            model = next(iter(models), "")
        rows = self._rows(model, method)
        if len(rows) < MIN_OUTCOMES:
            found = f"only {len(rows)}" if rows else "no"
            runs = "runs" if len(rows) > 1 else "run"
            are = "are" if len(rows) > 1 else "is"
            tail = f"; {MIN_OUTCOMES} are needed" if rows else ""
            return Forecast(
                None, None, None,
                f"no forecast: {found} complete {runs} of this model under method {method!r} "
                f"{are} on record{tail}",
            )  # fmt: skip
        x = [o.iimm for o in rows]
        over_error = _line(
            x,
            [gain_over_zero_shot_error(o.zero_shot_accuracy, o.final_accuracy) for o in rows],
            measurement.iimm,
        )
        gain = None
        if over_error is not None and zero_shot_accuracy <= NEAR_CEILING:
            error = 1 - zero_shot_accuracy
            gain = replace(
                over_error, point=over_error.point * error, scale=over_error.scale * error
            )
        mean = _line(x, [o.forgetting for o in rows], measurement.iimm)
        worst = _line(x, [o.worst for o in rows], measurement.iimm)
        basis = (
            f"line on IIMM through {len(rows)} runs of this model under method {method!r} "
            f"({len({o.task for o in rows})} tasks)"
        )
        if over_error is None and mean is None:
            basis = f"no forecast: the {len(rows)} runs on record all have about the same IIMM"
        elif not min(x) <= measurement.iimm <= max(x):
            basis += f"; IIMM {measurement.iimm:.3f} lies outside theirs, so it extrapolates"
        if zero_shot_accuracy > NEAR_CEILING:
            basis += f"; no gain is forecast: zero-shot accuracy {zero_shot_accuracy:.2f} is near 1"
        return Forecast(gain, mean, worst, basis, len(rows))

    def update(
        self,
        forecast: Forecast,
        *,
        method: str,
        model: str,
        share: float,
        seen: dict[str, tuple[float, float]],
    ) -> Forecast:
        """The forecast during training, from what has been observed so far.

        Args:
            forecast: The one from before training.
            method: As `predict`.
            model: As `predict`.
            share: Share of the training steps done, in (0, 1].
            seen: ``"gain"``, ``"forgetting"``, ``"worst"`` -> observed value and its standard
                error, fractions.

        Returns:
            A new `Forecast`. At the last step it equals what is observed; a forecast that is
            absent stays absent until there are outcomes.
        """
        rows = self._rows(model, method)
        if len(rows) < MIN_OUTCOMES:
            return forecast
        finals: dict[str, Callable[[Outcome], float | None]] = {
            "gain": lambda o: o.gain,
            "forgetting": lambda o: o.forgetting,
            "worst": lambda o: o.worst,
        }
        updated: dict[str, Any] = {}
        followed = [o for o in rows if o.trajectory]
        for name, (value, standard_error) in seen.items():
            if share >= 1:
                updated[name] = Prediction(value, standard_error, math.inf)
                continue
            so_far = [_at(o, name, share) for o in followed]
            line = _line(so_far, [finals[name](o) for o in followed], value)
            prior = getattr(forecast, name)
            if line is not None and (prior is None or line.scale < prior.scale):
                updated[name] = line
        if not updated:
            return forecast
        basis = "what is observed"
        if share < 1:
            basis = (
                f"{' and '.join(updated)} at {share:.0%} of the steps, against {len(followed)} "
                f"runs of this model under method {method!r}"
            )
        return replace(forecast, **updated, basis=basis)

    def _rows(self, model: str, method: str) -> list[Outcome]:
        return [o for o in self._outcomes if o.model_fingerprint == model and o.method == method]


def _line(
    x: list[float | None] | list[float], y: list[float | None], at: float
) -> Prediction | None:
    """Least squares with the prediction distribution of one new observation at `at`.

    ``scale² = s² (1 + 1/n + (at - x̄)²/Σ(x - x̄)²)`` with n - 2 degrees of freedom.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if len(pairs) < MIN_OUTCOMES:
        return None
    xs, ys = np.array(pairs, dtype=float).T
    spread = float(((xs - xs.mean()) ** 2).sum())
    if spread < 1e-10:
        return None
    fit = stats.linregress(xs, ys)
    n = len(xs)
    residual = float(np.sqrt(((ys - fit.intercept - fit.slope * xs) ** 2).sum() / (n - 2)))
    scale = residual * math.sqrt(1 + 1 / n + (at - float(xs.mean())) ** 2 / spread)
    return Prediction(float(fit.intercept + fit.slope * at), scale, n - 2)


def _at(outcome: Outcome, name: str, share: float) -> float | None:
    looks = [(0.0, 0.0)] + [
        (look["share"], look[name]) for look in outcome.trajectory if name in look
    ]
    if len(looks) == 1:
        return None
    shares, values = zip(*looks, strict=True)
    return float(np.interp(share, shares, values))
