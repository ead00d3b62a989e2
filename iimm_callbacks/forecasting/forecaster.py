"""Measurement + method + outcomes on record (+ what was seen so far) -> forecast with intervals.

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

import numpy as np
from numpy.typing import NDArray

from ..data.tasks import OFF_TARGET_PROBE_SIZE
from ..measures.accuracy import NEAR_CEILING
from ..measures.measure import Measurement
from ..records.forecast import (
    COVERAGE,
    QUANTITIES,
    Evidence,
    Forecast,
    Prediction,
)
from ..records.outcomes import Outcome, one_of_each_run
from . import pooling
from .candidates import Blend, Candidate, Table, blend
from .pooling import Pooled, bounded
from .predictors import (
    MEAN,
    POOLED,
    RECIPE,
    ZERO_SHOT,
    before_training,
    during_training,
)
from .records import (
    Ask,
    Run,
    Runs,
    choose,
    name_on_record,
    of_a_kind,
)
from .tabulate import beyond, tabulate, with_pooled, within

if TYPE_CHECKING:
    from .grading import Grade


class Forecaster:
    """Learns from outcomes on record how runs end, and says how well it does.

    Where the model has runs on fewer than 3 tasks, they are pooled with those of all other models
    on record and the ones that ship, published runs of CLIP and the sample's (see `pooling`): the
    first gain rests on the linear probe, and own runs count from the first one on.

    From 3 tasks on, the candidates before training are that pooled forecast, the plain mean of the
    method, zero-shot error, IIMM (on gain over zero-shot error, the target of arXiv 2407.15731),
    its two terms, what other methods did on the same task, and recipe; during training also what
    was gained or lost so far, as it is, with the mean rest, and on lines learned from past
    trajectories. They are averaged by what each has earned on tasks left out (see `candidates`), so
    a predictor that explains nothing has next to no say. Never an extrapolation in steps.

    It is *not* valid for recipes unlike the recorded ones: outside their range of learning rate,
    steps or IIMM it says so and widens.

    Example:
        >>> none = Forecaster().fit([], base_rates=False)
        >>> none.predict(Measurement(0.4, 0.2, 0.6, 0.01, 512, 10),
        ...     method="full", zero_shot_accuracy=0.3, model="1f").basis
        'no forecast: no complete run of this model is on record'
    """

    def __init__(self) -> None:
        self._record: list[Run] = []
        self._borrowed: list[Run] = []
        self._blends: dict[Any, Blend | None] = {}
        self._priors: dict[Any, dict[Run, float]] = {}
        self._pools: dict[Any, Pooled | None] = {}

    def fit(self, outcomes: Iterable[Outcome], *, base_rates: bool = True) -> Forecaster:
        """Take these outcomes as the record. Interrupted and stopped runs are left out.

        Args:
            outcomes: Outcomes of any models and methods.
            base_rates: Whether runs of other models that ship may stand in where the model's own
                are of too few tasks.

        Returns:
            Itself.
        """
        self._record = [Run(o) for o in one_of_each_run(outcomes) if o.complete]
        self._borrowed = _load_borrowed(self._record) if base_rates else []
        self._blends, self._priors, self._pools = {}, {}, {}
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
        ask = replace(ask, task=name_on_record(self._record, ask))
        runs = choose(self._record, self._borrowed, ask)
        notes = list(runs.notes)
        predictions: dict[str, Prediction | None] = dict.fromkeys(QUANTITIES)
        evidence = {}
        in_range = True
        for quantity in QUANTITIES:
            if not runs.rows:
                continue
            predictions[quantity], found, words = self._before(runs, ask, quantity, 1.0)
            notes += [word for word in words if word not in notes]
            in_range = in_range and not any("range on record" in word for word in words)
            if found is not None:
                evidence[quantity] = found
        if zero_shot_accuracy > NEAR_CEILING and runs.rows:
            predictions["gain"] = None
            evidence.pop("gain", None)
            notes.append(
                f"no gain is forecast: zero-shot accuracy {zero_shot_accuracy:.2f} is near 1"
            )
        basis = runs.label
        if runs.rows and not any(predictions.values()):
            basis = f"no forecast: {'; '.join(notes) or 'the runs on record do not allow one'}"
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
            (ask, runs),
        )

    def update(
        self,
        forecast: Forecast,
        *,
        share: float,
        seen: Mapping[str, tuple[float, float]],
        next_share: float | None = None,
    ) -> Forecast:
        """The forecast during training, from what has been observed so far.

        Args:
            forecast: What `predict` of this forecaster gave before training.
            share: Share of the training steps done, in (0, 1].
            seen: ``"gain"``, ``"forgetting"``, ``"worst"`` -> observed value and its standard
                error, fractions.
            next_share: Share of the steps at which the next look is due, if known.

        Returns:
            A new `Forecast`. At the last step it equals what is observed.

        Raises:
            ValueError: `forecast` is not one that `predict` gave.
        """
        if forecast._asked is None:
            raise ValueError("`forecast` must be what `predict` gave; this one was made otherwise")
        ask, runs = forecast._asked
        if share >= 1:
            last: dict[str, Any] = {name: Prediction(*seen[name], math.inf) for name in seen}
            return replace(
                forecast, **last, basis="what is observed", base_rate=False, next_look={}
            )
        updated: dict[str, Any] = {}
        evidence = dict(forecast.evidence)
        next_look = {}
        for name in seen:
            prior = getattr(forecast, name)
            found = self._during(runs, ask, name, share, 1.0, seen, prior)
            if found is None:
                continue
            updated[name], now = found
            plain = forecast.evidence.get(name, now)
            evidence[name] = replace(
                now,
                error_of_mean=plain.error_of_mean,
                error_of_zero_shot=plain.error_of_zero_shot,
            )
            if next_share is not None and name != "gain":
                coming = self._during(runs, ask, name, share, next_share, seen, prior)
                if coming is not None:
                    next_look[name] = coming[0]
        if not updated:
            return forecast
        basis = f"{forecast.basis}; {' and '.join(updated)} at {share:.0%} of the steps"
        return replace(forecast, **updated, basis=basis, evidence=evidence, next_look=next_look)

    def grade(self, outcomes: Iterable[Outcome], **settings: Any) -> Grade:
        """Replay recorded runs as if live, their task left out: see `grading.grade`."""
        from .grading import grade

        return grade(type(self), outcomes, **settings)

    def _next_look(self, runs: Runs, ask: Ask, next_share: float | None) -> dict[str, Prediction]:
        if next_share is None or not runs.rows:
            return {}
        if runs.own and not any(run.at("forgetting", next_share) is not None for run in runs.rows):
            return {}  # other models' looks do not say when this one's limit is crossed
        found = {q: self._before(runs, ask, q, next_share) for q in ("forgetting", "worst")}
        return {name: p for name, (p, _, _) in found.items() if p is not None}

    def _before(
        self, runs: Runs, ask: Ask, quantity: str, share: float
    ) -> tuple[Prediction | None, Evidence | None, list[str]]:
        """The forecast of a quantity at this share, and what the reader should know about it."""
        pooled = self._pooled(runs, ask, quantity, share)
        if quantity == "worst" and runs.other_off_target:
            return None, None, ["the worst of other off-target tasks says little of these"]
        if not runs.own:
            return (*_of_pool(pooled, ask, quantity), [])
        table, question, rows = tabulate(runs, ask, quantity, share)
        if quantity == "gain" and math.isfinite(ask.linear_probe_accuracy):
            table, question, rows = with_pooled(table, question, rows, pooled)
        fitted = self._blend(table, before_training(quantity, table.features), ask.method)
        if fitted is None:
            return (*_of_pool(pooled, ask, quantity), [])
        widening, words = beyond(table, question)
        widest = math.inf
        if widening > 1:  # no less sure than of a model that nothing is known of
            strangers = self._pooled(replace(runs, rows=[]), ask, quantity, share)
            widest = strangers.prediction.scale if strangers else math.inf
        if math.isinf(min(widening, widest)):
            return None, None, [f"{word}, too far for a forecast of {quantity}" for word in words]
        point, scale = fitted.predict(within(table, question, RECIPE))
        dof = fitted.dof
        if pooled is not None and fitted.weights.get(POOLED, 0.0) > 0.5:
            # Its errors on other models count too.
            scale, dof = pooled.prediction.scale, pooled.prediction.dof
        elif ask.method not in table.methods:
            means = [table.target[table.methods == m].mean() for m in set(table.methods)]
            # Its errors are those of other methods, so they are a guess: twice as wide.
            scale = 2 * math.hypot(scale, float(np.std(means)))
        if scale < 1e-9 and np.ptp(table.target) < 1e-9:
            scale = 0.5 / math.sqrt(ask.n_images or OFF_TARGET_PROBE_SIZE)
            words.append(f"all {len(rows)} runs ended with the same {quantity}")
        found = Prediction(point, max(scale, min(scale * widening, widest)), dof)
        return bounded(found, ask, quantity), _evidence(fitted), words

    def _pooled(self, runs: Runs, ask: Ask, quantity: str, until: float) -> Pooled | None:
        """What the runs of all models say together; the same for all methods but for its point."""
        key = (
            *(
                runs.own,
                not runs.rows,
                ask.model,
                ask.method,
                ask.task,
                ask.task_fingerprint,
                ask.off_target,
            ),
            *(ask.zero_shot_accuracy, ask.linear_probe_accuracy, quantity, until),
            repr(ask.recipe),
        )
        if key not in self._pools:
            rows = of_a_kind(self._all_runs(runs, ask), ask, quantity)
            self._pools[key] = pooling.before_training(rows, ask, quantity, until)
        return self._pools[key]

    def _all_runs(self, runs: Runs, ask: Ask) -> list[Run]:
        others = [*self._record, *self._borrowed] if runs.own else []
        return [*runs.rows, *(r for r in others if r.outcome.model_fingerprint != ask.model)]

    def _during(
        self,
        runs: Runs,
        ask: Ask,
        quantity: str,
        share: float,
        target_share: float,
        seen: Mapping[str, tuple[float, float]],
        prior: Prediction | None,
    ) -> tuple[Prediction, Evidence] | None:
        """The forecast for a share of the steps, from what was seen until an earlier one."""
        if runs.own:
            found = self._blended_during(runs, ask, quantity, share, target_share, seen, prior)
            if found is not None:
                return bounded(found[0], ask, quantity), found[1]
        before = self._pooled(runs, ask, quantity, 1.0)
        pooled = pooling.during_training(
            of_a_kind(self._all_runs(runs, ask), ask, quantity),
            ask,
            quantity,
            share,
            target_share,
            seen[quantity],
            prior,
            before.left_out if before else {},
        )
        if pooled is None:
            return None
        return bounded(pooled.prediction, ask, quantity), pooled.evidence

    def _blended_during(
        self,
        runs: Runs,
        ask: Ask,
        quantity: str,
        share: float,
        target_share: float,
        seen: Mapping[str, tuple[float, float]],
        prior: Prediction | None,
    ) -> tuple[Prediction, Evidence] | None:
        followed = [run for run in runs.rows if run.at(quantity, share) is not None]
        table, question, rows = tabulate(replace(runs, rows=followed), ask, quantity, target_share)
        if not rows:
            return None
        value, error = seen[quantity]
        so_far = np.array([run.at(quantity, share) for run in rows], dtype=float)
        features = {**table.features, "so_far": so_far}
        asked = {**question.features, "so_far": value}
        for other, name in (("gain", "gain_so_far"), ("forgetting", "mean_so_far")):
            values = [run.at(other, share) for run in rows]
            if other != quantity and other in seen and None not in values:
                features[name] = np.array(values, dtype=float)
                asked[name] = seen[other][0]
        probes = [run.outcome.linear_probe_accuracy for run in rows]
        if quantity == "gain" and math.isfinite(ask.linear_probe_accuracy) and None not in probes:
            before = [run.outcome.zero_shot_accuracy for run in rows]
            features["probe_gain"] = np.array(probes, dtype=float) - np.array(before)
            asked["probe_gain"] = ask.linear_probe_accuracy - ask.zero_shot_accuracy
        if prior is not None:
            priors = self._left_out(runs, ask, quantity, rows)
            if priors is not None:
                features["prior"], asked["prior"] = priors, prior.point
        table = replace(table, features=features)
        question = replace(question, features=asked)
        fitted = self._blend(table, during_training(features), ask.method)
        if fitted is None:
            return None
        point, scale = fitted.predict(question)
        # The scatter about the lines holds the sampling noise of the runs on record; what this
        # run's looks have beyond it comes on top.
        noises = [noise for run in rows if (noise := run.noise_at(quantity, share)) is not None]
        usual = float(np.mean(np.square(noises))) if noises else error**2
        excess = max(error**2 - usual, 0.0)
        scale = math.sqrt(scale**2 + fitted.slope("so_far") ** 2 * excess)
        # How the run goes makes up for an IIMM out of range, but not for a recipe.
        widening, _ = beyond(table, question, RECIPE)
        if math.isinf(widening):
            return None
        scale *= 1 + (widening - 1) * (1 - share)  # what is seen counts more and more
        if scale < 1e-9 and np.ptp(table.target) < 1e-9:
            scale = error or 0.5 / math.sqrt(ask.n_images or OFF_TARGET_PROBE_SIZE)
        return Prediction(point, scale, fitted.dof), _evidence(fitted)

    def _left_out(
        self, runs: Runs, ask: Ask, quantity: str, rows: list[Run]
    ) -> NDArray[np.float64] | None:
        """[n] forecast before training of each run on record, its own task left out."""
        values = [
            self._left_out_of(runs, ask, quantity, m) for m in {r.outcome.method for r in rows}
        ]
        found = {run: value for of_method in values for run, value in of_method.items()}
        known = np.array([found.get(run, math.nan) for run in rows])
        return None if np.isnan(known).any() else known

    def _left_out_of(self, runs: Runs, ask: Ask, quantity: str, method: str) -> dict[Run, float]:
        """Run of a method -> its forecast; the same for all questions that know as much."""
        known = tuple(bool(ask.recipe.get(name)) for name in ("learning_rate", "steps"))
        known = (math.isfinite(ask.iimm), *known)
        key = (ask.model, ask.task, ask.task_fingerprint, ask.off_target, known, quantity, method)
        if key not in self._priors:
            table, question, rows = tabulate(runs, replace(ask, method=method), quantity, 1.0)
            if quantity == "gain" and math.isfinite(ask.linear_probe_accuracy):
                pooled = self._pooled(runs, ask, quantity, 1.0)
                table, question, rows = with_pooled(table, question, rows, pooled)
            candidates = before_training(quantity, table.features)
            fitted = self._blend(table, candidates, method)
            own = np.flatnonzero(table.methods == method)
            self._priors[key] = {rows[i]: float(fitted.left_out[i]) for i in own} if fitted else {}
        return self._priors[key]

    def _blend(self, table: Table, candidates: Sequence[Candidate], method: str) -> Blend | None:
        """`blend`, once for the same table: the looks of many runs ask the same."""
        key = (method, tuple(candidates), *table.content())
        if key not in self._blends:
            self._blends[key] = blend(table, candidates, method, COVERAGE)
        return self._blends[key]


def _of_pool(
    pooled: Pooled | None, ask: Ask, quantity: str
) -> tuple[Prediction, Evidence] | tuple[None, None]:
    if pooled is None:
        return None, None
    return bounded(pooled.prediction, ask, quantity), pooled.evidence


def _evidence(fitted: Blend) -> Evidence:
    shares: dict[str, float] = {}
    for candidate, weight in fitted.weights.items():
        shares[candidate.name] = shares.get(candidate.name, 0.0) + weight
    ranked = dict(sorted(shares.items(), key=lambda item: -item[1]))
    errors = fitted.errors
    return Evidence(
        ranked,
        fitted.n_runs,
        fitted.n_tasks,
        fitted.error,
        errors.get(MEAN, errors.get(replace(MEAN, pooled=True))),
        errors.get(ZERO_SHOT, errors.get(replace(ZERO_SHOT, pooled=True))),
        fitted.coverage,
    )


def _load_borrowed(record: Sequence[Run]) -> list[Run]:
    """Published runs, and those of the shipped sample where the record has none of them."""
    models = {run.outcome.model_fingerprint for run in record}
    return [run for run in _shipped() if run.outcome.model_fingerprint not in models]


@cache
def _shipped() -> tuple[Run, ...]:
    from ..sample import load_outcomes
    from .base_rates import load_base_rates

    return tuple(Run(outcome) for outcome in (*load_base_rates(), *load_outcomes()))
