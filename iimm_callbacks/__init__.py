"""Measure IIMM before and during a fine-tune, forecast gain and forgetting, guard against both."""

from .accuracy import forgetting, gain_over_zero_shot_error, zero_shot_accuracy
from .callback import IIMMCallback
from .classifier import ImageCollator, PromptClassifier
from .families import Family, register_encoder
from .forecast import Forecast
from .forecaster import Forecaster
from .guard import Limits, Verdict
from .measure import IIMMAccumulator, Measurement, drift_bound, iimm
from .monitor import IIMMMonitor
from .outcomes import Outcome
from .store import append_outcome, read_outcomes
from .tasks import Task

__version__ = "0.1.0"

__all__ = [
    "Family",
    "Forecast",
    "Forecaster",
    "IIMMAccumulator",
    "IIMMCallback",
    "IIMMMonitor",
    "ImageCollator",
    "Limits",
    "Measurement",
    "Outcome",
    "PromptClassifier",
    "Task",
    "Verdict",
    "append_outcome",
    "drift_bound",
    "forgetting",
    "gain_over_zero_shot_error",
    "iimm",
    "read_outcomes",
    "register_encoder",
    "zero_shot_accuracy",
]
