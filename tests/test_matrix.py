"""Every model family under every fine-tuning method: real guarded Trainer runs of tiny models.

What each cell came to is in `matrix.json`, and in the table of models/README.md. A cell that comes
to something else fails; `pytest tests/test_matrix.py --whole --record-matrix` records again.
"""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import load_file
from shared_fixtures import SHAPES, make_dataset
from transformers import Trainer, TrainingArguments

from iimm_callbacks import IIMMCallback, ImageCollator, Outcome, PromptClassifier, Task
from iimm_callbacks.models.encoders import find_encoder, move
from iimm_callbacks.models.families import family_of
from iimm_callbacks.models.tuning import detect, prepare, trainable_share
from iimm_callbacks.models.wrappers import find_dual_encoder, model_fingerprint
from iimm_callbacks.records import keys

FAMILIES = dict(tiny.FAMILIES)
with contextlib.suppress(ModuleNotFoundError):  # an environment of its own: see .ci/README.md
    import tiny_open_clip

    FAMILIES |= tiny_open_clip.FAMILIES

RECORD = Path(__file__).with_name("matrix.json")
START, END = "<!-- made by tests/test_matrix.py -->", "<!-- end -->"
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
WIDTH |= {"num_attention_heads": 2}
VISION = WIDTH | {"image_size": 16, "patch_size": 8}


def blip2():
    opt = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32}
    opt |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config=WIDTH | {"encoder_hidden_size": 32},
        text_config=opt,
        num_query_tokens=2,
    )
    return hf.Blip2Model(config)


def captioner():
    text = WIDTH | {"vocab_size": 50, "encoder_hidden_size": 32}
    config = hf.BlipConfig(text_config=text, vision_config=VISION)
    return hf.BlipForConditionalGeneration(config)


REFUSED = {
    "BLIP-2": blip2,
    "a captioner (BLIP)": captioner,
    "an image encoder (ViT)": lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
    "a text encoder (BERT)": lambda: hf.BertModel(hf.BertConfig(**WIDTH, vocab_size=50)),
}
OPEN_CLIP = ("CLIP", "SigLIP", "CoCa", "EVA-02-CLIP")
ORDER = [*tiny.ALL, *(f"open_clip {name}" for name in OPEN_CLIP), *REFUSED]

# What each method may change, by parameter name; "full" may change everything.
MAY_CHANGE = {
    "full": r"",
    "bitfit": r"\.\d+\..*bias$",
    "attention": r"\.\d+\..*att.*(q_proj|k_proj|v_proj|query|key|value|qkv|in_proj)[._]weight$",
    "lora": r"\.lora_[AB]\.",
    "clip_adapter": r"^dual_encoder\.(up|down)\.weight$",
    "linear_probe": r"^dual_encoder\.classifier\.(weight|bias)$",
}
QUICK = ("full", "lora")  # what is tried without --whole
HEADS = ("clip_adapter", "linear_probe")
LEARNING_RATE = dict.fromkeys(MAY_CHANGE, 1e-2) | {"full": 1e-3, "linear_probe": 1e-3}
SOUNDS = ("tone", "noise", "click", "square")
RATE = 8000


def make_sound(kind, rng):
    """Half a second at 8 kHz."""
    t = np.arange(RATE // 2) / RATE
    pitch = rng.uniform(300, 1200)
    sound = {
        "tone": np.sin(2 * np.pi * pitch * t),
        "square": np.sign(np.sin(2 * np.pi * pitch * t)),
        "noise": rng.normal(size=t.size),
        "click": (rng.uniform(size=t.size) < 0.005) * 3.0,
    }[kind]
    return (sound + 0.01 * rng.normal(size=t.size)).astype(np.float32)


def make_sounds(names, n, seed):
    rng = np.random.default_rng(seed)
    labels = [i % len(names) for i in range(n)]
    return [({"array": make_sound(names[y], rng), "sampling_rate": RATE}, y) for y in labels]


def as_videos(pictures):
    """Pairs: two pictures of a row are a video's frames."""
    return [([row["image"], row["image"].rotate(10)], row["label"]) for row in pictures]


class Data(NamedTuple):
    rows: Any  # to train on
    task: Task
    other: Task  # off-target


@pytest.fixture(scope="module")
def data():
    """What a family reads -> its `Data`."""
    colours, shapes = make_dataset("colour", 32, seed=1), make_dataset("shape", 18, seed=2)
    names = colours.features["label"].names
    words, things = {"templates": "a {} thing"}, {"templates": "a {}", "class_names": SHAPES}
    sounds, others = make_sounds(SOUNDS, 32, 1), make_sounds(SOUNDS[:3], 18, 2)
    videos = as_videos(colours)
    return {
        "image": Data(colours, Task("task", colours, **words), Task("other", shapes, **things)),
        "video": Data(
            videos,
            Task("task", videos, class_names=names, **words),
            Task("other", as_videos(shapes), **things),
        ),
        "sound": Data(
            sounds,
            Task("task", sounds, class_names=SOUNDS, templates="the sound of a {}"),
            Task("other", others, class_names=SOUNDS[:3], templates="a {}"),
        ),
    }


@pytest.fixture
def record(pytestconfig):
    """(family, method, outcome): that is what `matrix.json` says, or will say."""

    def check(family, method, outcome):
        recorded = json.loads(RECORD.read_text())
        if pytestconfig.getoption("record_matrix"):
            recorded.setdefault(family, {})[method] = outcome
            RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        assert recorded[family][method] == outcome

    return check


def prepare_cell(family, method, data):
    """(classifier, processor, task)."""
    model, processor = FAMILIES[family]()
    task = data[family_of(model).reads].task
    options = {
        "lora": {"rank": 4},
        "clip_adapter": {"processor": processor, "residual_ratio": 0.5},
        "linear_probe": {"processor": processor, "task": task},
    }
    prepared = prepare(model, method, **options.get(method, {}))
    return PromptClassifier(prepared, task, processor), processor, task


def records(classifier, method):
    """Three runs of the model under the method, so that there is a forecast."""
    common = {"model": "tiny", "task_fingerprint": "", "method": method, "complete": True}
    return [
        Outcome(
            **common,
            model_fingerprint=model_fingerprint(classifier),
            task=f"past {i}",
            iimm=0.1 * i,
            inter=0.0,
            intra=0.2 * i,
            standard_error=0.01,
            n_images=100,
            n_classes=4,
            zero_shot_accuracy=0.3,
            final_accuracy=0.5 + 0.1 * i,
            off_target_before={"other": 0.4},
            off_target_after={"other": 0.3 - 0.01 * i},
            trajectory=[],
            ended="finished",
            recipe={},
        )
        for i in range(3)
    ]


def loss_of(classifier, rows, collator):
    with torch.no_grad():
        return classifier.eval()(**move(collator(list(rows)), classifier))["loss"].item()


def embed(classifier, cell):
    """Image and text embeddings of a few items."""
    _, processor, task = cell
    encoder = find_encoder(classifier, processor)
    images = encoder.preprocess(task.images(range(4)))
    with torch.no_grad():
        return (
            encoder.embed_images(classifier.eval(), images),
            encoder.embed_texts(classifier, encoder.tokenize(task.prompts(range(4)))),
        )


def cells():
    """All pairs; heads on the embeddings of a family's model are tried on one version of it."""
    for family in FAMILIES:
        for method in MAY_CHANGE:
            marks = [] if method in QUICK else [pytest.mark.whole]
            if method in HEADS and family in tiny.FAMILIES:
                marks.append(pytest.mark.once)
            yield pytest.param(family, method, marks=marks, id=f"{family}-{method}")


@pytest.mark.parametrize(("family", "method"), list(cells()))
def test_cell(family, method, data, tmp_path, record):
    try:
        cell = prepare_cell(family, method, data)
    except ValueError as error:
        record(family, method, str(error))
    else:
        check_cell(cell, family, method, data, tmp_path)
        record(family, method, "trains")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_joint_space_is_refused_by_name_with_the_reason(name, record):
    model = REFUSED[name]()
    with pytest.raises(ValueError, match=f"got {type(model).__name__}: ") as error:
        find_dual_encoder(model)
    for method in MAY_CHANGE:
        with pytest.raises(ValueError, match=re.escape(str(error.value))):
            prepare(model, method)
        record(name, method, re.search(r"got (.*?);", str(error.value))[1])


def test_the_readme_shows_what_these_tests_saw(pytestconfig):
    readme = Path(__file__).parents[1] / "iimm_callbacks" / "models" / "README.md"
    text, table = readme.read_text(), render(json.loads(RECORD.read_text()))
    if pytestconfig.getoption("record_matrix"):
        shown = re.escape(START) + ".*" + re.escape(END)
        text = re.sub(shown, lambda _: f"{START}\n{table}\n{END}", text, flags=re.S)
        readme.write_text(text)
    assert f"{START}\n{table}\n{END}" in text


def render(recorded):
    """The table of models/README.md: a tick where it trains, else the reason below the table."""
    notes = []

    def cell(outcome):
        if outcome == "trains":
            return "✓"
        if outcome not in notes:
            notes.append(outcome)
        return f"no ({notes.index(outcome) + 1})"

    rows = [["", *MAY_CHANGE], ["---"] * (len(MAY_CHANGE) + 1)]
    for family in sorted(recorded, key=[*ORDER].index):
        rows.append([family, *(cell(recorded[family][method]) for method in MAY_CHANGE)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"({i}) {note}.  " for i, note in enumerate(notes, 1))])


def check_cell(cell, family, method, data, tmp_path):
    classifier, processor, task = cell
    rows, _, other = data[family_of(find_dual_encoder(classifier)).reads]
    collator = ImageCollator(processor)
    assert detect(classifier) == method
    assert 0 < trainable_share(classifier) <= 1
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    start = loss_of(classifier, rows, collator)
    guard = IIMMCallback(
        task=task,
        off_target=[other],
        processor=processor,
        outcomes=records(classifier, method),
        max_forgetting=0.9,
        every=3,
        max_overhead=None,
        verbose=False,
    )
    trainer = Trainer(
        model=classifier,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=16,
            learning_rate=LEARNING_RATE[method],
            save_steps=6,
            logging_steps=3,
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[guard],
    )
    trainer.train()

    # It trains what it should, and only that.
    after = classifier.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(re.search(MAY_CHANGE[method], name) for name in changed), changed
    assert loss_of(classifier, rows, collator) < start

    # The guard logs every key, under the right method.
    everywhere = {keys.PREFIX, keys.INTER, keys.INTRA, keys.STANDARD_ERROR, keys.ACCURACY}
    everywhere |= {keys.RUNTIME, keys.WORST, keys.EXCEED, keys.accuracy_key("other")}
    for name in ("gain", "forgetting"):
        forecast = keys.forecast_key(name)
        everywhere |= {keys.observed_key(name), forecast, f"{forecast}_low", f"{forecast}_high"}
    looks = [row for row in trainer.state.log_history if keys.PREFIX in row]
    assert len(looks) > 2
    assert all(everywhere <= row.keys() for row in looks[:-1])
    assert looks[0][keys.observed_key("gain")] == 0
    assert guard.outcome.method == method
    assert guard.monitor.failures == 0

    # The checkpoint reloads to the same embeddings.
    fresh, _, _ = prepare_cell(family, method, data)
    fresh.load_state_dict(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    for mine, reloaded in zip(embed(classifier, cell), embed(fresh, cell), strict=True):
        assert torch.equal(mine, reloaded)
    assert loss_of(fresh, rows, collator) == loss_of(classifier, rows, collator)
