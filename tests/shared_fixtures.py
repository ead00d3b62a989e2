"""Small seeded models built from configs, and pictures drawn on the spot: no network, no files."""

import gc
import json
import os

import torchvision_ops  # isort: skip  # noqa: F401
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Trainer,
    TrainingArguments,
)

from iimm_callbacks import ImageCollator, PromptClassifier, Task

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """Each `Trainer.train` collects garbage: a quarter of a second, where it walks all imports."""
    gc.freeze()


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128,) * 3}
SHAPES = ("circle", "square", "cross")


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Guarded runs are saved in the user's cache folder otherwise."""
    path = tmp_path / "store" / "outcomes.jsonl"
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(path))
    monkeypatch.setattr("iimm_callbacks.records.store._told_waiting", set())
    return path


@pytest.fixture(autouse=True)
def no_setting_outlives_its_test():
    """`TrainingArguments(bf16=True)` and `(torch_compile=True)` set it for the whole process."""
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    """A byte-level CLIP tokenizer and a 16 px image processor."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=32)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


@pytest.fixture
def tiny_clip(processor):
    """() -> a freshly built CLIPModel, the same weights every time."""

    def build(dropout=0.0):
        torch.manual_seed(0)
        width = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_dropout": dropout,
        }
        end = processor.tokenizer.eos_token_id
        text = width | {
            "vocab_size": len(processor.tokenizer),
            "max_position_embeddings": 32,
            "eos_token_id": end,
            "bos_token_id": end - 1,
            "pad_token_id": end,
        }
        vision = width | {"image_size": 16, "patch_size": 8}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))

    return build


def draw(colour, shape, rng):
    """A 16 px picture of a shape in a colour, moved and noised."""
    pixels = np.full((16, 16, 3), 255.0)
    dx, dy = rng.integers(-2, 3, 2)
    y, x = np.mgrid[:16, :16]
    x, y = x - 8 - dx, y - 8 - dy
    inside = {
        "circle": x**2 + y**2 < 25,
        "square": (abs(x) < 5) & (abs(y) < 5),
        "cross": (abs(x) < 2) | (abs(y) < 2),
    }[shape]
    pixels[inside] = colour
    pixels += rng.normal(0, 12, pixels.shape)
    return PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_dataset(kind, n, seed):
    """n pictures labelled by colour or by shape, as a `datasets.Dataset`."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS if kind == "colour" else SHAPES)
    images, labels = [], []
    for _ in range(n):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        images.append(draw(COLOURS[colour], shape, rng))
        labels.append(names.index(colour if kind == "colour" else shape))
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="session")
def colours():
    return make_dataset("colour", 96, seed=1)


@pytest.fixture(scope="session")
def shapes():
    return make_dataset("shape", 60, seed=2)


@pytest.fixture
def colour_task(colours):
    return Task("colours", colours, templates="a {} thing", probe_size=32)


@pytest.fixture
def shape_task(shapes):
    return Task("shapes", shapes, templates="a {}", probe_size=24)


@pytest.fixture
def make_trainer(tmp_path, tiny_clip, processor, colours, colour_task):
    """(callbacks, model=None, **arguments) -> a real Trainer that learns the colour task."""

    def build(callbacks=(), model=None, **arguments):
        arguments = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 10,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
        } | arguments
        classifier = PromptClassifier(model or tiny_clip(), colour_task, processor)
        return Trainer(
            model=classifier,
            args=TrainingArguments(**arguments),
            train_dataset=colours,
            eval_dataset=colours.select(range(16)),
            data_collator=ImageCollator(processor),
            processing_class=processor,
            callbacks=list(callbacks),
        )

    return build
