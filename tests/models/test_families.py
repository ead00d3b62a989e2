"""The table of families: every one is read as its own forward reads it, and strangers are refused.

What a family's own forward computes is written out here by hand, from its processor's outputs on.
"""

import contextlib
import io
import pathlib

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from PIL import Image
from shared_fixtures import make_dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from iimm_callbacks import (
    Family,
    IIMMCallback,
    ImageCollator,
    PromptClassifier,
    Task,
    register_encoder,
)
from iimm_callbacks.data.images import as_image
from iimm_callbacks.models import families as families_module
from iimm_callbacks.models.encoders import find_encoder, move
from iimm_callbacks.models.families import family_of
from iimm_callbacks.models.tuning import detect, prepare
from iimm_callbacks.models.wrappers import find_dual_encoder
from iimm_callbacks.probing.probe import Probe

OPEN_CLIP = {}
with contextlib.suppress(ModuleNotFoundError):  # an environment of its own: see .ci/README.md
    import tiny_open_clip

    OPEN_CLIP = tiny_open_clip.FAMILIES
needs_open_clip = pytest.mark.skipif(not OPEN_CLIP, reason="without open_clip")

TEXTS = ["a photo of a red circle", "blue square", "the noise of a click"]
RATE = 8000
# Tokens of a padded text; the others are padded to the longest.
FULL_LENGTH = {"SigLIP": 12, "SigLIP 2": 12, "SigLIP 2 naflex": 12, "AIMv2": 12, "TIPSv2": 64}
# Values that show whatever is left out, or mistaken for another.
SCALARS = {
    "logit_scale": 1.7,
    "logit_bias": -3.0,
    "logit_scale_a": 1.1,
    "logit_scale_t": 2.2,
    "temperature": 0.3,
}


def make_inputs(reads):
    """Three of what a model reads, made without the package."""
    rng = np.random.default_rng(0)
    if reads == "sound":
        sounds = [rng.normal(0, 0.1, RATE).astype(np.float32) for _ in TEXTS]
        return [{"array": sound, "sampling_rate": RATE} for sound in sounds]

    def picture():
        return Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))

    if reads == "video":
        return [[picture(), picture()] for _ in TEXTS]
    return [picture() for _ in TEXTS]


def own_inputs(name, processor, inputs):
    """What goes into the family's own forward: (inputs of one tower, of the other)."""
    length = FULL_LENGTH.get(name)
    padding = {"padding": "max_length", "max_length": length} if length else {"padding": True}
    texts = dict(processor.tokenizer(TEXTS, return_tensors="pt", **padding))
    if name.startswith("BLIP"):  # has no token types
        texts.pop("token_type_ids", None)
    if name == "CLAP":
        arrays = [sound["array"] for sound in inputs]
        extract = processor.feature_extractor
        return dict(extract(arrays, sampling_rate=RATE, return_tensors="pt")), texts
    return dict(processor.image_processor(inputs, return_tensors="pt")), texts


def own_embeds(name, model, images, texts):
    """Both embeddings as the family's forward computes them."""
    if name == "BLIP retrieval":  # gives cosines only: see `own_logits`
        vision = model.vision_model(**images).last_hidden_state
        text = model.text_encoder(**texts).last_hidden_state
        return model.vision_proj(vision[:, 0]), model.text_proj(text[:, 0])
    out = model(**images, **texts)
    if name == "FLAVA":  # as FlavaForPreTraining does before its contrastive head
        return (
            model.image_projection(out.image_embeddings[:, 0]),
            model.text_projection(out.text_embeddings[:, 0]),
        )
    if name == "CLAP":
        return out.audio_embeds, out.text_embeds
    if name == "X-CLIP":
        # Its forward makes another text embedding for each video, out of that video. A space that
        # images and texts share has the texts before that.
        return out.video_embeds, model.text_projection(model.text_model(**texts)[1])
    return out.image_embeds, out.text_embeds


def own_logits(name, model, images, texts):
    """[images, texts] as the family's forward computes them."""
    if name == "BLIP retrieval":  # without a scale; ours is that of BLIP's training
        return model(**images, **texts, use_itm_head=False)[0] / 0.07
    if name == "FLAVA":
        head = hf.models.flava.modeling_flava.FlavaGlobalContrastiveHead(model.config)
        return head(*map(unit, own_embeds(name, model, images, texts)), model.logit_scale)[0]
    if name == "X-CLIP":  # its own are of texts made out of the videos
        videos, words = map(unit, own_embeds(name, model, images, texts))
        return np.exp(SCALARS["logit_scale"]) * videos @ words.T
    out = model(**images, **texts)
    return out.logits_per_audio if name == "CLAP" else out.logits_per_image


def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True)


def build(name):
    """(model, processor), with `SCALARS` in the model."""
    model, processor = {**tiny.FAMILIES, **OPEN_CLIP}[name]()
    with torch.no_grad():
        for scalar, value in SCALARS.items():
            if isinstance(getattr(model, scalar, None), nn.Parameter):
                getattr(model, scalar).fill_(value)
    return model.eval(), processor


def embed(model, processor, inputs, texts=TEXTS):
    encoder = find_encoder(model, processor)
    with torch.no_grad():
        images = encoder.embed_images(model, move(encoder.preprocess(inputs), model))
        return unit(images), unit(
            encoder.embed_texts(model, move(encoder.tokenize(list(texts)), model))
        )


def classify(model, processor, inputs):
    """Logits of three inputs on the texts, through a `PromptClassifier`."""
    rows = [(item, i) for i, item in enumerate(inputs)]
    task = Task("texts", rows, templates="{}", class_names=TEXTS)
    batch = ImageCollator(processor)(rows)
    with torch.no_grad():
        return PromptClassifier(model, task, processor).eval()(**batch)["logits"]


def check_embeds(ours, own):
    for one, other in zip(ours, own, strict=True):
        torch.testing.assert_close(one, unit(other), atol=1e-5, rtol=0)
        assert (one[0] - one[1]).abs().max() > 1e-3  # so that this can fail


# What the models of transformers compute


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_embeddings_are_those_of_the_familys_own_forward(name):
    model, processor = build(name)
    inputs = make_inputs(family_of(model).reads)
    with torch.no_grad():
        own = own_embeds(name, model, *own_inputs(name, processor, inputs))
    check_embeds(embed(model, processor, inputs), own)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_logits_are_those_of_the_familys_own_forward(name):
    model, processor = build(name)
    inputs = make_inputs(family_of(model).reads)
    with torch.no_grad():
        own = own_logits(name, model, *own_inputs(name, processor, inputs))
    torch.testing.assert_close(classify(model, processor, inputs), own, atol=1e-4, rtol=0)


def test_blip_retrieval_compares_the_embeddings_its_own_score_compares():
    model, processor = build("BLIP retrieval")
    inputs = make_inputs("image")
    images, texts = own_inputs("BLIP retrieval", processor, inputs)
    ours = embed(model, processor, inputs)
    with torch.no_grad():
        own = model(**images, **texts, use_itm_head=False).itm_score
    torch.testing.assert_close(ours[0] @ ours[1].T, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [-1.0, 9.0])  # below exp(0) = 1 and above 100, its limits
def test_aimv2_scales_its_logits_within_its_limits(scale):
    model, processor = build("AIMv2")
    with torch.no_grad():
        model.logit_scale.fill_(scale)
        inputs = make_inputs("image")
        own = own_logits("AIMv2", model, *own_inputs("AIMv2", processor, inputs))
        images, texts = embed(model, processor, inputs)
    logits = classify(model, processor, inputs)
    torch.testing.assert_close(logits, own, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, {-1.0: 1, 9.0: 100}[scale] * images @ texts.T)


def test_x_clips_own_text_embeddings_are_made_for_each_video():
    # Why the tests above take the texts from before that.
    model, processor = build("X-CLIP") if "X-CLIP" in tiny.FAMILIES else pytest.skip("no X-CLIP")
    images, texts = own_inputs("X-CLIP", processor, make_inputs("video"))
    with torch.no_grad():
        made = model(**images, **texts).text_embeds
    assert made.shape == (3, 3, 24)
    assert (made[0] - made[1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_texts_are_padded_as_the_family_was_trained(name):
    model, processor = build(name)
    tokens = find_encoder(model, processor).tokenize(["red", *TEXTS])["input_ids"]
    longest = max(len(processor.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert tokens.shape == (4, FULL_LENGTH.get(name, longest))
    assert longest < 12


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_an_embedding_does_not_depend_on_its_batch(name):
    model, processor = build(name)
    inputs = make_inputs(family_of(model).reads)
    images, texts = embed(model, processor, inputs)
    for i in range(3):
        alone = embed(model, processor, inputs[i : i + 1], TEXTS[i : i + 1])
        torch.testing.assert_close(alone[0][0], images[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(alone[1][0], texts[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "lowers"), [("GemmaTokenizer", True), ("Siglip2Tokenizer", False)]
)
def test_prompts_of_siglip_2_are_lower_cased_where_its_tokenizer_does_not(kind, lowers):
    model, processor = build("SigLIP 2")
    tokenizer = processor.tokenizer
    plain = find_encoder(model, processor)
    tokenizer.__class__ = type(kind, (type(tokenizer),), {})
    encoder = find_encoder(model, processor)
    lower = encoder.tokenize(["a photo of a red circle"])["input_ids"]
    capital = encoder.tokenize(["A photo of a Red circle"])["input_ids"]
    assert torch.equal(lower, capital) == lowers
    assert (encoder.description != plain.description) == lowers
    clip, of_clip = build("CLIP")
    of_clip.tokenizer.__class__ = tokenizer.__class__
    ids = find_encoder(clip, of_clip).tokenize(["red", "Red"])["input_ids"]
    assert not torch.equal(ids[0], ids[1])


def test_prompts_are_cut_at_the_models_positions_where_the_tokenizer_allows_more(caplog):
    model, processor = build("CLIP")
    processor.tokenizer.model_max_length = 512
    encoder = find_encoder(model, processor)
    tokens = encoder.tokenize(["a photo of the red green blue grey thing circle square cross"])
    assert tokens["input_ids"].shape == (1, 12)
    assert "1 prompts have more than the 12 tokens" in caplog.text
    assert encoder.embed_texts(model, tokens).shape == (1, 24)


# What the models of open_clip compute


@needs_open_clip
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_embeddings_and_logits_are_those_of_open_clips_own_forward(name, output_dict):
    model, pair = build(name)
    model.output_dict = output_dict or name.endswith("CoCa")  # without it CoCa fails
    inputs = make_inputs("image")
    pixels = torch.stack([pair[0](picture) for picture in inputs])
    with torch.no_grad():
        out = model(pixels, pair[1](TEXTS))
    if not isinstance(out, dict):
        out = dict(zip(("image_features", "text_features", "logit_scale"), out, strict=False))
    own = out["image_features"], out["text_features"]
    check_embeds(embed(model, pair, inputs), own)
    bias = SCALARS["logit_bias"] if name.endswith("SigLIP") else 0
    expected = np.exp(SCALARS["logit_scale"]) * own[0] @ own[1].T + bias
    logits = classify(model, pair, inputs)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    if hasattr(model, "get_logits"):  # CoCa has none
        with torch.no_grad():
            by_model = model.get_logits(pixels, pair[1](TEXTS))[0]
        torch.testing.assert_close(logits, by_model, atol=1e-4, rtol=0)


@needs_open_clip
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clips_own_tokenizer_pads_to_full_length(name):
    model, pair = build(name)
    assert find_encoder(model, pair).tokenize(TEXTS)["input_ids"].shape == (3, 32)


@needs_open_clip
@pytest.mark.parametrize("name", ["open_clip CLIP", "open_clip SigLIP"])  # its own tokenizer, HF's
def test_prompts_that_open_clip_cuts_are_told_once(name, caplog):
    model, pair = build(name)
    tokenize = find_encoder(model, pair).tokenize
    tokenize([29 * "a"])
    assert "are cut" not in caplog.text
    ids = tokenize(["red", 40 * "a"])["input_ids"]
    tokenize([50 * "a"])
    assert ids.shape == (2, 32)
    assert caplog.text.count("1 prompts have more than the 32 tokens") == 1


@needs_open_clip
@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16", "pure_fp16"])
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip_in_half_precision_is_measured(name, precision):
    if name.endswith("CoCa") and not precision.startswith("pure"):
        pytest.skip("open_clip's own forward fails: the pooling stays in full precision")
    exact = {}
    task = Task("colours", make_dataset("colour", 24, seed=1), templates="a {} thing")
    for kind in ("fp32", precision):
        model, pair = OPEN_CLIP[name](precision=kind)
        exact[kind] = Probe(task, processor=pair).look(model, 0).measurement
    dtypes = {p.dtype for p in model.parameters()}
    assert torch.bfloat16 in dtypes or torch.float16 in dtypes
    for value in ("iimm", "inter", "intra"):
        expected = getattr(exact["fp32"], value)
        assert getattr(exact[precision], value) == pytest.approx(expected, abs=0.02)


@needs_open_clip
@pytest.mark.parametrize(
    ("wrong", "got"), [(None, "none"), ("transform", "Compose"), ("triple", "tuple")]
)
def test_open_clip_asks_for_the_pair_of_transform_and_tokenizer(wrong, got):
    model, pair = build("open_clip CLIP")
    processor = {None: None, "transform": pair[0], "triple": (*pair, None)}[wrong]
    message = rf"pair \(transform, tokenizer\) for an open_clip model, got {got}; pass `processor="
    with pytest.raises(ValueError, match=message):
        find_encoder(model, processor)


# A family of the user's own


class Mine(nn.Module):
    """No transformers and no open_clip model, and none of their functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(3 * 16 * 16, 8), nn.EmbeddingBag(600, 8)


def mine(**more):
    entry = {
        "name": "Mine",
        "embed_images": lambda model, inputs: model.image(inputs["pixel_values"].flatten(1)),
        "embed_texts": lambda model, inputs: model.text(inputs["input_ids"]),
        "logit_scale": lambda model: (20.0, None),
        "towers": ("image", "text"),
    }
    return Family(**entry | more)


@pytest.fixture
def own_table(monkeypatch):
    monkeypatch.setattr(families_module, "_REGISTERED", [])


def test_a_family_of_ones_own_wins_over_a_refusal(own_table):
    model = hf.BlipForConditionalGeneration(
        hf.BlipConfig(text_config={"vocab_size": 50}, vision_config={"image_size": 32})
    )
    model.config.model_type = "blip-2"
    with pytest.raises(ValueError, match="language model"):
        find_dual_encoder(model)
    register_encoder(mine(), type(model))
    assert find_dual_encoder(model) is model


def test_a_family_that_preprocesses_by_itself_needs_no_processor(own_table, colour_task):
    def pixels(processor):
        assert processor is None
        return lambda images: torch.stack([torch.tensor(list(i.tobytes())) / 255 for i in images])

    def words(model, processor):
        return lambda prompts: torch.tensor([[len(p), p.count("e")] for p in prompts])

    family = mine(
        preprocess=pixels,
        tokenize=words,
        embed_images=lambda model, inputs: model.image(inputs),
        embed_texts=lambda model, inputs: model.text(inputs),
    )
    register_encoder(family, Mine)
    encoder = find_encoder(Mine())
    assert encoder.embed_images(Mine(), encoder.preprocess(colour_task.images([0, 1]))).shape == (
        2,
        8,
    )
    assert encoder.embed_texts(Mine(), encoder.tokenize(["red", "green"])).shape == (2, 8)


def test_a_model_of_ones_own_is_unknown_before_it_is_registered(own_table):
    assert family_of(Mine()) is None
    register_encoder(mine(), Mine)
    assert family_of(Mine()).name == "Mine"


@pytest.mark.parametrize("matches", [Mine, lambda module: hasattr(module, "text")])
def test_a_model_of_ones_own_is_read_by_its_functions(own_table, processor, matches):
    register_encoder(mine(), matches)
    model, inputs = Mine(), make_inputs("image")
    pixels = processor.image_processor(inputs, return_tensors="pt")["pixel_values"]
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        own = model.image(pixels.flatten(1)), model.text(tokens)
        logits = 20 * unit(own[0]) @ unit(own[1]).T
    check_embeds(embed(nn.Sequential(model), processor, inputs), own)
    torch.testing.assert_close(classify(model, processor, inputs), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["full", "linear_probe", "clip_adapter"])
def test_a_model_of_ones_own_trains_under_the_guard(
    own_table, processor, colours, colour_task, shape_task, make_trainer, method
):
    register_encoder(mine(), Mine)
    options = {
        "linear_probe": {"task": colour_task, "processor": processor},
        "clip_adapter": {"processor": processor, "reduction": 1, "residual_ratio": 0.9},
    }
    model = prepare(Mine(), method, **options.get(method, {}))
    guard = IIMMCallback(colour_task, [shape_task], verbose=False)
    trainer = make_trainer([guard], model=model, max_steps=30, learning_rate=1e-2)
    assert detect(trainer.model) == method

    def loss():
        with torch.no_grad():
            return trainer.model(**trainer.data_collator(list(colours)))["loss"].item()

    before = loss()
    trainer.train()
    assert loss() < 0.8 * before
    assert guard.outcome.method == method


@pytest.mark.parametrize("method", ["bitfit", "attention", "lora"])
def test_a_method_that_finds_nothing_to_tune_in_ones_own_model_says_so(own_table, method):
    register_encoder(mine(), Mine)
    with pytest.raises(ValueError, match="`model` Mine has no "):
        prepare(Mine(), method)


def test_the_latest_entry_wins_over_earlier_ones_and_those_built_in(own_table, tiny_clip):
    model = tiny_clip()
    assert family_of(model).name == "CLIP"
    register_encoder(mine(name="earlier"), type(model))
    assert family_of(model).name == "earlier"
    register_encoder(mine(name="later"), lambda module: isinstance(module, hf.CLIPModel))
    assert family_of(model).name == "later"
    assert family_of(build("SigLIP")[0]).name == "SigLIP"


def test_an_entry_of_ones_own_decides_the_scale_the_towers_and_what_is_read(
    own_table, tiny_clip, processor
):
    builtin = family_of(tiny_clip())
    register_encoder(
        mine(
            name="half",
            embed_images=builtin.embed_images,
            embed_texts=builtin.embed_texts,
            logit_scale=lambda model: (3.0, -1.0),
            towers=("vision_model",),
        ),
        hf.CLIPModel,
    )
    inputs, model = make_inputs("image"), tiny_clip().eval()
    images, texts = embed(model, processor, inputs)
    expected = 3 * images @ texts.T - 1
    torch.testing.assert_close(classify(model, processor, inputs), expected, atol=1e-5, rtol=0)
    tuned = {n.split(".")[0] for n, p in prepare(model, "bitfit").named_parameters() if trains(p)}
    assert tuned == {"vision_model"}


def trains(parameter):
    return parameter.requires_grad


class Kin(hf.CLIPModel):
    """A user's class, whose functions go by the usual names."""


class PassesOn(nn.Module):
    """Asks the model inside for whatever it has not itself."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])),
        lambda model: torch.compile(model, backend="eager"),
        PassesOn,
    ],
    ids=["peft", "compile", "passes on"],
)
def test_an_entry_of_ones_own_counts_in_wrappers_that_pass_on_its_functions(
    own_table, tiny_clip, processor, wrap
):
    model = Kin(tiny_clip().config)
    functions = {"embed_texts": lambda model, inputs: torch.full((len(TEXTS), 24), 7.0)}
    register_encoder(mine(name="kin", logit_scale=lambda model: (42.0, None), **functions), Kin)
    wrapped = wrap(model)
    encoder = find_encoder(wrapped, processor)
    assert find_dual_encoder(wrapped) is model
    assert encoder.scale(wrapped) == 42
    assert encoder.embed_texts(wrapped, encoder.tokenize(TEXTS)).eq(7).all()


class NamesOfOpenClip(nn.Module):
    """A user's module with the names of open_clip around a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode_image(self, pixel_values):
        raise AssertionError

    encode_text = encode_image


def test_functions_named_as_open_clips_around_another_model_are_looked_through(
    tiny_clip, processor
):
    model = tiny_clip().eval()
    wrapped = NamesOfOpenClip(model)
    assert find_dual_encoder(wrapped) is model
    inputs = make_inputs("image")
    expected = embed(model, processor, inputs)
    for one, other in zip(embed(wrapped, processor, inputs), expected, strict=True):
        assert torch.equal(one, other)


class PassesOn(nn.Module):
    """A user's module with the usual functions around a model of transformers."""

    def __init__(self, model, **attributes):
        super().__init__()
        self.inner = model
        for name, value in attributes.items():
            setattr(self, name, value)

    def get_image_features(self, **inputs):
        return 2 * vector(self.inner.get_image_features(**inputs))

    def get_text_features(self, **inputs):
        return 3 * vector(self.inner.get_text_features(**inputs))


def vector(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("has_config", [False, True])
@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "SigLIP 2", "ALIGN", "AIMv2", "TIPSv2"])
def test_a_module_that_passes_on_is_read_as_the_model_inside(name, has_config):
    if name not in tiny.FAMILIES:
        pytest.skip(tiny.UNAVAILABLE[name])
    model, processor = build(name)
    wrapped = PassesOn(PassesOn(model, **{"config": model.config} if has_config else {}))
    inner, outer = find_encoder(model, processor), find_encoder(wrapped, processor)
    pictures, tokens = inner.preprocess(make_inputs("image")), inner.tokenize(TEXTS)
    with torch.no_grad():
        images, texts = inner.embed_images(model, pictures), inner.embed_texts(model, tokens)
        found = outer.embed_images(wrapped, outer.preprocess(make_inputs("image")))
        torch.testing.assert_close(found, 4 * images)  # its own functions count
        found = outer.embed_texts(wrapped, outer.tokenize(TEXTS))
        torch.testing.assert_close(found, 9 * texts)
    assert outer.scale(wrapped) == inner.scale(model)
    assert outer.description == inner.description
    own = PassesOn(model, logit_scale=nn.Parameter(torch.tensor(1.5)))
    assert find_encoder(own, processor).scale(own) == pytest.approx(np.exp(1.5))


class Several(nn.Module):
    """A user's module with a frozen model beside the one that trains."""

    def __init__(self, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student


def test_of_several_dual_encoders_the_one_that_trains_is_measured(tiny_clip, processor):
    student, teacher = tiny_clip(), tiny_clip().requires_grad_(False)
    for both in (Several(teacher, student), nn.Sequential(Several(student, teacher))):
        assert find_dual_encoder(both) is student
    student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"one dual encoder that trains, got 0 of \['0.t"):
        find_encoder(both, processor)
    with pytest.raises(ValueError, match=r"got 2 of \['teacher', 'student'\]; freeze the others"):
        find_dual_encoder(Several(tiny_clip(), tiny_clip()))
    assert find_dual_encoder(Several(teacher, teacher)) is teacher


@pytest.mark.parametrize("hide", [lambda m: [m], lambda m: {"clip": m}, lambda m: (m,)])
def test_a_model_hidden_from_torch_is_named(tiny_clip, hide):
    holder = nn.Linear(2, 2)
    holder.models = hide(tiny_clip())
    with pytest.raises(ValueError, match=r"its `models` hides a CLIPModel from torch, so that no"):
        find_dual_encoder(nn.Sequential(holder))


@pytest.mark.parametrize(
    ("family", "matches", "message"),
    [
        ("Mine", Mine, "`family` must be a `Family`, got str"),
        (mine, Mine, "`family` must be a `Family`, got function"),
        (mine(), "Mine", "`matches` must be the models' class or a function .*, got 'Mine'"),
        (mine(), None, "`matches` must be .*, got None"),
    ],
)
def test_what_is_no_entry_is_not_registered(own_table, family, matches, message):
    before = list(families_module._TABLE)
    with pytest.raises(TypeError, match=message):
        register_encoder(family, matches)
    assert families_module._TABLE == before


# Models without a joint space; more in test_matrix.py

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
WIDTH |= {"num_attention_heads": 2}
PICTURES = WIDTH | {"image_size": 16, "patch_size": 8}


def blip2_retrieval():
    config = hf.Blip2Config(
        vision_config=PICTURES,
        qformer_config=WIDTH | {"encoder_hidden_size": 32, "vocab_size": 50},
        num_query_tokens=2,
        image_text_hidden_size=8,
    )
    return hf.Blip2ForImageTextRetrieval(config)


def llava():
    text = {"model_type": "llama", "vocab_size": 50, "num_key_value_heads": 2, **WIDTH}
    vision = {"model_type": "clip_vision_model", **PICTURES}
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    )


def captioner():
    decoder = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    decoder |= {"add_cross_attention": True, "is_decoder": True}
    return hf.VisionEncoderDecoderModel(
        encoder=hf.ViTModel(hf.ViTConfig(**PICTURES)),
        decoder=hf.GPT2LMHeadModel(hf.GPT2Config(**decoder)),
    )


REFUSED = {
    "Blip2ForImageTextRetrieval": (blip2_retrieval, "an image has 32 vectors instead of one"),
    "LlavaForConditionalGeneration": (llava, "it generates text and has no space in which"),
    "VisionEncoderDecoderModel": (captioner, "it generates text and has no space in which"),
    "CLIPVisionModel": (
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**PICTURES)),
        "it embeds images only and has no text tower",
    ),
    "CLIPTextModelWithProjection": (
        lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**WIDTH, vocab_size=50)),
        "it embeds texts only and has no image tower",
    ),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "in a module"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_joint_space_is_refused_with_reason_and_way_out(name, wrap):
    make, reason = REFUSED[name]
    model = nn.Sequential(nn.Identity(), nn.Sequential(make())) if wrap else make()
    with pytest.raises(ValueError, match=f"joint space, got {name}: .*{reason}") as error:
        find_dual_encoder(model)
    assert "pass `encode=(encode_images, encode_texts)`" in str(error.value)
    assert "`register_encoder`" in str(error.value)


def test_a_plain_module_around_nothing_known_is_told_what_was_looked_for():
    with pytest.raises(ValueError, match="got Sequential: neither it nor any module inside"):
        find_dual_encoder(nn.Sequential(nn.Linear(2, 2)))


# Data of another kind than the model reads

WRONG = {
    ("CLAP", "image"): "must hold sounds for ClapModel, got images",
    ("CLIP", "sound"): "must hold images for CLIPModel, got sounds",
    ("CLIP", "video"): "must hold images for CLIPModel, got videos",
    ("X-CLIP", "image"): "must hold videos for XCLIPModel, got images",
}


def task_of(inputs, name="task"):
    return Task(name, list(zip(inputs, (0, 1, 2), strict=True)), class_names=TEXTS)


@pytest.mark.parametrize(("name", "reads"), WRONG)
def test_data_of_another_kind_is_refused(name, reads):
    if name not in tiny.FAMILIES:
        pytest.skip(tiny.UNAVAILABLE[name])
    model, processor = build(name)
    message = WRONG[name, reads]
    with pytest.raises(ValueError, match=message):
        Probe(task_of(make_inputs(reads)), processor=processor).prepare(model)


def test_data_of_another_kind_is_refused_before_training(tmp_path):
    model, processor = build("CLIP")
    task, other = task_of(make_inputs("image")), task_of(make_inputs("sound"), "other")
    trainer = Trainer(
        PromptClassifier(model, task, processor),
        TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True),
        train_dataset=task.dataset,
        data_collator=ImageCollator(processor),
        callbacks=[IIMMCallback(task, [other], processor=processor, verbose=False)],
    )
    with pytest.raises(ValueError, match="must hold images for CLIPModel, got sounds"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_sounds_of_another_rate_are_refused_with_how_to_resample_them():
    model, processor = build("CLAP")
    sounds = [sound | {"sampling_rate": 16000} for sound in make_inputs("sound")]
    with pytest.raises(ValueError, match=r"of 8000 Hz for this model, got 16000 Hz; .*=8000\)\)"):
        Probe(task_of(sounds), processor=processor).prepare(model)
    with pytest.raises(ValueError, match="got 16000 Hz"):
        ImageCollator(processor)([(sound, 0) for sound in sounds])


def test_sounds_without_a_rate_are_taken_to_be_of_the_models():
    model, processor = build("CLAP")
    sounds = make_inputs("sound")
    bare = [as_image(sound["array"].astype(float)) for sound in sounds]
    expected, _ = embed(model, processor, sounds)
    torch.testing.assert_close(embed(model, processor, bare)[0], expected, atol=1e-6, rtol=0)
    task = task_of([sound["array"] for sound in sounds])
    assert Probe(task, processor=processor).look(model, 0).measurement.n_images == 3


@pytest.mark.skipif("X-CLIP" in tiny.UNAVAILABLE, reason="not in this transformers")
def test_an_array_of_frames_is_a_video():
    model, processor = build("X-CLIP")
    videos = make_inputs("video")
    arrays = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
    expected, _ = embed(model, processor, videos)
    ours, _ = embed(model, processor, [as_image(array) for array in arrays])
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)
    assert Probe(task_of(arrays), processor=processor).look(model, 0).measurement.n_images == 3


# What a data set holds -> what a processor reads

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
PICTURE = Image.fromarray(PIXELS)


def encoded():
    buffer = io.BytesIO()
    PICTURE.save(buffer, "png")
    return buffer.getvalue()


class Decoded:
    """As what `datasets.Audio` decodes to."""

    def get_all_samples(self):
        class Samples:
            data = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # [channels, n]
            sample_rate = 8000

        return Samples()


@pytest.mark.parametrize(
    "item",
    [
        PICTURE,
        PIXELS,
        encoded(),
        {"bytes": encoded(), "path": None},
        {"bytes": encoded(), "path": "no such file.png"},
        PICTURE.convert("RGBA"),
    ],
    ids=["picture", "array", "bytes", "undecoded", "undecoded with path", "RGBA"],
)
def test_a_picture_in_any_form_is_the_same_rgb_picture(item):
    image = as_image(item)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("form", [str, pathlib.Path, lambda path: {"path": str(path)}])
def test_a_path_is_the_picture_in_the_file(tmp_path, form):
    (tmp_path / "picture.png").write_bytes(encoded())
    assert np.array_equal(np.asarray(as_image(form(tmp_path / "picture.png"))), PIXELS)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_a_picture_of_another_mode_becomes_rgb(mode):
    image = as_image(PICTURE.convert(mode))
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize(
    ("item", "samples", "rate"),
    [
        (np.array([0.5, -1.0]), [0.5, -1.0], None),
        ([0.5, -1.0], [0.5, -1.0], None),
        ({"array": [0.5, -1.0], "sampling_rate": 8000}, [0.5, -1.0], 8000),
        ({"array": np.array([0.5, -1.0])}, [0.5, -1.0], None),
        (Decoded(), [2.0, 4.0], 8000),
    ],
    ids=["array", "list", "dict", "dict without a rate", "decoded, stereo"],
)
def test_a_sound_in_any_form_is_one_channel_of_float32_and_a_rate(item, samples, rate):
    sound = as_image(item)
    assert sound.keys() == {"array", "sampling_rate"}
    assert sound["array"].dtype == np.float32
    assert sound["array"].tolist() == samples
    assert sound["sampling_rate"] == rate


@pytest.mark.parametrize(
    "item",
    [[PICTURE, PICTURE.convert("L")], (PICTURE, PIXELS), np.stack([PIXELS, PIXELS]), [encoded()]],
    ids=["list", "tuple", "array", "bytes"],
)
def test_a_video_in_any_form_is_a_list_of_rgb_pictures(item):
    frames = as_image(item)
    assert len(frames) == len(item)
    assert [frame.mode for frame in frames] == ["RGB"] * len(item)
    assert np.array_equal(np.asarray(frames[0]), PIXELS)


@pytest.mark.parametrize(("item", "name"), [(None, "NoneType"), (3, "int"), ([1, 2], "int")])
def test_what_is_neither_picture_sound_nor_video_is_named(item, name):
    with pytest.raises(TypeError, match=f"bytes or array, got {name}; pass the data set without"):
        as_image(item)


@pytest.mark.parametrize(
    "item",
    [np.zeros(400, np.int16), np.zeros((2, 400), np.float32), np.full((4, 5, 3), -1.0)],
    ids=["integer samples", "two channels", "normalised picture"],
)
def test_an_array_that_is_no_picture_is_not_taken_for_one(item):
    with pytest.raises(ValueError, match="expected a picture"):
        as_image(item)


@pytest.mark.parametrize("shape", [(2, 400), (400, 2)])
def test_a_sound_of_two_channels_is_refused_by_its_shape(shape):
    # CLAP's extractor would take the channels for samples, and ask for gigabytes.
    with pytest.raises((TypeError, ValueError), match=rf"{shape[0]}, {shape[1]}"):
        as_image({"array": np.zeros(shape), "sampling_rate": RATE})
