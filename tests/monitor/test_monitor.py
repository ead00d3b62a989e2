"""The monitor in a training loop of the user's own: begin, check, end."""

import gc
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from iimm_callbacks import ImageCollator, Limits, PromptClassifier, append_outcome, read_outcomes
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.monitor import IIMMMonitor
from iimm_callbacks.records.run_file import read_run


@pytest.fixture
def make_monitor(colour_task, shape_task, processor):
    def build(**settings):
        off_target = settings.pop("off_target", [shape_task])
        settings = {"processor": processor, "verbose": False} | settings
        return IIMMMonitor(colour_task, off_target, **settings)

    return build


@pytest.fixture
def train(processor, colour_task, colours):
    """(model, monitor, steps, start) -> trained by hand, looked at every second step."""

    def run(model, monitor, steps=6, start=0, recipe=None):
        classifier = PromptClassifier(model, colour_task, processor).train()
        optimizer = torch.optim.SGD(classifier.parameters(), lr=0.05)
        collate = ImageCollator(processor)
        monitor.begin(model, **({"recipe": recipe} if recipe else {}))
        for step in range(start + 1, steps + 1):
            rows = [colours[(8 * step + i) % 96] for i in range(8)]
            classifier(**collate(rows))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 2 == 0:
                monitor.check(model, step, steps)
        return monitor

    return run


def timeless(rows):
    return [{k: v for k, v in r.items() if k not in ("time", "eval_iimm_runtime")} for r in rows]


def test_guards_a_loop_without_any_trainer(tiny_clip, make_monitor, train):
    model = tiny_clip()
    monitor = train(model, make_monitor())
    assert [row["step"] for row in monitor.history] == [0, 2, 4, 6]
    assert [row["share"] for row in monitor.history] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    first, last = monitor.history[0], monitor.history[-1]
    gain = last["eval_iimm_accuracy"] - first["eval_iimm_accuracy"]
    drop = first["eval_iimm_shapes_accuracy"] - last["eval_iimm_shapes_accuracy"]
    assert last["eval_iimm_gain_observed"] == pytest.approx(gain)
    assert last["eval_iimm_forgetting_observed"] == pytest.approx(drop)
    assert last["eval_iimm_forgetting_worst"] == pytest.approx(drop)  # of one task
    assert monitor.row().items() <= last.items()
    assert all(type(v) is float for v in monitor.row().values())
    assert model.training


def test_the_loop_ends_at_the_weights_it_had_without_the_guard(tiny_clip, make_monitor, train):
    class Blind:
        def begin(self, model):
            pass

        def check(self, model, step, total_steps):
            pass

    guarded, plain = tiny_clip(dropout=0.3), tiny_clip(dropout=0.3)
    for model, monitor in ((guarded, make_monitor()), (plain, Blind())):
        torch.manual_seed(3)
        train(model, monitor)
    for one, other in zip(guarded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_wrecked_model_is_told_from_the_untouched_one(tiny_clip, make_monitor):
    model = tiny_clip()
    monitor = make_monitor(max_forgetting=Limits(0.05))
    # What the untouched model says of the shapes counts as right.
    look = monitor.probe.look

    def all_right_at_first(model, step, dtype=None, **settings):
        seen = look(model, step, dtype, **settings)
        seen.correct["shapes"][:] = step == 0
        return seen

    monitor.probe.look = all_right_at_first
    assert monitor.begin(model).level != "stop"
    verdict = monitor.check(model, 1, 10)
    assert verdict.level == "stop"
    assert "observed mean forgetting 100.0 points" in verdict.reason
    assert monitor.verdict is verdict


@pytest.mark.parametrize("call", [lambda m, x: m.check(x, 1, 2), lambda m, x: m.end(x)])
def test_nothing_can_be_said_before_the_untouched_model_was_seen(tiny_clip, make_monitor, call):
    with pytest.raises(RuntimeError, match=r"call `begin\(model\)` on the untouched model"):
        call(make_monitor(), tiny_clip())


def test_a_second_begin_is_refused(tiny_clip, make_monitor):
    monitor = make_monitor()
    monitor.begin(tiny_clip())
    with pytest.raises(RuntimeError, match="`begin` was called already"):
        monitor.begin(tiny_clip())


def test_a_checkpoint_goes_through_json_and_back(tiny_clip, make_monitor, train):
    monitor = train(tiny_clip(), make_monitor())
    state = monitor.state_dict()
    text = json.dumps(state, allow_nan=False)
    again = make_monitor()
    again.load_state_dict(json.loads(text))
    assert again.state_dict() == state  # also before the run goes on
    again.begin(tiny_clip())
    assert again.state_dict() == state
    assert again.verdict == monitor.verdict


def test_a_run_goes_on_from_the_recorded_baseline(tiny_clip, make_monitor, train):
    model = tiny_clip()
    whole = train(tiny_clip(), make_monitor())
    half = make_monitor()
    half_state = {}

    class UpToStep4:
        def begin(self, model):
            half.begin(model)

        def check(self, model, step, total_steps):
            if step == 4:
                half_state.update(json.loads(json.dumps(half.state_dict())))
                half_state["weights"] = {k: v.clone() for k, v in model.state_dict().items()}
            else:
                half.check(model, step, total_steps)

    train(model, UpToStep4())
    resumed_model, resumed = tiny_clip(), make_monitor()
    resumed_model.load_state_dict(half_state.pop("weights"))
    resumed.load_state_dict(half_state)
    train(resumed_model, resumed, start=4)
    missing_step_4 = [row for row in whole.history if row["step"] != 4]
    assert timeless(resumed.history) == timeless(missing_step_4)
    assert resumed.record()["model_fingerprint"] == model_fingerprint(tiny_clip())


def test_state_is_empty_before_the_run_begins(make_monitor):
    assert make_monitor().state_dict() == {}


@pytest.mark.parametrize("moment", ["before", "begun", "ended", "restored"])
def test_the_record_is_json_at_every_moment(tiny_clip, make_monitor, train, moment):
    monitor = make_monitor()
    if moment != "before":
        train(tiny_clip(), monitor, steps=0 if moment == "begun" else 2)
    if moment == "restored":
        state, monitor = monitor.state_dict(), make_monitor()
        monitor.load_state_dict(state)
    record = monitor.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert [look["step"] for look in record["looks"]] == {
        "before": [], "begun": [0], "ended": [0, 2], "restored": [0, 2]
    }[moment]  # fmt: skip


def test_a_finite_state_even_where_there_is_no_standard_error(tiny_clip, make_monitor, monkeypatch):
    monitor = make_monitor()
    look = monitor.probe.look

    def without_error(*args, **settings):
        seen = look(*args, **settings)
        return replace(seen, measurement=replace(seen.measurement, standard_error=math.nan))

    monitor.probe.look = without_error
    monitor.begin(tiny_clip())
    state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
    assert "eval_iimm_se" not in monitor.row()
    assert monitor.end(tiny_clip()).standard_error is None
    again = make_monitor()
    again.load_state_dict(state)
    again.begin(tiny_clip())
    assert again.end(tiny_clip()).standard_error is None


def test_the_outcome_is_read_back_from_file_as_it_was(tiny_clip, make_monitor, train, tmp_path):
    monitor = train(tiny_clip(), make_monitor(), recipe={"learning_rate": 0.05})
    outcome = monitor.end(tiny_clip())
    assert outcome.recipe["learning_rate"] == 0.05
    assert outcome.versions["torch"] == torch.__version__
    assert 0 < outcome.recipe["trainable_share"] <= 1
    assert outcome.method == "full"
    assert outcome.model == "CLIPModel"
    assert outcome.model_fingerprint == model_fingerprint(tiny_clip())
    assert outcome.task_fingerprint == monitor.probe.fingerprints["colours"]
    assert outcome.gain == pytest.approx(monitor.history[-1]["eval_iimm_gain_observed"])
    assert set(outcome.drops) == {"shapes"}
    assert [look["share"] for look in outcome.trajectory] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    append_outcome(tmp_path / "runs.jsonl", outcome)
    append_outcome(tmp_path / "runs.jsonl", outcome)
    assert read_outcomes(tmp_path / "runs.jsonl") == [outcome, outcome]


def test_a_run_that_goes_on_does_not_learn_from_what_ended_since(
    tiny_clip, make_monitor, train, own_store
):
    def past(i):
        other = replace(outcome, run=f"r{i}", task=f"t{i}", task_fingerprint=f"{i}")
        return replace(other, iimm=0.3 + 0.05 * i)

    outcome = train(tiny_clip(), make_monitor(outcomes=None)).end(tiny_clip())
    for i in range(4):
        append_outcome(own_store, past(i))
    monitor = make_monitor()
    monitor.begin(tiny_clip())
    state = json.loads(json.dumps(monitor.state_dict()))
    append_outcome(own_store, past(4))
    again, new = make_monitor(), make_monitor()
    again.load_state_dict(state)
    again.begin(tiny_clip())
    new.begin(tiny_clip())
    known = [m.record()["forecast"]["n_outcomes"] for m in (monitor, again, new)]
    assert known == [4, 4, 5]


def test_a_run_that_fails_before_its_first_look_is_saved_too(tiny_clip, make_monitor, own_store):
    monitor = make_monitor()
    monitor.begin(tiny_clip())
    del monitor
    gc.collect()
    (outcome,) = read_outcomes(own_store)
    assert (outcome.complete, outcome.ended, outcome.gain) == (False, "interrupted", 0.0)


def test_a_run_without_off_target_tasks_has_an_outcome_too(
    tiny_clip, make_monitor, train, tmp_path
):
    monitor = train(tiny_clip(), make_monitor(off_target=[]))
    assert not any("forgetting" in key for key in monitor.row())
    append_outcome(tmp_path / "runs.jsonl", monitor.end(tiny_clip()))
    assert read_outcomes(tmp_path / "runs.jsonl") == [monitor.end(tiny_clip())]


def test_a_failing_look_leaves_history_and_verdict_as_they_were(tiny_clip, make_monitor, caplog):
    model, monitor = tiny_clip(), make_monitor()
    verdict = monitor.begin(model)
    history = list(monitor.history)
    broken = nn.Module()
    for step in (1, 2):
        assert monitor.check(broken, step, 10) is verdict
    assert monitor.history == history
    assert monitor.failures == 2
    assert len([r for r in caplog.records if "could not measure" in r.message]) == 1
    assert "step 1 (ValueError: `model` must be a dual encoder" in caplog.text
    monitor.check(model, 3, 10)
    assert monitor.history[-1]["step"] == 3


def test_a_failing_look_raises_if_strict(tiny_clip, make_monitor):
    monitor = make_monitor(strict=True)
    monitor.begin(tiny_clip())
    with pytest.raises(ValueError, match="got Module"):
        monitor.check(nn.Module(), 1, 10)


def test_a_loop_needs_two_calls_and_prints_what_the_callback_prints(
    tiny_clip, make_monitor, processor, colour_task, tmp_path, capsys
):
    model, monitor = tiny_clip(), make_monitor(verbose=True, every=2, run_file=tmp_path / "r.json")
    monitor.begin(model, recipe={"steps": 6})
    verdicts = {step: monitor.step(step) for step in range(1, 7)}
    assert [step for step, verdict in verdicts.items() if verdict is not None] == [2, 4, 6]
    assert verdicts[6] is monitor.verdict
    assert monitor.end().complete
    printed = capsys.readouterr().out
    assert printed.startswith("IIMM before training: colours (full)\n")
    assert [printed.count(f"IIMM step {step} (") for step in range(1, 7)] == [0, 1, 0, 1, 0, 1]
    assert printed.count("Predicted and observed: colours (full)") == 1
    assert f"Report: iimm report {tmp_path / 'r.json'}" in printed


def told_of_no_look(caplog):
    return [r.message for r in caplog.records if "look" in r.message]


@pytest.mark.parametrize(
    ("every", "limit", "steps", "says"),
    [
        (50, 0.05, 4, "With `every=50` no look comes before the last of 4 steps"),
        ([1.0], 0.05, 4, r"With `every=\[1.0\]` no look comes before the last of 4 steps"),
        ("epoch", 0.05, 4, "was told of no 'epoch' until step 3 of 4, .* with `event='epoch'`"),
        (50, None, 4, None),  # it only measures
        (3, 0.05, 4, None),
        (50, 0.05, 1, None),
        (None, 0.05, 4, None),
    ],
)
@pytest.mark.once
def test_a_loop_that_is_not_looked_at_before_its_end_is_told_so_once(
    tiny_clip, make_monitor, caplog, every, limit, steps, says
):
    monitor, model = make_monitor(every=every, max_forgetting=limit, max_overhead=None), tiny_clip()
    monitor.begin(model, recipe={"steps": steps})
    for step in range(1, steps + 1):
        monitor.step(step)
    said = told_of_no_look(caplog)
    assert len(said) == (says is not None)
    assert all(re.search(says, message) for message in said)


@pytest.mark.parametrize(
    ("every", "looks"),
    [(None, [0, 7, 14, 21, 35, 49, 70]), (20, [0, 21, 42, 63, 70]), (0.25, [0, 21, 35, 56, 70])],
)
@pytest.mark.once
def test_a_loop_that_tells_every_seventh_step_is_looked_at_from_where_a_look_was_due(
    tiny_clip, make_monitor, every, looks
):
    monitor, model = make_monitor(every=every, max_overhead=None), tiny_clip()
    monitor.begin(model, recipe={"steps": 70})
    for step in range(7, 71, 7):
        monitor.step(step)
    assert [row["step"] for row in monitor.history] == looks


@pytest.mark.parametrize("off_target", [None, []])
def test_what_is_no_task_is_named(off_target):
    with pytest.raises(TypeError, match="must be `Task`s, got str; wrap the data set"):
        IIMMMonitor("flowers", off_target)


def test_a_step_at_which_an_epoch_ends_is_looked_at(tiny_clip, make_monitor, caplog):
    monitor, model = make_monitor(every="epoch", max_overhead=None), tiny_clip()
    monitor.begin(model, recipe={"steps": 9})
    for step in range(1, 10):
        monitor.step(step, event="epoch" if step % 3 == 0 else None)
    assert [row["step"] for row in monitor.history] == [0, 3, 6, 9]
    assert told_of_no_look(caplog) == []


def test_without_the_number_of_steps_a_loop_is_told_to_give_it(tiny_clip, make_monitor):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(model)
    with pytest.raises(RuntimeError, match=re.escape("recipe={'steps': total}")):
        monitor.step(1)


@pytest.mark.parametrize(("steps", "n"), [(8.0, 8), (8.5, None), ("8", None)])
@pytest.mark.once
def test_the_number_of_steps_is_a_whole_number(tiny_clip, make_monitor, steps, n):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(model, recipe={"steps": steps})
    if n is None:
        with pytest.raises(RuntimeError, match=re.escape(f"got {steps!r}")):
            monitor.step(1)
        return
    assert monitor.step(8) is not None
    assert monitor.end().recipe["steps"] == n
    assert monitor.history[-1]["share"] == 1


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, float])
@pytest.mark.once
def test_steps_of_any_kind_are_kept_as_json_and_checkpoints_have_them(
    tiny_clip, make_monitor, tmp_path, kind
):
    model, run_file = tiny_clip(), tmp_path / "run.json"
    monitor = make_monitor(run_file=run_file, max_overhead=None, every=2)
    monitor.begin(model, recipe={"steps": 4})
    for step in range(1, 5):
        monitor.step(kind(step))
    monitor.check(model, kind(4), kind(4))
    assert monitor.end(step=kind(4)).complete
    assert [row["step"] for row in read_run(run_file)["looks"]] == [0, 2, 4, 4]
    resumed = make_monitor()
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert [(type(row["step"]), row["step"]) for row in resumed.history][:2] == [(int, 0), (int, 2)]


@pytest.mark.parametrize("step", [1.5, -1, "2", None, math.nan, math.inf, torch.ones(2)])
@pytest.mark.once
def test_a_step_that_is_no_whole_number_is_named(tiny_clip, make_monitor, step):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(model, recipe={"steps": 4})
    says = re.escape(f"`step` must be a whole number of optimizer steps, got {step!r}")
    with pytest.raises(ValueError, match=says):
        monitor.step(step)


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        (torch.tensor(1.5, requires_grad=True), 1.5),
        (np.float32(1.5), 1.5),
        (torch.ones(3), None),  # one for each image
        ("a", None),
        (math.nan, None),
        (None, None),
    ],
)
@pytest.mark.once
def test_a_loss_that_is_no_number_ends_no_run(tiny_clip, make_monitor, loss, kept):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(model, recipe={"steps": 1})
    monitor.step(1, loss)
    assert monitor.history[-1].get("training_loss") == kept


def trained(model):
    with torch.no_grad():
        for p in model.visual_projection.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize(
    ("recipe", "given", "ended"),
    [
        ({}, "", "the steps done were never told"),
        ({"steps": 6}, "", "finished"),
        ({"steps": 6}, "out of time", "out of time"),
    ],
)
def test_a_model_is_looked_at_in_the_end_where_no_step_was_told(
    tiny_clip, make_monitor, own_store, recipe, given, ended
):
    model, monitor = tiny_clip(), make_monitor()
    monitor.begin(model, recipe=recipe)
    outcome = monitor.end(trained(model), ended=given)
    alone = make_monitor(outcomes=None)
    alone.begin(model)
    assert outcome.final_accuracy == alone.history[0]["eval_iimm_accuracy"]
    assert outcome.trajectory[-1]["iimm"] == alone.history[0]["eval_iimm"]
    assert outcome.iimm != alone.history[0]["eval_iimm"]
    assert outcome.ended == ended
    assert outcome.complete == (ended == "finished")
    assert [o.complete for o in read_outcomes(own_store)] == [outcome.complete]


@pytest.mark.parametrize(("steps", "done"), [(0, 0), (6, 0), ("unknown", 0)])
def test_without_a_step_there_is_no_complete_run(tiny_clip, make_monitor, own_store, steps, done):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(model, recipe={} if steps == "unknown" else {"steps": steps})
    outcome = monitor.end(step=done)
    assert (outcome.complete, outcome.ended) == (False, "no step was done")
    assert [(o.complete, o.ended) for o in read_outcomes(own_store)] == [
        (False, "no step was done")
    ]


def test_a_model_that_never_moved_is_no_complete_run_by_silence(tiny_clip, make_monitor):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(model, recipe={"steps": 6})
    outcome = monitor.end()
    assert not outcome.complete
    assert outcome.ended == "the steps done were never told"


@pytest.mark.parametrize("before", [True, False])
def test_a_loop_that_goes_on_from_a_trained_model_is_none_to_learn_from(
    tiny_clip, make_monitor, before
):
    monitor, model = make_monitor(), tiny_clip()
    monitor.begin(trained(model) if before else model, untouched=tiny_clip(), recipe={"steps": 1})
    monitor.step(1)
    assert monitor.end().complete is not before
    assert monitor.state_dict()["is_later_phase"] is before


def test_a_run_longer_than_was_said_is_not_looked_at_every_step(tiny_clip, make_monitor, caplog):
    monitor, model = make_monitor(max_overhead=None), tiny_clip()
    monitor.begin(model, recipe={"steps": 4})
    for step in range(1, 11):
        monitor.step(step)
    assert [row["step"] for row in monitor.history] == [0, 1, 2, 3, 4]
    outcome = monitor.end()
    assert outcome.recipe["steps"] == 10
    assert [row["share"] for row in monitor.history] == [0, 0.1, 0.2, 0.3, 0.4, 1]
    said = [r.message for r in caplog.records if "step 5, and 4 steps in all" in r.message]
    assert len(said) == 1


@pytest.mark.parametrize(("steps", "says"), [((1, 2, 1), "told 1 after 2"), ((0, 1), "told 0")])
def test_steps_that_start_anew_or_at_0_are_warned_of(tiny_clip, make_monitor, caplog, steps, says):
    monitor, model = make_monitor(), tiny_clip()
    with pytest.raises(RuntimeError, match="before `row`"):
        monitor.row()
    monitor.begin(model, recipe={"steps": 4})
    for step in (*steps, *steps):
        monitor.step(step)
    said = [r.getMessage() for r in caplog.records if "over all epochs" in r.getMessage()]
    assert len(said) == 1
    assert says in said[0]


def test_a_terminal_that_is_gone_costs_a_warning(tiny_clip, make_monitor, monkeypatch, caplog):
    def gone(*_):
        raise BrokenPipeError("the reader is gone")

    monkeypatch.setattr("iimm_callbacks.monitor.measured.tqdm.write", gone)
    monitor, model = make_monitor(verbose=True, every=1), tiny_clip()
    monitor.begin(model, recipe={"steps": 2})
    assert monitor.step(1) is not None
    assert caplog.text.count("the reader is gone") == 1


def test_canaries_are_not_logged_one_by_one(tiny_clip, make_monitor, shape_task, monkeypatch):
    named = make_monitor()
    monkeypatch.setattr("iimm_callbacks.sample.canaries", lambda **_: [shape_task])
    canary = make_monitor(off_target=None)
    for monitor in (named, canary):
        model = tiny_clip()
        monitor.begin(model)
    key = "eval_iimm_shapes_accuracy"
    assert key in named.row()
    assert key not in canary.row()
    assert canary.history[0][key] == named.history[0][key]  # it is in the run file
    assert canary.row().keys() | {key} == named.row().keys()
