"""The record of finished runs: what goes in comes out, and a damaged line harms no other."""

import json
import logging
import threading
import time
from dataclasses import asdict, replace

import pytest
from filelock import FileLock

from iimm_callbacks import Outcome, append_outcome, read_outcomes
from iimm_callbacks.outcomes import as_outcomes

RUN = Outcome(
    model="tiny/clip",
    model_fingerprint="1f",
    method="full",
    task="digits",
    task_fingerprint="2e",
    iimm=0.4,
    inter=0.2,
    intra=0.6,
    standard_error=None,
    n_images=512,
    n_classes=10,
    zero_shot_accuracy=0.3,
    final_accuracy=0.9,
    off_target_before={"emoji": 0.5, "clipart": 0.6, "flags": 0.4},
    off_target_after={"emoji": 0.3, "clipart": 0.7, "flags": 0.39},
    trajectory=[{"share": 0.5, "gain": 0.4, "forgetting": 0.02, "worst": 0.1}],
    recipe={"learning_rate": 1e-5, "note": "größer"},
)


def line_with(**changes):
    return json.dumps(asdict(RUN) | changes)


def test_outcomes_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new folder" / "outcomes.jsonl"
    stopped = replace(RUN, complete=False, ended="stopped", standard_error=0.01)
    append_outcome(path, RUN)
    append_outcome(str(path), stopped)
    assert read_outcomes(path) == [RUN, stopped]
    assert as_outcomes(path) == as_outcomes(str(path)) == as_outcomes(iter([RUN, stopped]))
    assert as_outcomes(None) == []


def test_who_appends_waits_for_whoever_is_at_it(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    writers = [threading.Thread(target=append_outcome, args=(path, RUN)) for _ in range(8)]
    with FileLock(f"{path}.lock"):
        for writer in writers:
            writer.start()
        time.sleep(0.3)
        assert not path.exists()
    for writer in writers:
        writer.join(timeout=60)
    assert read_outcomes(path) == [RUN] * 8


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (line_with()[:40], "line 1 column 41"),  # cut short by a crash
        ("not JSON", "Expecting value"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"schema_version": 1, "model": "only"}', "missing"),
        ('{"loss": 0.1}', "schema version None"),
        (line_with(schema_version=2), "schema version 2, this version reads 1"),
        (line_with(iimm="high"), "not a number in"),
        (line_with(final_accuracy=90.0), "not a number in"),
        (line_with(inter=float("nan")), "not a number in"),
        (line_with(off_target_after={}), "different tasks"),
        (line_with(trajectory=[{"gain": 0.1}]), "lacks `share`"),
        (line_with(off_target_before=[0.5]), "values"),
    ],
)
def test_a_line_that_is_no_outcome_is_skipped_and_named(tmp_path, caplog, line, says):
    path = tmp_path / "outcomes.jsonl"
    path.write_text("\n".join([line_with(), "", line, line_with()]) + "\n")
    with caplog.at_level(logging.WARNING):
        assert read_outcomes(path) == [RUN, RUN]
    (message,) = caplog.messages
    assert "line 3 is not an outcome" in message
    assert says in message


def test_binary_rubbish_is_skipped(tmp_path, caplog):
    path = tmp_path / "outcomes.jsonl"
    path.write_bytes(b"\x00\xff\xfe\x80\n" + line_with().encode() + b"\n")
    assert read_outcomes(path) == [RUN]
    assert "line 1" in caplog.text


def test_a_torn_last_line_does_not_take_the_next_outcome_with_it(tmp_path, caplog):
    path = tmp_path / "outcomes.jsonl"
    path.write_text(line_with() + "\n" + line_with()[:40])
    append_outcome(path, RUN)
    assert read_outcomes(path) == [RUN, RUN]
    assert "line 2" in caplog.text


def test_an_unknown_field_of_a_later_version_is_ignored(tmp_path):
    (tmp_path / "o.jsonl").write_text(line_with(colour="blue"))
    assert read_outcomes(tmp_path / "o.jsonl") == [RUN]


def test_gain_and_forgetting_have_their_signs():
    assert RUN.gain == pytest.approx(0.9 - 0.3)
    assert RUN.drops == pytest.approx({"emoji": 0.2, "clipart": -0.1, "flags": 0.01})
    assert RUN.forgetting == pytest.approx((0.2 - 0.1 + 0.01) / 3)
    assert RUN.worst == pytest.approx(0.2)
    alone = replace(RUN, off_target_before={}, off_target_after={})
    assert (alone.forgetting, alone.worst) == (None, None)


def test_what_is_no_outcome_is_refused_by_type():
    with pytest.raises(TypeError, match="must hold Outcome records, got dict"):
        as_outcomes([asdict(RUN)])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_outcomes("nowhere.jsonl")
