"""The logged keys, in one place: a look and what it was judged to be -> one flat row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for the types alone: the command line reads keys without torch
    from ..measures.results import Forgetting
    from .forecast import Forecast, Prediction
    from .look import Look
    from .outcomes import Outcome
    from .verdict import Verdict

PREFIX = "eval_iimm"
INTER = f"{PREFIX}_inter"
INTRA = f"{PREFIX}_intra"
STANDARD_ERROR = f"{PREFIX}_se"
LINEAR_PROBE = f"{PREFIX}_linear_probe_accuracy"
LINEAR_PROBE_ERROR = f"{PREFIX}_linear_probe_se"
ACCURACY = f"{PREFIX}_accuracy"
WORST = f"{PREFIX}_forgetting_worst"
EXCEED = f"{PREFIX}_exceed_probability"
RUNTIME = f"{PREFIX}_runtime"


def observed_key(name: str) -> str:
    """Key of the observed "gain" or "forgetting"."""
    return f"{PREFIX}_{name}_observed"


def accuracy_key(task: str) -> str:
    """Key of an off-target task's accuracy, or of its own metric in its place."""
    return f"{PREFIX}_{task}_accuracy"


def forecast_key(name: str) -> str:
    """Key of the forecast of "gain" or "forgetting"; its interval has ``_low`` and ``_high``."""
    return f"{PREFIX}_{name}_forecast"


def look_row(
    look: Look,
    baseline: Look,
    forecast: Forecast,
    observed: Forgetting | None,
    verdict: Verdict,
) -> dict[str, float]:
    """All logged numbers of one look, Python floats; what there is no number of is left out.

    Args:
        look: The look; the first task in it is being learnt, the others are off-target.
        baseline: The look at the untouched model, with these images and maybe more. IIMM and
            accuracies of a look at fewer are then the baseline's, plus what changed on these.
        forecast: At this look.
        observed: Forgetting so far; ``None`` at the baseline and without off-target tasks.
        verdict: At this look.
    """
    shown = baseline.first(look)
    m, whole, before = look.measurement, baseline.measurement, shown.measurement
    task, *off_target = look.correct

    def accuracy(name: str) -> float:
        return _changed(baseline.accuracy(name), shown.accuracy(name), look.accuracy(name), 0.0)

    row = {
        PREFIX: _changed(whole.iimm, before.iimm, m.iimm, -1.0),
        INTER: _changed(whole.inter, before.inter, m.inter, -1.0),
        INTRA: _changed(whole.intra, before.intra, m.intra, -1.0),
        ACCURACY: accuracy(task),
        observed_key("gain"): look.accuracy(task) - shown.accuracy(task),
        RUNTIME: look.runtime,
    }
    if not math.isnan(m.standard_error):
        row[STANDARD_ERROR] = m.standard_error
    if look.learnable is not None and look.learnable.probe is not None:
        row[LINEAR_PROBE] = look.learnable.probe.accuracy
        row[LINEAR_PROBE_ERROR] = look.learnable.probe.standard_error
    if off_target:
        row[observed_key("forgetting")] = observed.mean.value if observed else 0.0
        row[WORST] = observed.worst.value if observed else 0.0
    row |= _interval("gain", forecast.gain) | _interval("forgetting", forecast.forgetting)
    if verdict.exceed_probability is not None:
        row[EXCEED] = verdict.exceed_probability
    return row | {accuracy_key(name): accuracy(name) for name in off_target}


def _changed(whole: float, before: float, now: float, least: float) -> float:
    """The baseline's number of all its images, plus what changed on those that a look shows."""
    return now if before == whole else min(max(whole + now - before, least), 1.0)


def as_outcome(
    start: Outcome, history: Sequence[dict[str, Any]], complete: bool, ended: str
) -> Outcome:
    """The outcome of a run from its looks.

    Args:
        start: The run before its first step.
        history: One row per look.
        complete: As `Outcome`.
        ended: As `Outcome`.
    """
    last = history[-1]
    return replace(
        start,
        final_accuracy=last[ACCURACY],
        off_target_after={name: last[accuracy_key(name)] for name in start.off_target_after},
        trajectory=[_trajectory_row(row) for row in history],
        complete=complete,
        ended=ended,
    )


def _trajectory_row(row: dict[str, Any]) -> dict[str, Any]:
    kept = {n: observed_key(n) for n in ("gain", "forgetting")} | {"worst": WORST}
    values = {k: row[key] for k, key in kept.items() if key in row}
    errors = {f"{k}_se": row["standard_errors"][k] for k in values if k in row["standard_errors"]}
    known = {"iimm": PREFIX, "training_loss": "training_loss", "drops": "drops"}
    beside = {name: row[key] for name, key in known.items() if key in row}
    return {"share": row["share"]} | values | errors | beside


def _interval(name: str, prediction: Prediction | None) -> dict[str, float]:
    if prediction is None:
        return {}
    key = forecast_key(name)
    return {key: prediction.point, f"{key}_low": prediction.low, f"{key}_high": prediction.high}
