"""What a run counts from, which numbers reach whom, and in which order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import default_compute_objective

from iimm_callbacks import IIMMCallback, PromptClassifier
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.records import keys
from iimm_callbacks.records.outcomes import at_the_last_step


@pytest.fixture
def guard(colour_task, shape_task):
    def build(**settings):
        settings = {"max_overhead": None, "verbose": False, "outcomes": None} | settings
        return IIMMCallback(colour_task, settings.pop("off_target", [shape_task]), **settings)

    return build


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 8}


def test_the_guard_does_not_change_what_the_default_objective_sums(make_trainer, guard):
    plain, guarded = (
        make_trainer(callbacks, **EVALUATED) for callbacks in ([], [guard(every="evaluate")])
    )
    for trainer in (plain, guarded):
        trainer.train()
    objectives = [default_compute_objective(t.evaluate()) for t in (plain, guarded)]
    assert objectives[0] == pytest.approx(objectives[1])


def test_a_search_picks_the_same_trial_with_and_without_the_guard(
    make_trainer, guard, tiny_clip, processor, colour_task, tmp_path
):
    optuna = pytest.importorskip("optuna")
    grid = {"learning_rate": [1e-6, 1e-3, 1.0]}
    found = []
    for callbacks in ([], [guard()]):
        like = make_trainer(max_steps=4, eval_strategy="steps", eval_steps=4)
        trainer = Trainer(
            model_init=lambda: PromptClassifier(tiny_clip(), colour_task, processor),
            args=like.args,
            train_dataset=like.train_dataset,
            eval_dataset=like.eval_dataset,
            data_collator=like.data_collator,
            processing_class=processor,
            callbacks=callbacks,
        )
        best = trainer.hyperparameter_search(
            hp_space=lambda t: {n: t.suggest_categorical(n, rates) for n, rates in grid.items()},
            n_trials=3,
            backend="optuna",
            sampler=optuna.samplers.GridSampler(grid, seed=0),
        )
        found.append((best.hyperparameters, best.objective))
    assert found[0] == found[1]
    # No trial overwrites the run file of another.
    assert len(list((tmp_path / "out").glob("*/iimm_colours.json"))) == 3


@pytest.mark.parametrize("last", [False, True])
def test_early_stopping_on_our_number_works_in_any_order(make_trainer, guard, last):
    ours, stopping = guard(), EarlyStoppingCallback(1)
    trainer = make_trainer(
        [stopping] if last else [ours, stopping],
        **EVALUATED,
        learning_rate=1e-9,  # so that nothing ever gets better
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="iimm_accuracy",
    )
    if last:
        trainer.add_callback(ours)
    order = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.state.global_step == 4
    trainer.predict(trainer.eval_dataset)
    assert trainer.callback_handler.callbacks == order
    patience = stopping.early_stopping_patience_counter
    trainer.evaluate()
    assert stopping.early_stopping_patience_counter == patience + 1  # it was told the number
    assert trainer.callback_handler.callbacks == order


def test_a_prediction_during_training_leaves_the_callbacks_in_their_order(make_trainer, guard):
    class Predicts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.predict(trainer.eval_dataset)

    trainer = make_trainer(
        [Predicts(), guard(every=2)], max_steps=4, metric_for_best_model="iimm_gain_observed"
    )
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before


def test_of_our_numbers_only_the_one_asked_for_is_among_the_metrics(make_trainer, guard):
    trainer = make_trainer([guard()], **EVALUATED, metric_for_best_model="iimm_accuracy")
    seen = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: (seen.append(evaluate(*a, **k)), seen[-1])[1]
    trainer.train()
    ours = [{key for key in metrics if key.startswith("eval_iimm")} for metrics in seen]
    assert ours == [{"eval_iimm_accuracy"}] * 4


@pytest.fixture
def tuned(tiny_clip):
    model = tiny_clip()
    with torch.no_grad():
        for p in model.visual_projection.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("given", ["model", "folder", "function"])
def test_a_second_phase_counts_from_the_base_model(
    make_trainer, guard, tiny_clip, tuned, tmp_path, given
):
    first = guard()
    make_trainer([first], max_steps=2).train()
    base = {"model": tiny_clip(), "folder": str(tmp_path / "base"), "function": tiny_clip}[given]
    tiny_clip().save_pretrained(tmp_path / "base")
    second = guard(base_model=base)
    make_trainer([second], model=tuned, max_steps=2).train()
    one, other = (callback.monitor.history[0] for callback in (first, second))
    for key in ("eval_iimm", "eval_iimm_accuracy", "eval_iimm_shapes_accuracy"):
        assert one[key] == pytest.approx(other[key])
    last = second.monitor.history[-1]
    lost = one["eval_iimm_shapes_accuracy"] - last["eval_iimm_shapes_accuracy"]
    assert last["eval_iimm_forgetting_observed"] == pytest.approx(lost)
    # Its gain is not that of its own steps, so nothing may be learnt from it.
    assert not second.outcome.complete
    assert second.outcome.ended == "finished, as a later phase of its training"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_base_model_that_is_the_model_itself_makes_no_later_phase(
    make_trainer, guard, tiny_clip, method
):
    callback = guard(base_model=tiny_clip)
    make_trainer([callback], model=prepare(tiny_clip(), method), max_steps=2).train()
    assert callback.outcome.complete


def test_the_recipe_is_that_of_the_optimizer_that_steps(make_trainer, guard, tiny_clip):
    """It may be the user's own; of the Trainer's the rate is the one before its schedule."""
    callbacks = [guard(), guard()]
    trainer = make_trainer([callbacks[0]], max_steps=2)
    groups = [{"params": [p]} for p in trainer.model.parameters()]
    groups[0]["lr"] = 0.02
    trainer.optimizer = torch.optim.SGD(groups, lr=0.01)
    trainer.train()
    make_trainer([callbacks[1]], max_steps=2, warmup_steps=1, learning_rate=2e-3).train()
    one, other = (callback.outcome.recipe for callback in callbacks)
    assert (one["optimizer"], one["learning_rate"]) == ("SGD", 0.02)
    assert other["optimizer"].startswith("adamw_torch")
    assert other["learning_rate"] == pytest.approx(2e-3)


BEST = EVALUATED | {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}


def test_a_misspelt_number_of_ours_is_the_trainers_own_error(make_trainer, guard):
    trainer = make_trainer([guard()], **BEST, metric_for_best_model="iimm_forgetting")
    with pytest.raises(KeyError, match="eval_iimm_forgetting"):
        trainer.train()


def test_a_forecast_that_is_not_there_yet_ends_no_run(make_trainer, guard):
    callback = guard(off_target=[], outcomes=None)
    trainer = make_trainer([callback], **BEST, metric_for_best_model="iimm_exceed_probability")
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize(
    ("key", "greater", "warns"),
    [
        ("iimm_forgetting_observed", None, True),
        ("eval_iimm_exceed_probability", True, True),
        ("iimm_forgetting_worst", False, False),
        ("iimm_accuracy", None, False),
    ],
)
def test_the_best_model_by_most_forgetting_is_warned_of(
    make_trainer, guard, caplog, key, greater, warns
):
    arguments = BEST | {"max_steps": 2, "greater_is_better": greater}
    make_trainer([guard()], **arguments, metric_for_best_model=key).train()
    said = [r.message for r in caplog.records if "greater_is_better=False" in r.message]
    assert len(said) == warns


@pytest.mark.parametrize("early", [True, False])
def test_the_end_of_a_run_is_learnt_from_its_last_step_and_not_from_an_early_checkpoint(
    make_trainer, guard, monkeypatch, early
):
    callback = guard()
    arguments = BEST | {"greater_is_better": False, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer([callback], **arguments)
    evaluate = trainer.evaluate

    def scripted(*args, **settings):
        metrics = evaluate(*args, **settings)
        metrics["eval_loss"] = float(abs(trainer.state.global_step - (4 if early else 8)))
        return metrics

    monkeypatch.setattr(trainer, "evaluate", scripted)
    trainer.train()
    outcome, looks = callback.outcome, callback.monitor.history
    assert (outcome.complete, outcome.ended) == (True, "finished")
    assert outcome.recipe.get("best_step") == (4 if early else None)
    learnt = at_the_last_step(outcome)
    last = next(row for row in looks if row["step"] == trainer.state.max_steps)
    assert learnt.gain == pytest.approx(last[keys.observed_key("gain")])
    assert learnt.forgetting == pytest.approx(last[keys.observed_key("forgetting")])
    assert len(learnt.trajectory) == len(outcome.trajectory) - early
    assert outcome.gain == pytest.approx(looks[-1][keys.observed_key("gain")])
    without = replace(outcome, trajectory=outcome.trajectory[:-1])
    assert at_the_last_step(without).complete is not early


def test_what_the_run_counts_from_is_said(make_trainer, guard, tuned, tiny_clip, capsys):
    make_trainer([guard(verbose="all")], max_steps=1).train()
    assert "count from the model as it is now." in capsys.readouterr().out
    make_trainer([guard(verbose=True, base_model=tiny_clip())], model=tuned, max_steps=1).train()
    assert "count from `base_model`." in capsys.readouterr().out


def test_adapters_that_were_trained_count_from_the_base_model(make_trainer, guard, tiny_clip):
    model = prepare(tiny_clip(), "lora")
    make_trainer([], model=model, max_steps=8, learning_rate=0.1).train()
    callback = guard(base_model=tiny_clip())
    make_trainer([callback], model=model, max_steps=1).train()
    plain = guard()
    make_trainer([plain], max_steps=1).train()
    assert callback.monitor.history[0]["eval_iimm"] == pytest.approx(
        plain.monitor.history[0]["eval_iimm"]
    )


@pytest.mark.parametrize("method", ["lora", "dora", "clip_adapter"])
@pytest.mark.parametrize("names_base", [False, True])
def test_adapters_that_were_trained_make_a_later_phase(
    make_trainer, guard, tiny_clip, processor, capsys, caplog, method, names_base
):
    def untrained():
        if method == "dora":
            targets = ["q_proj", "v_proj"]
            return get_peft_model(tiny_clip(), LoraConfig(target_modules=targets, use_dora=True))
        return prepare(
            tiny_clip(), method, **({} if method == "lora" else {"processor": processor})
        )

    model = untrained()
    first, second = guard(), guard(verbose="all", base_model=tiny_clip if names_base else None)
    make_trainer([first], model=model, max_steps=2, learning_rate=0.1).train()
    assert first.outcome.complete
    assert "trained before this run" not in caplog.text
    again = untrained()  # as loaded in another process
    again.load_state_dict(model.state_dict())
    make_trainer([second], model=again, max_steps=2).train()
    assert second.outcome.ended == "finished, as a later phase of its training"
    assert not second.outcome.complete
    assert "were trained before this run, or begin at random" in caplog.text
    counted = "`base_model`." if names_base else "the model as it is now."
    assert f"count from {counted}" in capsys.readouterr().out


class WithHead(nn.Module):
    """A whole CLIP under a linear layer of the user's own."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip
        self.head = nn.Linear(clip.config.projection_dim, 4)

    def forward(self, pixel_values, labels=None):
        found = self.clip.get_image_features(pixel_values=pixel_values)
        logits = self.head(found if isinstance(found, torch.Tensor) else found.pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_parameters_that_train_outside_of_the_encoder_are_told_of(
    make_trainer, guard, tiny_clip, processor, caplog
):
    like = make_trainer()
    trainer = Trainer(
        model=WithHead(tiny_clip()),
        args=like.args,
        train_dataset=like.train_dataset,
        data_collator=like.data_collator,
        processing_class=processor,
        callbacks=[guard()],
    )
    trainer.train()
    assert "2 parameters that train lie outside of the dual encoder (head.weight" in caplog.text
    caplog.clear()
    make_trainer([guard()], max_steps=1).train()
    make_trainer([guard()], model=prepare(tiny_clip(), "lora"), max_steps=1).train()
    assert "lie outside" not in caplog.text


class WithClassify(WithHead):
    def classify(self, image_embeds):
        return self.head(image_embeds)


def test_a_head_of_ones_own_is_scored_where_it_says_how(
    make_trainer, guard, tiny_clip, processor, colours, colour_task, caplog
):
    like = make_trainer(max_steps=30, learning_rate=3e-3)
    model, callback = WithClassify(tiny_clip()), guard()
    trainer = Trainer(
        model=model,
        args=like.args,
        train_dataset=like.train_dataset,
        data_collator=like.data_collator,
        processing_class=processor,
        callbacks=[callback],
    )
    trainer.train()
    assert "lie outside" not in caplog.text
    positions = colour_task.subset()
    images, labels = colour_task.images(positions), colour_task.labels(positions)
    batch = like.data_collator(list(zip(images, labels, strict=True)))
    with torch.no_grad():
        right = model.eval()(**batch)["logits"].argmax(1) == batch["labels"]
    last = callback.monitor.history[-1]
    assert last["eval_iimm_accuracy"] == pytest.approx(float(right.double().mean()))
    # Not comparable with runs of zero-shot accuracy.
    assert callback.outcome.recipe["metrics"] == {"colours": "accuracy of its own classifier"}


@pytest.mark.parametrize(("said", "stops"), [(True, True), (np.bool_(True), True), (1, False)])
def test_an_action_stops_by_true_of_either_kind(make_trainer, guard, said, stops):
    trainer = make_trainer([guard(action=lambda verdict: said)], max_steps=3)
    trainer.train()
    assert (trainer.state.global_step < 3) == stops


def test_label_smoothing_trains_with_and_without_the_guard(make_trainer, guard):
    losses = []
    for callbacks in ([], [guard()]):
        trainer = make_trainer(callbacks, max_steps=2, label_smoothing_factor=0.1)
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("label", [True, np.True_, np.uint8(1), torch.tensor(1)])
def test_the_collator_takes_the_labels_that_a_task_takes(make_trainer, colours, label):
    batch = make_trainer().data_collator([{"image": colours[0]["image"], "label": label}])
    assert batch["labels"].tolist() == [1]
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("label", ["cat", None, 1.0])
def test_the_collator_names_a_label_that_is_no_integer(make_trainer, colours, label):
    collator = make_trainer().data_collator
    with pytest.raises(TypeError, match=f"integers in column 'label', got {label!r}"):
        collator([(colours[0]["image"], label)])
