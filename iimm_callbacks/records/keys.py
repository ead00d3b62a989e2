"""The logged keys, in one place: a look and what it was judged to be -> one flat row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for the types alone: the command line reads keys without torch
    from ..measures.results import Forgetting
    from .forecast import Forecast
    from .look import Look
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


def forecast_keys(name: str) -> list[str]:
    """Keys of a forecast and of both ends of its interval."""
    return [f"{forecast_key(name)}{end}" for end in ("", "_low", "_high")]


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
    for name, found in (("gain", forecast.gain), ("forgetting", forecast.forgetting)):
        if found is not None:
            row |= zip(forecast_keys(name), (found.point, found.low, found.high), strict=True)
    if verdict.exceed_probability is not None:
        row[EXCEED] = verdict.exceed_probability
    return row | {accuracy_key(name): accuracy(name) for name in off_target}


def _changed(whole: float, before: float, now: float, least: float) -> float:
    """The baseline's number of all its images, plus what changed on those that a look shows."""
    return now if before == whole else min(max(whole + now - before, least), 1.0)
