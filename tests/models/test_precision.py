"""Measured in the precision the model trains in, whichever that is, and accumulated in float64."""

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig, CLIPModel

from iimm_callbacks import IIMMCallback
from iimm_callbacks.measures.embeddings import zero_shot_correct
from iimm_callbacks.models.encoders import class_embeddings, find_encoder, move
from iimm_callbacks.models.tuning import detect, prepare
from iimm_callbacks.models.untouched import zero_shot_twin
from iimm_callbacks.probing import scoring as probe_module
from iimm_callbacks.probing.probe import Probe

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture
def make_guard(colour_task, shape_task):
    def build():
        return IIMMCallback(
            colour_task, [shape_task], every=2, max_overhead=None, strict=True, verbose=False
        )

    return build


def trained(make_trainer, model, callbacks=(), **arguments):
    trainer = make_trainer(callbacks, model=model, max_steps=6, **arguments)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return losses, weights


def by_hand(model, task, processor):
    """IIMM in float64 of embeddings in the model's own precision."""
    encoder, positions = find_encoder(model, processor), task.subset()
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        inputs = move(encoder.preprocess(task.images(positions)), model)
        images = encoder.embed_images(model, inputs)
        texts = encoder.embed_texts(model, move(encoder.tokenize(task.prompts(positions)), model))
    labels = task.labels(positions)
    unit = torch.nn.functional.normalize(images.double(), dim=1)
    texts = torch.nn.functional.normalize(class_embeddings(texts, 1).double(), dim=1)
    n, (wrong, right) = len(unit), (unit @ texts.T, unit @ unit.T)
    inter = [wrong[i, c] for i in range(n) for c in range(len(texts)) if c != labels[i]]
    intra = [right[i, j] for i in range(n) for j in range(n) if i != j]
    return float((torch.stack(inter).mean() + torch.stack(intra).mean()) / 2), images.dtype


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_the_measure_is_the_float64_mean_over_embeddings_of_the_models_own_precision(
    tiny_clip, colour_task, processor, dtype
):
    model = tiny_clip().to(dtype)
    look = Probe(colour_task, processor=processor, progress=False, batch_size=96).look(model, 0)
    expected, used = by_hand(model, colour_task, processor)
    assert used == dtype
    assert look.measurement.iimm == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_stays_near_full(tiny_clip, colour_task, processor, dtype):
    full, low = (
        Probe(colour_task, processor=processor, progress=False).look(tiny_clip().to(d), 0)
        for d in (torch.float32, dtype)
    )
    assert low.measurement.iimm == pytest.approx(full.measurement.iimm, abs=5e-3)
    assert low.measurement.iimm != full.measurement.iimm


def test_autocast_is_measured_in_autocast(tiny_clip, colour_task, processor):
    probe = Probe(colour_task, processor=processor, progress=False)
    model = tiny_clip()
    full, mixed = probe.look(model, 0), probe.look(model, 0, torch.bfloat16)
    again = probe.look(model, 0)
    assert mixed.measurement.iimm != full.measurement.iimm
    assert mixed.measurement.iimm == pytest.approx(full.measurement.iimm, abs=5e-3)
    assert again.measurement == full.measurement


@pytest.mark.parametrize("method", ["full", "lora", "clip_adapter"])
@pytest.mark.parametrize("how", ["bfloat16 weights", "float16 weights", "bf16=True"])
def test_a_guarded_run_trains_as_an_unguarded_one_in_every_precision(
    make_trainer, make_guard, tiny_clip, processor, how, method
):
    def run(callbacks):
        model = tiny_clip()
        if "weights" in how:
            model = model.to(getattr(torch, how.split()[0]))
        options = {"processor": processor} if method == "clip_adapter" else {}
        return trained(
            make_trainer, prepare(model, method, **options), callbacks, bf16=how == "bf16=True"
        )

    guard = make_guard()
    (losses, weights), (plain_losses, plain_weights) = run([guard]), run([])
    assert losses == plain_losses
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(torch.equal(weights[n], plain_weights[n]) for n in weights)
    assert [row["step"] for row in guard.monitor.history] == [0, 2, 4, 6]


@pytest.mark.parametrize("bits", [8, 4])
def test_lora_on_a_quantised_base_is_measured_and_trains_on(
    make_trainer, make_guard, tiny_clip, tmp_path, bits
):
    pytest.importorskip("bitsandbytes")
    tiny_clip().save_pretrained(tmp_path / "clip")
    options = {f"load_in_{bits}bit": True}
    if bits == 4:  # the joint space of the tiny model is narrower than a block
        options["llm_int8_skip_modules"] = ["visual_projection", "text_projection"]

    def run(callbacks):
        quantised = CLIPModel.from_pretrained(
            tmp_path / "clip", quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
        )
        torch.manual_seed(0)
        model = prepare(quantised, "lora")
        assert detect(model) == "lora"
        return model, trained(make_trainer, model, callbacks)

    guard = make_guard()
    (model, (losses, weights)), (_, (plain_losses, plain_weights)) = run([guard]), run([])
    assert losses == plain_losses
    assert losses[-1] < losses[0]
    assert all(torch.equal(weights[n], plain_weights[n]) for n in weights)
    assert [row["step"] for row in guard.monitor.history] == [0, 2, 4, 6]
    with zero_shot_twin(model):
        base = guard.monitor.probe.look(model, 6)
    assert base.measurement.iimm == guard.monitor.history[0]["eval_iimm"]


def test_classes_are_not_compared_in_autocast(tiny_clip, colour_task, processor, monkeypatch):
    # There cosines are rounded to three digits, and classes tie.
    seen = []

    def watched(images, texts, labels):
        seen.append(torch.is_autocast_enabled("cpu"))
        return zero_shot_correct(images, texts, labels)

    monkeypatch.setattr(probe_module, "zero_shot_correct", watched)
    Probe(colour_task, processor=processor, progress=False).look(tiny_clip(), 0, torch.bfloat16)
    assert seen == [False]
