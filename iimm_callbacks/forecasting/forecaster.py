"""Measurement + method + outcomes on record (+ what was seen so far) -> forecast with intervals.

No coefficients of the paper are published, so every forecast is fitted on recorded outcomes, and
says which, how many, by which predictors and with which error. Without any it is absent, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..accuracy import NEAR_CEILING
from ..data.tasks import OFF_TARGET_PROBE_SIZE
from ..measure import Measurement
from ..storage.outcomes import Outcome, one_of_each_run
from .candidates import Blend, Candidate, Table, blend
from .forecast import COVERAGE, Evidence, Forecast, Prediction
from .predictors import MEAN, RECIPE, ZERO_SHOT, before_training, during_training
from .records import QUANTITIES, Ask, Run, Runs, choose
from .stand_ins import lost_so_far, repeat
from .tabulate import beyond, tabulate, within

if TYPE_CHECKING:
    from .grading import Grade


class Forecaster:
    """Learns from outcomes on record how runs end, and says how well it does.

    Before training the candidates are the plain mean of the method, zero-shot error, IIMM (on gain
    over zero-shot error, the target of arXiv 2407.15731), its two terms, what other methods did on
    the same task, and recipe; during training also what was gained or lost so far, as it is, with
    the mean rest, and on lines learned from past trajectories. They are averaged by what each has
    earned on tasks left out (see `candidates`), so a predictor that explains nothing has next to no
    say. Never an extrapolation in steps. Methods are pooled, and models where the model has runs on
    fewer than 3 tasks; without any, published base rates stand in, labelled as such.

    It is *not* valid for recipes unlike the recorded ones: outside their range of learning rate,
    steps or IIMM it says so, widens, and abstains when far out.

    Example:
        >>> none = Forecaster().fit([], base_rates=False)
        >>> none.predict(Measurement(0.4, 0.2, 0.6, 0.01, 512, 10),
        ...     method="full", zero_shot_accuracy=0.3, model="1f").basis
        'no forecast: no complete run of this model is on record'
    """

    def __init__(self) -> None:
        self._record: list[Run] = []
        self._base_rates: list[Run] = []
        self._blends: dict[Any, Blend | None] = {}
        self._priors: dict[Any, dict[Run, float]] = {}

    def fit(self, outcomes: Iterable[Outcome], *, base_rates: bool = True) -> Forecaster:
        """Take these outcomes as the record. Interrupted and stopped runs are left out.

        Args:
            outcomes: Outcomes of any models and methods.
            base_rates: Whether published figures may stand in where they are of no use.

        Returns:
            Itself.
        """
        self._record = [Run(o) for o in one_of_each_run(outcomes) if o.complete]
        self._base_rates = _load_base_rates() if base_rates else []
        self._blends, self._priors = {}, {}
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
        off_target: Sequence[str] = (),
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
            off_target: Names of the off-target tasks: runs with the same ones are preferred.
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
            math.nan if linear_probe_accuracy is None else linear_probe_accuracy,
            linear_probe_standard_error or 0.0, n_train,
        )  # fmt: skip
        runs = choose(self._record, self._base_rates, ask)
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
        recorded = bool(runs.rows) and not runs.base_rate
        if share >= 1:
            names = [name for name in seen if recorded or name != "gain"]
            last: dict[str, Any] = {name: Prediction(*seen[name], math.inf) for name in names}
            if not recorded:  # a base rate is no forecast of this run
                last = {name: last.get(name) for name in QUANTITIES}
            return replace(
                forecast, **last, basis="what is observed", base_rate=False, next_look={}
            )
        updated: dict[str, Any] = {}
        evidence = dict(forecast.evidence) if recorded else {}
        next_look = {}
        so_far = []
        for name in seen:
            prior = getattr(forecast, name) if recorded else None
            found = self._during(runs, ask, name, share, 1.0, seen, prior) if recorded else None
            if found is not None:
                updated[name], now = found
                plain = forecast.evidence.get(name, now)
                evidence[name] = replace(
                    now,
                    error_of_mean=plain.error_of_mean,
                    error_of_zero_shot=plain.error_of_zero_shot,
                )
            else:
                guess = lost_so_far(name, share, 1.0, *seen[name])
                if guess is not None and (prior is None or guess.scale < prior.scale):
                    updated[name] = guess
                    so_far.append(name)
                    evidence.pop(name, None)
            if next_share is None or name == "gain":
                continue
            coming = (
                self._during(runs, ask, name, share, next_share, seen, prior) if found else None
            )
            guess = coming[0] if coming else lost_so_far(name, share, next_share, *seen[name])
            if guess is not None:
                next_look[name] = guess
        if not updated:
            return forecast
        at = f"at {share:.0%} of the steps"
        basis = f"{forecast.basis}; {' and '.join(updated)} {at}" if recorded else ""
        if so_far:
            guessed = (
                f"what was lost {at}; no run on record tells how it goes on, so the interval is "
                "that of the shipped sample's runs"
            )
            basis = f"{basis}; {guessed}" if basis else guessed
        if not recorded:
            updated.setdefault("gain", None)
        return replace(
            forecast,
            **updated,
            basis=basis,
            evidence=evidence,
            base_rate=False,
            next_look=next_look,
        )

    def grade(self, outcomes: Iterable[Outcome], **settings: Any) -> Grade:
        """Replay recorded runs as if live, their task left out: see `grading.grade`."""
        from .grading import grade

        return grade(outcomes, **settings)

    def _next_look(self, runs: Runs, ask: Ask, next_share: float | None) -> dict[str, Prediction]:
        if next_share is None or runs.base_rate or not runs.rows:
            return {}
        found = {q: self._before(runs, ask, q, next_share) for q in ("forgetting", "worst")}
        return {name: p for name, (p, _, _) in found.items() if p is not None}

    def _before(
        self, runs: Runs, ask: Ask, quantity: str, share: float
    ) -> tuple[Prediction | None, Evidence | None, list[str]]:
        """The forecast of a quantity at this share, and what the reader should know about it."""
        if runs.repeats:
            return repeat(runs, quantity, share), None, []
        if quantity == "worst" and runs.other_off_target:
            return None, None, ["the worst of other off-target tasks says little of these"]
        table, question, rows = tabulate(runs, ask, quantity, share)
        fitted = self._blend(table, before_training(quantity, table.features), ask.method)
        if fitted is None:
            return None, None, []
        widening, words = beyond(table, question)
        if math.isinf(widening):
            return None, None, [f"{word}, too far for a forecast of {quantity}" for word in words]
        point, scale = fitted.predict(within(table, question, RECIPE))
        if ask.method not in table.methods:
            means = [table.target[table.methods == m].mean() for m in set(table.methods)]
            # Its errors are those of other methods, so they are a guess: twice as wide.
            scale = 2 * math.hypot(scale, float(np.std(means)))
        if scale < 1e-9 and np.ptp(table.target) < 1e-9:
            scale = 0.5 / math.sqrt(ask.n_images or OFF_TARGET_PROBE_SIZE)
            words.append(f"all {len(rows)} runs ended with the same {quantity}")
        if quantity == "gain":
            point = min(max(point, -ask.zero_shot_accuracy), 1 - ask.zero_shot_accuracy)
        return Prediction(point, scale * widening, fitted.dof), _evidence(fitted), words

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
            table, _, rows = tabulate(runs, replace(ask, method=method), quantity, 1.0)
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


def _load_base_rates() -> list[Run]:
    from .base_rates import load_base_rates

    return [Run(outcome) for outcome in load_base_rates()]
