"""The callback in real Trainer runs of a tiny CLIP."""

import copy
import gc
import json
import logging
import math
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from iimm_callbacks import (
    IIMMCallback,
    Limits,
    Outcome,
    Task,
    append_outcome,
    read_outcomes,
    sample,
)
from iimm_callbacks.guard.judging import judge_look
from iimm_callbacks.guard.pace import Budget
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.verdict import Verdict
from iimm_callbacks.sample import load_base_rates

CHECKPOINTING = "activation_checkpointing"  # its name since transformers 5
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
EVERY_LOOK = {
    "eval_iimm",
    "eval_iimm_inter",
    "eval_iimm_intra",
    "eval_iimm_se",
    "eval_iimm_accuracy",
    "eval_iimm_gain_observed",
    "eval_iimm_forgetting_observed",
    "eval_iimm_forgetting_worst",
    "eval_iimm_runtime",
    "eval_iimm_shapes_accuracy",
}
WITH_FORECAST = EVERY_LOOK | {
    f"eval_iimm_{name}_forecast{end}"
    for name in ("gain", "forgetting")
    for end in ("", "_low", "_high")
}


@pytest.fixture
def guard(colour_task, shape_task):
    def build(**settings):
        settings = {"max_overhead": None, "verbose": False} | settings
        return IIMMCallback(colour_task, settings.pop("off_target", [shape_task]), **settings)

    return build


@pytest.fixture
def past_runs(tiny_clip):
    """(forgetting) -> five outcomes of the tiny model that all forgot about that much."""

    def build(forgetting):
        fingerprint = model_fingerprint(tiny_clip())
        return [
            Outcome(
                model="tiny",
                model_fingerprint=fingerprint,
                method="full",
                task=f"t{i}",
                task_fingerprint=f"f{i}",
                iimm=0.3 + 0.1 * i,
                inter=0.1,
                intra=0.5,
                standard_error=0.01,
                n_images=32,
                n_classes=4,
                zero_shot_accuracy=0.3,
                final_accuracy=0.5,
                off_target_before={"shapes": 0.6},
                off_target_after={"shapes": 0.6 - forgetting + 0.002 * (i % 2)},
            )
            for i in range(5)
        ]

    return build


@pytest.fixture
def script_looks(monkeypatch):
    """(f) -> from step 1 on, the off-target task has f(step) of its images right."""

    def script(share_right):
        look = Probe.look

        def scripted(self, model, step, autocast_dtype=None, **settings):
            seen = look(self, model, step, autocast_dtype, **settings)
            n = len(seen.correct["shapes"])
            right = np.arange(n) < round(n * share_right(step))
            return replace(seen, correct=seen.correct | {"shapes": right})

        monkeypatch.setattr(Probe, "look", scripted)

    return script


def rows(trainer):
    return [r for r in trainer.state.log_history if "eval_iimm" in r]


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def turned_at_random(batch):
    angles = [random.choice([0, 90, 180, 270]) for _ in batch["image"]]
    turned = [image.rotate(a) for image, a in zip(batch["image"], angles, strict=True)]
    return batch | {"image": turned}


class TurnedPairs:
    """As torchvision's data sets: labels in `.targets`, and a transform that draws."""

    def __init__(self, data):
        self.data, self.targets = data, list(data["label"])
        self.classes = data.features["label"].names

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        image = self.data[position]["image"]
        angle = 90 * (int(torch.randint(4, ())) + random.randrange(4) + np.random.randint(4))
        return image.rotate(angle), self.targets[position]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


# When it looks


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (None, [0, 1, 2, 4, 6, 10, 14, 20]),
        (7, [0, 7, 14, 20]),
        (0.25, [0, 5, 10, 15, 20]),
        ("epoch", [0, 12, 20]),
        ("evaluate", [0, 8, 16, 20]),
    ],
)
def test_looks_when_it_is_told_to(make_trainer, guard, every, steps):
    trainer = make_trainer([guard(every=every)], max_steps=20, eval_strategy="steps", eval_steps=8)
    trainer.train()
    assert [r["step"] for r in rows(trainer)] == steps


@pytest.mark.parametrize(
    ("settings", "arguments", "says"),
    [
        ({"every": "evaluate"}, {}, "With `every='evaluate'` no look comes before the last of 3 "
                                    "steps (`eval_strategy` is 'no'): "),
        ({"every": "evaluate"}, {"eval_strategy": "steps", "eval_steps": 3}, "`eval_strategy` is"),
        ({"every": "evaluate"}, {"eval_strategy": "epoch"}, "`eval_strategy` is 'epoch'"),
        ({"every": "epoch"}, {}, "(there is one epoch)"),
        ({"every": 3}, {}, "With `every=3` no look comes before the last of 3 steps: until then "),
        ({"every": 3, "max_forgetting": None}, {}, None),
        ({"every": 3}, {"eval_strategy": "steps", "eval_steps": 2,
                        "metric_for_best_model": "iimm_gain_observed"}, None),
        ({"every": "evaluate"}, {"eval_strategy": "steps", "eval_steps": 2}, None),
        ({"every": "epoch"}, {"per_device_train_batch_size": 48}, None),
        ({"every": 2}, {}, None),
        ({}, {}, None),
    ],
)  # fmt: skip
def test_a_run_that_is_looked_at_only_when_it_ends_is_told_so_before(
    make_trainer, guard, caplog, settings, arguments, says
):
    callback = guard(**settings)
    trainer = make_trainer([callback], **{"max_steps": 3} | arguments)
    trainer.train()
    said = [r.message for r in caplog.records if "no look comes before" in r.message]
    assert len(said) == (says is not None)
    assert all(says in message for message in said)
    in_training = [row["step"] for row in callback.monitor.history if 0 < row["step"] < 3]
    assert (in_training == []) == (says is not None or callback.limits.max_forgetting is None)


@pytest.mark.parametrize(
    ("limit", "steps", "dropped"), [(None, [0, 6], 5), (0.9, [0, 1, 2, 3, 5, 6], 1)]
)
def test_drops_looks_that_cost_too_much_but_none_that_a_limit_needs(
    make_trainer, guard, limit, steps, dropped
):
    callback = guard(max_overhead=1e-6, every=1, max_forgetting=limit, batch_size=8)
    trainer = make_trainer([callback], max_steps=6)
    trainer.train()
    assert [r["step"] for r in rows(trainer)] == steps
    assert callback.record()["looks_dropped"] == dropped
    shown = [row["n_images"] for row in callback.monitor.history[1:]]
    assert shown == [8 + 8] * (len(shown) - 1) + [32 + 24]  # a quarter, to the end of a batch


def test_looks_at_fewer_images_do_not_move_an_unchanged_model(make_trainer, guard):
    callback = guard(max_overhead=1e-6, every=1, max_forgetting=0.05, batch_size=8)
    trainer = make_trainer([callback], max_steps=6, learning_rate=0.0)
    trainer.train()
    first, *looks = rows(trainer)
    assert len({row["n_images"] for row in callback.monitor.history}) > 1
    for name in ("", "_inter", "_intra", "_accuracy", "_shapes_accuracy"):
        key = f"eval_iimm{name}"
        assert [row[key] for row in looks] == pytest.approx([first[key]] * len(looks), abs=1e-6)


def test_an_alarm_is_raised_on_all_images_only(make_trainer, guard, script_looks):
    script_looks(lambda step: 1.0 if step < 3 else 0.2)
    callback = guard(max_overhead=1e-6, every=1, action="stop", batch_size=8)
    make_trainer([callback], max_steps=8).train()
    last = callback.monitor.history[-1]
    assert (last["level"], last["n_images"]) == ("stop", 32 + 24)
    assert len({row["step"] for row in callback.monitor.history}) == len(callback.monitor.history)


def test_a_full_look_in_place_of_a_partial_one_is_logged_and_acted_on(
    make_trainer, guard, monkeypatch
):
    def judged(look, *args, **settings):
        found = judge_look(look, *args, **settings)
        full = sum(map(len, look.correct.values())) == 32 + 24
        verdict = Verdict("stop" if full else "continue", 0.5, "all images tell")
        return replace(found, verdict=verdict, row=found.row | {"level": verdict.level})

    monkeypatch.setattr("iimm_callbacks.monitor.measured.judge_look", judged)
    monkeypatch.setattr(Budget, "part", lambda *_: 0.5)
    callback = guard(action="stop", every=2, max_overhead=0.05)
    trainer = make_trainer(
        [callback], max_steps=6, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="iimm_accuracy",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    assert callback.outcome.ended.startswith("stopped by the guard at step 2")
    assert [row["step"] for row in rows(trainer)] == [0, 2, 2]
    assert [row["n_images"] for row in callback.monitor.history] == [56, 56]


def test_a_short_run_that_will_go_over_the_limit_is_stopped_at_its_first_looks(
    make_trainer, guard, script_looks
):
    script_looks(lambda step: 0.9 - 0.1 * step)
    callback = guard(action="stop", max_overhead=0.05)
    make_trainer([callback], max_steps=25).train()
    assert callback.outcome.ended.startswith("stopped by the guard at step")
    assert callback.monitor.history[-1]["step"] <= 3


# What it logs


def test_logs_exactly_the_documented_keys(make_trainer, guard, past_runs):
    trainer = make_trainer([guard(outcomes=past_runs(0.0))], max_steps=4)
    trainer.train()
    first, *_, last = rows(trainer)
    expected = WITH_FORECAST | {"eval_iimm_exceed_probability", "epoch", "step"}
    probe = {"eval_iimm_linear_probe_accuracy", "eval_iimm_linear_probe_se"}
    assert set(first) == expected | probe
    assert set(last) == expected
    for key in (WITH_FORECAST | probe) - {"eval_iimm_shapes_accuracy"}:
        assert key.removesuffix("_low").removesuffix("_high") in IIMMCallback.__doc__
    assert all(type(v) in (float, int) for row in rows(trainer) for v in row.values())


def test_logs_no_number_where_there_is_none(make_trainer, guard):
    trainer = make_trainer([guard(off_target=[])], max_steps=4)
    trainer.train()
    without = {k for k in WITH_FORECAST if "shapes" not in k}
    without -= {"eval_iimm_forgetting_observed", "eval_iimm_forgetting_worst"}
    assert set(rows(trainer)[-1]) <= without | {"epoch", "step", "eval_iimm_exceed_probability"}


def test_gain_and_forgetting_are_differences_of_the_logged_accuracies(make_trainer, guard):
    trainer = make_trainer([guard()], max_steps=10)
    trainer.train()
    first, last = rows(trainer)[0], rows(trainer)[-1]
    gain = last["eval_iimm_accuracy"] - first["eval_iimm_accuracy"]
    drop = first["eval_iimm_shapes_accuracy"] - last["eval_iimm_shapes_accuracy"]
    assert last["eval_iimm_gain_observed"] == pytest.approx(gain)
    assert last["eval_iimm_forgetting_observed"] == pytest.approx(drop)


def test_the_trainers_own_rows_are_all_there(make_trainer, guard):
    trainer = make_trainer([guard(every=1)], max_steps=5)
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "loss" in r] == [1, 2, 3, 4, 5]


def test_prints_tables_and_one_line_per_look(make_trainer, guard, capsys):
    make_trainer([guard(verbose=True)], max_steps=4).train()
    printed = capsys.readouterr().out
    assert "IIMM before training: colours (full)" in printed
    assert "Predicted and observed: colours (full)" in printed
    assert len([line for line in printed.splitlines() if line.startswith("IIMM step")]) == 4


def test_works_as_metric_for_the_best_model(make_trainer, guard, script_looks):
    script_looks(lambda step: {0: 1.0, 2: 0.5, 4: 0.75, 6: 0.25}[step])
    trainer = make_trainer(
        [guard(max_forgetting=None, every=100)],
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="iimm_forgetting_observed",
        greater_is_better=False,
        load_best_model_at_end=False,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(0.25)
    assert trainer.state.best_global_step == 4


def test_the_summary_is_of_the_best_model_where_that_is_loaded(make_trainer, guard):
    callback = guard()
    trainer = make_trainer(
        [callback],
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="iimm_accuracy",
    )
    trainer.train()
    assert callback.outcome.final_accuracy == pytest.approx(trainer.state.best_metric)


# That it leaves the run alone


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 3},
        {CHECKPOINTING: True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"method": "lora"},
        {"transform": True},
    ],
    ids=["plain", "workers-accumulation", "bf16", "evaluating", "gradient-checkpointing",
         "compiled", "lora", "random-transform"],
)  # fmt: skip
def test_the_run_is_bit_identical_with_and_without_the_guard(
    make_trainer, guard, tiny_clip, arguments
):
    arguments = dict(arguments)
    method, transform = arguments.pop("method", "full"), arguments.pop("transform", False)
    trainers = []
    for callbacks in ([], [guard(every=2)]):
        torch.manual_seed(0)
        model = prepare(tiny_clip(dropout=0.3), method)
        trainer = make_trainer(callbacks, model=model, **arguments)
        if transform:
            trainer.train_dataset = trainer.train_dataset.with_transform(turned_at_random)
        trainer.train()
        trainers.append(trainer)
    plain, guarded = trainers
    assert_same_weights(weights(plain), weights(guarded))
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in trainers]
    assert losses[0] == losses[1]
    moments = [trainer.optimizer.state_dict()["state"] for trainer in trainers]
    assert moments[0].keys() == moments[1].keys() != set()
    for one, other in zip(moments[0].values(), moments[1].values(), strict=True):
        assert_same_weights(one, other)
    assert len(rows(guarded)) == 6


def test_a_training_set_that_draws_random_numbers_is_left_alone(make_trainer, guard, tiny_clip):
    losses = []
    for callbacks in ([], [guard(every=2)]):
        torch.manual_seed(0)
        trainer = make_trainer(callbacks, model=tiny_clip(dropout=0.3))
        trainer.train_dataset = TurnedPairs(trainer.train_dataset)
        trainer.train()
        losses.append([r["loss"] for r in trainer.state.log_history if "loss" in r])
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(set(losses[0])) == 10
    assert callbacks[0].outcome.linear_probe_accuracy is not None


def test_the_bit_identity_test_can_fail(make_trainer, tiny_clip):
    class Careless(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.rand(1)

    trainers = [make_trainer(c, model=tiny_clip(dropout=0.3)) for c in ([], [Careless()])]
    for trainer in trainers:
        trainer.train()
    with pytest.raises(AssertionError):
        assert_same_weights(weights(trainers[0]), weights(trainers[1]))


# What it does about forgetting


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stop_before_training_leaves_the_weights_bit_identical(
    make_trainer, guard, past_runs, caplog, accumulation, tmp_path
):
    callback = guard(outcomes=past_runs(0.4), action="stop")
    trainer = make_trainer(
        [callback],
        gradient_accumulation_steps=accumulation,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=1,
    )
    before = weights(trainer)
    trainer.train()
    assert_same_weights(before, weights(trainer))
    assert not trainer.optimizer.state
    forecast = rows(trainer)[0]["eval_iimm_forgetting_forecast"]
    assert f"forecast mean forgetting {100 * forecast:.1f} points" in caplog.text
    assert callback.outcome.ended.startswith("stopped by the guard at step 0: forecast mean")
    assert not callback.outcome.complete
    assert not list(tmp_path.glob("out/checkpoint*"))
    assert [r["step"] for r in rows(trainer)] == [0]


def test_a_callback_stopped_before_training_can_train_again(make_trainer, guard, past_runs):
    callback = guard(outcomes=past_runs(0.4), action="stop")
    trainer = make_trainer([callback])
    trainer.train()
    before = weights(trainer)
    callback.action = "warn"
    trainer.train()
    assert callback.outcome.complete
    assert any(not torch.equal(v, before[k]) for k, v in weights(trainer).items())


def test_stops_at_the_first_look_over_the_limit(make_trainer, guard, script_looks):
    script_looks(lambda step: 1.0 if step < 6 else 0.25)
    callback = guard(action="stop", every=2, max_forgetting=0.3)
    trainer = make_trainer([callback], max_steps=10)
    trainer.train()
    assert trainer.state.global_step == 6
    assert "observed mean forgetting 75.0 points" in callback.outcome.ended
    assert callback.outcome.complete is False


def test_does_not_stop_within_the_sampling_error(make_trainer, guard, script_looks):
    script_looks(lambda step: 1.0 if step < 6 else 0.96)  # one image of 24
    trainer = make_trainer([guard(action="stop", every=2, max_forgetting=0.01)], max_steps=10)
    trainer.train()
    assert trainer.state.global_step == 10


def test_warn_goes_on_and_repeats_only_when_it_gets_worse(
    make_trainer, guard, script_looks, caplog
):
    script_looks(lambda step: {0: 1, 2: 0.6, 4: 0.6, 6: 0.1, 8: 0.1, 10: 0.1}[step])
    limits = Limits(0.38, confidence=0.95)
    trainer = make_trainer([guard(every=2, max_forgetting=limits)], max_steps=10)
    with caplog.at_level(logging.WARNING, logger="iimm_callbacks"):
        trainer.train()
    assert trainer.state.global_step == 10
    warned = [r.getMessage().split(":")[0] for r in caplog.records if "guard, step" in r.message]
    assert warned == ["IIMM guard, step 2", "IIMM guard, step 6"]


def test_a_callable_gets_every_verdict_and_may_stop(make_trainer, guard, script_looks):
    script_looks(lambda step: 1.0 if step < 4 else 0.2)
    seen = []

    def action(verdict):
        seen.append(verdict.level)
        return verdict.level == "stop"

    trainer = make_trainer([guard(every=2, action=action)], max_steps=10)
    trainer.train()
    assert seen[0] != "stop"
    assert seen[1:] == ["continue", "stop"]
    assert trainer.state.global_step == 4


def test_a_stop_for_the_forecasts_sake_waits_until_the_next_look_is_over_the_limit(
    make_trainer, guard, past_runs, script_looks, caplog
):
    # All past runs lost nothing until 60 % of the steps, and then 0.4.
    late = [{"share": s, "gain": 0.0, "forgetting": 0.4 * (s > 0.6), "worst": 0.4 * (s > 0.6)}
            for s in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]  # fmt: skip
    record = [replace(o, trajectory=late) for o in past_runs(0.4)]
    script_looks(lambda step: 1.0 if step <= 6 else 0.5)
    callback = guard(outcomes=record, action="stop", every=2, max_forgetting=0.1)
    trainer = make_trainer([callback], max_steps=10)
    trainer.train()
    assert trainer.state.global_step == 6
    assert callback.outcome.forgetting == 0
    assert "forecast mean forgetting 39.9 points" in callback.outcome.ended
    assert "not yet at the next look" in caplog.text  # it warned from the start


# What is saved


def test_every_run_is_saved(make_trainer, guard, own_store, tmp_path):
    callbacks = [guard(), guard(outcomes=tmp_path / "team.jsonl"), guard(outcomes=None)]
    for callback in callbacks:
        make_trainer([callback], max_steps=4).train()
    (outcome,) = read_outcomes(own_store)
    assert outcome == callbacks[0].outcome
    assert (outcome.task, outcome.method, outcome.complete) == ("colours", "full", True)
    expected = {"optimizer", "learning_rate", "schedule", "steps", "batch_size", "trainable_share"}
    assert expected <= set(outcome.recipe)
    assert [look["share"] for look in outcome.trajectory] == [0, 0.25, 0.5, 0.75, 1]
    assert all("forgetting_se" in look for look in outcome.trajectory[1:])
    assert read_outcomes(tmp_path / "team.jsonl") == [callbacks[1].outcome]
    assert len(list(own_store.parent.glob("*.jsonl"))) == 1


def test_the_next_run_learns_from_the_record(make_trainer, guard, past_runs, own_store):
    for outcome in past_runs(0.1):
        append_outcome(own_store, outcome)
    callback = guard()
    make_trainer([callback], max_steps=4).train()
    assert callback.monitor.record()["forecast"]["basis"].startswith("5 complete runs of this")
    assert callback.monitor.history[0]["eval_iimm_forgetting_forecast"] == pytest.approx(
        0.1, abs=0.01
    )
    assert len(read_outcomes(own_store)) == 6
    deaf = guard(outcomes=[])
    make_trainer([deaf], max_steps=4).train()
    assert deaf.monitor.record()["forecast"]["base_rate"]


def test_a_stopped_run_is_saved_as_such(make_trainer, guard, script_looks, own_store):
    script_looks(lambda step: 1.0 if step < 4 else 0.2)
    make_trainer([guard(action="stop", every=2)], max_steps=10).train()
    (outcome,) = read_outcomes(own_store)
    assert not outcome.complete
    assert outcome.ended.startswith("stopped by the guard at step 4")
    assert outcome.forgetting == pytest.approx(0.8, abs=0.05)


def test_an_interrupted_run_is_saved_as_such(make_trainer, guard, own_store):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    callback = guard(every=2)
    with pytest.raises(KeyboardInterrupt):
        make_trainer([callback, Interrupt()]).train()
    callback.monitor = None
    gc.collect()
    (outcome,) = read_outcomes(own_store)
    assert (outcome.complete, outcome.ended) == (False, "interrupted")
    assert outcome.trajectory[-1]["share"] == 0.4


def test_a_store_that_cannot_be_written_costs_a_warning(make_trainer, guard, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    callback = guard(outcomes=tmp_path / "file" / "outcomes.jsonl")
    make_trainer([callback], max_steps=4).train()
    assert callback.outcome.complete
    assert "The outcome of this run was not saved" in caplog.text


def test_what_is_borrowed_is_shown_logged_and_stops_nothing_before_the_first_look(
    make_trainer, guard, capsys
):
    callback = guard(verbose="all", action="stop", max_forgetting=0.001, every=1)
    trainer = make_trainer([callback], max_steps=10, learning_rate=0.0)
    trainer.train()
    printed = " ".join(capsys.readouterr().out.split())
    assert "forgetting borrowed forecast" in printed
    shipped = len(load_base_rates()) + len(sample.load_outcomes())
    assert f"Base rates: borrowed from {shipped} complete runs of 4 other models" in printed
    assert "leave-one-model-out error" in printed
    first = rows(trainer)[0]
    assert {"eval_iimm_gain_forecast", "eval_iimm_forgetting_forecast"} <= set(first)
    assert callback.monitor.history[0]["level"] == "warn"
    assert callback.monitor.history[0]["reason"].startswith("borrowed forecast mean forgetting")
    assert len(rows(trainer)) > 1
    assert "predicted, borrowed" in printed
    assert "none" not in printed.split("predicted, borrowed")[1].split("colours")[0]


# When things go wrong


def test_a_failing_look_warns_once_and_the_run_goes_on(make_trainer, guard, monkeypatch, caplog):
    look = Probe.look

    def failing(self, model, step, autocast_dtype=None, **settings):
        if step in (4, 6):
            raise RuntimeError("disk on fire")
        return look(self, model, step, autocast_dtype, **settings)

    monkeypatch.setattr(Probe, "look", failing)
    callback = guard(every=2)
    trainer = make_trainer([callback], max_steps=10)
    trainer.train()
    assert [r["step"] for r in rows(trainer)] == [0, 2, 8, 10]
    assert caplog.text.count("RuntimeError: disk on fire") == 1
    assert callback.record()["failures"] == 2


def test_a_failing_look_raises_if_strict(make_trainer, guard, monkeypatch):
    look = Probe.look

    def failing(self, model, step, autocast_dtype=None, **settings):
        if step:
            raise RuntimeError("disk on fire")
        return look(self, model, step, autocast_dtype, **settings)

    monkeypatch.setattr(Probe, "look", failing)
    with pytest.raises(RuntimeError, match="disk on fire"):
        make_trainer([guard(strict=True)]).train()


def test_weights_that_turn_nan_give_no_number(make_trainer, guard, caplog):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    next(model.parameters()).fill_(math.nan)

    callback = guard(every=3)
    trainer = make_trainer([Poison(), callback], max_steps=9)
    trainer.train()
    assert [r["step"] for r in rows(trainer)] == [0, 3]
    assert "training has diverged, which is not forgetting: `text_embeds` must be finite" in (
        caplog.text
    )
    # What was seen at step 3 is not how the run ended.
    assert (callback.outcome.complete, callback.outcome.ended) == (False, "training diverged")


def test_the_first_measurement_is_not_forgiven(make_trainer, guard, tiny_clip):
    model = tiny_clip()
    with torch.no_grad():
        model.visual_projection.weight.fill_(math.nan)
    trainer = make_trainer([guard()], model=model)
    before = weights(trainer)
    with pytest.raises(ValueError, match="norm nan"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)


def test_a_failing_best_model_metric_does_not_end_the_run(make_trainer, guard, monkeypatch):
    look = Probe.look

    def failing(self, model, step, autocast_dtype=None, **settings):
        if step == 4:
            raise RuntimeError("disk on fire")
        return look(self, model, step, autocast_dtype, **settings)

    monkeypatch.setattr(Probe, "look", failing)
    trainer = make_trainer(
        [guard()],
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="iimm",
    )
    trainer.train()
    assert trainer.state.best_global_step in (2, 6)


# Resuming


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_has_the_baseline_and_history_of_its_start(
    make_trainer, guard, tmp_path, restore
):
    arguments = {
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 5,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = make_trainer([guard(every=2)], output_dir=str(tmp_path / "a"), **arguments)
    whole.train()
    callback = guard(every=2)
    resumed = make_trainer([callback], output_dir=str(tmp_path / "b"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    timeless = [
        [{k: v for k, v in row.items() if not k.endswith("runtime")} for row in rows(t)]
        for t in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]
    assert [r["step"] for r in callback.monitor.history] == [0, 2, 4, 6, 8, 10]
    state = json.loads((tmp_path / "a" / "checkpoint-10" / "trainer_state.json").read_text())
    assert "IIMMCallback/colours" in state["stateful_callbacks"]


def test_a_checkpoint_without_the_guard_is_never_taken_for_the_baseline(
    make_trainer, guard, tmp_path, caplog
):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(output_dir=str(tmp_path / "a"), **arguments).train()
    trainer = make_trainer([guard()], output_dir=str(tmp_path / "b"), **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert rows(trainer) == []
    assert "The IIMM guard is off: this run resumes at step 3 and" in caplog.text
    assert "written without the guard, so the untouched model was never measured" in caplog.text


def test_under_adapters_the_untouched_model_is_measured_at_any_step(
    make_trainer, tiny_clip, guard, tmp_path
):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(
        model=prepare(tiny_clip(), "lora"), output_dir=str(tmp_path / "a"), **arguments
    ).train()
    fresh, late = guard(every=3), guard(every=3)
    for callback, checkpoint in ((fresh, None), (late, str(tmp_path / "a" / "checkpoint-3"))):
        model = prepare(tiny_clip(), "lora")
        trainer = make_trainer([callback], model=model, output_dir=str(tmp_path / "b"), **arguments)
        trainer.train(resume_from_checkpoint=checkpoint)
    assert [r["step"] for r in late.monitor.history] == [0, 3, 6]
    assert [r["step"] for r in rows(trainer)] == [3, 6]
    shares = [c.outcome.recipe["trainable_share"] for c in (fresh, late)]
    assert 0 < shares[0] == shares[1] < 0.5
    for one, other in zip(
        (r for r in fresh.monitor.history if r["step"] in (0, 3, 6)),
        late.monitor.history,
        strict=True,
    ):
        assert one["eval_iimm"] == other["eval_iimm"]
        assert one["eval_iimm_forgetting_observed"] == other["eval_iimm_forgetting_observed"]


def test_resuming_with_other_images_turns_the_guard_off_and_keeps_what_was_recorded(
    make_trainer, guard, tmp_path, shapes, caplog
):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer([guard()], output_dir=str(tmp_path / "a"), **arguments).train()
    start = str(tmp_path / "a" / "checkpoint-3")
    other = [Task("shapes", shapes, templates="{}", probe_size=24)]
    trainer = make_trainer([guard(off_target=other)], output_dir=str(tmp_path / "b"), **arguments)
    trainer.train(resume_from_checkpoint=start)
    assert trainer.state.global_step == 6
    assert "The IIMM guard is off" in caplog.text
    assert "['shapes'] have other images" in caplog.text
    states = [
        json.loads((folder / "trainer_state.json").read_text())["stateful_callbacks"]
        for folder in (tmp_path / "a" / "checkpoint-3", tmp_path / "b" / "checkpoint-6")
    ]
    assert states[0]["IIMMCallback/colours"] == states[1]["IIMMCallback/colours"]
    strict = make_trainer(
        [guard(off_target=other, strict=True)], output_dir=str(tmp_path / "c"), **arguments
    )
    with pytest.raises(ValueError, match=r"\['shapes'\] have other images"):
        strict.train(resume_from_checkpoint=start)


# Bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_forgetting": 5}, r"fraction in \(0, 1\].*got 5; write 0.05 for 5 points"),
        ({"max_forgetting": 0.0}, "got 0.0"),
        ({"every": 0}, "got 0"),
        ({"every": "step"}, "got 'step'"),
        ({"max_overhead": 0}, "got 0"),
        ({"action": "stop", "off_target": []}, "got no `off_target` task"),
        ({"action": "stop", "max_forgetting": None}, "got no `max_forgetting`"),
    ],
)
def test_a_bad_setting_names_itself_and_what_came(guard, settings, message):
    with pytest.raises(ValueError, match=message):
        guard(**settings)


def test_an_action_of_another_kind_is_refused(guard):
    with pytest.raises(TypeError, match="got 'halt'"):
        guard(action="halt")


def test_tasks_that_cannot_guard_one_another_are_refused(colour_task, shape_task, colours, shapes):
    with pytest.raises(ValueError, match="'again' is the task itself"):
        IIMMCallback(colour_task, [Task("again", colours)])
    with pytest.raises(ValueError, match=r"\['shapes'\] more than once"):
        IIMMCallback(colour_task, [shape_task, Task("shapes", shapes.select(range(20)))])
    with pytest.raises(ValueError, match="key 'eval_iimm_linear_probe_accuracy'"):
        IIMMCallback(colour_task, [Task("linear_probe", shapes)])
    with pytest.raises(TypeError, match="got Dataset"):
        IIMMCallback(colour_task, [shapes])


def test_the_tasks_own_images_under_another_name_are_found_out(make_trainer, colour_task, colours):
    copy = Task("copy", colours.select(range(96)), templates="a {} thing", probe_size=32)
    trainer = make_trainer([IIMMCallback(colour_task, [copy], verbose=False)])
    with pytest.raises(ValueError, match="'copy' is the task itself"):
        trainer.train()


def test_a_callback_can_be_copied_and_pickled_before_training(guard, make_trainer):
    callback = pickle.loads(pickle.dumps(copy.deepcopy(guard())))
    make_trainer([callback], max_steps=2).train()
    assert callback.outcome.complete
