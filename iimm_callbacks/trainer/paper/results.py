"""Measurements and outcomes -> R², slope and Kendall's tau beside what is published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from ...measures.results import gain_over_zero_shot_error
from ...records.outcomes import Outcome
from .experiment import Found, Part
from .published import BATCH_SIZE, CLAIMS, EPOCHS, RATES, TASKS

# Name -> in words. All but the last three are the paper's.
PREDICTORS = {
    "iimm": "IIMM",
    "intra": "image to image",
    "inter": "image to wrong text",
    "text_text": "text to text",
    "h_score": "H-Score",
    "gbc": "GBC",
    "logme": "LogME",
    "transrate": "TransRate",
    "emms": "EMMS, labels by the model's own text encoder",
    "zero_shot_error": "zero-shot error",
    "linear_probe": "linear probe's gain over zero-shot error",
}
_SCORES = {  # of `measures.transferability`
    "h_score": "H-Score", "gbc": "GBC", "logme": "LogME", "transrate": "TransRate", "emms": "EMMS",
}  # fmt: skip
_RISING = ("iimm", "intra", "inter")  # with which the gain is said to rise
_LEVEL = 0.95
_WIDEST = 0.6  # an interval wider than this tells no value from another
_FEWEST = 4  # tasks for an interval
_LEAST_SPREAD = 1e-6  # relative; below it rounding decides
_DRAWS = 2000


@dataclass(frozen=True)
class Cell:
    """One statistic of one model and method over the tasks.

    Attributes:
        model, method: Keys.
        target: ``"gain_over_zero_shot_error"`` or ``"forgetting"`` (mean, a fraction).
        statistic: ``"r2"``, ``"slope"`` or ``"tau"``.
        predictor: Of `PREDICTORS`.
        n_tasks: That it is over.
        value, low, high: With its 95 % interval; None where too few tasks are there.
        published: The paper's value; None where there is none.
        status: ``"reproduced"``, ``"not reproduced"``, ``"not run"``; empty without a published
            value. Reproduced: the published value lies in the interval, which is no wider than 0.6,
            and gain rises with IIMM and its terms. Not run: not all nine tasks, or not by the
            paper's recipe.
    """

    model: str
    method: str
    target: str
    statistic: str
    predictor: str
    n_tasks: int
    value: float | None
    low: float | None
    high: float | None
    published: float | None
    status: str


def results(found: Found, part: Part) -> dict[str, Any]:
    """Everything that the page shows, JSON-ready; fractions.

    Args:
        found: What `experiment.reproduce` returned.
        part: What was asked of it.

    Returns:
        ``claims``: a row for each published value, of models that were not run as well; ``cells``:
        all rows of `Cell`. ``runs``: of each model, method and task the run of the learning
        rate with the best validation accuracy. ``departures``: how this is not the paper's
        experiment, in words. ``measured``, ``failed``, ``n_left``: as `Found`.
    """
    departed = departures(part)
    runs: list[dict[str, Any]] = []
    cells: list[Cell] = []
    for model in part.models:
        measured = found.measured.get(model, {})
        for method in part.methods:
            chosen = best_rates([o for o in found.outcomes.get(model, []) if o.method == method])
            runs += [_row(model, o) for o in chosen]
            cells += _cells(model, method, chosen, measured, bool(departed))
    return {
        "models": list(part.models),
        "claims": [asdict(cell) for cell in _claims(cells)],
        "cells": [asdict(cell) for cell in cells],
        "runs": runs,
        "departures": departed,
        "measured": found.measured,
        "failed": found.failed,
        "n_left": found.n_left,
    }


def departures(part: Part) -> list[str]:
    """How a part is not the paper's experiment, in words; then no cell of it counts as run."""
    told = []
    if part.setting.epochs != EPOCHS:
        told.append(f"{part.setting.epochs} epochs instead of {EPOCHS}")
    if part.setting.batch_size != BATCH_SIZE:
        told.append(f"batches of {part.setting.batch_size} images instead of {BATCH_SIZE}")
    if sorted(part.rates) != sorted(RATES):
        rates = ", ".join(f"{rate:g}" for rate in part.rates)
        told.append(f"learning rates {rates} instead of {', '.join(f'{r:g}' for r in RATES)}")
    if part.most_test is not None:
        told.append(f"{part.most_test} test images of a task at most")
    if missing := [name for name in TASKS if name not in part.tasks]:
        told.append(f"without {', '.join(missing)}")
    return told


def best_rates(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Of each task the run with the best validation accuracy, the first of equals."""
    best: dict[str, Outcome] = {}
    for o in outcomes:
        accuracy = o.recipe["validation_accuracy"]
        if o.task not in best or accuracy > best[o.task].recipe["validation_accuracy"]:
            best[o.task] = o
    return list(best.values())


def _claims(cells: Sequence[Cell]) -> list[Cell]:
    """The cell of each published value."""
    known = {(c.model, c.statistic, c.predictor): c for c in cells if c.published is not None}
    return [
        known.get((model, of, by))
        or Cell(model, "full", _PUBLISHED, of, by, 0, None, None, None, value, "not run")
        for (model, of, by), value in CLAIMS.items()
    ]


def _row(model: str, o: Outcome) -> dict[str, Any]:
    names = (
        "task", "method", "iimm", "inter", "intra", "zero_shot_accuracy", "final_accuracy",
        "linear_probe_accuracy", "forgetting", "worst",
    )  # fmt: skip
    return {"model": model} | {name: getattr(o, name) for name in names} | {
        "gain_over_zero_shot_error": _relative(o),
        "learning_rate": o.recipe["learning_rate"],
        "best_epoch": o.recipe["best_epoch"],
    }  # fmt: skip


def _relative(o: Outcome) -> float | None:
    return gain_over_zero_shot_error(o.zero_shot_accuracy, o.final_accuracy)


def _cells(
    model: str,
    method: str,
    runs: Sequence[Outcome],
    measured: Mapping[str, Mapping[str, Any]],
    departed: bool,
) -> list[Cell]:
    partial = departed or len(runs) < len(TASKS)
    cells = []
    for target, end in _TARGETS.items():
        known = [(o, y) for o in runs if (y := end(o)) is not None]
        for predictor in PREDICTORS:
            x = [_predictor(predictor, o, measured[o.task]) for o, _ in known]
            found = _statistics(x, [y for _, y in known])
            falls = predictor in _RISING and (found["slope"][0] or 0.0) < 0
            for statistic, triple in found.items():
                key = (statistic, predictor)
                is_claimed = method == "full" and target == _PUBLISHED
                paper = CLAIMS.get((model, *key)) if is_claimed else None
                status = _status(triple, paper, partial, falls)
                cells.append(Cell(model, method, target, *key, len(known), *triple, paper, status))
    return cells


def _predictor(name: str, o: Outcome, measured: Mapping[str, Any]) -> float:
    if name in _SCORES:
        return float(measured["scores"][_SCORES[name]])
    if name == "zero_shot_error":
        return 1 - o.zero_shot_accuracy
    if name == "linear_probe":
        error = max(1 - o.zero_shot_accuracy, 1e-9)
        return float(measured["linear_probe_accuracy"] - o.zero_shot_accuracy) / error
    return float(measured[name])


_PUBLISHED = "gain_over_zero_shot_error"
_TARGETS: dict[str, Callable[[Outcome], float | None]] = {
    _PUBLISHED: _relative,
    "forgetting": lambda o: o.forgetting,
}

Triple = tuple[float | None, float | None, float | None]


def _statistics(x: Sequence[float], y: Sequence[float]) -> dict[str, Triple]:
    """R², slope, tau with 95 % intervals: by Fisher's z, Student's t, and a bootstrap of tasks."""
    none: Triple = (None, None, None)
    if len(x) < _FEWEST or min(_spread(x), _spread(y)) < _LEAST_SPREAD:
        return {"r2": none, "slope": none, "tau": none}
    r = stats.pearsonr(x, y)
    ends = r.confidence_interval(_LEVEL)
    low, high = sorted(end**2 for end in ends)
    line = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(x) - 2) * line.stderr)
    tau = float(stats.kendalltau(x, y).statistic)
    drawn = _resampled_taus(np.asarray(x, dtype=float), np.asarray(y, dtype=float))
    bounds = np.nanquantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return {
        "r2": (float(r.statistic**2), 0.0 if ends[0] * ends[1] < 0 else float(low), float(high)),
        "slope": (float(line.slope), float(line.slope) - half, float(line.slope) + half),
        "tau": (tau, float(bounds[0]), float(bounds[1])),
    }


def _spread(values: Sequence[float]) -> float:
    return float(np.ptp(values) / max(np.abs(values).max(), 1e-9))


def _resampled_taus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[draws] Kendall's tau-b of resampled tasks; NaN where a draw has one task only."""
    draws = np.random.default_rng(0).integers(0, len(x), (_DRAWS, len(x)))
    one, other = np.triu_indices(len(x), 1)
    a, b = (np.sign(v[draws[:, one]] - v[draws[:, other]]) for v in (x, y))  # [draws, pairs]
    ties = np.sqrt(np.abs(a).sum(1) * np.abs(b).sum(1))
    taus: np.ndarray = (a * b).sum(1) / np.where(ties > 0, ties, np.nan)
    return taus


def _status(triple: Triple, published: float | None, partial: bool, falls: bool) -> str:
    value, low, high = triple
    if published is None:
        return ""
    if partial or value is None or low is None or high is None or not math.isfinite(value):
        return "not run"
    inside = low <= published <= high and high - low <= _WIDEST and not falls
    return "reproduced" if inside else "not reproduced"
