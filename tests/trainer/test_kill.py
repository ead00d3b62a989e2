"""Killed at random moments and resumed, a run ends as if it had never been interrupted."""

import os
from dataclasses import replace

import pytest
import torch
from forked import in_a_fork
from resume_worker import KILLS, STEPS, main

from iimm_callbacks import read_outcomes
from iimm_callbacks.records.outcomes import one_of_each_run
from iimm_callbacks.records.run_file import read_run

pytestmark = [pytest.mark.once, pytest.mark.whole]

SEED = int(os.environ.get("IIMM_KILL_SEED", "0"))
WALL_TIMES = ("time", "_runtime", "_per_second", "total_flos", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture
def runs(folder, tiny_clip, processor, colours, shapes):
    """Folders of the killed runs."""
    if not (folder / "model").exists():
        tiny_clip().save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        colours.save_to_disk(folder / "colours")
        shapes.save_to_disk(folder / "shapes")
        in_a_fork(main, folder, SEED)
    return sorted(folder.glob("run-*"))


def done(folder):
    return torch.load(folder / "done.pt", weights_only=False)


def pair(run):
    """A killed run, and the one in one piece on the same schedule."""
    return done(run), done(run.parent / f"reference-{run.name[-1]}")


def timeless(value):
    """Without wall times, and without the name that tells a run from all others."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not str(k).endswith(WALL_TIMES)}
        return {k: timeless(v) for k, v in kept.items()}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def test_runs_were_killed_and_finished(runs, folder):
    assert int((folder / "kills.txt").read_text()) >= KILLS
    assert len(list(folder.glob("run-*/done.pt"))) == len(runs)


def test_the_history_has_no_gaps_and_no_doubles(runs):
    for run in runs:
        killed, whole = pair(run)
        assert timeless(killed["history"]) == timeless(whole["history"])
        steps = [row["step"] for row in killed["history"]]
        assert steps[0] == 0
        assert steps == sorted(set(steps))
        assert [row["level"] for row in killed["history"]] == [
            row["level"] for row in whole["history"]
        ]


def test_the_trainers_log_is_that_of_a_run_in_one_piece(runs):
    """Resumed from the checkpoint of its last step, the Trainer itself takes one more step."""
    for run in runs:
        killed, whole = (timeless(result["log"][:-1]) for result in pair(run))
        assert [row for row in killed if row["step"] <= STEPS] == whole
        assert whole[-1]["step"] == STEPS


def test_the_final_weights_are_those_of_a_run_in_one_piece(runs):
    for run in runs:
        killed, whole = pair(run)
        for name, value in whole["weights"].items():
            assert torch.equal(killed["weights"][name], value)


def test_exactly_one_outcome_counts_and_it_is_that_of_a_run_in_one_piece(runs):
    for run in runs:
        killed, whole = pair(run)
        on_record = read_outcomes(run / "store.jsonl")
        assert len({outcome.run for outcome in on_record}) == 1
        (outcome,) = one_of_each_run(on_record)
        assert outcome == killed["outcome"]
        assert replace(outcome, run="") == replace(whole["outcome"], run="")


def test_the_run_file_is_whole_and_complete(runs):
    for run in runs:
        killed, whole = pair(run)
        record = read_run(run / "iimm_colours.json")
        assert record == killed["record"]
        assert timeless(record) == timeless(whole["record"])
        assert not list(run.glob("*.unfinished"))
