"""A run's file: written whole or not at all, read as it was, or refused by the field's name."""

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import make_record

from iimm_callbacks.monitor import IIMMMonitor
from iimm_callbacks.records.run_file import file_name, process, read_run, save_run, sweep
from iimm_callbacks.reports import terminal as report
from iimm_callbacks.reports.terminal import look_line


@pytest.fixture
def path(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs" / "run.json"


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


# --- writing ---


def test_a_saved_run_is_json_and_replaces_the_old_file(path):
    path.write_text("old")
    save_run(make_record(), path)
    assert json.loads(path.read_text()) == make_record()
    assert names_in(path.parent) == ["run.json"]


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_a_run_that_cannot_be_saved_leaves_the_old_file_and_no_other(path, value):
    path.write_text("old")
    with pytest.raises((ValueError, TypeError)):
        save_run(make_record() | {"bad": value}, path)
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["run.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_at_any_point_leaves_the_old_file_and_no_other(path, monkeypatch, call, error):
    def fail(*args):
        assert len(names_in(path.parent)) == 2  # the old one and the unfinished one
        raise error

    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        save_run(make_record(), path)
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["run.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_leaves_the_old_file_and_no_other(path, monkeypatch):
    plain = Path.open

    def full(file, *args, **kwargs):
        plain(file, *args, **kwargs).close()
        return plain(Path("/dev/full"), "wb")

    path.write_text("old")
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_run(make_record(), path)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["run.json"]


def test_what_a_killed_process_had_begun_is_swept_away_and_nothing_else(path):
    save_run({}, path)
    begun = path.with_name(f"{path.name}.12ab34cd.unfinished")
    other = path.with_name("other.json.12ab34cd.unfinished")
    for file in (begun, other):
        file.write_text("{")
    sweep(path)
    assert path.exists()
    assert other.exists()
    assert not begun.exists()


def test_links_are_replaced_and_not_followed(path, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("not ours")
    path.symlink_to(elsewhere)
    save_run(make_record(), path)
    assert elsewhere.read_text() == "not ours"
    assert not path.is_symlink()
    assert names_in(tmp_path) == ["elsewhere", "runs"]


@pytest.mark.parametrize("target", ["missing/run.json", ".", "..", ""])
def test_what_cannot_be_a_file_is_an_os_error_and_leaves_nothing(path, monkeypatch, target):
    monkeypatch.chdir(path.parent)
    with pytest.raises(OSError, match=r"run\.json|unfinished"):
        save_run(make_record(), target)
    assert names_in(path.parent) == []


# --- reading ---


def test_the_record_of_a_real_run_comes_back_as_it_was(
    path, tiny_clip, processor, colour_task, shape_task
):
    monitor = IIMMMonitor(colour_task, [shape_task], processor=processor, verbose=False)
    model = tiny_clip()
    monitor.begin(model, recipe={"learning_rate": 1e-3, "betas": [0.9, 0.99]})
    for step in (1, 2):
        monitor.check(model, step, 2)
    save_run(monitor.record(), path)
    assert read_run(path) == monitor.record()
    assert report.summary_table(read_run(path)) == report.summary_table(monitor.record())


@pytest.mark.parametrize(
    "settings", [{}, {"forecast": False}, {"off_target": False}, {"limit": None}], ids=str
)
def test_any_kind_of_record_comes_back_with_fields_that_are_not_known(path, settings):
    record = make_record(**settings) | {"of a later version": [{"x": None}]}
    record["looks"][0]["eval_iimm_new"] = 0.5
    record["forecast"]["new"] = record["limits"]["new"] = "n"
    save_run(record, path)
    assert read_run(path) == record


DEEP = json.loads("[" * 30 + "]" * 30)
DELETED = object()


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (["task"], DELETED, "`task` is missing"),
        (["task"], 5, "`task` must be a string, got 5"),
        (["model_fingerprint"], 5, "`model_fingerprint` must be a string, got 5"),
        (["task"], "\ud800", "`task` must be a string in UTF-8"),
        (["off_target", 1], None, r"`off_target\[1\]` must be a string, got None"),
        (["off_target", 1], "x\x1b", r"`looks\[0\]` lacks 'eval_iimm_x\\x1b_accuracy'"),
        (["n_images"], -1, "`n_images` must be a whole number from 0, got -1"),
        (["recipe"], {}, "`recipe` lacks `trainable_share`"),
        (["recipe", "trainable_share"], "all", r"`recipe\['trainable_share'\]` must be a fraction"),
        (["recipe", "new"], DEEP, r"`recipe\['new'\]` is nested deeper than 16"),
        (["limits", "limit_on"], "$x$", r"`limits\['limit_on'\]` must be one of 'mean', 'worst'"),
        (["limits", "max_forgetting"], 5, r"`limits\['max_forgetting'\]` must be a fraction"),
        (["forecast"], None, "`forecast` must be an object, got None"),
        (["forecast", "base_rate"], 0, r"`forecast\['base_rate'\]` must be true or false, got 0"),
        (["forecast", "notes"], "none", r"`forecast\['notes'\]` must be a list, got 'none'"),
        (["forecast", "gain"], None, r"`forecast\['gain'\]` must be an object, got None"),
        (["forecast", "gain", "low"], DELETED, r"`forecast\['gain'\]` lacks `low`"),
        (["forecast", "gain", "low"], 1e999, r"`forecast\['gain'\]\['low'\]` must be a finite"),
        (["forecast", "evidence", "gain", "n_tasks"], 2.5, r"\['n_tasks'\]` must be a whole numb"),
        (["forecast", "evidence", "gain", "predictors"], [], r"\['predictors'\]` must be an obje"),
        (["looks"], [], "`looks` must hold a look, got none"),
        (["looks"], {}, "`looks` must be a list, got dict"),
        (["looks", 1], 7, r"`looks\[1\]` must be an object, got 7"),
        (["looks", 1, "step"], "last", r"`looks\[1\]\['step'\]` must be a whole number from 0"),
        (["looks", 0, "level"], "fine", r"`looks\[0\]\['level'\]` must be one of 'continue', 'w"),
        (["looks", 0, "eval_iimm"], float("nan"), r"`looks\[0\]\['eval_iimm'\]` .* got nan"),
        (["looks", 0, "eval_iimm"], DELETED, r"`looks\[0\]` lacks `eval_iimm`"),
        (["looks", 0, "eval_iimm_emoji_accuracy"], DELETED, r"lacks 'eval_iimm_emoji_accuracy'"),
        (["looks", 0, "eval_iimm_emoji_accuracy"], 1.5, r"emoji_accuracy'\]` must be a fraction"),
        (["looks", 1, "eval_iimm_forgetting_worst"], DELETED, r"lacks 'eval_iimm_forgetting_wor"),
        (["looks", 0, "eval_iimm_gain_forecast_low"], DELETED, r"lacks 'eval_iimm_gain_forecast_"),
        (["looks", 1, "eval_iimm_forgetting_forecast"], DELETED, r"lacks 'eval_iimm_forgetting_f"),
        (["templates"], {"digits": "{}"}, r"`templates\['digits'\]` must be a list, got '{}'"),
        (["metrics"], ["recall@5"], "`metrics` must be an object, got list"),
        (["fingerprints"], {"digits": 5}, r"`fingerprints\['digits'\]` must be a string, got 5"),
        (["new"], float("inf"), "`new` must be a JSON value, numbers finite, got inf"),
        (["\x1b[2J"], float("inf"), r"`'\\x1b\[2J'` must be a JSON value"),
        (["\udcff"], 1, "`all of it, a key` must be a string in UTF-8"),
    ],
)
def test_a_bad_field_is_refused_with_file_name_and_value(path, where, value, says):
    record = make_record()
    inside = record
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    if value is DELETED:
        del inside[where[-1]]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"^{path} is no run file: .*{says}"):
        read_run(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Expecting value"),
        (b"[]", "`all of it` must be an object, got list"),
        (b"null", "`all of it` must be an object, got None"),
        (json.dumps(make_record()).encode()[:-1], "Expecting"),
        (b'{"task": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (json.dumps(make_record()).encode("utf-16"), "'utf-8' codec can't decode"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"new": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
    ids=["empty", "list", "null", "cut", "bytes", "utf-16", "lists", "objects", "digits"],
)
def test_what_is_no_json_object_in_utf_8_is_refused(path, content, says):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} is no run file: .*{says}"):
        read_run(path)


def test_a_file_that_cannot_be_opened_is_an_os_error(path):
    for missing in (path, path.parent):
        with pytest.raises(OSError, match=str(missing)):
            read_run(missing)


def test_whole_numbers_and_huge_ones_can_be_shown(path):
    record = copy.deepcopy(make_record())
    record["forecast"]["gain"] |= {"point": 10**308, "low": -(10**308), "high": 1}
    record["looks"][1] |= {"eval_iimm_forgetting_forecast_high": 10**308, "share": 0}
    save_run(record, path)
    assert "+inf" in report.preflight_table(read_run(path))
    assert "+inf" in look_line(read_run(path)["looks"][1])


# --- names ---


def test_a_plain_name_is_kept():
    assert file_name("handwritten_digits-v1.0") == "iimm_handwritten_digits-v1.0.json"
    assert file_name("") == "iimm_.json"


@pytest.mark.parametrize("task", ["..", "../../etc/passwd", "/", "a\\b", "a\0b", ".", "x" * 999])
def test_no_name_leaves_the_folder(tmp_path, task):
    path = tmp_path / file_name(task)
    path.write_text("")
    assert path.parent.resolve() == path.resolve().parent == tmp_path.resolve()
    assert len(path.name) <= 80


def test_two_tasks_never_share_a_file():
    changed = file_name("a/b")
    looks_changed = changed.removeprefix("iimm_").removesuffix(".json")
    names = ["a/b", "a b", "a_b", looks_changed, "x" * 53, "x" * 54, "x" * 55]
    assert len({file_name(name) for name in names}) == len(names)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters()), st.text(st.characters()))
def test_any_name_is_a_file_of_its_own(tmp_path_factory, one, other):
    folder = tmp_path_factory.getbasetemp()
    path = folder / file_name(one)
    assert path.parent == folder
    assert path.name.isascii()
    assert path.name.startswith("iimm_")
    assert not set(path.name) & set("/\\:\0 ")
    path.write_text("")
    path.unlink()
    assert (file_name(one) == file_name(other)) == (one == other)


def test_a_run_whose_process_is_gone_is_interrupted(tmp_path):
    path, here = tmp_path / "iimm_digits.json", process({"ended": "running"})["process"]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for change, ended in [
        ({}, "running"),
        ({"pid": dead.pid}, "interrupted"),
        ({"started": here["started"] - 60}, "interrupted"),  # another process has that id now
        ({"host": "elsewhere", "pid": dead.pid}, "running"),  # nobody knows
    ]:
        save_run(make_record() | {"ended": "running", "process": here | change}, path)
        assert read_run(path)["ended"] == ended
    save_run(make_record() | {"process": here | {"pid": dead.pid}}, path)
    assert read_run(path)["ended"] == make_record()["ended"]  # it had ended before
    assert process({"ended": "finished"}) == {}
