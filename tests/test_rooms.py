"""The map of the package: rooms on floors, every import goes down, no circle; old paths work."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import iimm_callbacks

pytestmark = pytest.mark.once

PACKAGE = Path(iimm_callbacks.__file__).parent
FLOORS = [
    "measures", "records", "data", "models", "probing", "sample", "guard", "forecasting",
    "rescue", "reports", "monitor", "trainer", "cli",
]  # fmt: skip
ENTRIES = 15


def imports(package):
    """(module, module it imports) of the package, as tuples of names; types are no imports."""
    files = {
        path.relative_to(package).with_suffix("").parts: path for path in package.rglob("*.py")
    }
    for module, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = [
            n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECK" in ast.dump(n)
        ]
        skipped = {id(node) for block in typing for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and id(node) not in skipped:
                base = module[: len(module) - node.level] + tuple((node.module or "").split("."))
                base = tuple(part for part in base if part)
                for alias in node.names:
                    inner = (*base, alias.name)
                    yield module, inner if inner in files else base


def upward(package):
    """Imports that do not go down, between rooms."""
    return [
        (".".join(module), ".".join(imported))
        for module, imported in imports(package)
        if module[0] != "__init__" and imported and imported[0] != module[0]
        and FLOORS.index(imported[0]) > FLOORS.index(module[0])
    ]  # fmt: skip


def circles(package):
    """Modules that import themselves by way of others."""
    graph = {}
    for module, imported in imports(package):
        graph.setdefault(module, set()).add(imported)

    def reached(start):
        seen, queue = set(), [start]
        while queue:
            new = graph.get(queue.pop(), set()) - seen
            seen |= new
            queue.extend(new)
        return seen

    return sorted(".".join(module) for module in graph if module in reached(module))


def test_every_import_goes_down():
    assert upward(PACKAGE) == []


def test_no_modules_import_one_another():
    assert circles(PACKAGE) == []


def test_the_checks_can_fail(tmp_path):
    for room, text in {"records": "from ..cli import x", "cli": "from ..records import a"}.items():
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_text(text)
    (tmp_path / "cli" / "b.py").write_text("from . import c")
    (tmp_path / "cli" / "c.py").write_text("def f():\n    from .b import x")
    assert upward(tmp_path) == [("records.a", "cli")]
    assert circles(tmp_path) == ["cli.b", "cli.c"]


def test_the_map_can_be_drawn_from_the_listing():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert {name.removesuffix(".py") for name in entries} == {*FLOORS, "__init__", "py.typed"}
    assert len(entries) <= ENTRIES


@pytest.mark.parametrize("room", FLOORS)
def test_every_room_says_what_it_is_for_in_twenty_lines(room):
    card = (PACKAGE / room / "README.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert 5 <= len(card.splitlines()) <= 20


@pytest.mark.parametrize(
    ("old", "names"),
    [
        ("accuracy", "forgetting gain_over_zero_shot_error zero_shot_accuracy"),
        ("callback", "IIMMCallback"),
        ("card", "update_card"),
        ("data.tasks", "Task"),
        ("forecasting.forecast", "Forecast"),
        ("forecasting.forecaster", "Forecaster"),
        ("guard", "Limits Verdict"),
        ("measure", "IIMMAccumulator Measurement drift_bound iimm"),
        ("measurement", "FOLDER"),
        ("models.classifier", "ImageCollator PromptClassifier"),
        ("models.families", "Family register_encoder"),
        ("models.tuning", "prepare"),
        ("monitor", "IIMMMonitor"),
        ("probe_accuracy", "LinearProbe linear_probe"),
        ("report", "plot_run preflight_table summary_table"),
        ("storage.outcomes", "Outcome"),
        ("storage.run_file", "save_run"),
        ("storage.store", "append_outcome read_outcomes"),
    ],
)
def test_old_import_paths_of_public_names_give_the_very_same_object(old, names):
    module = import_module(f"iimm_callbacks.{old}")
    for name in names.split():
        here = getattr(module, name)
        if name in iimm_callbacks.__all__:
            assert here is getattr(iimm_callbacks, name)
        if not name.isupper():
            assert getattr(sys.modules[here.__module__], name) is here
    assert module.__spec__.name == module.__name__


def test_an_old_path_may_be_the_first_import():
    code = "from iimm_callbacks.storage.store import read_outcomes as a; import iimm_callbacks as b"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}; assert a is b.read_outcomes"], check=False
    )
    assert done.returncode == 0
