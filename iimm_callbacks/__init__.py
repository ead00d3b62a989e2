"""Measure IIMM before and during a fine-tune, forecast gain and forgetting, guard against both."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.tasks import Task
    from .forecasting.forecaster import Forecaster
    from .measures.embeddings import zero_shot_accuracy
    from .measures.measure import IIMMAccumulator, drift_bound, iimm
    from .measures.probe_accuracy import LinearProbe, linear_probe
    from .measures.results import Measurement, forgetting, gain_over_zero_shot_error
    from .models.classifier import ImageCollator, PromptClassifier
    from .models.families import Family, register_encoder
    from .monitor import IIMMMonitor
    from .records.forecast import Forecast
    from .records.outcomes import Outcome
    from .records.store import append_outcome, read_outcomes
    from .records.verdict import Limits, Verdict
    from .trainer.calibration.calibrate import calibrate
    from .trainer.calibration.recipes import Recipe
    from .trainer.callback import IIMMCallback

__version__ = "0.1.0"

# Where each public name lives. It is imported when first asked for, as transformers does it: what
# needs no Trainer does not wait for it, and `iimm doctor` runs where transformers is broken.
_HOMES = {
    "measures.embeddings": ("zero_shot_accuracy",),
    "measures.results": ("Measurement", "forgetting", "gain_over_zero_shot_error"),
    "trainer.calibration.calibrate": ("calibrate",),
    "trainer.calibration.recipes": ("Recipe",),
    "trainer.callback": ("IIMMCallback",),
    "data.tasks": ("Task",),
    "records.forecast": ("Forecast",),
    "forecasting.forecaster": ("Forecaster",),
    "records.verdict": ("Limits", "Verdict"),
    "measures.measure": ("IIMMAccumulator", "drift_bound", "iimm"),
    "models.classifier": ("ImageCollator", "PromptClassifier"),
    "models.families": ("Family", "register_encoder"),
    "monitor": ("IIMMMonitor",),
    "measures.probe_accuracy": ("LinearProbe", "linear_probe"),
    "records.outcomes": ("Outcome",),
    "records.store": ("append_outcome", "read_outcomes"),
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
    "Recipe",
    "Task",
    "Verdict",
    "append_outcome",
    "calibrate",
    "drift_bound",
    "forgetting",
    "gain_over_zero_shot_error",
    "iimm",
    "linear_probe",
    "read_outcomes",
    "register_encoder",
    "zero_shot_accuracy",
]


# Modules with public names that moved: their old import paths keep working.
_MOVED = {
    f"{__name__}.{old}": f"{__name__}.{new}"
    for old, new in {
        "accuracy": "measures.embeddings",
        "callback": "trainer.callback",
        "card": "reports.card",
        "data.templates": "data.prompts",
        "forecasting.forecast": "records.forecast",
        "measure": "measures.measure",
        "measures.accuracy": "measures.embeddings",
        "measurement": "measures.measurement",
        "probe_accuracy": "measures.probe_accuracy",
        "report": "reports.terminal",
        "storage": "records",
        "storage.outcomes": "records.outcomes",
        "storage.run_file": "records.run_file",
        "storage.store": "records.store",
    }.items()
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module of `_MOVED` from where it is now."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        spec.loader_state = module.__spec__  # importlib overwrites it
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _MovedModules())


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
