"""The step that the Trainer still takes once it was told to stop: it must leave nothing behind."""

from contextlib import nullcontext

import pytest
import torch
from test_resume import steps, stop_from, timeless
from torch import nn
from transformers import TrainerCallback

from iimm_callbacks import IIMMCallback
from iimm_callbacks.trainer import host


@pytest.fixture
def guard(colour_task, shape_task):
    def build(**settings):
        settings = {"max_overhead": None, "verbose": False, "action": stop_at_once} | settings
        return IIMMCallback(colour_task, [shape_task], **settings)

    return build


def stop_at_once(verdict):
    return True


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_stopped_before_training_nothing_is_saved_evaluated_or_looked_at(
    make_trainer, guard, tmp_path
):
    callback = guard(every="evaluate")
    strategies = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    make_trainer([callback], max_steps=12, per_device_train_batch_size=96, **strategies).train()
    assert steps(callback) == [0]
    assert saved(tmp_path / "out") == []
    assert callback.outcome.ended.startswith("stopped by the guard at step 0")


@pytest.mark.parametrize("accumulated", [1, 4])
def test_statistics_of_batch_norms_stay_as_they_were(make_trainer, guard, tiny_clip, accumulated):
    model = tiny_clip()
    norm = nn.BatchNorm1d(model.vision_model.post_layernorm.weight.shape[0])
    model.vision_model.post_layernorm = nn.Sequential(model.vision_model.post_layernorm, norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"gradient_accumulation_steps": accumulated}
    make_trainer([guard()], model=model, **settings).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stop_that_another_callback_asks_for_is_its_own_affair(make_trainer, guard):
    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            control.should_training_stop = True

    plain, guarded = make_trainer([Stop()]), make_trainer([Stop(), guard(action="warn")])
    for trainer in (plain, guarded):
        trainer.train()
    for one, other in zip(plain.model.parameters(), guarded.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("optimizer", "can"),
    [("adamw_torch", True), ("galore_adamw_layerwise", False), ("lomo", False)],
)
def test_optimizers_that_step_in_backward_cannot_be_held(make_trainer, optimizer, can):
    args = make_trainer().args
    args.optim = optimizer
    with nullcontext() if can else pytest.raises(RuntimeError, match=r"^why\. It ends with this"):
        host.check_can_hold(args, "why")


def test_a_stopped_run_that_is_started_again_and_again_stays_as_it_is(
    make_trainer, guard, tmp_path, monkeypatch
):
    monkeypatch.setattr("iimm_callbacks.monitor.measured.judge_look", stop_from(12))
    settings = {
        "max_steps": 36, "save_strategy": "epoch", "eval_strategy": "epoch",
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    whole = guard(action="stop", every="evaluate")
    make_trainer([whole], **settings).train()
    before = saved(tmp_path / "out")
    for _ in range(3):
        again = guard(action="stop", every="evaluate")
        make_trainer([again], **settings).train(resume_from_checkpoint=True)
        assert timeless(again) == timeless(whole)
        assert again.outcome == whole.outcome
        assert saved(tmp_path / "out") == before


def test_resumed_a_stopped_run_ends_at_its_best_model_and_is_rescued_all_the_same(
    make_trainer, guard, tmp_path, monkeypatch
):
    monkeypatch.setattr("iimm_callbacks.monitor.measured.judge_look", stop_from(4))
    monkeypatch.setattr("iimm_callbacks.monitor.measured.is_exceeded", lambda *_: True)
    rescued = []
    monkeypatch.setattr(
        "iimm_callbacks.trainer.run.rescue_at_end", lambda *_, **__: rescued.append(1)
    )
    settings = {
        "max_steps": 20, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    with pytest.warns(FutureWarning, match="use `action='rescue'`"):
        whole, again = (guard(action="stop", every=2, on_exceed="rescue") for _ in range(2))
    make_trainer([whole], **settings).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-4")
    make_trainer([again], **settings).train(resume_from_checkpoint=checkpoint)
    assert steps(whole) == [0, 2, 4, 4]
    assert timeless(again) == timeless(whole)
    assert again.outcome == whole.outcome
    assert rescued == [1, 1]


def test_a_run_that_another_callback_stopped_is_not_said_to_be_stopped_by_the_guard(
    make_trainer, guard, monkeypatch
):
    class Early(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    monkeypatch.setattr("iimm_callbacks.monitor.measured.judge_look", stop_from(5))
    callback = guard(action="stop", every=100)
    make_trainer([callback, Early()], max_steps=10).train()
    assert steps(callback) == [0, 5]
    assert callback.outcome.ended == "stopped early"
