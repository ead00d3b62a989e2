"""What the README promises is held by tests that exist; its tables are those of the code."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from iimm_callbacks import IIMMCallback
from iimm_callbacks.records import keys

pytestmark = pytest.mark.once

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text()


def promises():
    """Promise -> names of the tests that hold it, from the README's table."""
    section = README.split("### What it promises\n")[1].split("\n## ")[0]
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
    section = README.split("### Every option of `IIMMCallback`\n")[1].split("\n**")[0]
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|-) \|", section, re.MULTILINE)
    parameters = inspect.signature(IIMMCallback).parameters.values()
    assert rows == [(p.name, "" if p.default is p.empty else repr(p.default)) for p in parameters]


def test_the_table_of_keys_is_that_of_what_is_logged():
    section = README.split("## How to read the numbers\n")[1].split("\n`Task")[0]
    told = set(re.findall(r"`(eval_\w+|eval_iimm_<task>_accuracy)`", section))
    known = {keys.PREFIX, keys.INTER, keys.INTRA, keys.STANDARD_ERROR, keys.ACCURACY}
    known |= {keys.LINEAR_PROBE, keys.LINEAR_PROBE_ERROR}
    known |= {keys.EXCEED, keys.RUNTIME, keys.WORST, keys.accuracy_key("<task>")}
    known |= {keys.observed_key(name) for name in ("gain", "forgetting")}
    known |= {keys.forecast_key(name) for name in ("gain", "forgetting")}
    assert told == known
