"""What is read of a large store is what would be read of all of it."""

import json
import os
from dataclasses import asdict, replace
from functools import partial

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_outcomes import RUN

from iimm_callbacks.forecasting.forecaster import Forecaster
from iimm_callbacks.forecasting.runs import about, measured
from iimm_callbacks.records import catalog as catalogs
from iimm_callbacks.records import objects, scan, store, table
from iimm_callbacks.records.catalog import LEARNT_FROM, Listed, thin
from iimm_callbacks.records.lines import name_of, to_line
from iimm_callbacks.records.store import (
    append_outcome,
    check_store,
    open_store,
    read_outcomes,
    retire,
    sync,
)
from iimm_callbacks.sample import load_outcomes

pytestmark = pytest.mark.once


def run(i, model="a", method="full", task="t", **fields):
    return replace(
        RUN, run=f"{i:032x}", model=f"org/{model}", model_fingerprint=model, method=method,
        task=task, **fields,
    )  # fmt: skip


def many(n, seed=0):
    """Runs of three models, two methods and four tasks; some cut short, some without a name."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        cell = (rng.choice(list("abc")), rng.choice(["full", "lora"]), rng.choice(list("stuv")))
        rows.append(run(i, *map(str, cell), complete=bool(rng.random() < 0.8)))
        rows[-1] = replace(rows[-1], run="", ended=f"{i}") if rng.random() < 0.2 else rows[-1]
    return rows


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Every store has a table, and learns from few."""
    monkeypatch.setattr(store, "_LARGE", 1)
    monkeypatch.setattr(store, "_MANY", 1)
    monkeypatch.setattr(table, "_folder", lambda: tmp_path / "tables")


@pytest.fixture(params=["file", "folder", "memory"])
def place(request, tmp_path):
    """A store of each kind."""
    if request.param == "memory":
        name = f"memory://catalog{os.getpid()}-{tmp_path.name}"
        yield name
        import fsspec

        fsspec.filesystem("memory").rm(name.removeprefix("memory://"), recursive=True)
    else:
        yield {"file": f"{tmp_path}/o.jsonl", "folder": f"{tmp_path}/team/"}[request.param]


def fill(place, rows):
    for row in rows:
        append_outcome(place, row)


def same(found, expected):
    """The same runs: objects that were written within a tick have no order."""
    return sorted(map(to_line, found)) == sorted(map(to_line, expected))


def check(place):
    """Every answer is that of the store read as a whole."""
    whole, tabled = Listed(read_outcomes(place)), open_store(place)
    assert isinstance(tabled, table.Tabled)
    assert tabled.n_outcomes == whole.n_outcomes
    assert tabled.methods() == whole.methods()
    for model in ("a", "b", "nobody"):
        assert same(tabled.relevant(model), whole.relevant(model))
    for pattern in ({}, {"model": "a"}, {"model": "org/*", "task": "[st]"}, {"method": "lo*"}):
        chosen = tabled.select(**pattern)
        assert same(tabled.read(chosen), whole.read(whole.select(**pattern)))
    return tabled


def test_a_table_answers_as_the_whole_store_does(place):
    rows = many(40)
    fill(place, rows)
    check(place)
    fill(place, [*many(10, seed=1), replace(rows[3], complete=True, ended="resumed")])
    check(place)
    retire(place, name_of(rows[5]), "by mistake")
    assert check(place).n_outcomes == 50


def test_more_than_a_forecast_needs_is_thinned_the_same(tmp_path):
    rows = [run(i, "abcdef"[i % 6], task=f"t{i % 35}") for i in range(LEARNT_FROM + 200)]
    fill(tmp_path / "o.jsonl", rows)
    for model in ("a", "nobody"):
        found = open_store(tmp_path / "o.jsonl").relevant(model)
        assert found == [rows[i] for i in thin(rows, model)]
        assert len(found) == LEARNT_FROM


def test_what_was_saved_first_stays_the_same_when_more_is_saved(place):
    rows = many(30)
    fill(place, rows)
    n = open_store(place).n_outcomes
    before = open_store(place).relevant("a", first=n)
    # As a resumed run finds them.
    fill(place, [replace(row, run=f"later{i}") for i, row in enumerate(many(10, seed=1))])
    after = open_store(place)
    assert after.n_outcomes == n + 10
    if "team" in place or "memory" in place:  # by the clock
        assert len(after.relevant("a", first=n)) >= len(before) - 10
    else:
        assert after.relevant("a", first=n) == before


def test_damaged_lines_are_reported_and_the_last_one_is_read_when_it_is_whole(tmp_path, caplog):
    path, rows = tmp_path / "o.jsonl", many(6)
    lines = [to_line(row) for row in rows]
    path.write_bytes(b"\n".join([lines[0], b"{", b"", *lines[1:5], b"[]\n"]) + lines[5][:40])
    check(path)
    caplog.clear()
    open_store(path).relevant("a")
    assert caplog.text.count("is not an outcome and is skipped") == 3
    with path.open("ab") as file:
        file.write(lines[5][40:])
    assert check(path).n_outcomes == 6


def test_lines_with_bad_values_push_no_good_run_out(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "LEARNT_FROM", 20)
    monkeypatch.setattr(thin, "__defaults__", (20,))
    path, rows = tmp_path / "o.jsonl", many(60)
    fill(path, rows)
    good = [asdict(row) for row in rows]
    wrong = [
        *(row | {"final_accuracy": 150.0} for row in good),  # later lines of the same runs
        *(row | {"run": f"new{i}", "iimm": "high"} for i, row in enumerate(good)),
        {"schema_version": 1, "retired": rows[0].run},  # without why
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in wrong)
    found = check(path)
    assert found.n_outcomes == 60
    assert len(found.read(found.select())) == 60
    assert len(found.relevant("a")) == 20


def test_a_run_that_is_there_twice_counts_where_it_came_last(tmp_path):
    rows = [run(i, task="st"[i % 2]) for i in range(4)]
    path = tmp_path / "o.jsonl"
    fill(path, [*rows, replace(rows[0], ended="again")])
    expected = [*rows[1:], replace(rows[0], ended="again")]
    assert Listed(read_outcomes(path)).relevant("a") == expected
    assert open_store(path).relevant("a") == expected


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_a_mark_of_utf_8_at_the_start_costs_no_run(tmp_path, mark):
    path = tmp_path / "o.jsonl"
    path.write_bytes(mark + b"".join(map(to_line, many(5))))
    assert check(path).n_outcomes == 5


@pytest.mark.parametrize("later", [{}, {"n": 3}])
def test_a_file_that_was_edited_is_read_anew(tmp_path, later):
    path, rows = tmp_path / "o.jsonl", many(20)
    fill(path, rows)
    check(path)
    text = path.read_text().replace('"method": "lora"', '"method": "tune"')
    path.write_text(text)  # as long as before
    fill(path, many(**later, seed=3) if later else [])
    found = check(path)
    if not later:
        assert found.methods() <= {"full", "tune"}


def test_a_line_that_is_not_the_tables_is_never_taken_for_it(tmp_path):
    """Edited in its middle and appended to, with the old time of its last change."""
    path, rows = tmp_path / "o.jsonl", [run(i, ended="x" * 2000) for i in range(20)]
    fill(path, rows)
    open_store(path)
    text = path.read_bytes()
    path.write_bytes(text.replace(f"{9:032x}".encode(), b"f" * 32))
    fill(path, [run(20)])
    found = open_store(path).relevant("a")
    assert {o.run for o in found} == {o.run for o in read_outcomes(path)}
    open_store(path)
    path.write_bytes(path.read_bytes().replace(b"f" * 32, b"e" * 32))
    os.truncate(path, path.stat().st_size)
    stale = table.Tabled(path, table.of_file(path), path, [], partial(open_store, path))
    path.write_bytes(path.read_bytes().replace(b"e" * 32, b"d" * 32))
    with pytest.raises(OSError, match="changed while it was read"):
        stale.read(range(20))
    assert len(open_store(path).read(range(21))) == 21


def test_a_table_that_is_damaged_lost_or_cannot_be_kept_is_made_again(tmp_path, monkeypatch):
    path = tmp_path / "o.jsonl"
    fill(path, many(20))
    check(path)
    (kept,) = (tmp_path / "tables").glob("*.table")
    whole = kept.read_bytes()
    for content in (b"", b"5\n", b"{}", b"nothing", whole[:-30], whole[:-1] + b"x"):
        kept.write_bytes(content)
        check(path)
    kept.unlink()
    check(path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(table, "_folder", lambda: tmp_path / "file" / "tables")
    check(path)
    fill(f"{tmp_path}/team/", many(20))
    assert len(open_store(f"{tmp_path}/team/").select()) == 20


def test_what_leaves_an_address_and_what_waits_for_it(tmp_path, monkeypatch):
    place, rows = f"{tmp_path}/team/", many(8)
    fill(place, rows)
    check(place)
    there = sorted((tmp_path / "team").iterdir())
    there[0].unlink()
    assert check(place).n_outcomes == 7
    (tmp_path / "team" / "notes.txt").write_text("not ours")
    check(place)
    fill(place, [run(99)])
    (new,) = set((tmp_path / "team").iterdir()) - {*there, tmp_path / "team" / "notes.txt"}
    new.write_bytes(new.read_bytes()[:-9])  # torn before it was copied
    assert check(place).n_outcomes == 7
    there[1].write_bytes(b"{")  # torn later: the copy is what its name says
    assert open_store(place).n_outcomes == 7
    sync(place, tmp_path / "other.jsonl")
    assert len(read_outcomes(tmp_path / "other.jsonl")) == len(read_outcomes(place)) == 6


def test_a_copy_that_was_cut_short_loses_nothing(tmp_path):
    place = f"{tmp_path}/team/"
    fill(place, many(8))
    check(place)
    (copy,) = (tmp_path / "tables").glob("*.jsonl")
    copy.write_bytes(copy.read_bytes()[:-200])  # killed while it was written
    assert check(place).n_outcomes == 8
    check(place)
    assert copy.read_bytes().count(b"\n") == 8


def test_what_is_outside_the_copy_may_be_retired_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / "cache" / name)
    place, rows = f"{tmp_path}/team/", many(6)
    fill(place, rows)
    spread = json.dumps(asdict(run(7)), indent=1).encode()  # which has no line in the copy
    (tmp_path / "team" / objects.name_of(spread)).write_bytes(spread)
    fill(store._waiting(objects.as_store(place)), [run(8)])
    assert check(place).n_outcomes == 8
    for i in (7, 8):
        retire(place, run(i).run, "by mistake")
    assert check(place).n_outcomes == 6


def test_without_locks_an_address_is_read_as_a_whole(tmp_path, monkeypatch):
    place = f"{tmp_path}/team/"
    fill(place, many(5))

    def no_lock(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(table, "FileLock", no_lock)
    assert isinstance(open_store(place), Listed)
    assert open_store(place).n_outcomes == 5


def test_a_stale_table_that_cannot_be_removed_costs_no_run(tmp_path, monkeypatch):
    path = tmp_path / "o.jsonl"
    fill(path, [run(i, ended="x" * 2000) for i in range(10)])
    before, state = open_store(path), path.stat()
    path.write_bytes(path.read_bytes().replace(f"{5:032x}".encode(), b"f" * 32))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    monkeypatch.setattr(table, "forget", lambda store: None)  # of a folder that is read only
    assert {o.run for o in before.relevant("a")} == {o.run for o in read_outcomes(path)}
    assert "f" * 32 in {o.run for o in open_store(path).relevant("a")}


def test_a_copy_that_another_process_removed_is_made_again(tmp_path):
    place = f"{tmp_path}/team/"
    fill(place, many(6))
    found = open_store(place)
    table.forget(objects.as_store(place))
    assert same(found.relevant("a"), Listed(read_outcomes(place)).relevant("a"))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), max_size=60))
def test_thinned_runs_are_the_newest_of_every_cell_and_stay_the_same(cells):
    rows = [run(i, model, task=task) for i, (model, task) in enumerate(cells)]
    chosen = thin(rows, "a", limit=12)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(len(rows), 12)
    kept = [rows[i] for i in chosen]
    assert thin(kept, "a", limit=12) == list(range(len(kept)))
    for cell in set(cells):
        own = [i for i, other in enumerate(cells) if other == cell]
        taken = [i for i in chosen if cells[i] == cell]
        assert taken == own[len(own) - len(taken) :]
        assert taken  # six cells, twelve places


def test_a_forecast_from_a_store_is_that_from_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogs, "LEARNT_FROM", 60)
    monkeypatch.setattr(table, "LEARNT_FROM", 60)
    monkeypatch.setattr(thin, "__defaults__", (60,))
    rows = load_outcomes()
    path = tmp_path / "o.jsonl"
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    new = replace(rows[0], task="new", task_fingerprint="")
    found = open_store(path).relevant(new.model_fingerprint)
    assert len(found) == 60
    from_store, from_list = (
        Forecaster().fit(known).predict(measured(new), **about(new)) for known in (found, rows)
    )
    assert from_store.gain == from_list.gain
    assert from_store.forgetting == from_list.forgetting
    assert from_store.basis.startswith("60 complete runs of this model")


def test_lines_are_read_from_any_place_on(tmp_path):
    path = tmp_path / "o.jsonl"
    lines = [*map(to_line, many(60)), b"{\n", b"\n", to_line(replace(RUN, task="ü\r"))]
    path.write_bytes(b"".join(lines) + b'{"torn')
    size = path.stat().st_size

    def read(start=0):
        found = scan.scan_lines(path, start, size)
        words = zip(*([found.words[w][i] for i in found.rows[w]] for w in scan.WORDS), strict=True)
        return list(zip(words, found.rows[list(found.rows.dtype.names[4:])].tolist(), strict=True))

    kinds = [scan.OUTCOME] * 60 + [scan.DAMAGED, scan.OUTCOME, scan.DAMAGED]
    assert [facts[3] for _, facts in read()] == kinds
    assert read(len(lines[0])) == read()[1:]


def facts_without_the_schema(line):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "_decode", msgspec.json.Decoder(int).decode)
        return scan._facts(line)


def places_in(value, path=()):
    """Where each value is."""
    yield path
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(child, (*path, key))


SHIPPED = load_outcomes()
LITERALS = [
    *b"null true 0 1 -0.0 1.0 1e400 -1e400 5e-324 NaN Infinity 2.5 1e5000000 01 +1 .5 -1".split(),
    *b"9223372036854775807 9223372036854775808 1.0000000000000002 [] {} [1]".split(),
    *rb'"" "1" "\ud800" {"a":1} {"a":NaN} {"gain":0} [{"gain":0,"share":1}] {"\ud800":0}'.split(),
    b'"\xff"',
    b'{"\xff":0}',
    b"9" * 400,
    b"[" * 17 + b"]" * 17,
    b"[" * 3000 + b"]" * 3000,
]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_schema_accepts_only_what_parsing_accepts(data):
    row = asdict(data.draw(st.sampled_from(SHIPPED))) | {"run": "one"}
    row["trajectory"] = row["trajectory"][:2]
    swaps = {}
    for n in range(data.draw(st.integers(0, 2))):
        *way, last = data.draw(st.sampled_from(list(places_in(row))[1:]))
        holder = row
        for key in way:
            holder = holder[key]
        kind = data.draw(st.sampled_from(["value", "new", "gone", "twice"]))
        swaps[f'"@{n}"'.encode()] = data.draw(st.sampled_from(LITERALS))
        if kind == "value" or isinstance(holder, list):
            holder[last] = f"@{n}"
        elif kind == "gone":
            del holder[last]
        elif kind == "new":
            holder[data.draw(st.sampled_from(["new", "retired", "\ud800", "drops"]))] = f"@{n}"
        else:
            holder[f"@key {n}"] = f"@{n}"
            swaps[f'"@key {n}"'.encode()] = json.dumps(last).encode()
    line = json.dumps(row).encode() + b"\n"
    for old, new in swaps.items():
        line = line.replace(old, new)
    assert scan._facts(line) == facts_without_the_schema(line)


def test_the_schema_accepts_what_runs_leave():
    for outcome in SHIPPED:
        recipe = outcome.recipe | {"metrics": {outcome.task: "f1"}, "betas": [0.9, 1]}
        line = to_line(replace(outcome, run="one", recipe=recipe))
        assert scan._decode(line).task == outcome.task


def test_only_a_line_feed_ends_a_line(tmp_path, monkeypatch):
    path, lines = tmp_path / "o.jsonl", list(map(to_line, many(6)))
    path.write_bytes(lines[0][:-1] + b"\r\n" + lines[1][:-1] + b"\r" + b"".join(lines[2:]))
    assert check(path).n_outcomes == 4
    assert [problem.partition(":")[0] for problem in check_store(path)] == ["line 2"]
