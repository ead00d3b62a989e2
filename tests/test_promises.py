"""What the README promises is held by tests that exist; its tables are those of the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import typer

from iimm_callbacks import IIMMCallback, cli
from iimm_callbacks.records import keys

pytestmark = pytest.mark.once

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CALLBACK = (ROOT / "iimm_callbacks" / "trainer" / "README.md").read_text()


def promises():
    """Promise -> names of the tests that hold it, from the table in README.md."""
    section = (TESTS / "README.md").read_text().split("## What is promised\n")[1]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return {promise.strip(): re.findall(r"`(test_\w+)`", tests) for promise, tests in rows[2:]}


def test_every_promise_names_tests_that_exist():
    written = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(promises()) >= 10
    for promise, tests in promises().items():
        assert tests, promise
        assert set(tests) <= written, promise


def test_the_table_of_options_is_that_of_the_callback():
    section = CALLBACK.split("## Every option of `IIMMCallback`\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|-) \|", section, re.MULTILINE)
    parameters = [
        p for p in inspect.signature(IIMMCallback).parameters.values() if p.name != "former"
    ]
    assert rows == [(p.name, "" if p.default is p.empty else repr(p.default)) for p in parameters]


def test_the_table_of_keys_is_that_of_what_is_logged():
    section = CALLBACK.split("## The logged keys\n")[1].split("\n`Task")[0]
    told = set(re.findall(r"`(eval_\w+|eval_iimm_<task>_accuracy)`", section))
    known = {keys.PREFIX, keys.INTER, keys.INTRA, keys.STANDARD_ERROR, keys.ACCURACY}
    known |= {keys.LINEAR_PROBE, keys.LINEAR_PROBE_ERROR}
    known |= {keys.EXCEED, keys.RUNTIME, keys.WORST, keys.accuracy_key("<task>")}
    known |= {keys.observed_key(name) for name in ("gain", "forgetting")}
    known |= {keys.forecast_key(name) for name in ("gain", "forgetting")}
    assert told == known


LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")


@pytest.mark.parametrize(
    "path", sorted(p for p in ROOT.rglob("*.md") if ".venv" not in p.parts), ids=lambda p: p.name
)
def test_every_link_leads_somewhere(path):
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        assert link.startswith(("https://", "http://")) or (path.parent / link).exists(), link


def test_the_readme_is_for_ten_minutes():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 220
    assert len(text.split()) <= 2000


def test_the_commands_of_the_readme_exist_and_none_is_missing():
    section = (ROOT / "README.md").read_text().split("## Commands\n")[1].split("\n## ")[0]
    told = set(re.findall(r"^iimm (\w+)", section, re.MULTILINE))
    assert told == set(typer.main.get_command(cli.app).commands)


def test_the_figures_of_the_readme_are_those_of_the_grade():
    grades = (ROOT / "examples" / "study" / "GRADES.txt").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("│") for line in grades.splitlines() if line.count("│") >= 4]
    (sample,) = (row[2] for row in rows if row[1].strip().startswith("gain, all methods, none of"))
    (published,) = (row[2] for row in rows if row[1].strip().startswith("26 published pairs"))
    points = float(re.search(r"\(([0-9.]+) of", sample).group(1))
    assert (
        f"gain forecast was {points:.1f} points off on the sample and "
        f"{float(published.split()[0]):.1f} on published runs" in readme
    )
