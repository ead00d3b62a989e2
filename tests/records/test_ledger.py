"""A run's place in the store: written once, whatever ends the run, and never at its cost."""

import gc
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from test_outcomes import RUN

from iimm_callbacks import read_outcomes
from iimm_callbacks.records import ledger as module
from iimm_callbacks.records.as_dataset import to_dataset
from iimm_callbacks.records.ledger import Ledger

INTERRUPTED = replace(RUN, complete=False, ended="interrupted")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outcomes.jsonl"


def test_a_closed_ledger_wrote_its_draft_exactly_once(path):
    ledger = Ledger(path)
    ledger.draft(RUN)
    assert not path.exists()
    ledger.close()
    ledger.close()
    ledger.draft(INTERRUPTED)
    del ledger
    gc.collect()
    assert read_outcomes(path) == [RUN]


def test_the_latest_draft_is_the_one_that_counts(path):
    ledger = Ledger(path)
    ledger.draft(INTERRUPTED)
    ledger.draft(RUN)
    ledger.close()
    assert read_outcomes(path) == [RUN]


def test_a_ledger_that_goes_away_records_the_run_as_interrupted(path):
    ledger = Ledger(str(path))
    ledger.draft(INTERRUPTED)
    del ledger
    gc.collect()
    assert read_outcomes(path) == [INTERRUPTED]


def test_a_run_that_never_looked_leaves_nothing(path):
    ledger = Ledger(path)
    ledger.close()
    del ledger
    gc.collect()
    assert not path.exists()
    assert not path.parent.joinpath("outcomes.jsonl.lock").exists()


@pytest.mark.parametrize("store", [None, ""])
def test_without_a_store_nothing_is_read_or_kept(store, own_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(store)
    ledger.draft(RUN)
    ledger.close()
    assert ledger.catalog().n_outcomes == 0
    assert ledger.path is None
    assert not any(tmp_path.rglob("*.jsonl"))


def test_the_default_store_is_read_and_added_to(own_store):
    ledger = Ledger("default")
    assert (ledger.path, ledger.catalog().n_outcomes) == (own_store, 0)
    ledger.draft(RUN)
    ledger.close()
    assert Ledger("default").catalog().relevant("") == [RUN]


ENDS = {
    "end": "",
    "exception": "raise RuntimeError('out of memory')",
    "sys.exit": "sys.exit(3)",
    "ctrl-c": "raise KeyboardInterrupt",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "abort": "os._exit(1)",
    # A data loader's worker inherits a copy, which goes away when it ends.
    "fork": "if os.fork() == 0:\n    del ledger; gc.collect(); sys.exit()\nos.wait(); os._exit(0)",
}
PROGRAM = """
import gc, os, signal, sys
from dataclasses import replace
from test_outcomes import RUN
from iimm_callbacks.storage.ledger import Ledger
gc.freeze()
for end, code in {ends!r}.items():
    if os.fork() == 0:  # a process each, without importing torch again
        ledger = Ledger("{folder}/" + end)
        ledger.draft(replace(RUN, complete=False, ended="interrupted"))
        exec(code)
        sys.exit()
for _ in {ends!r}:
    os.wait()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folder with the store of each of `ENDS`, named so."""
    folder = tmp_path_factory.mktemp("ended")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(ends=ENDS, folder=folder)],
        check=True, capture_output=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("end", ENDS)
def test_however_the_process_ends_the_run_is_recorded_at_most_once(ended, end):
    found = read_outcomes(ended / end) if (ended / end).exists() else []
    assert found == ([] if end in ("kill", "abort", "fork") else [INTERRUPTED])


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(30, "read-only"),
                                   ValueError("has NaN in it"), TimeoutError("held")])  # fmt: skip
def test_a_store_that_cannot_be_written_costs_a_warning(path, caplog, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(module, "append_outcome", refuse)
    ledger = Ledger(path)
    ledger.draft(RUN)
    with caplog.at_level(logging.WARNING):
        ledger.close()
    assert [r.getMessage() for r in caplog.records] == [
        f"The outcome of this run was not saved: {error}"
    ]
    assert ledger.saved == (None, None)  # nothing is said to be where it is not


def test_what_was_saved_is_said_and_nothing_else(path, tmp_path):
    ledger = Ledger(path, tmp_path / "run.json")
    ledger.draft(RUN, {"looks": []})
    assert ledger.saved == (tmp_path / "run.json", None)
    ledger.close()
    ledger.close()
    assert ledger.saved == (tmp_path / "run.json", path)
    (tmp_path / "folder.json").mkdir()
    blocked = Ledger(None, tmp_path / "folder.json")
    blocked.draft(RUN, {"looks": []})
    blocked.close()
    assert blocked.saved == (None, None)


def test_a_folder_in_the_place_of_the_store_costs_a_warning(path, caplog):
    path.mkdir()
    ledger = Ledger(path)
    ledger.draft(RUN)
    assert ledger.catalog().n_outcomes == 0
    ledger.close()
    assert "cannot be read" in caplog.text
    assert "was not saved" in caplog.text


def test_a_folder_of_several_splits_costs_a_warning(path, caplog):
    datasets.DatasetDict(train=to_dataset([RUN])).save_to_disk(path)
    assert Ledger(path).catalog().n_outcomes == 0
    assert "cannot be read" in caplog.text


def test_an_outcome_that_could_not_be_read_back_costs_a_warning(path, caplog):
    ledger = Ledger(path)
    ledger.draft(replace(RUN, iimm=float("nan")))
    ledger.close()
    assert "was not saved" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("method", ["exists", "open"])
def test_a_store_that_may_not_be_read_costs_a_warning(path, caplog, monkeypatch, method):
    path.write_text("")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    ledger = Ledger(path)
    monkeypatch.setattr(Path, method, refuse)
    assert ledger.catalog().n_outcomes == 0
    assert "cannot be read" in caplog.text


def test_damaged_lines_are_skipped(path, caplog):
    ledger = Ledger(path)
    ledger.draft(RUN)
    ledger.close()
    path.write_text(path.read_text() + '{"cut sho')
    assert Ledger(path).catalog().relevant("") == [RUN]
    assert "line 2" in caplog.text
