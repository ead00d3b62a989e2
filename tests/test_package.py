"""What a wheel holds and weighs."""

import io
import zipfile
from pathlib import Path

import pytest

import iimm_callbacks

pytestmark = pytest.mark.once

PACKAGE = Path(iimm_callbacks.__file__).parent
LARGEST = 20_000_000  # bytes


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
    wanted |= {"sample/tasks.json", "sample/base_rates/clip.json", "sample/DATA_CARD.md"}
    wanted |= {"data/clip_prompts/templates.json", "data/clip_prompts/SOURCE.md"}
    wanted |= {
        f"reports/{name}" for name in ("style.css", "base.html", "report.html", "compare.html")
    }
    wanted |= {f"measures/measurement/iimm/{name}" for name in ("README.md", "requirements.txt")}
    assert wanted <= names


def test_the_wheel_holds_nothing_left_over(files):
    odd = (".unfinished", ".lock", ".orig", ".rej", ".tmp", ".swp", ".log", ".pt")
    assert [path.name for path in files if path.name.endswith(odd)] == []
