"""Class prompts under the plain Trainer: the model's own logits, and the right gradients."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_encoders import make_siglip
from torch import nn
from transformers import Trainer, TrainingArguments

from iimm_callbacks import ImageCollator, PromptClassifier, Task
from iimm_callbacks.models import classifier as classifier_module
from iimm_callbacks.models.encoders import find_encoder
from iimm_callbacks.models.tuning import prepare

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def model_and_processor(request, tiny_clip, processor):
    return make_siglip() if request.param == "siglip" else (tiny_clip().eval(), processor)


@pytest.fixture
def batch(processor, colours):
    return ImageCollator(processor)([colours[i] for i in range(6)])


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# Logits


@pytest.mark.parametrize("model_and_processor", ["clip", "siglip"], indirect=True)
def test_logits_are_the_dual_encoders_own_for_one_template(
    model_and_processor, colour_task, colours
):
    model, processor = model_and_processor
    inputs = ImageCollator(processor)([colours[i] for i in range(6)])
    labels = inputs.pop("labels")
    siglip = model.config.model_type == "siglip"
    padding = {"padding": "max_length", "max_length": 12} if siglip else {"padding": True}
    prompts = [f"a {name} thing" for name in colour_task.class_names]
    tokens = processor.tokenizer(prompts, return_tensors="pt", **padding)
    with torch.no_grad():
        expected = model(**tokens, **inputs).logits_per_image
        ours = PromptClassifier(model, colour_task, processor)(**inputs, labels=labels)
    torch.testing.assert_close(ours["logits"], expected, atol=1e-5, rtol=1e-5)
    own_loss = nn.functional.cross_entropy(expected, labels)
    torch.testing.assert_close(ours["loss"], own_loss, atol=1e-5, rtol=1e-5)


def test_several_templates_are_averaged_per_class(tiny_clip, processor, colours, batch):
    templates = ("a {} thing", "one {}", "{}!")
    task = Task("colours", colours, templates=templates, probe_size=32)
    model = tiny_clip().eval()
    classifier = PromptClassifier(model, task, processor)
    with torch.no_grad():
        logits = classifier(**batch)["logits"]
        for c, name in enumerate(task.class_names):
            vectors = []
            for template in templates:
                tokens = processor.tokenizer([template.format(name)], return_tensors="pt")
                pixels = batch["pixel_values"]
                out = model(**tokens, pixel_values=pixels)
                vectors.append(out.text_embeds[0])
            mean = torch.stack(vectors).mean(0)
            expected = model.logit_scale.exp() * out.image_embeds @ (mean / mean.norm())
            torch.testing.assert_close(logits[:, c], expected, atol=1e-4, rtol=1e-5)


def test_gives_no_loss_without_labels(tiny_clip, processor, colour_task, batch):
    classifier = PromptClassifier(tiny_clip(), colour_task, processor)
    assert set(classifier(pixel_values=batch["pixel_values"])) == {"logits"}


def test_prompts_are_held_once_and_not_saved(tiny_clip, processor, colour_task):
    classifier = PromptClassifier(tiny_clip(), colour_task, processor)
    assert dict(classifier.named_buffers())["prompt_input_ids"].shape[0] == 4
    assert all(name.startswith("dual_encoder.") for name in classifier.state_dict())


def test_bfloat16_weights_give_float32_logits_and_a_gradient(
    tiny_clip, processor, colour_task, batch
):
    exact = PromptClassifier(tiny_clip(), colour_task, processor)(**batch)["logits"]
    classifier = PromptClassifier(tiny_clip().bfloat16(), colour_task, processor)
    out = classifier(**batch)
    assert out["logits"].dtype == torch.float32
    torch.testing.assert_close(out["logits"], exact, atol=0.3, rtol=0)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())


def test_captions_are_no_classes(tiny_clip, processor, colours):
    task = Task("captions", [(colours[i]["image"], f"no {i}") for i in range(4)])
    with pytest.raises(ValueError, match="'captions' must have classes, got captions"):
        PromptClassifier(tiny_clip(), task, processor)


# Under the plain Trainer


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_trains_under_the_plain_trainer(make_trainer, arguments):
    trainer = make_trainer(max_steps=25, learning_rate=3e-3, **arguments)
    trainer.train()
    assert np.mean(losses(trainer)[-5:]) < 0.6 * np.mean(losses(trainer)[:5])


def test_bfloat16_weights_train(make_trainer, tiny_clip):
    model = tiny_clip().bfloat16()
    trainer = make_trainer(model=model, max_steps=15, learning_rate=3e-3)
    trainer.train()
    assert np.mean(losses(trainer)[-3:]) < np.mean(losses(trainer)[:3])
    assert model.visual_projection.weight.dtype == torch.bfloat16


def test_siglip_trains_with_its_bias(tmp_path, colours, colour_task):
    model, processor = make_siglip()
    before = weights(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=25, learning_rate=3e-3, logging_steps=1,
        save_strategy="no", report_to="none", remove_unused_columns=False, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    classifier = PromptClassifier(model, colour_task, processor)
    collator = ImageCollator(processor)
    trainer = Trainer(classifier, arguments, data_collator=collator, train_dataset=colours)
    trainer.train()
    assert np.mean(losses(trainer)[-5:]) < 0.8 * np.mean(losses(trainer)[:5])
    unmoved = [k for k, v in weights(model).items() if torch.equal(v, before[k])]
    # A bias shared by all classes cancels in the softmax; attention is blind to the keys' bias.
    assert [k for k in unmoved if not k.endswith(("k_proj.bias", "position_ids"))] in (
        [],
        ["logit_bias"],
    )


def test_accumulation_of_2_by_4_equals_a_batch_of_8(make_trainer):
    ends = []
    for size, accumulation in ((8, 1), (4, 2)):
        trainer = make_trainer(
            max_steps=5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        ends.append((weights(trainer.model), losses(trainer)))
    for name, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][name], atol=1e-5, rtol=1e-4)
    assert ends[0][1] == pytest.approx(ends[1][1], abs=2e-4)  # logged with four digits


@pytest.mark.parametrize("method", ["full", "lora", "bitfit", "attention"])
def test_checkpointed_activations_change_no_loss(make_trainer, tiny_clip, method):
    # The argument has another name in transformers 4.
    new = hasattr(TrainingArguments, "activation_checkpointing")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    ends = []
    for arguments in ({}, {name: True}):
        torch.manual_seed(0)
        model = prepare(tiny_clip(), method)
        trainer = make_trainer(model=model, max_steps=4, **arguments)
        trainer.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == bool(
            arguments
        )
        ends.append(losses(trainer))
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)
    assert ends[0][0] != ends[0][-1]


def test_evaluation_gives_a_loss_and_predictions_of_n_by_c(make_trainer, colours):
    trainer = make_trainer(per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    classifier = trainer.model.eval()
    batch = trainer.data_collator([colours[i] for i in range(16)])
    with torch.no_grad():
        out = classifier(**batch)
    assert metrics["eval_loss"] == pytest.approx(out["loss"].item(), abs=1e-4)
    predictions = trainer.predict(colours.select(range(16)))
    assert predictions.predictions.shape == (16, 4)
    np.testing.assert_allclose(predictions.predictions, out["logits"].numpy(), atol=1e-4)
    np.testing.assert_array_equal(predictions.label_ids, colours[:16]["label"])


def test_a_resumed_run_ends_at_the_same_weights(make_trainer, tmp_path):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(output_dir=str(tmp_path / "a"), **arguments)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "b"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    one, other = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_dual_encoder_saves_and_reloads_by_itself(
    make_trainer, tiny_clip, batch, tmp_path, method
):
    model = tiny_clip()
    if method == "lora":
        model = get_peft_model(model, LoraConfig(**LORA))
    trainer = make_trainer(model=model, max_steps=3)
    trainer.train()
    trainer.model.dual_encoder.save_pretrained(tmp_path / "tuned")
    if method == "lora":
        again = PeftModel.from_pretrained(tiny_clip(), tmp_path / "tuned")
    else:
        again = type(model).from_pretrained(tmp_path / "tuned")
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch)["logits"]
        trainer.model.dual_encoder = again.eval()
        torch.testing.assert_close(trainer.model(**batch)["logits"], expected, atol=0, rtol=0)


@pytest.mark.whole
def test_compiled_training_ends_near_the_plain_one(make_trainer):
    ends = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make_trainer(max_steps=3, **arguments)
        trainer.train()
        ends.append(losses(trainer))
    torch._dynamo.reset()
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)


# The collator


def test_a_batch_is_what_the_processor_makes_of_the_images(processor, colours, batch):
    rows = [colours[i] for i in range(6)]
    pixels = processor.image_processor(images=[r["image"] for r in rows], return_tensors="pt")
    assert set(batch) == {"pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"], pixels["pixel_values"])
    assert batch["labels"].tolist() == [r["label"] for r in rows]
    assert batch["labels"].dtype == torch.int64


def test_columns_of_other_names_are_taken_when_named(processor, colours, batch):
    renamed = colours.rename_columns({"image": "picture", "label": "colour"})
    collate = ImageCollator(processor, image_column="picture", label_column="colour")
    again = collate([renamed[i] for i in range(6)])
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_missing_column_is_named_with_what_there_is_and_what_to_do(processor, colours, missing):
    rows = [{k: v for k, v in colours[0].items() if k != missing}]
    left = "label" if missing == "image" else "image"
    with pytest.raises(ValueError, match=rf"needs column '{missing}', got \['{left}'\]") as error:
        ImageCollator(processor)(rows)
    assert "remove_unused_columns=False" in str(error.value)


def test_the_trainer_dropping_columns_is_explained(make_trainer):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_trainer(remove_unused_columns=True).train()


def test_an_image_processor_alone_will_do_and_a_tokenizer_will_not(processor, colours, batch):
    alone = ImageCollator(processor.image_processor)([colours[i] for i in range(4)])
    whole = ImageCollator(processor)([colours[i] for i in range(4)])
    assert torch.equal(alone["pixel_values"], whole["pixel_values"])
    for wrong in (processor.tokenizer, None):
        with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
            ImageCollator(wrong)([colours[0]])


def test_pickled_or_copied_it_gives_the_same_logits(tiny_clip, processor, colour_task, batch):
    classifier = PromptClassifier(tiny_clip(), colour_task, processor).eval()
    expected = classifier(pixel_values=batch["pixel_values"])["logits"]
    for other in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        assert torch.equal(other(pixel_values=batch["pixel_values"])["logits"], expected)


def test_logits_are_not_rounded_by_autocast(tiny_clip, processor, colour_task, batch):
    classifier = PromptClassifier(tiny_clip(), colour_task, processor).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = classifier(pixel_values=batch["pixel_values"])["logits"]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_many_prompts_are_embedded_in_batches_to_the_same_vectors(
    tiny_clip, processor, colour_task, batch, monkeypatch
):
    whole = PromptClassifier(tiny_clip(), colour_task, processor).eval()
    expected = whole(pixel_values=batch["pixel_values"])["logits"]
    monkeypatch.setattr(classifier_module, "TEXT_BATCH", 3)
    parts = whole(pixel_values=batch["pixel_values"])["logits"]
    torch.testing.assert_close(parts, expected, atol=1e-5, rtol=0)


def test_the_guard_reads_the_model_as_the_classifier_does(tiny_clip, processor, colour_task):
    classifier = PromptClassifier(tiny_clip(), colour_task, processor)
    for given in (None, processor.tokenizer, processor.image_processor):
        assert find_encoder(classifier, given) is classifier.encoder
    assert find_encoder(classifier, processor) is not classifier.encoder
