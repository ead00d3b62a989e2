"""A look -> forecast, verdict and the row that tells it all. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import keys
from .accuracy import Forgetting, Score, forgetting, paired_drop
from .forecasting.forecast import Forecast
from .forecasting.forecaster import Forecaster
from .guard import Limits, Verdict, judge
from .probing.look import Look


@dataclass(frozen=True)
class Judged:
    """What is made of a look.

    Attributes:
        forecast: Of the end of the run.
        verdict: On it, and on what is observed.
        row: The logged keys, ``step``, ``share``, ``level``, ``reason``, ``n_images`` shown and
            ``standard_errors`` of what is observed.
    """

    forecast: Forecast
    verdict: Verdict
    row: dict[str, Any]


def judge_first(baseline: Look, prior: Forecast, limits: Limits) -> Judged:
    """Of the look at the untouched model.

    Args:
        baseline: That look; the task being learnt comes first in it.
        prior: The forecast before training.
        limits: The user's.
    """
    verdict = judge(prior, None, limits)
    return Judged(prior, verdict, _row(baseline, baseline, 0.0, prior, verdict, None, {}))


def judge_look(
    look: Look,
    baseline: Look,
    prior: Forecast,
    forecaster: Forecaster,
    limits: Limits,
    *,
    share: float,
    coming: float,
) -> Judged:
    """Of a look during training.

    Args:
        look: At the model as it trains.
        baseline: At the untouched model, with these images and maybe more.
        prior: The forecast before training.
        forecaster: That made it.
        limits: The user's.
        share: Of the steps that are done, in [0, 1].
        coming: Share of the steps at which the next look is due.
    """
    baseline = baseline.first(look)
    task, *off_target = look.correct
    gain = paired_drop(baseline.seen(task), look.seen(task))
    seen = {"gain": (-gain.value, gain.standard_error)}
    observed = None
    if off_target:
        observed = forgetting(_some(baseline, off_target), _some(look, off_target))
        seen["forgetting"] = (observed.mean.value, observed.mean.standard_error)
        seen["worst"] = (observed.worst.value, observed.worst.standard_error)
    forecast = forecaster.update(prior, share=share, seen=seen, next_share=coming)
    # At the end there is nothing left to forecast.
    verdict = judge(forecast if share < 1 else None, observed, limits)
    return Judged(forecast, verdict, _row(look, baseline, share, forecast, verdict, observed, seen))


def _some(look: Look, tasks: list[str]) -> dict[str, np.ndarray | Score]:
    return {task: look.seen(task) for task in tasks}


def _row(
    look: Look,
    baseline: Look,
    share: float,
    forecast: Forecast,
    verdict: Verdict,
    observed: Forgetting | None,
    seen: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    return keys.look_row(look, baseline, forecast, observed, verdict) | {
        "step": look.step,
        "share": share,
        "level": verdict.level,
        "reason": verdict.reason,
        "n_images": sum(map(len, look.correct.values())),
        "standard_errors": {name: error for name, (_, error) in seen.items()},
    }
