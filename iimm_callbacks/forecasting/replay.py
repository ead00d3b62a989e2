"""Saved runs, told again look by look: what would have been forecast without their own task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats
from tqdm.auto import tqdm

from ..records.forecast import QUANTITIES, Forecast
from ..records.outcomes import Outcome
from .runs import about, measured

if TYPE_CHECKING:
    from .forecaster import Forecaster


@dataclass(frozen=True)
class Replay:
    """A saved run, and what would have been forecast of it at each look.

    Attributes:
        outcome: The run.
        shares: Of the steps done at each look, the one before training first.
        looks: As `Outcome.trajectory`, at these shares.
        forecasts: At these shares, from runs on other tasks.
        plain: Quantity -> what the plain mean of the method's runs on other tasks says of it, and
            their line on zero-shot error.
    """

    outcome: Outcome
    shares: tuple[float, ...]
    looks: tuple[dict[str, float], ...]
    forecasts: tuple[Forecast, ...]
    plain: dict[str, tuple[float, float]]


def replay_all(new: Callable[[], Forecaster], runs: Sequence[Outcome]) -> list[Replay]:
    """Each complete run with looks, forecast look by look from the runs on other tasks.

    Args:
        new: Makes the forecaster, unfitted.
        runs: Saved ones, one record of each.
    """
    replays = []
    forecasters: dict[str, Forecaster] = {}
    for o in tqdm(runs, desc="replaying", unit="run", disable=None, leave=False, delay=2):
        if not o.complete or not o.trajectory:
            continue
        others = [other for other in runs if other.task != o.task]
        if o.task not in forecasters:
            forecasters[o.task] = new().fit(others, base_rates=False)
        replay = replay_one(o, forecasters[o.task], others)
        if replay is not None:
            replays.append(replay)
    return replays


def replay_one(o: Outcome, forecaster: Forecaster, others: Sequence[Outcome]) -> Replay | None:
    """A run, forecast look by look; None where nothing is known.

    Args:
        o: A complete run with looks.
        forecaster: Fitted to runs without it.
        others: Runs that the plain mean and the line on zero-shot error are of.
    """
    looks = sorted(o.trajectory, key=lambda look: look["share"])
    looks = [{"share": 0.0, "gain": 0.0}] * (looks[0]["share"] > 0) + looks
    shares = [look["share"] for look in looks]
    forecasts = [
        forecaster.predict(
            measured(o), **about(o), next_share=shares[1] if len(shares) > 1 else None
        )
    ]
    if not forecasts[0].n_outcomes:
        return None
    for i in range(1, len(looks)):
        seen: dict[str, tuple[float, float]] = {
            name: (looks[i][name], looks[i].get(f"{name}_se", 0.0))
            for name in QUANTITIES
            if name in looks[i]
        }
        coming = shares[i + 1] if i + 1 < len(shares) else None
        forecasts.append(
            forecaster.update(
                forecasts[0],
                share=shares[i],
                seen=seen,
                next_share=coming,
                drops=looks[i].get("drops"),
            )
        )
    plain = {q: _plain(o, q, others) for q in QUANTITIES}
    return Replay(o, tuple(shares), tuple(looks), tuple(forecasts), plain)


def _plain(o: Outcome, quantity: str, others: Sequence[Outcome]) -> tuple[float, float]:
    """Plain mean of the method's other runs, and their line on zero-shot error."""
    rows = [
        (1 - other.zero_shot_accuracy, getattr(other, quantity))
        for other in others
        if (other.model_fingerprint, other.method) == (o.model_fingerprint, o.method)
        and other.complete
        and getattr(other, quantity) is not None
    ]
    mean = float(np.mean([y for _, y in rows])) if rows else math.nan
    if len(rows) < 2 or np.ptp([x for x, _ in rows]) == 0:
        return mean, math.nan
    line = stats.linregress(*zip(*rows, strict=True))
    return mean, float(line.intercept + line.slope * (1 - o.zero_shot_accuracy))
