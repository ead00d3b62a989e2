"""Measure IIMM before and during a fine-tune, forecast gain and forgetting, guard against both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Where each public name lives. It is imported when first asked for, as transformers does it: what
# needs no Trainer does not wait for it, and `iimm doctor` runs where transformers is broken.
_HOMES = {
    "accuracy": ("forgetting", "gain_over_zero_shot_error", "zero_shot_accuracy"),
    "callback": ("IIMMCallback",),
    "classifier": ("ImageCollator", "PromptClassifier"),
    "families": ("Family", "register_encoder"),
    "forecast": ("Forecast",),
    "forecaster": ("Forecaster",),
    "guard": ("Limits", "Verdict"),
    "measure": ("IIMMAccumulator", "Measurement", "drift_bound", "iimm"),
    "monitor": ("IIMMMonitor",),
    "outcomes": ("Outcome",),
    "store": ("append_outcome", "read_outcomes"),
    "tasks": ("Task",),
}

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


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
