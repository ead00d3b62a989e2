"""Whatever stands in a file, a reader gives what can be written and read again, or one known error.

Fields of one outcome and of one run are broken one by one in test_outcomes.py and
test_run_file.py, names and folders in test_saved.py.
"""

import ast
import csv
import io
import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_outcomes import RUN, json_values
from test_report import make_record

import iimm_callbacks
from iimm_callbacks.records.as_dataset import check_names, from_dataset, to_dataset
from iimm_callbacks.records.by_hand import read_csv
from iimm_callbacks.records.outcomes import parse_outcome
from iimm_callbacks.records.run_file import read_run, save_run
from iimm_callbacks.records.store import append_outcome, check_store, read_outcomes
from iimm_callbacks.reports.figures import plot_run
from iimm_callbacks.reports.terminal import (
    look_line,
    preflight_lines,
    preflight_table,
    summary_table,
)
from iimm_callbacks.reports.words import printable

pytestmark = pytest.mark.once

ROWS = to_dataset([RUN, RUN]).to_list()

fast = settings(max_examples=100, deadline=None)
noise = st.binary(max_size=200)
json_bytes = json_values.map(lambda value: json.dumps(value).encode())
lines = st.lists(noise | json_bytes | st.just(json.dumps(asdict(RUN)).encode()), max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every reader of this module reads: it holds what the test put there, and no more."""
    logging.getLogger("iimm_callbacks.records.lines").setLevel(logging.CRITICAL)
    yield tmp_path_factory.mktemp("untrusted")
    logging.getLogger("iimm_callbacks.records.lines").setLevel(logging.NOTSET)


def write(folder, name, content):
    """The one file in the folder."""
    for other in folder.iterdir():
        other.unlink()
    path = folder / name
    path.write_bytes(content)
    return path


def is_alone(path):
    """Reading has written nothing beside it."""
    return [file.name for file in path.parent.iterdir() if file != path] == []


def attempt(read, path):
    """What it returns; or None, and what the one error that it may raise says."""
    try:
        return read(path), ""
    except ValueError as error:
        return None, str(error)


def check_outcomes(found, again):
    """Outcomes that were read survive being written and read: in lines, and in a table."""
    again.unlink(missing_ok=True)
    for outcome in found:
        append_outcome(again, outcome)
    if found:
        assert read_outcomes(again) == found
        assert from_dataset(to_dataset(found)) == found
        again.unlink()
        Path(f"{again}.lock").unlink(missing_ok=True)


# --- stores ---


@fast
@given(lines.map(b"\n".join) | noise)
def test_any_file_is_outcomes_and_named_lines(folder, content):
    path = write(folder, "store.jsonl", content)
    found, problems = read_outcomes(path), check_store(path)
    written = [line for line in content.split(b"\n") if line.strip()]
    assert len(found) + len(problems) == len(written)
    assert [p for p in problems if not p.startswith("line ") or p != printable(p)] == []
    assert is_alone(path)
    check_outcomes(found, folder / "again.jsonl")


cells = st.none() | st.booleans() | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
ints = st.integers(-(2**63), 2**63 - 1)
values = cells | ints | json_bytes | json_bytes.map(bytes.decode) | st.lists(ints, max_size=2)
NESTED = "[" * 100_000


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(ROWS[0])), values | st.just(NESTED), st.booleans())
def test_any_value_in_a_table_is_an_outcome_or_a_named_row(folder, column, value, whole):
    rows = [ROWS[0] | {column: value}, ROWS[1] | ({column: value} if whole else {})]
    try:
        dataset = Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError, UnicodeEncodeError):  # no column holds these
        assume(False)
    found = from_dataset(dataset)
    assert len(found) in ((0, 2) if whole else (0, 1, 2))
    check_outcomes(found, folder / "again.jsonl")


@fast
@given(noise | json_bytes, st.sampled_from(["state.json", "dataset_dict.json"]))
def test_any_folder_is_outcomes_or_an_error(folder, content, name):
    path = write(folder, name, content)
    for read in (read_outcomes, check_store):
        with pytest.raises((ValueError, TypeError, OSError)):
            read(folder)
    with pytest.raises((ValueError, OSError)):
        check_names(folder)
    assert is_alone(path)


@fast
@given(st.data())
def test_any_bytes_in_a_saved_table_are_outcomes_or_an_error(tmp_path_factory, data):
    store = tmp_path_factory.getbasetemp() / "bytes"
    if not store.exists():
        to_dataset([RUN, RUN]).save_to_disk(store)
    (file,) = store.glob("*.arrow")
    before = file.read_bytes()
    broken = bytearray(before)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(before) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(broken[: data.draw(st.just(len(before)) | st.integers(0, len(before)))])
    found, refusal = attempt(read_outcomes, store)
    file.write_bytes(before)
    assert len(list(store.iterdir())) == 3
    assert refusal.startswith(f"{store} is damaged: ") or len(found) <= 2
    assert all(parse_outcome(json.loads(json.dumps(asdict(o)))) == o for o in found or ())


# --- CSV ---

HEADER = ["model", "method", "task", "zero_shot_accuracy", "final_accuracy"]
LOOKS = ["gain@0.1", "gain_se@0.1"]
OPTIONAL = ["iimm", "n_images", "learning_rate", "steps", "before:b", "after:b", *LOOKS]
GOOD = ["m", "full", "cars", "0.5", "0.6", "0.1", "8", "1e-3", "9", "0.5", "0.4", "0.1", "0.01"]


def as_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode(errors="surrogatepass")


def read_or_refused(path):
    """The outcomes; none where they are refused in the one documented way."""
    found, refusal = attempt(read_csv, path)
    assert found is not None or refusal.startswith(f"{path} line ")
    assert is_alone(path)
    return found or []


@fast
@given(noise | lines.map(b"\n".join) | st.lists(st.lists(st.text())).map(as_csv))
def test_any_csv_is_outcomes_or_an_error_with_its_line(folder, content):
    path = write(folder, "runs.csv", content)
    check_outcomes(read_or_refused(path), folder / "again.jsonl")


numbers = st.floats().map(str) | st.integers().map(str) | st.sampled_from(["9" * 5000, "1_0", "٣"])


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.integers(0, len(GOOD) - 1), st.text() | numbers)
def test_any_cell_is_read_or_refused_with_its_line(folder, in_header, position, text):
    rows = [[*HEADER, *OPTIONAL], list(GOOD)]
    rows[0 if in_header else 1][position] = text
    path = write(folder, "runs.csv", as_csv(rows))
    check_outcomes(read_or_refused(path), folder / "again.jsonl")


# --- run files ---


def places(value, at=()):
    """Where every value inside a record stands."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in inside:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def change_at(record, place, value, missing=False):
    *above, last = place
    for key in above:
        record = record[key]
    record[last] = value
    if missing:
        del record[last]


PLACES = list(places(make_record()))


def shown_or_refused(path):
    """Whether the record in a file can be shown and saved again; it is refused otherwise."""
    record, refusal = attempt(read_run, path)
    if record is None:
        assert refusal.startswith(f"{path} is no run file: ")
        return False
    texts = [preflight_table(record), summary_table(record), *map(look_line, record["looks"])]
    texts.append(preflight_lines(record, "at each epoch"))
    assert all(line == printable(line) for text in texts for line in text.split("\n"))
    save_run(record, path)
    assert read_run(path) == record
    return True


@fast
@given(noise | json_bytes)
def test_any_file_is_a_run_or_an_error(folder, content):
    path = write(folder, "run.json", content)
    assert not shown_or_refused(path)
    assert is_alone(path)


extremes = st.sampled_from(
    [0, -1, 1e308, -1e308, 10**308, 10**400, 2**63 - 1, "", "\x1b[2J", "\ud800", "mean", [], {}]
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PLACES), json_values | extremes, st.booleans())
def test_any_value_in_a_run_can_be_shown_or_is_refused(folder, place, value, missing):
    record = make_record()
    change_at(record, place, value, missing)
    path = write(folder, "run.json", json.dumps(record).encode())
    shown_or_refused(path)
    assert is_alone(path)


WORDS = [("task",), ("method",), ("ended",)]
NUMBERS = [place for place in PLACES if "_forecast" in str(place[-1])]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8"), max_size=5))
    | st.tuples(st.sampled_from(NUMBERS), st.sampled_from([-1e308, -3.0, 1e300, 1e308]))
)
def test_any_run_that_can_be_read_can_be_drawn(folder, change):
    record = make_record()
    change_at(record, *change)
    path = write(folder, "run.json", json.dumps(record).encode())
    plot_run(read_run(path), folder / "run.png")


# --- no code from data ---

MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "code",
}
CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("torch", "jit"), ("np", "load"), ("numpy", "load"), ("yaml", "load")}
SAFE = {("yaml", "safe_load"), ("yaml", "YAMLError")}  # plain values only
KEYWORDS = {"allow_pickle", "trust_remote_code"}


def runs_data(source):
    """What in a module could run code that stands in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module, a.name) for a in node.names}
            if names <= SAFE:
                continue
            found += [node.module] if (node.module or "").split(".")[0] in MODULES else []
            found += [".".join(name) for name in names & LOADERS]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in CALLS else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = (node.value.id, node.attr)
            found += [".".join(name)] if name in LOADERS else []
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            found.append(node.arg)
    return found


def test_no_module_runs_code_that_stands_in_data():
    modules = sorted(Path(iimm_callbacks.__file__).parent.rglob("*.py"))
    assert len(modules) > 40
    found = {str(m): runs_data(m.read_text(encoding="utf-8")) for m in modules}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("from yaml import YAMLObject, safe_load", "yaml"),
        ("def f():\n    import yaml.loader", "yaml.loader"),
        ("from marshal import loads", "marshal"),
        ("from torch import load", "torch.load"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("x = eval('1')", "eval"),
        ("np.load(f, allow_pickle=True)", "np.load allow_pickle"),
    ],
)
def test_the_check_for_such_code_can_fail(source, what):
    assert sorted(runs_data(source)) == sorted(what.split())
    assert runs_data("model.eval()\nimport json\njson.load(file)") == []
