"""Estimates of one quantity of a run from other runs: before it begins, and while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..records.forecast import COVERAGE, Evidence, Prediction
from ..records.outcomes import OFF_TARGET_PROBE_SIZE
from . import pooling
from .candidates import (
    MEAN,
    POOLED,
    RECIPE,
    ZERO_SHOT,
    Blend,
    Candidate,
    before_training,
    blend,
    during_training,
)
from .mixed_model import Floats
from .pooling import Pooled, Sight
from .runs import Ask, Run, Runs, of_a_kind
from .tabulate import Question, Table, beyond, tabulate, with_pooled, within


class Estimates:
    """Point, scale and evidence of one quantity at a time; what is fitted once is kept.

    Args:
        record: Complete saved runs.
        borrowed: Runs of other models, shipped with the package.
    """

    def __init__(self, record: Sequence[Run], borrowed: Sequence[Run]) -> None:
        self._record = record
        self._borrowed = borrowed
        self._blends: dict[Any, Blend | None] = {}
        self._priors: dict[Any, dict[Run, float]] = {}
        self._pools: dict[Any, Pooled | None] = {}
        self._learnt: dict[Any, pooling.Learnt] = {}

    def before(
        self, runs: Runs, ask: Ask, quantity: str, share: float
    ) -> tuple[Prediction | None, Evidence | None, list[str]]:
        """The forecast before training, what it rests on, and what the reader should know about it.

        Args:
            runs: What it may rest on.
            ask: The run that is asked about.
            quantity: "gain", "forgetting" or "worst".
            share: Of the steps, at which it is forecast; 1 is the end.
        """
        pooled = self._pooled(runs, ask, quantity, share)
        if quantity == "worst" and runs.other_off_target:
            return None, None, ["no forecast of the worst task: saved runs used others"]
        if not runs.own:
            return (*_of_pool(pooled, ask, quantity), [])
        table, question, rows = tabulate(runs, ask, quantity, share)
        if _is_pooled(ask, quantity, share):
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
        if pooled is not None and fitted.weights.get(POOLED[quantity], 0.0) > 0.5:
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
        return _bounded(found, ask, quantity), _evidence(fitted), words

    def during(
        self, runs: Runs, ask: Ask, sight: Sight
    ) -> tuple[Prediction, Evidence] | tuple[None, None]:
        """The forecast for a share of the steps, from what was seen until an earlier one.

        Args:
            runs: What it may rest on.
            ask: The run that is asked about.
            sight: What was seen of it.
        """
        quantity = sight.quantity
        if runs.own:
            found = self._blended_during(runs, ask, sight)
            if found is not None:
                return _bounded(found[0], ask, quantity), found[1]
        before = self._pooled(runs, ask, quantity, 1.0)
        rows = of_a_kind(self._all_runs(runs, ask), ask, quantity)
        pooled = pooling.during_training(rows, ask, sight, before.left_out if before else {})
        return _of_pool(pooled, ask, quantity)

    def _pooled(self, runs: Runs, ask: Ask, quantity: str, until: float) -> Pooled | None:
        """What the runs of all models say together; the same for all methods but for its point."""
        key = (
            runs.own, not runs.rows, ask.model, ask.method, ask.task, ask.task_fingerprint,
            ask.off_target, ask.zero_shot_accuracy, ask.linear_probe_accuracy, quantity, until,
            repr(ask.recipe),
        )  # fmt: skip
        if key not in self._pools:
            rows = of_a_kind(self._all_runs(runs, ask), ask, quantity)
            self._pools[key] = pooling.before_training(rows, ask, quantity, until, self._learnt)
        return self._pools[key]

    def _all_runs(self, runs: Runs, ask: Ask) -> list[Run]:
        others = [*self._record, *self._borrowed] if runs.own else []
        return [*runs.rows, *(r for r in others if r.outcome.model_fingerprint != ask.model)]

    def _blended_during(
        self, runs: Runs, ask: Ask, sight: Sight
    ) -> tuple[Prediction, Evidence] | None:
        quantity, share, seen = sight.quantity, sight.share, sight.seen
        followed = [run for run in runs.rows if run.at(quantity, share) is not None]
        table, question, rows = tabulate(replace(runs, rows=followed), ask, quantity, sight.until)
        if not rows:
            return None
        table, question = self._seen(runs, ask, sight, table, question, rows)
        fitted = self._blend(table, during_training(table.features), ask.method)
        if fitted is None:
            return None
        error = seen[quantity][1]
        point, scale = fitted.predict(question)
        # The scatter about the lines holds the sampling noise of the saved runs; what this
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

    def _seen(
        self, runs: Runs, ask: Ask, sight: Sight, table: Table, question: Question, rows: list[Run]
    ) -> tuple[Table, Question]:
        """Table and question with what was seen of the runs as features."""
        quantity, share, seen = sight.quantity, sight.share, sight.seen
        so_far = np.array([run.at(quantity, share) for run in rows], dtype=float)
        features = {**table.features, "so_far": so_far}
        asked = {**question.features, "so_far": seen[quantity][0]}
        for other, name in (("gain", "gain_so_far"), ("forgetting", "mean_so_far")):
            values = [run.at(other, share) for run in rows]
            if other != quantity and other in seen and None not in values:
                features[name] = np.array(values, dtype=float)
                asked[name] = seen[other][0]
        probes = [run.outcome.linear_probe_accuracy for run in rows]
        if _has_probe(ask, quantity) and None not in probes:
            before = [run.outcome.zero_shot_accuracy for run in rows]
            features["probe_gain"] = np.array(probes, dtype=float) - np.array(before)
            asked["probe_gain"] = ask.linear_probe_accuracy - ask.zero_shot_accuracy
        if sight.prior is not None:
            priors = self._left_out(runs, ask, quantity, rows)
            if priors is not None:
                features["prior"], asked["prior"] = priors, sight.prior.point
        return replace(table, features=features), replace(question, features=asked)

    def _left_out(self, runs: Runs, ask: Ask, quantity: str, rows: list[Run]) -> Floats | None:
        """[n] forecast before training of each saved run, its own task left out."""
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
            if _is_pooled(ask, quantity, 1.0):
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


def _has_probe(ask: Ask, quantity: str) -> bool:
    return quantity == "gain" and math.isfinite(ask.linear_probe_accuracy)


def _is_pooled(ask: Ask, quantity: str, share: float) -> bool:
    """Whether the pooled forecast is a candidate beside those fitted to the model's own runs.

    Of what is lost by an early look it is none: how far models differ is set for the end.
    """
    return share >= 1 if quantity != "gain" else _has_probe(ask, quantity)


def _bounded(prediction: Prediction, ask: Ask, quantity: str) -> Prediction:
    """The prediction within the range of accuracies, [0, 1]."""
    before = ask.off_target_accuracies
    if quantity == "gain":
        least, most = -ask.zero_shot_accuracy, 1 - ask.zero_shot_accuracy
    elif not before:
        least, most = -1.0, 1.0
    elif quantity == "worst":
        least, most = min(before) - 1, max(before)
    else:
        mean = float(np.mean(before))
        least, most = mean - 1, mean
    point = min(max(prediction.point, least), most)
    return replace(prediction, point=point, least=least, most=most)


def _of_pool(
    pooled: Pooled | None, ask: Ask, quantity: str
) -> tuple[Prediction, Evidence] | tuple[None, None]:
    if pooled is None:
        return None, None
    return _bounded(pooled.prediction, ask, quantity), pooled.evidence


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
