"""Outcomes as objects: in folders and at addresses, by any number of writers, whatever fails."""

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import killed_writers
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_cli import ask, fails, run
from test_outcomes import PUBLISHED, RUN

from iimm_callbacks import IIMMCallback, append_outcome, read_outcomes
from iimm_callbacks.records import objects, store, table
from iimm_callbacks.records.as_dataset import to_dataset
from iimm_callbacks.records.ledger import Ledger
from iimm_callbacks.records.lines import name_of
from iimm_callbacks.records.objects import Address, as_store
from iimm_callbacks.records.outcomes import Retired
from iimm_callbacks.records.store import (
    as_outcomes,
    check_store,
    default_store,
    open_store,
    retire,
    sync,
)

pytestmark = pytest.mark.once

STOPPED = replace(RUN, complete=False, ended="stopped")


def runs(n, start=0):
    return [replace(RUN, task=f"task {i}", run=f"{i}") for i in range(start, start + n)]


def by_task(outcomes):
    return sorted(outcomes, key=lambda o: (o.task, o.run, o.complete))


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Nothing waits in the user's cache, no pause is long, and memory is empty."""
    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(objects, "_PAUSES", (0.0, 0.0))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(params=["folder", "memory", "file"])
def place(request, tmp_path):
    """A store of each kind, as a user writes it."""
    return {
        "folder": f"{tmp_path}/team/",
        "memory": "memory://team/runs",
        "file": str(tmp_path / "team.jsonl"),
    }[request.param]


def test_outcomes_come_back_as_they_were_written_in_their_order(place):
    for outcome in (RUN, STOPPED, PUBLISHED):
        append_outcome(place, outcome)
        time.sleep(0.01)
    assert read_outcomes(place) == [RUN, STOPPED, PUBLISHED]
    assert as_outcomes(place) == [RUN, STOPPED, PUBLISHED]
    assert check_store(place) == []


@pytest.mark.parametrize("place", ["folder", "memory"], indirect=True)
def test_the_same_outcome_twice_is_one_object(place):
    for _ in range(3):
        append_outcome(place, RUN)
    assert read_outcomes(place) == [RUN]


def test_an_empty_place_holds_none_and_reading_makes_nothing(tmp_path):
    assert read_outcomes("memory://nothing") == []
    assert not as_store(f"{tmp_path}/none/").exists()
    assert read_outcomes(f"{tmp_path}/none/") == []
    assert list(tmp_path.iterdir()) == []


def test_which_paths_are_files_and_which_are_folders_of_objects(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    to_dataset([RUN]).save_to_disk(tmp_path / "saved")
    append_outcome(f"{tmp_path}/objects/", RUN)
    for name in ("new.jsonl", "other", "saved", "empty"):
        assert as_store(tmp_path / name) == tmp_path / name
    for name in (f"{tmp_path}/empty/", tmp_path / "objects"):
        assert as_store(name) == Address(f"file://{name}")
    assert as_store("C:/runs") == Path("C:/runs")
    assert as_store(f"{tmp_path}/saved/") == tmp_path / "saved"
    assert read_outcomes(f"{tmp_path}/saved/") == [RUN]
    assert read_outcomes(tmp_path / "objects") == [RUN]


def test_a_local_folder_may_have_any_name(tmp_path):
    for name in ("a::b", "50%#x?"):
        place = f"{tmp_path}/{name}/"
        append_outcome(place, RUN)
        assert [path.suffix for path in (tmp_path / name).iterdir()] == [".json"]
        assert read_outcomes(place) == read_outcomes(tmp_path / name) == [RUN]
        files, root = as_store(place).filesystem()
        assert len(files.ls(root)) == 1


def test_the_marker_of_a_folder_is_no_object(flaky, monkeypatch):
    append_outcome(flaky, RUN)
    real = Flaky.ls

    def marked(self, path, **more):
        return [{"name": f"{path}/", "size": 0, "type": "file"}, *real(self, path, **more)]

    monkeypatch.setattr(Flaky, "ls", marked)
    assert read_outcomes(flaky) == [RUN]
    assert check_store(flaky) == []


@pytest.mark.parametrize("place", ["folder", "memory"], indirect=True)
def test_torn_changed_and_foreign_objects_are_named_skipped_and_left(place, caplog):
    append_outcome(place, RUN)
    files, root = as_store(place).filesystem()
    (name,) = (row.rsplit("/", 1)[-1] for row in files.ls(root, detail=False))
    data = files.cat_file(f"{root}/{name}")
    others = {
        f"outcome-{'0' * 32}.json": data,
        f"outcome-{'1' * 32}.json": data[:40],
        "holiday.jpg": b"\xff\xd8",
        objects.name_of(b"{}"): b"{}",
    }
    for other, content in others.items():
        files.pipe_file(f"{root}/{other}", content)
    files.pipe_file(f"{root}/README.md", b"what this is")
    assert read_outcomes(place) == [RUN]
    told = check_store(place)
    assert sorted(line.split(":")[0] for line in told) == sorted(others)
    assert len([r for r in caplog.records if "is not an outcome and is skipped" in r.message]) == 4
    assert len(files.ls(root)) == 6


@pytest.mark.whole
def test_writers_that_are_killed_lose_nothing_that_they_were_sure_of(tmp_path, monkeypatch):
    """Three of the rounds that killed_writers.py makes by hand."""
    monkeypatch.setattr(store, "_LARGE", 1)
    monkeypatch.setattr(store, "_MANY", 1)
    monkeypatch.setattr(table, "_folder", lambda: tmp_path / "tables")
    places, rng = [f"{tmp_path}/file.jsonl", f"{tmp_path}/team/"], random.Random(0)
    sure = {place: set() for place in places}
    for number in range(3):
        killed_writers.one_round(places, number, rng, sure, 0.02)
        killed_writers.check(places, sure)
    assert sum(map(len, sure.values())) > 10


class Flaky(MemoryFileSystem):
    """A network: `failing` calls to come raise what `error` makes."""

    protocol = "flaky"
    failing = 0
    error: type[Exception] = ConnectionError
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _fails(self):
        if Flaky.failing > 0:
            Flaky.failing -= 1
            raise Flaky.error("the network is down")

    def pipe_file(self, *args, **more):
        self._fails()
        return super().pipe_file(*args, **more)

    def ls(self, *args, **more):
        self._fails()
        return super().ls(*args, **more)


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    monkeypatch.setattr(Flaky, "failing", 0)
    monkeypatch.setattr(Flaky, "error", ConnectionError)
    return "flaky://team"


def test_what_fails_half_way_is_tried_again(flaky, caplog):
    Flaky.failing = 2
    append_outcome(flaky, RUN)
    Flaky.failing = 2
    assert read_outcomes(flaky) == [RUN]
    assert not caplog.records


def test_what_cannot_be_written_waits_on_this_machine_and_is_carried_over(flaky, caplog, tmp_path):
    Flaky.failing = 3
    append_outcome(flaky, RUN)
    (told,) = [r.message for r in caplog.records]
    assert "cannot write an outcome to flaky://team: ConnectionError" in told
    assert "it is kept in" in told
    assert Flaky.store == {}
    assert read_outcomes(flaky) == [RUN]  # what waits is known here
    append_outcome(flaky, STOPPED)
    assert len(Flaky.store) == 2
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    assert by_task(read_outcomes(flaky)) == by_task([RUN, STOPPED])


def test_a_place_that_stays_away_is_told_of_once(flaky, caplog):
    for record in (RUN, STOPPED):
        Flaky.failing = 3
        append_outcome(flaky, record)
    assert len(caplog.records) == 1
    assert by_task(read_outcomes(flaky)) == by_task([RUN, STOPPED])


def test_two_stores_that_do_not_exist_are_an_error_of_sync(tmp_path):
    with pytest.raises(ValueError, match=r"got .*one\.jsonl and .*other/: neither does"):
        sync(tmp_path / "one.jsonl", f"{tmp_path}/other/")
    assert not list(tmp_path.glob("*o*e*"))


def test_sync_carries_over_what_waits(flaky, tmp_path):
    Flaky.failing = 3
    append_outcome(flaky, RUN)
    assert sync(f"{tmp_path}/mine.jsonl", flaky) == (1, 0)
    assert len(Flaky.store) == 1
    assert read_outcomes(tmp_path / "mine.jsonl") == [RUN]


def test_what_waits_and_fails_again_costs_the_new_outcome_nothing(flaky, caplog, tmp_path):
    Flaky.failing = 3
    append_outcome(flaky, RUN)
    real, calls = Flaky.pipe_file, []

    def once(self, path, data, **more):
        calls.append(path)
        if len(calls) > 1:
            raise ConnectionError("down again")
        return real(self, path, data, **more)

    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flaky, "pipe_file", once)
        append_outcome(flaky, STOPPED)
    assert len(Flaky.store) == 1
    assert "still wait" in caplog.text
    assert by_task(read_outcomes(flaky)) == by_task([RUN, STOPPED])


def test_a_damaged_line_that_waits_is_not_deleted(flaky, tmp_path):
    Flaky.failing = 3
    append_outcome(flaky, RUN)
    (waiting,) = (tmp_path / "cache").rglob("*.jsonl")
    waiting.write_text(waiting.read_text() + '{"torn')
    append_outcome(flaky, STOPPED)
    assert len(Flaky.store) == 2
    assert by_task(read_outcomes(flaky)) == by_task([RUN, STOPPED])  # each once
    assert waiting.read_text().endswith('{"torn')


def test_a_network_that_stays_down_is_an_error_to_a_reader(flaky):
    Flaky.failing = 99
    with pytest.raises(OSError, match="cannot list the outcomes in flaky://team: ConnectionError"):
        read_outcomes(flaky)
    assert Ledger(flaky).catalog().n_outcomes == 0


def test_without_permission_it_is_not_tried_again(flaky):
    Flaky.failing, Flaky.error = 99, PermissionError
    with pytest.raises(PermissionError, match="the network is down"):
        read_outcomes(flaky)
    assert Flaky.failing == 98


def test_a_scheme_whose_package_is_not_installed_says_which(monkeypatch):
    def missing(text):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ImportError, match="the store s3://bucket/team needs another package: Inst"):
        Address("s3://bucket/team")


@pytest.mark.parametrize("other", ["memory://team", "{tmp}/folder/", "{tmp}/other.jsonl"])
def test_sync_goes_both_ways_and_twice_is_once(other, tmp_path):
    mine, other = str(tmp_path / "mine.jsonl"), other.format(tmp=tmp_path)
    for outcome in runs(3):
        append_outcome(mine, outcome)
    for outcome in runs(3, start=2):
        append_outcome(other, outcome)
    assert sync(mine, other) == (2, 2)
    assert by_task(read_outcomes(mine)) == by_task(read_outcomes(other)) == by_task(runs(5))
    assert read_outcomes(mine)[:3] == runs(3)  # as it was
    assert sync(mine, other) == sync(other, mine) == (0, 0)


def test_names_in_an_outcome_are_no_names_of_files(tmp_path):
    hostile = replace(RUN, task="../../etc/passwd", model="<script>alert(1)</script>", run="a/b\n")
    append_outcome(f"{tmp_path}/team/", hostile)
    assert [path.parent.name for path in tmp_path.rglob("*.json")] == ["team"]
    assert read_outcomes(f"{tmp_path}/team/") == [hostile]


@pytest.mark.parametrize("address", ["hf://", "memory:///", "memory:/", "file:///"])
def test_an_address_that_names_no_place_is_refused(address):
    with pytest.raises(ValueError, match=r"must name a place, such as s3://bucket/team, got '"):
        as_store(address)


def test_ten_megabytes_in_a_field_are_read_back_and_fill_no_screen(tmp_path):
    path, most = tmp_path / "runs.jsonl", "x" * 10_000_000
    append_outcome(path, replace(RUN, recipe={"note": most}, run="1"))
    append_outcome(path, replace(RUN, task=most, run="2"))
    append_outcome(path, replace(RUN, task=most, run="2", final_accuracy=0.8))
    assert [len(o.task) for o in open_store(path).read([0, 1])] == [6, 10_000_000]
    told = [run("outcomes", *words, "--store", path) for words in (
        ["check"], ["list"], ["retire", "2", "--why", "too long"],
    )]  # fmt: skip
    assert all(len(answer.stdout) < 2000 for answer in told)
    assert len(open_store(path).select()) == 1


def test_a_clock_that_goes_back_loses_nothing(tmp_path):
    folder = tmp_path / "team"
    for i, outcome in enumerate(runs(3)):
        append_outcome(f"{folder}/", outcome)
        newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 - i, 1000 - i))
    assert by_task(read_outcomes(f"{folder}/")) == runs(3)


def test_a_guarded_run_saves_to_an_address_and_the_next_one_learns_from_it(
    make_trainer, colour_task, shape_task
):
    for n in (1, 2):
        guard = IIMMCallback(
            colour_task, shape_task, outcomes="memory://team", verbose=False, card=False
        )
        make_trainer([guard]).train()
        assert len(read_outcomes("memory://team")) == n
    assert "1 complete run of this" in guard.monitor.record()["forecast"]["basis"]


def test_a_run_whose_store_is_out_of_reach_goes_on_and_keeps_its_outcome(
    make_trainer, colour_task, shape_task, flaky
):
    Flaky.failing = 99
    guard = IIMMCallback(colour_task, shape_task, outcomes=flaky, verbose=False, card=False)
    make_trainer([guard]).train()
    Flaky.failing = 0
    assert read_outcomes(flaky) == [guard.outcome]


def test_the_users_store_may_be_an_address(monkeypatch):
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", "memory://mine")
    assert default_store() == Address("memory://mine")
    append_outcome(default_store(), RUN)
    assert ask("outcomes", "list")["n_outcomes"] == 1
    doctor = json.loads(run("doctor", "--json").stdout)
    assert doctor["store"] | {"problems": []} == {
        "path": "memory://mine", "runs": 1, "damaged": 0, "writable": None, "problems": [],
    }  # fmt: skip


def test_the_commands_take_addresses(tmp_path):
    mine = tmp_path / "mine.jsonl"
    append_outcome(mine, RUN)
    assert ask("outcomes", "sync", mine, "memory://team")["added"] == [0, 1]
    assert ask("outcomes", "list", "--store", "memory://team")["n_outcomes"] == 1
    assert ask("outcomes", "check", "--store", "memory://team")["problems"] == []
    assert ask("outcomes", "import", "memory://team", "--store", f"{tmp_path}/new/")["added"] == 1
    assert ask("outcomes", "list", "--store", f"{tmp_path}/new/")["n_outcomes"] == 1
    ask("outcomes", "export", tmp_path / "all.jsonl", "--store", "memory://team")
    assert read_outcomes(tmp_path / "all.jsonl") == [RUN]
    told = fails("outcomes", "list", "--store", "nosuch://team")
    assert "must be a file, a folder or an address that fsspec knows" in told
    assert not (tmp_path / "nosuch:").exists()
    assert not Path("nosuch:").exists()


# --- retired runs


def test_a_retired_run_no_longer_counts_and_stays(place):
    for outcome in runs(3):
        append_outcome(place, outcome)
    assert retire(place, "1", "wrong prompts") == runs(2)[1]
    assert by_task(read_outcomes(place)) == by_task([runs(3)[0], runs(3)[2]])
    assert check_store(place) == []
    with pytest.raises(ValueError, match="a saved run that counts, got '1'"):
        retire(place, "1", "again")
    with pytest.raises(ValueError, match="`why` must say why"):
        retire(place, "0", " ")
    kept = [item for _, item in store._scan(as_store(place))]
    assert len(kept) == 4
    (told,) = [item for item in kept if isinstance(item, Retired)]
    assert (told.retired, told.why) == ("1", "wrong prompts")
    assert told.provenance["when"]


def test_a_run_without_a_name_is_retired_by_its_hash(place):
    nameless = [replace(RUN, run="", task=name) for name in ("a", "b")]
    for outcome in nameless:
        append_outcome(place, outcome)
    retire(place, name_of(nameless[0]), "a test")
    assert read_outcomes(place) == nameless[1:]


def test_sync_carries_over_what_is_retired(tmp_path):
    mine = str(tmp_path / "mine.jsonl")
    for outcome in runs(3):
        append_outcome(mine, outcome)
    sync(mine, "memory://team")
    retire("memory://team", "2", "the disk was broken")
    assert sync(mine, "memory://team") == (1, 0)
    assert by_task(read_outcomes(mine)) == by_task(read_outcomes("memory://team")) == runs(2)
    assert sync(mine, "memory://team") == (0, 0)


def test_retiring_waits_where_the_address_is_out_of_reach(flaky):
    append_outcome(flaky, RUN)
    Flaky.failing = 0
    real = Flaky.pipe_file
    Flaky.pipe_file = lambda self, *_, **__: (_ for _ in ()).throw(ConnectionError("down"))
    try:
        retire(flaky, name_of(RUN), "wrong")
    finally:
        Flaky.pipe_file = real
    assert read_outcomes(flaky) == []
    append_outcome(flaky, STOPPED)
    assert len(Flaky.store) == 3


@pytest.mark.parametrize(
    "wrong", [{"retired": 3}, {"why": None}, {"provenance": [1]}, {"schema_version": 99}]
)
def test_what_is_no_word_of_a_retired_run_is_told(wrong, tmp_path):
    path = tmp_path / "runs.jsonl"
    row = {"retired": "1", "why": "x", "provenance": {}, "schema_version": 1} | wrong
    path.write_text(json.dumps(row) + "\n")
    assert len(check_store(path)) == 1
    assert read_outcomes(path) == []


def test_the_command_retires_a_run(own_store):
    append_outcome(own_store, RUN)
    append_outcome(own_store, runs(1)[0])
    assert ask("outcomes", "retire", "0", "--why", "a <b>test</b>")["retired"] == "0"
    assert ask("outcomes", "list")["n_outcomes"] == 1
    assert "must be that of a saved run" in fails("outcomes", "retire", "0", "--why", "x")


def test_a_run_without_a_name_is_retired_by_the_one_that_list_tells(tmp_path):
    rows = [replace(RUN, run="", ended=ended) for ended in ("first", "second")]
    for row in rows:
        append_outcome(tmp_path / "o.jsonl", row)
    store = ("--store", tmp_path / "o.jsonl")
    first, _ = ask("outcomes", "list", *store)["outcomes"]
    assert (first["ended"], len(first["name"])) == ("first", 32)
    ask("outcomes", "retire", first["name"], "--why", "by mistake", *store)
    assert read_outcomes(tmp_path / "o.jsonl") == rows[1:]


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_told(tmp_path):
    (tmp_path / "team").mkdir()
    with pytest.raises(OSError, match=r"ends with a slash: .*/team/\)"):
        append_outcome(tmp_path / "team", RUN)
    append_outcome(f"{tmp_path}/team/", RUN)
    append_outcome(tmp_path / "team", replace(RUN, run="again"))  # it holds objects now
    assert len(read_outcomes(tmp_path / "team")) == 2
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError, match=r"cannot append an outcome \(File exists\)"):
        append_outcome(f"{tmp_path}/runs/", RUN)
