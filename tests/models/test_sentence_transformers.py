"""A CLIP model of sentence-transformers, through its own Trainer, with nothing but the callback."""

import pytest
import torch
from datasets import Dataset, Features, Image, Value

pytest.importorskip("sentence_transformers")

from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from iimm_callbacks import IIMMCallback
from iimm_callbacks.models.encoders import find_encoder
from iimm_callbacks.models.tuning import detect
from iimm_callbacks.models.untouched import zero_shot_twin


@pytest.fixture
def sentence_model(tiny_clip, processor, tmp_path):
    def build():
        tiny_clip().save_pretrained(tmp_path / "clip")
        processor.save_pretrained(tmp_path / "clip")
        return SentenceTransformer(str(tmp_path / "clip"), device="cpu")

    return build


def train(model, colours, tmp_path, callbacks):
    names = colours.features["label"].names
    pairs = Dataset.from_dict(
        {
            "image": [row["image"] for row in colours],
            "text": [f"a {names[row['label']]} thing" for row in colours],
        },
        features=Features({"image": Image(), "text": Value("string")}),
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_guard_rides_along(sentence_model, colours, colour_task, shape_task, tmp_path, method):
    guard = IIMMCallback(
        colour_task, [shape_task], every=4, max_overhead=None, strict=True, verbose=False
    )
    ended = []
    for callbacks in ([guard], []):
        torch.manual_seed(0)
        model = sentence_model()
        if method == "lora":
            model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        assert detect(model) == method
        trainer = train(model, colours, tmp_path, callbacks)
        ended.append({n: p.detach().clone() for n, p in model.named_parameters()})
        if callbacks:
            looks = [row for row in trainer.state.log_history if "eval_iimm" in row]
            assert [row["step"] for row in looks] == [0, 4, 8]
            assert looks[0]["eval_iimm"] != looks[-1]["eval_iimm"]
            assert guard.outcome.method == method
            guarded = model
    assert all(torch.equal(ended[0][n], ended[1][n]) for n in ended[0])
    if method == "lora":
        with zero_shot_twin(guarded):
            base = guard.monitor.probe.look(guarded, 8)
        assert base.measurement.iimm == looks[0]["eval_iimm"]


def test_embeddings_are_those_of_its_own_encode(sentence_model, colour_task, processor):
    model = sentence_model()
    encoder = find_encoder(model, processor)
    pictures, prompts = colour_task.images(range(3)), colour_task.prompts([])
    with torch.no_grad():
        images = encoder.embed_images(model.eval(), encoder.preprocess(pictures))
        texts = encoder.embed_texts(model, encoder.tokenize(prompts))
    for ours, items in ((images, pictures), (texts, prompts)):
        theirs = model.encode(items, convert_to_tensor=True)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
