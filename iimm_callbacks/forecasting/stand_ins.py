"""What stands in for a fit where the record is too small for one."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from ..data.tasks import OFF_TARGET_PROBE_SIZE
from .forecast import Prediction
from .records import Run, Runs

# What was lost so far says something of the end from here on.
_FROM_SHARE = 0.2


def repeat(runs: Runs, quantity: str, share: float) -> Prediction | None:
    """Mean and spread of runs of the very same task and method, Student-t distributed."""
    values = [value for run in runs.rows if (value := run.at(quantity, share)) is not None]
    if len(values) < 2:
        return None
    noises = [noise for run in runs.rows if (noise := run.noise_at(quantity, share)) is not None]
    noise = max(noises, default=0.5 / math.sqrt(OFF_TARGET_PROBE_SIZE))
    spread = max(float(np.std(values, ddof=1)), noise)
    return Prediction(
        float(np.mean(values)), spread * math.sqrt(1 + 1 / len(values)), len(values) - 1
    )


def lost_so_far(
    quantity: str, share: float, later: float, value: float, error: float
) -> Prediction | None:
    """What was lost so far, for want of runs on record; how much is to come the sample's runs say.

    None for gains, and before 20 % of the steps.
    """
    if quantity == "gain" or share < _FROM_SHARE:
        return None
    return Prediction(value, math.hypot(error, _rest(quantity, share, later)), 9)


@cache
def _rest(quantity: str, share: float, later: float) -> float:
    """Root mean square of what the shipped sample's runs lost between two shares of the steps."""
    from ..sample import load_outcomes

    runs = [Run(outcome) for outcome in load_outcomes()]
    pairs = [(run.at(quantity, share), run.at(quantity, later)) for run in runs]
    changes = [end - now for now, end in pairs if now is not None and end is not None]
    return float(np.sqrt(np.mean(np.square(changes))))
