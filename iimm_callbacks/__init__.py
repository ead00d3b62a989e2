"""Measure IIMM before and during a fine-tune, forecast gain and forgetting, guard against both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accuracy import forgetting, gain_over_zero_shot_error, zero_shot_accuracy
    from .callback import IIMMCallback
    from .data.tasks import Task
    from .forecasting.forecast import Forecast
    from .forecasting.forecaster import Forecaster
    from .guard import Limits, Verdict
    from .measure import IIMMAccumulator, Measurement, drift_bound, iimm
    from .models.classifier import ImageCollator, PromptClassifier
    from .models.families import Family, register_encoder
    from .monitor import IIMMMonitor
    from .probe_accuracy import LinearProbe, linear_probe
    from .storage.outcomes import Outcome
    from .storage.store import append_outcome, read_outcomes

__version__ = "0.1.0"

# Where each public name lives. It is imported when first asked for, as transformers does it: what
# needs no Trainer does not wait for it, and `iimm doctor` runs where transformers is broken.
_HOMES = {
    "accuracy": ("forgetting", "gain_over_zero_shot_error", "zero_shot_accuracy"),
    "callback": ("IIMMCallback",),
    "data.tasks": ("Task",),
    "forecasting.forecast": ("Forecast",),
    "forecasting.forecaster": ("Forecaster",),
    "guard": ("Limits", "Verdict"),
    "measure": ("IIMMAccumulator", "Measurement", "drift_bound", "iimm"),
    "models.classifier": ("ImageCollator", "PromptClassifier"),
    "models.families": ("Family", "register_encoder"),
    "monitor": ("IIMMMonitor",),
    "probe_accuracy": ("LinearProbe", "linear_probe"),
    "storage.outcomes": ("Outcome",),
    "storage.store": ("append_outcome", "read_outcomes"),
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
    "LinearProbe",
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
    "linear_probe",
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
