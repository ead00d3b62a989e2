"""Measurement + method + saved outcomes (+ what was seen so far) -> forecast with intervals.

No coefficients of the paper are published, so every forecast is fitted on recorded outcomes, and
says which, how many, by which predictors and with which error. Without any it is absent, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ..measures.results import NEAR_CEILING, Measurement
from ..records.catalog import thin
from ..records.forecast import QUANTITIES, Forecast, Prediction
from ..records.outcomes import Outcome, at_the_last_step, one_of_each_run
from .estimates import Estimates
from .off_target import by_task
from .pooling import Sight
from .runs import Ask, Run, Runs, choose, saved_name

if TYPE_CHECKING:
    from .grading import Grade


class Forecaster:
    """Learns from saved outcomes how runs end, and says how well it does.

    If the model has runs on fewer than 3 tasks, they are pooled with the saved runs of all other
    models and with those that ship, published runs of CLIP and the sample's (see `pooling`). The
    first forecast of the gain rests on the linear probe; own runs count from the first one on.

    From 3 tasks on, the candidates before training are that pooled forecast, the plain mean of the
    method, zero-shot error, IIMM (on gain over zero-shot error, the target of arXiv 2407.15731),
    its two terms, what other methods did on the same task, and recipe; during training also the
    gain or forgetting so far: unchanged, with the mean of what usually follows, and on lines fitted
    to past trajectories. They are averaged by their leave-one-task-out errors (see `candidates`),
    so a predictor that explains nothing has almost no weight. It never extrapolates in steps.

    It is *not* valid for recipes unlike the saved ones: outside their range of learning rate, steps
    or IIMM it says so and widens.

    Example:
        >>> none = Forecaster().fit([], base_rates=False)
        >>> none.predict(Measurement(0.4, 0.2, 0.6, 0.01, 512, 10),
        ...     method="full", zero_shot_accuracy=0.3, model="1f").basis
        'no forecast: no complete run of this model is saved'
    """

    def __init__(self) -> None:
        self._record: list[Run] = []
        self._borrowed: list[Run] = []
        self._taught: dict[str, tuple[list[Run], Estimates]] = {}

    def fit(self, outcomes: Iterable[Outcome], *, base_rates: bool = True) -> Forecaster:
        """Learn from these outcomes. Interrupted and stopped runs are left out.

        Of more than `catalog.LEARNT_FROM` runs a forecast takes some, see `catalog.thin`.

        Args:
            outcomes: Outcomes of any models and methods, the oldest first.
            base_rates: Whether to use shipped runs of other models if the model's own runs cover
                too few tasks.

        Returns:
            Itself.
        """
        ended = map(at_the_last_step, one_of_each_run(outcomes))
        self._record = [Run(o) for o in ended if o.complete]
        models = {run.outcome.model_fingerprint for run in self._record}
        shipped = _shipped() if base_rates else ()  # the sample's too, where none of them is saved
        self._borrowed = [run for run in shipped if run.outcome.model_fingerprint not in models]
        self._taught = {}
        return self

    def predict(
        self,
        measurement: Measurement,
        *,
        method: str,
        zero_shot_accuracy: float,
        model: str | None = None,
        task: str = "",
        task_fingerprint: str = "",
        recipe: Mapping[str, Any] | None = None,
        off_target: Sequence[str] | Mapping[str, float] = (),
        linear_probe_accuracy: float | None = None,
        linear_probe_standard_error: float | None = None,
        n_train: int | None = None,
        next_share: float | None = None,
    ) -> Forecast:
        """The forecast before training.

        Args:
            measurement: IIMM of the task, untouched model.
            method: Fine-tuning method of the run.
            zero_shot_accuracy: On the task, a fraction.
            model: `model_fingerprint` of the model; ``None`` where all outcomes are of one model.
            task: Name of the task; where given, past runs on the same task are made use of.
            task_fingerprint: As `Outcome.task_fingerprint`; the same task has the same one.
            recipe: As `Outcome.recipe`; its ``learning_rate`` and ``steps`` are made use of.
            off_target: Names of the off-target tasks: runs with the same ones are preferred. As a
                mapping to their zero-shot accuracies it bounds what can be forgotten.
            linear_probe_accuracy: As `Outcome.linear_probe_accuracy`; the forecast of the gain
                rests on it, where it is known.
            linear_probe_standard_error: Of that; ``None``: 0.
            n_train: Images in the training set, if known.
            next_share: Share of the steps at which the next look is due, if known.

        Returns:
            A `Forecast`; absent, with the reason, where there is nothing to go by.

        Raises:
            ValueError: `model` is None and the outcomes are of several models.
        """
        models = {run.outcome.model_fingerprint for run in self._record}
        if model is None:
            if len(models) > 1:
                raise ValueError(
                    f"`model` must be given: the outcomes are of {len(models)} models, and IIMM "
                    "does not compare across models; pass `model_fingerprint(model)`"
                )
            model = next(iter(models), "")
        m = measurement
        ask = Ask(
            method, model, zero_shot_accuracy, m.iimm, m.inter, m.intra, m.n_images,
            task, task_fingerprint, recipe or {}, tuple(off_target),
            tuple(off_target.values()) if isinstance(off_target, Mapping) else (),
            math.nan if linear_probe_accuracy is None else linear_probe_accuracy,
            linear_probe_standard_error or 0.0, n_train,
        )  # fmt: skip
        record, _ = self._teach(model)
        ask = replace(ask, task=saved_name(record, ask))
        return self._forecast(choose(record, self._borrowed, ask), ask, next_share)

    def _teach(self, model: str) -> tuple[list[Run], Estimates]:
        """The saved runs that forecasts for a model rest on, and what they say."""
        if model not in self._taught:
            chosen = thin([run.outcome for run in self._record], model)
            record = [self._record[i] for i in chosen]
            self._taught[model] = record, Estimates(record, self._borrowed)
        return self._taught[model]

    def _forecast(self, runs: Runs, ask: Ask, next_share: float | None) -> Forecast:
        """Of all quantities at the end of the run."""
        notes = list(runs.notes)
        predictions: dict[str, Prediction | None] = dict.fromkeys(QUANTITIES)
        evidence = {}
        in_range = True
        estimates = self._teach(ask.model)[1]
        for quantity in QUANTITIES if runs.rows else ():
            predictions[quantity], found, words = estimates.before(runs, ask, quantity, 1.0)
            notes += [word for word in words if word not in notes]
            in_range = in_range and not any("range of the saved runs" in word for word in words)
            if found is not None:
                evidence[quantity] = found
        if runs.rows and _refused(runs, ask, "gain"):
            predictions["gain"] = None
            evidence.pop("gain", None)
            notes.append(
                f"no gain is forecast: zero-shot accuracy {ask.zero_shot_accuracy:.2f} is near 1"
            )
        basis = runs.label
        if runs.rows and not any(predictions.values()):
            basis = f"no forecast: {'; '.join(notes) or 'the saved runs do not allow one'}"
        return Forecast(
            predictions["gain"],
            predictions["forgetting"],
            predictions["worst"],
            basis,
            len(runs.rows),
            evidence,
            tuple(notes),
            runs.base_rate,
            in_range,
            self._next_look(runs, ask, next_share),
            by_task(runs.rows, ask, predictions["forgetting"]),
            (ask, runs),
        )

    def update(
        self,
        forecast: Forecast,
        *,
        share: float,
        seen: Mapping[str, tuple[float, float]],
        next_share: float | None = None,
        drops: Mapping[str, float] | None = None,
    ) -> Forecast:
        """The forecast during training, from what has been observed so far.

        Args:
            forecast: What `predict` of this forecaster gave before training.
            share: Share of the training steps done, in (0, 1].
            seen: ``"gain"``, ``"forgetting"``, ``"worst"`` -> observed value and its standard
                error, fractions.
            next_share: Share of the steps at which the next look is due, if known.
            drops: Drop of each off-target task so far, fractions, if known.

        Returns:
            A new `Forecast`. At the last step it equals what is observed. Where what is seen tells
            less of the gain than was known before training, that stays.

        Raises:
            ValueError: `forecast` is not one that `predict` gave.
        """
        if forecast._asked is None:
            raise ValueError("`forecast` must be what `predict` gave; this one was made otherwise")
        ask, runs = forecast._asked
        estimates = self._teach(ask.model)[1]
        if share >= 1:
            last: dict[str, Any] = {name: Prediction(*seen[name], math.inf) for name in seen}
            return replace(
                forecast,
                **last,
                basis="what is observed",
                base_rate=False,
                next_look={},
                off_target={},
            )
        updated: dict[str, Any] = {}
        evidence = dict(forecast.evidence)
        next_look = {}
        for name in seen:
            if _refused(runs, ask, name):
                continue
            prior = getattr(forecast, name)
            sight = Sight(name, share, 1.0, seen, prior)
            found, now = estimates.during(runs, ask, sight)
            if found is None or now is None:
                continue
            if name == "gain" and prior is not None and prior.width < found.width:
                continue  # the linear probe tells more than the first steps do
            updated[name] = found
            plain = forecast.evidence.get(name, now)
            evidence[name] = replace(
                now, error_of_mean=plain.error_of_mean, error_of_zero_shot=plain.error_of_zero_shot
            )
            if next_share is not None and name != "gain":
                coming, _ = estimates.during(runs, ask, replace(sight, until=next_share))
                if coming is not None:
                    next_look[name] = coming
        if not updated:
            return forecast
        basis = f"{forecast.basis}; {' and '.join(updated)} at {share:.0%} of the steps"
        mean = updated.get("forgetting", forecast.forgetting)
        return replace(
            forecast,
            **updated,
            basis=basis,
            evidence=evidence,
            next_look=next_look,
            off_target=by_task(runs.rows, ask, mean, (share, drops) if drops else None),
        )

    def grade(self, outcomes: Iterable[Outcome], **settings: Any) -> Grade:
        """Leave-one-task-out evaluation on saved runs: see `grading.grade`."""
        from .grading import grade

        return grade(type(self), outcomes, **settings)

    def _next_look(self, runs: Runs, ask: Ask, next_share: float | None) -> dict[str, Prediction]:
        if next_share is None or not runs.rows:
            return {}
        if runs.own and not any(run.at("forgetting", next_share) is not None for run in runs.rows):
            return {}  # other models' looks do not say when this one's limit is crossed
        estimates = self._teach(ask.model)[1]
        found = {q: estimates.before(runs, ask, q, next_share) for q in ("forgetting", "worst")}
        return {name: p for name, (p, _, _) in found.items() if p is not None}


def _refused(runs: Runs, ask: Ask, quantity: str) -> bool:
    """Whether a quantity has no forecast, before training as during it, whatever is seen."""
    if quantity == "worst":
        return runs.other_off_target
    return quantity == "gain" and ask.zero_shot_accuracy > NEAR_CEILING


@cache
def _shipped() -> tuple[Run, ...]:
    from ..sample import load_base_rates, load_outcomes

    return tuple(Run(outcome) for outcome in (*load_base_rates(), *load_outcomes()))
