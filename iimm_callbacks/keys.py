"""The logged keys, in one place: a look and what it was judged to be -> one flat row."""

from __future__ import annotations

import math
from typing import Any

from .accuracy import Forgetting
from .forecast import Forecast, Prediction
from .guard import Verdict
from .probe import Look

PREFIX = "eval_iimm"
INTER = f"{PREFIX}_inter"
INTRA = f"{PREFIX}_intra"
STANDARD_ERROR = f"{PREFIX}_se"
ACCURACY = f"{PREFIX}_accuracy"
WORST = f"{PREFIX}_forgetting_worst"
EXCEED = f"{PREFIX}_exceed_probability"
RUNTIME = f"{PREFIX}_runtime"


def observed_key(name: str) -> str:
    """Key of the observed "gain" or "forgetting"."""
    return f"{PREFIX}_{name}_observed"


def accuracy_key(task: str) -> str:
    """Key of an off-target task's accuracy."""
    return f"{PREFIX}_{task}_accuracy"


def forecast_key(name: str) -> str:
    """Key of the forecast of "gain" or "forgetting"; its interval has ``_low`` and ``_high``."""
    return f"{PREFIX}_{name}_forecast"


def look_row(
    look: Look,
    baseline: Look,
    task: str,
    forecast: Forecast,
    observed: Forgetting | None,
    verdict: Verdict,
) -> dict[str, float]:
    """All logged numbers of one look, Python floats; what there is no number of is left out.

    Args:
        look: The look.
        baseline: The look at the untouched model.
        task: Name of the task being learnt; the others of the look are off-target.
        forecast: At this look.
        observed: Forgetting so far; ``None`` at the baseline and without off-target tasks.
        verdict: At this look.
    """
    m = look.measurement
    row = {
        PREFIX: m.iimm,
        INTER: m.inter,
        INTRA: m.intra,
        ACCURACY: look.accuracy(task),
        observed_key("gain"): look.accuracy(task) - baseline.accuracy(task),
        RUNTIME: look.runtime,
    }
    if not math.isnan(m.standard_error):
        row[STANDARD_ERROR] = m.standard_error
    off_target = [name for name in look.correct if name != task]
    if off_target:
        row[observed_key("forgetting")] = observed.mean.value if observed else 0.0
        row[WORST] = observed.worst.value if observed else 0.0
    row |= _interval("gain", forecast.gain) | _interval("forgetting", forecast.forgetting)
    if verdict.exceed_probability is not None:
        row[EXCEED] = verdict.exceed_probability
    return row | {accuracy_key(name): look.accuracy(name) for name in off_target}


def trajectory_row(row: dict[str, Any]) -> dict[str, float]:
    """What an `Outcome` keeps of a look: ``share``, ``gain``, ``forgetting`` and ``worst``."""
    kept = {n: observed_key(n) for n in ("gain", "forgetting")} | {"worst": WORST}
    return {"share": row["share"]} | {k: row[key] for k, key in kept.items() if key in row}


def _interval(name: str, prediction: Prediction | None) -> dict[str, float]:
    if prediction is None:
        return {}
    key = forecast_key(name)
    return {key: prediction.point, f"{key}_low": prediction.low, f"{key}_high": prediction.high}
