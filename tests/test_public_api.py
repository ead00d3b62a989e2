"""The public surface, and what importing it must not do."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import iimm_callbacks

ROOT = Path(__file__).parents[1]

# Run in a fresh interpreter: notes each import by the package of what only some users need (the
# Trainer itself imports peft where there is one, so `sys.modules` does not tell), every connection,
# changes to the root logger, and the modules that the package adds to those of the Trainer: timings
# are noise here, examples/benchmark.py takes them.
WATCH = """
import builtins, json, logging, socket, sys
OPTIONAL = ("torchvision", "matplotlib", "peft", "evaluate", "open_clip", "iimm_callbacks.sample")
seen, connections, plain = [], [], builtins.__import__
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    caller = (globals or {}).get("__name__") or ""
    full = caller.split(".")[0] + "." + name if level else name
    if caller.split(".")[0] == "iimm_callbacks" and full.startswith(OPTIONAL):
        seen.append(full)
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = watched
socket.socket.connect = lambda self, address: connections.append(str(address))
from transformers import Trainer, TrainerCallback
before = set(sys.modules)
from iimm_callbacks import *
added = set(sys.modules) - before
import scipy.stats
import torch
found = {
    "added": sorted(added),
    "added can fail": "scipy.stats" in set(sys.modules) - before,
    "imports": list(seen),
    "sample": "iimm_callbacks.sample" in sys.modules,
    "plots": "matplotlib" in sys.modules,
    "connections": connections,
    "handlers": len(logging.getLogger().handlers + logging.getLogger("iimm_callbacks").handlers),
    "level": logging.getLogger().level,
    "cuda": torch.cuda.is_initialized(),
}
try:
    exec("import matplotlib", {"__name__": "iimm_callbacks.reports.terminal"})
except ImportError:  # it is seen even where it is not installed
    pass
found["can fail"] = seen
print(json.dumps(found))
"""


# Seconds each, or of use to some users only.
NOT_AT_IMPORT = (
    "scipy.stats", "scipy.optimize", "evaluate", "matplotlib", "open_clip", "pandas", "peft",
    "sklearn", "tensorboard", "torchvision", "typer", "iimm_callbacks.cli",
    "iimm_callbacks.forecasting.grading", "iimm_callbacks.reports.page",
    "iimm_callbacks.reports.compare", "iimm_callbacks.sample",
)  # fmt: skip
FEW = {"iimm_callbacks", "rich", "markdown_it", "mdurl", "pygments", "platformdirs"}


@pytest.fixture(scope="module")
def fresh_import():
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_is_what_can_be_imported():
    public = {name for name in dir(iimm_callbacks) if not name.startswith("_")}
    assert all(hasattr(iimm_callbacks, name) for name in public)
    assert public == set(iimm_callbacks.__all__)
    assert sorted(iimm_callbacks.__all__) == iimm_callbacks.__all__


@pytest.mark.parametrize("name", iimm_callbacks.__all__)
def test_every_public_name_says_what_it_is(name):
    value = getattr(iimm_callbacks, name)
    assert inspect.getdoc(value)
    assert not value.__doc__.startswith(f"{name}(")  # a dataclass without a docstring gets this one
    if inspect.isclass(value):
        methods = inspect.getmembers(value, inspect.isfunction)
        own = [f for n, f in methods if not n.startswith("_") and f.__module__ == value.__module__]
        assert [f.__qualname__ for f in own if not inspect.getdoc(f)] == []


def test_importing_loads_nothing_optional(fresh_import):
    assert fresh_import["imports"] == []
    assert not fresh_import["sample"]
    assert not fresh_import["plots"]


def test_the_import_check_can_fail(fresh_import):
    assert fresh_import["can fail"] == ["matplotlib"]


def test_importing_adds_no_large_library_to_the_trainer(fresh_import):
    modules = fresh_import["added"]
    assert "iimm_callbacks.trainer.callback" in modules
    assert [m for m in modules if m in NOT_AT_IMPORT or m.startswith("torchvision.")] == []


def test_a_forecast_from_saved_runs_needs_no_torch():
    code = (
        "import sys; from iimm_callbacks import Forecaster; "
        "from iimm_callbacks.forecasting.runs import about, measured; "
        "from iimm_callbacks.records.store import read_outcomes; "
        f"runs = read_outcomes({str(ROOT / 'iimm_callbacks/sample/outcomes.jsonl')!r}); "
        "print(Forecaster().fit(runs[1:]).predict(measured(runs[0]), **about(runs[0])).gain, "
        "'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    gain, has_torch = done.stdout.rsplit(maxsplit=1)
    assert gain.startswith("Prediction(point=0.096"), gain
    assert has_torch == "False"


def test_importing_adds_few_packages_to_the_trainer(fresh_import):
    """Of scipy the Trainer may have loaded parts or nothing, by what is installed."""
    roots = {m.split(".")[0].lstrip("_") for m in fresh_import["added"]}
    third_party = roots - set(sys.stdlib_module_names)
    assert third_party - FEW - {"scipy", "numpy", "cython_runtime", "attr", "attrs"} == set()


def test_the_check_of_what_is_imported_can_fail(fresh_import):
    assert fresh_import["added can fail"]


def test_importing_connects_nowhere_and_sets_up_no_logging_and_no_device(fresh_import):
    assert fresh_import["connections"] == []
    assert fresh_import["handlers"] == 0
    assert fresh_import["level"] == 30  # logging.WARNING, Python's own default
    assert not fresh_import["cuda"]
