"""Runs of any model and method -> the forecast of a new one, from the first run on.

The forecast of a model's first run, and of the next few. It is a mixed model (see `mixed_model`):
what differs between models, methods and tasks is an effect of each, shrunk by how little is known
of it. Runs of other models are the prior, the model's own take over as they come.

Gain rests on the linear probe. With zero-shot error ``e_0``, the probe's error ``e_p`` and "way"
``e_0 - e_p``, a method that moves the towers ends near the probe: ``gain = way + q · e_p``, ``q``
the share of the probe's error that long training removes besides (error ratio ``1 - q``): next to 0
for a hundred steps, 0.4 to 0.5 for CLIP's published runs over 4,000 steps. A light method goes a
share of the way, 0.5 ± 0.3 where nothing is known of it. Forgetting is a line in zero-shot error.

The spreads below are set by hand, with the sample's runs and the published pairs in view: what is
graded on these is no proof for a third model. How wide intervals are is learnt from the model's own
runs as they come. They are *not* coefficients of any paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy import special

from ..records.forecast import COVERAGE, Evidence, Prediction
from .mixed_model import (
    Effect,
    Extra,
    Floats,
    Rows,
    as_rows,
    covariance,
    describe,
    describe_ask,
    group,
    heavy_tailed,
    left_out,
    predict,
    surprises,
)
from .runs import Ask, Run

_DOF = 3  # of the intervals before any run of the model is saved
_TAIL = 1  # ν of the weights of odd tasks: Cauchy's, so that one far off counts for nothing
_FAR = 9.0  # a squared miss, over the usual one: what is further off widens intervals no more
_SO_FAR = "what was seen so far, pooled"

_GAIN = (
    Effect("long_error", (), 0.5),
    Effect("unknown_error", ("run",), 0.25),
    Effect("error", ("model",), 0.08),
    Effect("tower_way", ("model",), 0.02),
    Effect("light_way", (), 0.3),
    Effect("light_way", ("method",), 0.15),
    Effect("light_way", ("model",), 0.15),
    Effect("light_way", ("model", "method"), 0.1),
    Effect("one", ("model",), 0.01),
    Effect("probe_noise", ("model", "task"), 1.0),
    Effect("size", ("task",), 0.4),
    Effect("size", ("model", "task"), 0.6),
    Effect("size", ("model", "task", "kind"), 0.4),
    Effect("size", ("model", "task", "method"), 0.4),
)
_GAIN_WITHOUT_PROBE = (
    Effect("zero_shot_error", (), 0.5),
    Effect("zero_shot_error", ("method",), 0.2),
    Effect("zero_shot_error", ("model",), 0.3),
    Effect("one", ("model", "method"), 0.1),
    Effect("zero_shot_error", ("model", "task"), 0.2),
    Effect("one", ("model", "task", "method"), 0.05),
)
_LOSS = (
    Effect("one", (), 0.05),
    Effect("one", ("kind",), 0.02),
    Effect("one", ("method",), 0.02),
    Effect("one", ("model",), 0.04),
    Effect("one", ("model", "method"), 0.02),
    Effect("one", ("task",), 0.01),
    Effect("one", ("model", "task"), 0.015),
    Effect("one", ("model", "task", "method"), 0.015),
    # Half of a task being wrong before, a slope twice as spread says as much as a level.
    Effect("zero_shot_error", (), 0.1),
    Effect("zero_shot_error", ("model",), 0.08),
)
_LOSS_TO_COME = (
    Effect("one", (), 0.02),
    Effect("so_far", (), 0.5),
    Effect("one", ("method",), 0.01),
    Effect("so_far", ("method",), 0.2),
    Effect("one", ("model",), 0.015),
    Effect("so_far", ("model",), 0.2),
    Effect("one", ("model", "task"), 0.01),
    Effect("one", ("model", "task", "method"), 0.01),
)
_GAIN_TO_COME = (
    *_LOSS_TO_COME[:-2],
    Effect("to_go", (), 0.5),
    Effect("to_go", ("kind",), 0.2),
    Effect("to_go", ("model",), 0.3),
    Effect("one", ("model", "task"), 0.03),
    Effect("one", ("model", "task", "method"), 0.02),
)
# Whether it is of gain, whether a probe is known -> effects, and what the forecast rests on
_EFFECTS: dict[tuple[bool, bool], tuple[tuple[Effect, ...], str]] = {
    (True, True): (_GAIN, "linear probe, pooled"),
    (True, False): (_GAIN_WITHOUT_PROBE, "zero-shot error, pooled"),
    (False, False): (_LOSS, "zero-shot error, pooled"),
}


@dataclass(frozen=True)
class Pooled:
    """A forecast from the runs of many models.

    Attributes:
        prediction: Student-t.
        evidence: What it rests on. Its errors are those on the model's own runs, each task left
            out; without any, on the other models' runs, all of one source left out.
        left_out: Run -> what would have been forecast for it without its task.
    """

    prediction: Prediction
    evidence: Evidence
    left_out: dict[Run, float]


@dataclass(frozen=True)
class Learnt:
    """What runs teach, whichever run is asked about."""

    known: Rows
    factor: float  # by which intervals are wider than the mixed model has them
    dof: float
    evidence: Evidence
    left_out: dict[Run, float]


@dataclass(frozen=True)
class Sight:
    """What was seen of a run, and what is asked about it.

    Attributes:
        quantity: "gain", "forgetting" or "worst".
        share: Of the steps that are done, in (0, 1).
        until: Share of the steps for which it is forecast; 1 is the end.
        seen: Quantity -> observed value and its standard error, fractions.
        prior: The forecast before training, if there was one.
    """

    quantity: str
    share: float
    until: float
    seen: Mapping[str, tuple[float, float]]
    prior: Prediction | None


def before_training(
    runs: Sequence[Run], ask: Ask, quantity: str, until: float, kept: dict[Any, Learnt]
) -> Pooled | None:
    """The forecast before training.

    Args:
        runs: Saved ones, of any models and methods.
        ask: The run that is asked about.
        quantity: "gain", "forgetting" or "worst".
        until: Share of the steps that is asked about; 1 is the end.
        kept: What runs taught before; added to.

    Returns:
        `Pooled`; None where no run has the quantity.
    """
    probed = quantity == "gain" and math.isfinite(ask.linear_probe_accuracy)
    rows = [run for run in runs if run.at(quantity, until) is not None]
    if probed:
        rows = [run for run in rows if run.outcome.linear_probe_accuracy is not None]
    if not rows:
        return None
    effects, name = _EFFECTS[quantity == "gain", probed]
    cells = group(rows, ask)
    key = (ask.model, quantity, name, until, frozenset(run for cell in cells for run in cell))
    if key not in kept:
        to_end = partial(_at, quantity=quantity, share=until)
        kept[key] = _learn(cells, ask.model, quantity, effects, name, to_end, None)
    return _predicted(kept[key], cells, ask, quantity, effects, None)


def during_training(
    runs: Sequence[Run], ask: Ask, sight: Sight, priors: Mapping[Run, float]
) -> Pooled | None:
    """The forecast from what was seen so far, by a line fitted to other models' runs.

    Args:
        runs: As `before_training`.
        ask: As `before_training`.
        sight: What was seen of it.
        priors: The forecast of each run before training, without its task.

    Returns:
        `Pooled`; None where no run was followed.
    """
    quantity, share, until, prior = sight.quantity, sight.share, sight.until, sight.prior
    rows = [
        run
        for run in runs
        if run.at(quantity, share) is not None and run.at(quantity, until) is not None
    ]
    gain = quantity == "gain" and prior is not None
    if gain:
        rows = [run for run in rows if run in priors]
    if not rows:
        return None
    value, error = sight.seen[quantity]
    effects = _GAIN_TO_COME if gain else _LOSS_TO_COME
    noises = [n for run in rows if (n := run.noise_at(quantity, share)) is not None]
    excess = max(error**2 - float(np.mean(np.square(noises))), 0.0) if noises else error**2

    def more(run: Run | None) -> dict[str, float]:
        so_far = value if run is None else _at(run, quantity, share)
        expected = prior.point if run is None and prior else priors.get(run, 0.0) if run else 0.0
        return {"so_far": so_far, "to_go": expected - so_far if gain else 0.0}

    def to_come(run: Run) -> float:
        return _at(run, quantity, until) - _at(run, quantity, share)

    cells = group(rows, ask)
    learnt = _learn(cells, ask.model, quantity, effects, _SO_FAR, to_come, more)
    found = _predicted(learnt, cells, ask, quantity, effects, more)
    line = replace(found.prediction, point=value + found.prediction.point)
    known = [run for run in rows if run in priors]
    if prior is not None and known:
        value_then, so_far, end = (
            np.array([_at(run, quantity, s) for run in known]) for s in (until, share, 1.0)
        )
        expected = np.array([priors[run] for run in known])
        of_line = value_then - so_far - np.array([found.left_out[run] for run in known])
        found = _join(line, prior, of_line, value_then - expected, end - expected, found.evidence)
        line = found.prediction
    return replace(
        found,
        prediction=replace(line, scale=math.hypot(line.scale, math.sqrt(excess))),
        left_out={},
    )


def _join(
    line: Prediction,
    prior: Prediction,
    of_line: Floats,
    of_prior: Floats,
    usual: Floats,
    evidence: Evidence,
) -> Pooled:
    """Two forecasts of one value, mixed as was best on saved runs; no less sure than `prior`.

    Args:
        line: From what was seen so far.
        prior: From before training, of the end.
        of_line: [n] misses of the first on saved runs, without their task.
        of_prior: [n] those of the second.
        usual: [n] misses of the forecast before training at the end.
        evidence: Of `line`.
    """
    apart = of_prior - of_line
    share = float(of_prior @ apart) / max(float(apart @ apart), 1e-12)  # least squares
    share = min(max(share, 0.0), 1.0)
    left = of_prior - share * apart
    ratio = math.sqrt(float(left @ left) / max(float(usual @ usual), 1e-12))
    point = share * line.point + (1 - share) * prior.point
    joined = Prediction(point, prior.scale * min(ratio, 1.0), prior.dof)
    reach = joined.scale * float(special.stdtrit(joined.dof, (1 + COVERAGE) / 2))
    evidence = replace(
        evidence,
        predictors={_SO_FAR: share, "forecast before training": 1 - share},
        error=float(np.abs(left).mean()),
        coverage=float((np.abs(left) <= reach).mean()),
    )
    return Pooled(joined, evidence, {})


def _predicted(
    learnt: Learnt,
    cells: Sequence[Sequence[Run]],
    ask: Ask,
    quantity: str,
    effects: Sequence[Effect],
    more: Extra | None,
) -> Pooled:
    asked = as_rows([describe_ask(ask, quantity, cells, more)])
    point, scale = (float(found[0]) for found in predict(learnt.known, asked, effects))
    point += float(asked.numbers["way"][0]) if effects is _GAIN else 0.0
    prediction = Prediction(point, scale * learnt.factor, learnt.dof)
    return Pooled(prediction, learnt.evidence, learnt.left_out)


def _learn(
    cells: Sequence[Sequence[Run]],
    model: str,
    quantity: str,
    effects: Sequence[Effect],
    name: str,
    target: Callable[[Run], float],
    more: Extra | None,
) -> Learnt:
    known = as_rows([describe(cell, quantity, target, more) for cell in cells])
    expected = known.numbers["way"] if effects is _GAIN else np.zeros(len(known))
    among = covariance(known, known, effects)
    known = heavy_tailed(replace(known, target=known.target - expected), among, "lesson", _TAIL)
    whole = np.ones(len(cells), bool)
    points, scales = left_out(known, among, whole, "task")
    start = 1.0
    if more is not None:  # a line of other models: as good as it was on them
        start = float(surprises(known, points, scales, whole, "task").mean())
    own = known.groups["model"] == model
    elsewhere = left_out(known, among, ~own, "world")
    squares = np.append(
        surprises(known, points, scales, own, "task"), surprises(known, *elsewhere, ~own, "world")
    )
    # Intervals widen where all are off, not where a few are.
    squares = np.minimum(squares, _FAR * max(float(np.median(squares)), 1.0))
    dof = _DOF + len(squares)
    factor = math.sqrt((_DOF * start + squares.sum()) / dof)
    found = {run: float(points[i] + expected[i]) for i, cell in enumerate(cells) for run in cell}
    judged = own if own.any() else whole
    if not own.any():
        points, scales = elsewhere
    misses = np.abs(known.target - points)[judged]
    reach = float(special.stdtrit(dof, (1 + COVERAGE) / 2)) * factor * scales[judged]
    evidence = Evidence(
        {name: 1.0},
        sum(len(cell) for cell, counts in zip(cells, judged, strict=True) if counts),
        len(set(known.groups["task"][judged].tolist())),
        float(misses.mean()),
        None,
        None,
        float((misses <= reach).mean()),
        "task" if own.any() else "model",
    )
    return Learnt(known, factor, dof, evidence, found)


def _at(run: Run, quantity: str, share: float) -> float:
    value = run.at(quantity, share)
    assert value is not None  # the callers have looked
    return value
