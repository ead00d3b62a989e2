"""What the README promises is held by tests that exist."""

import ast
import re
from pathlib import Path

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
        for path in TESTS.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert len(promises()) >= 10
    for promise, tests in promises().items():
        assert tests, promise
        assert set(tests) <= written, promise
