"""Resumed, repeated and searched runs: which model is the untouched one, and what is saved."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPModel, Trainer, TrainerCallback

from iimm_callbacks import IIMMCallback, IIMMMonitor, read_outcomes
from iimm_callbacks.guard.judging import judge_look
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.journal import Journal
from iimm_callbacks.records.ledger import Past

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
KEY = "IIMMCallback/colours"


@pytest.fixture
def guard(colour_task, shape_task):
    def build(**settings):
        settings = {"max_overhead": None, "verbose": False, "every": 3} | settings
        return IIMMCallback(colour_task, [shape_task], **settings)

    return build


class Interrupt(TrainerCallback):
    """Raises at the end of a step, once."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise self.error


def timeless(callback):
    wall = ("time", "eval_iimm_runtime")
    return [{k: v for k, v in r.items() if k not in wall} for r in callback.monitor.history]


def steps(callback):
    return [row["step"] for row in callback.monitor.history]


# A checkpoint that was written without the guard


@pytest.fixture
def unguarded(make_trainer, tmp_path):
    """Path of a checkpoint of step 3, written without the guard."""
    make_trainer(output_dir=str(tmp_path / "unguarded"), **SAVING).train()
    return str(tmp_path / "unguarded" / "checkpoint-3")


@pytest.mark.parametrize("form", ["model", "folder", "function"])
def test_the_base_model_gives_the_baseline_of_a_run_guarded_from_its_start(
    make_trainer, guard, tiny_clip, unguarded, tmp_path, form
):
    whole = guard(outcomes=[])
    make_trainer([whole], **SAVING).train()
    tiny_clip().save_pretrained(tmp_path / "base")
    base = {"model": tiny_clip(), "folder": str(tmp_path / "base"), "function": tiny_clip}[form]
    late = guard(base_model=base, outcomes=[])
    make_trainer([late], output_dir=str(tmp_path / "late"), **SAVING).train(
        resume_from_checkpoint=unguarded
    )
    assert timeless(late) == timeless(whole)
    assert late.outcome.model_fingerprint == model_fingerprint(tiny_clip())
    assert late.outcome.final_accuracy == whole.outcome.final_accuracy


def test_the_base_model_does_not_pass_for_the_frozen_part_of_the_tuned_one(
    make_trainer, guard, tiny_clip, unguarded, tmp_path
):
    """What was kept of the base's frozen tower is not what the checkpoint's tower says."""

    def frozen():
        model = tiny_clip()
        model.text_model.requires_grad_(False)
        model.text_projection.requires_grad_(False)
        return model

    base = frozen()
    torch.nn.init.normal_(base.text_projection.weight)
    late = guard(base_model=base)
    trainer = make_trainer([late], model=frozen(), output_dir=str(tmp_path / "late"), **SAVING)
    trainer.train(resume_from_checkpoint=make_checkpoint(make_trainer, frozen(), tmp_path))
    monitor = late.monitor
    again = IIMMMonitor(
        late.task, late.off_target, processor=trainer.processing_class, outcomes=None, verbose=False
    )
    again.begin(trainer.model)
    assert again.row()["eval_iimm_inter"] == monitor.row()["eval_iimm_inter"]


def make_checkpoint(make_trainer, model, tmp_path):
    make_trainer(model=model, output_dir=str(tmp_path / "frozen"), **SAVING).train()
    return str(tmp_path / "frozen" / "checkpoint-3")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "give it as `base_model`"),
        ("no/such-model", "no/such-model|couldn't connect"),
        (lambda: 5, "`base_model` must be a model, its Hub name .* got int"),
    ],
)
def test_without_a_base_model_the_guard_is_off_and_says_so_once(
    make_trainer, guard, unguarded, tmp_path, caplog, base, message
):
    callback = guard(base_model=base)
    trainer = make_trainer([callback], output_dir=str(tmp_path / "late"), **SAVING)
    trainer.train(resume_from_checkpoint=unguarded)
    assert trainer.state.global_step == 6
    ours = [r for r in caplog.records if r.name.startswith("iimm_callbacks")]
    assert len(ours) == 1
    assert ours[0].getMessage().startswith("The IIMM guard is off: this run resumes at step 3")
    assert re.search(message, ours[0].getMessage())
    assert callback.monitor is None
    assert not [row for row in trainer.state.log_history if "eval_iimm" in row]


def test_making_the_base_model_draws_nothing_from_the_runs_streams(
    make_trainer, guard, tiny_clip, tmp_path
):
    """A checkpoint of the model only has no streams that would be put back."""
    settings = SAVING | {"save_only_model": True}
    make_trainer(model=tiny_clip(dropout=0.3), output_dir=str(tmp_path / "a"), **settings).train()
    ends = []
    for callbacks in ([], [guard(base_model=lambda: (torch.rand(1), tiny_clip(dropout=0.3))[1])]):
        folder = str(tmp_path / f"b{len(ends)}")
        model = tiny_clip(dropout=0.3)
        trainer = make_trainer(callbacks, model=model, output_dir=folder, **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_with_the_guard_off_a_best_model_metric_of_ours_is_nan_and_no_error(
    make_trainer, guard, unguarded, tmp_path
):
    trainer = make_trainer(
        [guard()], output_dir=str(tmp_path / "late"), metric_for_best_model="iimm_accuracy",
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, **SAVING,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=unguarded)
    assert trainer.state.global_step == 6


# A checkpoint of a guarded run


@pytest.mark.parametrize(
    ("every", "arguments"),
    [
        ("epoch", {"max_steps": 20, "save_steps": 12}),  # an epoch has 12 steps
        ("evaluate", {"max_steps": 20, "save_steps": 12, "eval_strategy": "epoch"}),
        (5, {"max_steps": 20, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5,
             "save_total_limit": 1, "load_best_model_at_end": True,
             "metric_for_best_model": "iimm_accuracy"}),
        (None, {"max_steps": 20, "save_steps": 20}),
    ],
    ids=["epoch", "evaluate", "best-model", "after-the-last-step"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # transformers 4: it saves too fast
@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_history_and_outcome_of_one_in_one_piece(
    make_trainer, guard, tmp_path, every, arguments, restore
):
    def run(name, callback, resume=None):
        trainer = make_trainer(
            [callback],
            output_dir=str(tmp_path / name),
            save_strategy="steps",
            restore_callback_states_from_checkpoint=restore,
            **arguments,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = guard(every=every), guard(every=every)
    run("whole", whole)
    kept = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    trainer = run("resumed", resumed, str(kept[0]))
    assert timeless(resumed) == timeless(whole)
    assert resumed.outcome == whole.outcome
    ours = [row["step"] for row in trainer.state.log_history if "eval_iimm_se" in row]
    assert set(ours) == set(steps(whole))


def test_a_run_resumed_to_go_on_longer_counts_its_shares_anew(make_trainer, guard, tmp_path):
    folder = str(tmp_path / "out")
    make_trainer([guard()], output_dir=folder, **SAVING).train()
    callback = guard()
    longer = SAVING | {"max_steps": 12}
    make_trainer([callback], output_dir=folder, **longer).train(resume_from_checkpoint=True)
    shares = [look["share"] for look in callback.outcome.trajectory]
    assert shares == [0, 0.25, 0.5, 0.75, 1]
    assert callback.outcome.recipe["steps"] == 12
    assert callback.outcome.complete


def test_a_warning_that_was_given_is_not_given_again_after_resuming(
    make_trainer, guard, tmp_path, caplog, monkeypatch
):
    from iimm_callbacks.records.verdict import Verdict

    levels = {0: "continue", 2: "warn", 3: "continue", 4: "warn", 6: "stop"}
    step = [0]

    def scripted(forecast, observed, limits):
        return Verdict(levels[step[0]], 0.5, f"said at {step[0]}")

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            step[0] = state.global_step

    monkeypatch.setattr("iimm_callbacks.guard.judging.judge", scripted)
    monkeypatch.setattr("iimm_callbacks.guard.schedule.DEFAULT_SHARES", (1 / 3, 1 / 2, 2 / 3, 1))
    arguments = SAVING | {"output_dir": str(tmp_path / "out")}
    with pytest.raises(KeyboardInterrupt):
        make_trainer([Note(), guard(every=None), Interrupt(4)], **arguments).train()
    before = [r.getMessage() for r in caplog.records if "IIMM guard" in r.getMessage()]
    step[0] = 0
    caplog.clear()
    make_trainer([Note(), guard(every=None)], **arguments).train(
        resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3")
    )
    after = [r.getMessage() for r in caplog.records if "IIMM guard" in r.getMessage()]
    assert before == ["IIMM guard, step 2: said at 2"]
    assert after == ["IIMM guard, step 6: said at 6"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(attributes=None),
        lambda state: state["attributes"].pop("baseline"),
        lambda state: state["attributes"]["history"][0].update(eval_iimm="high"),
        lambda state: state["attributes"]["start"].update(schema_version=99),
        lambda state: state.pop("attributes"),
    ],
)
def test_a_damaged_state_turns_the_guard_off_and_harms_nothing(
    make_trainer, guard, tmp_path, caplog, spoil
):
    make_trainer([guard()], output_dir=str(tmp_path / "a"), **SAVING).train()
    path = tmp_path / "a" / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    spoil(state["stateful_callbacks"][KEY])
    path.write_text(json.dumps(state))
    trainer = make_trainer([guard()], output_dir=str(tmp_path / "b"), **SAVING)
    trainer.train(resume_from_checkpoint=str(path.parent))
    assert trainer.state.global_step == 6
    assert caplog.text.count("The IIMM guard is off") == 1


# Journals are data


@pytest.fixture(scope="module")
def journal():
    """The state of a run, filled by the first test that has a model."""
    return {}


@pytest.fixture
def state(journal, colour_task, shape_task, processor, tiny_clip):
    if not journal:
        monitor = IIMMMonitor(
            colour_task, [shape_task], processor=processor, outcomes=None, verbose=False
        )
        model = tiny_clip()
        monitor.begin(model, recipe={"steps": 2})
        monitor.check(model, 1, 2)
        journal.update(json.loads(json.dumps(monitor.state_dict())))
    return journal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(JSON)
def test_noise_is_no_journal(value):
    with pytest.raises(ValueError, match=r"must be an object|is missing"):
        Journal.from_json(value)


@given(data=st.data(), value=JSON)
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_journal_with_one_value_replaced_is_read_or_refused(state, data, value):
    where = state = json.loads(json.dumps(state))
    while True:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = data.draw(st.sampled_from(keys))
        inner = where[key]
        if isinstance(inner, dict | list) and inner and data.draw(st.booleans()):
            where = inner
            continue
        where[key] = value
        break
    try:
        journal = Journal.from_json(state)
    except ValueError:
        return
    again = json.loads(json.dumps(journal.to_json(), allow_nan=False))
    assert Journal.from_json(again).to_json() == journal.to_json()
    journal.outcome(True, "finished")


def test_a_journal_goes_through_json_and_back(state):
    assert Journal.from_json(state).to_json() == state


# Several runs in one process


def test_each_call_of_train_is_a_run_and_all_count_from_the_untouched_model(
    make_trainer, guard, own_store, capsys
):
    callback = guard(verbose=True)
    trainer = make_trainer([callback], max_steps=6)
    trainer.train()
    first, looks = callback.outcome, callback.monitor.history
    trainer.train()
    second = callback.outcome
    assert steps(callback) == [0, 3, 6]
    assert second.zero_shot_accuracy == first.zero_shot_accuracy
    assert callback.monitor.history[0]["eval_iimm"] == looks[0]["eval_iimm"]
    assert "count from the untouched model of the earlier run" in capsys.readouterr().out
    assert [o.run for o in read_outcomes(own_store)] == [first.run, second.run]
    assert first.run != second.run
    # Its gain is not that of its own steps, so nothing may be learnt from it.
    assert (first.complete, second.complete) == (True, False)
    assert second.ended == "finished, as a later phase of its training"


def test_a_second_phase_that_is_resumed_is_still_none_to_learn_from(make_trainer, guard, tmp_path):
    callback = guard()
    trainer = make_trainer([callback], **SAVING)
    trainer.train()
    trainer.train()
    again = guard()
    resumed = make_trainer([again], max_steps=6, output_dir=str(tmp_path / "again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert steps(again) == [0, 3, 6]
    for outcome in (callback.outcome, again.outcome):
        assert outcome.ended == "finished, as a later phase of its training"
        assert not outcome.complete


def test_a_checkpoint_in_the_working_directory_is_not_that_of_a_model_without_a_name(
    make_trainer, guard, tiny_clip, tmp_path, monkeypatch
):
    first, second = guard(), guard()
    make_trainer([first], **SAVING).train()
    model = tiny_clip()
    with torch.no_grad():
        model.logit_scale.add_(1)
    monkeypatch.chdir(tmp_path / "out" / "checkpoint-3")
    make_trainer([second], model=model, max_steps=3, output_dir=str(tmp_path / "2")).train()
    assert second.outcome.complete
    assert second.outcome.model_fingerprint != first.outcome.model_fingerprint


def test_weights_that_were_put_back_are_untouched_again(make_trainer, guard, tiny_clip):
    callback = guard()
    trainer = make_trainer([callback], max_steps=6)
    trainer.train()
    trainer.model.dual_encoder.load_state_dict(tiny_clip().state_dict())
    trainer.train()
    assert callback.outcome.complete
    assert callback.monitor.history[0]["eval_iimm_gain_observed"] == 0


def test_a_model_loaded_from_a_checkpoint_counts_from_that_runs_start(
    make_trainer, guard, tiny_clip, processor, tmp_path, colour_task
):
    """Of a model that is trained as it is `from_pretrained` reads the Trainer's checkpoints."""
    first = guard()
    trainer = make_trainer([first], max_steps=6, save_strategy="steps", save_steps=6)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-6"
    trainer.model.dual_encoder.save_pretrained(checkpoint)
    again = CLIPModel.from_pretrained(checkpoint)
    second = guard()
    make_trainer([second], model=again, max_steps=6, output_dir=str(tmp_path / "2")).train()
    one, other = first.monitor.history, second.monitor.history
    assert other[0]["eval_iimm"] == one[0]["eval_iimm"]
    lost = one[0]["eval_iimm_shapes_accuracy"] - other[-1]["eval_iimm_shapes_accuracy"]
    assert other[-1]["eval_iimm_forgetting_observed"] == pytest.approx(lost)
    assert not second.outcome.complete


def test_tried_again_after_an_exception_the_baseline_is_the_untouched_model(
    make_trainer, guard, tiny_clip, own_store
):
    callback = guard(outcomes=Past([], own_store))
    trainer = make_trainer([callback, Interrupt(5)], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert callback.outcome.model_fingerprint == model_fingerprint(tiny_clip())
    alone = guard(outcomes=Past([], own_store))
    make_trainer([alone], max_steps=6).train()
    assert timeless(callback)[0] == timeless(alone)[0]
    assert steps(callback) == [0, 3, 6]
    # The first one's model had been trained for 5 steps before its recipe began.
    first, second = read_outcomes(own_store)
    assert (first.complete, second.complete) == (False, True)
    assert first.ended == "finished, as a later phase of its training"


@pytest.mark.parametrize("when", [0, 4])
def test_auto_find_batch_size_keeps_the_baseline_of_its_first_try(
    make_trainer, guard, tiny_clip, own_store, when
):
    class FullAt(TrainerCallback):
        done = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == when and not self.done:
                self.done = True
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    callback = guard()
    trainer = make_trainer(
        [callback, FullAt()], max_steps=6, auto_find_batch_size=True, per_device_train_batch_size=16
    )
    trainer.train()
    assert callback.outcome.model_fingerprint == model_fingerprint(tiny_clip())
    assert steps(callback) == [0, 3, 6]
    ours = [row["step"] for row in trainer.state.log_history if "eval_iimm" in row]
    assert ours == [0, 3, 6]
    (outcome,) = read_outcomes(own_store)
    assert outcome.complete == (when == 0)  # the Trainer keeps what the first try has trained
    assert outcome.recipe["batch_size"] == trainer._train_batch_size < 16


def test_tried_again_nothing_of_the_first_try_is_left(
    make_trainer, guard, tmp_path, monkeypatch, own_store
):
    """No look that failed, no seconds spent, no folder; the settings are those of now."""
    look, first = Probe.look, [True]

    def failing(self, model, step, autocast_dtype=None, **settings):
        if step == 4 and first:
            first.clear()
            raise ValueError("no look")
        return look(self, model, step, autocast_dtype, **settings)

    monkeypatch.setattr(Probe, "look", failing)
    callback = guard(every=4, action="rescue")
    folders = [tmp_path / "one", tmp_path / "two"]
    broken = make_trainer([callback, Interrupt(5)], output_dir=str(folders[0]))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    callback.every = 2
    again = make_trainer([callback], output_dir=str(folders[1]), **SAVING)
    again.model = again.model_wrapped = broken.model
    again.train()
    assert again.state.log_history[0]["eval_iimm_gain_observed"] == 0
    assert steps(callback) == [0, 2, 4, 6]
    assert callback.record()["failures"] == 0
    assert (folders[1] / "iimm_colours.json").exists()
    assert (folders[1] / "iimm_colours_untouched.safetensors").exists()
    assert [outcome.complete for outcome in read_outcomes(own_store)] == [False]  # 5 + 6 steps


def test_two_guarded_trainers_in_one_process_keep_apart(make_trainer, guard, tiny_clip, tmp_path):
    callbacks = [guard(outcomes=[]), guard(outcomes=[])]
    trainers = [
        make_trainer([c], max_steps=6, output_dir=str(tmp_path / str(i)), learning_rate=rate)
        for i, (c, rate) in enumerate(zip(callbacks, (1e-3, 1e-2), strict=True))
    ]
    for trainer in trainers:
        trainer.train()
    alone = guard(outcomes=[])
    make_trainer([alone], max_steps=6, learning_rate=1e-2).train()
    assert timeless(callbacks[1]) == timeless(alone)
    assert timeless(callbacks[0])[0] == timeless(callbacks[1])[0]
    assert callbacks[0].outcome.run != callbacks[1].outcome.run
    assert (tmp_path / "0" / "iimm_colours.json").exists()
    assert (tmp_path / "1" / "iimm_colours.json").exists()


def test_every_trial_of_a_hyperparameter_search_is_a_run_of_its_own(
    make_trainer, guard, tiny_clip, processor, colour_task, own_store
):
    pytest.importorskip("optuna")
    from iimm_callbacks import PromptClassifier

    callback = guard()
    plain = make_trainer([callback], max_steps=6, eval_strategy="steps", eval_steps=6)
    trainer = Trainer(
        model_init=lambda: PromptClassifier(tiny_clip(), colour_task, processor),
        args=plain.args,
        train_dataset=plain.train_dataset,
        eval_dataset=plain.eval_dataset,
        data_collator=plain.data_collator,
        processing_class=processor,
        callbacks=[callback],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        compute_objective=lambda metrics: metrics["eval_iimm_accuracy"],
        n_trials=3,
        backend="optuna",
        direction="maximize",
    )
    outcomes = read_outcomes(own_store)
    assert len({o.run for o in outcomes}) == len(outcomes) == 3
    assert {o.model_fingerprint for o in outcomes} == {model_fingerprint(tiny_clip())}
    assert len({o.recipe["learning_rate"] for o in outcomes}) == 3


def test_evaluating_after_a_run_measures_nothing_more(make_trainer, guard):
    callback = guard(every="evaluate")
    trainer = make_trainer([callback], max_steps=6)
    trainer.train()
    looks = len(callback.monitor.history)
    trainer.evaluate()
    assert len(callback.monitor.history) == looks


@pytest.mark.parametrize(("every", "stopped_at"), [(2, 4), ("epoch", 12)])
def test_a_run_that_was_stopped_and_then_killed_stays_stopped(
    make_trainer, guard, tmp_path, monkeypatch, every, stopped_at
):
    """The checkpoint of the step it stopped at may be from before or after the look there."""
    monkeypatch.setattr("iimm_callbacks.monitor.measured.judge_look", stop_from(stopped_at))
    arguments = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2}
    arguments["output_dir"] = str(tmp_path / "out")
    whole = guard(every=every, action="stop")
    stopped = make_trainer([whole], **arguments)
    stopped.train()
    assert stopped.state.global_step == stopped_at
    again = guard(every=every, action="stop")
    resumed = make_trainer([again], **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stopped_at}"))
    for one, other in zip(stopped.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.outcome == whole.outcome
    assert again.outcome.ended.startswith(f"stopped by the guard at step {stopped_at}")
    goes_on = make_trainer([guard(every=every, action="warn")], **arguments)
    goes_on.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stopped_at}"))
    assert goes_on.state.global_step == 20


def stop_from(step):
    """`judge_look` that says stop from a step on."""

    def judged(look, *arguments, **keywords):
        found = judge_look(look, *arguments, **keywords)
        level = "stop" if look.step >= step else "continue"
        verdict = replace(found.verdict, level=level, reason="enough")
        return replace(found, verdict=verdict, row=found.row | {"level": level, "reason": "enough"})

    return judged
