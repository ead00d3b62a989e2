"""What a wheel holds and weighs; what importing the package adds to importing the Trainer."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import iimm_callbacks

PACKAGE = Path(iimm_callbacks.__file__).parent
LARGEST = 20_000_000  # bytes

# Timings are noise here; examples/benchmark.py takes them. This says what can make them worse.
ADDED = """
import json, sys
from transformers import Trainer, TrainerCallback
before = set(sys.modules)
from iimm_callbacks import *
added = set(sys.modules) - before
import scipy.stats
print(json.dumps([sorted(added), "scipy.stats" in set(sys.modules) - before]))
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
def added():
    """Modules that the public names load beyond those of the Trainer; and can the check fail?"""
    command = [sys.executable, "-c", ADDED]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_adds_no_large_library_to_the_trainer(added):
    modules, _ = added
    assert "iimm_callbacks.trainer.callback" in modules
    assert [m for m in modules if m in NOT_AT_IMPORT or m.startswith("torchvision.")] == []


def test_importing_adds_few_packages_to_the_trainer(added):
    """Of scipy the Trainer may have loaded parts or nothing, by what is installed."""
    modules, _ = added
    third_party = {m.split(".")[0].lstrip("_") for m in modules} - set(sys.stdlib_module_names)
    assert third_party - FEW - {"scipy", "numpy", "cython_runtime", "attr", "attrs"} == set()


def test_the_check_of_what_is_imported_can_fail(added):
    assert added[1]


@pytest.fixture(scope="module")
def files():
    """What hatchling puts into the wheel: the package as it is, without caches."""
    found = [path for path in PACKAGE.rglob("*") if path.is_file()]
    return [p for p in found if "__pycache__" not in p.parts and p.suffix != ".pyc"]


def test_the_wheel_stays_under_20_megabytes(files):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.relative_to(PACKAGE.parent))
    assert 1_000_000 < wheel.getbuffer().nbytes < LARGEST


def test_the_wheel_holds_its_types_data_and_pages(files):
    names = {path.relative_to(PACKAGE).as_posix() for path in files}
    wanted = {"py.typed", "sample/model/model.safetensors", "sample/outcomes.jsonl"}
    wanted |= {"sample/tasks.json", "forecasting/base_rates/clip.json", "sample/DATA_CARD.md"}
    wanted |= {"data/clip_prompts/templates.json", "data/clip_prompts/SOURCE.md"}
    wanted |= {
        f"reports/{name}" for name in ("style.css", "base.html", "report.html", "compare.html")
    }
    wanted |= {f"measures/measurement/iimm/{name}" for name in ("README.md", "requirements.txt")}
    assert wanted <= names


def test_the_wheel_holds_nothing_left_over(files):
    odd = (".unfinished", ".lock", ".orig", ".rej", ".tmp", ".swp", ".log", ".pt")
    assert [path.name for path in files if path.name.endswith(odd)] == []
