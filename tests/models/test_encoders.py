"""Embeddings out of real tiny models, bare and in every wrapper that training puts around them."""

import copy

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from iimm_callbacks import IIMMCallback, PromptClassifier
from iimm_callbacks.models.encoders import class_embeddings, find_encoder, move
from iimm_callbacks.models.untouched import load_untouched
from iimm_callbacks.models.wrappers import find_dual_encoder, model_fingerprint

PROMPTS = ["a red thing", "a photo of a blue circle", "grey"]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def make_siglip():
    """A tiny SiglipModel with a bias and a scale of its own, and its processor."""
    words = "a photo of red green blue grey thing circle square cross".split()
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    rules = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    end = [("</s>", vocab["</s>"])]
    rules.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=12,
        model_input_names=["input_ids"],  # as SiglipTokenizer: no mask
    )
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    width = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    text = width | ids | {"vocab_size": len(vocab), "max_position_embeddings": 12}
    torch.manual_seed(0)
    vision = width | {"image_size": 16, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model, SiglipProcessor(image_processor=images, tokenizer=tokenizer)


class Wrapped(nn.Module):
    """A user's own module around a dual encoder."""

    def __init__(self, backbone):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.inside = nn.ModuleDict({"backbone": backbone})

    def forward(self, x):
        return self.head(x)


class Nameless(nn.Module):
    """No dual encoder."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 8)


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def pictures(colour_task):
    return colour_task.images(colour_task.subset()[:5])


def embed(model, encoder, pictures):
    model.eval()
    with torch.no_grad():
        images = encoder.embed_images(model, move(encoder.preprocess(pictures), model))
        texts = encoder.embed_texts(model, move(encoder.tokenize(PROMPTS), model))
    return nn.functional.normalize(images, dim=1), nn.functional.normalize(texts, dim=1)


def forward_embeds(model, processor, pictures, **text_options):
    tokens = processor.tokenizer(PROMPTS, return_tensors="pt", **text_options)
    pixels = processor.image_processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        out = model.eval()(**tokens, **pixels)
    return out.image_embeds, out.text_embeds


def returning_a_tensor(function):
    def old(**inputs):
        output = function(**inputs)
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    return old


def assert_close(one, other, atol=1e-5):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


# The embeddings are the model's own


def test_clip_embeddings_are_those_of_its_own_forward(tiny_clip, processor, pictures):
    model = tiny_clip()
    ours = embed(model, find_encoder(model, processor), pictures)
    assert_close(ours, forward_embeds(model, processor, pictures, padding=True))


def test_siglip_embeddings_are_those_of_its_own_forward_on_padded_text(pictures):
    model, processor = make_siglip()
    encoder = find_encoder(model, processor)
    assert encoder.tokenize(PROMPTS)["input_ids"].shape == (3, 12)
    ours = embed(model, encoder, pictures)
    right = forward_embeds(model, processor, pictures, padding="max_length", max_length=12)
    assert_close(ours, right)
    short = forward_embeds(model, processor, pictures, padding=True)
    assert (ours[1] - short[1]).abs().max() > 1e-3  # so the padding matters


@pytest.mark.parametrize("wrap", ["peft", "compile", "ddp", "module", "classifier", "ddp-peft"])
def test_a_wrapped_model_embeds_as_the_bare_one(
    tiny_clip, processor, pictures, colour_task, gloo, wrap
):
    wrappers = {
        "peft": lambda m: get_peft_model(m, LoraConfig(**LORA | {"init_lora_weights": True})),
        "compile": lambda m: torch.compile(m, backend="eager"),
        "ddp": nn.parallel.DistributedDataParallel,
        "module": Wrapped,
        "classifier": lambda m: PromptClassifier(m, colour_task, processor),
    }
    bare, model = tiny_clip(), tiny_clip()
    for name in reversed(wrap.split("-")):
        model = wrappers[name](model)
    ours = embed(model, find_encoder(model, processor), pictures)
    assert_close(ours, embed(bare, find_encoder(bare, processor), pictures))


def test_adapters_take_part(tiny_clip, processor, pictures):
    model = get_peft_model(tiny_clip(), LoraConfig(**LORA))
    encoder = find_encoder(model, processor)
    adapted = embed(model, encoder, pictures)
    merged = forward_embeds(
        copy.deepcopy(model).merge_and_unload(), processor, pictures, padding=True
    )
    assert_close(adapted, merged)
    with model.disable_adapter():
        base = embed(model, encoder, pictures)
    assert_close(base, embed(tiny_clip(), encoder, pictures))
    assert (base[0] - adapted[0]).abs().max() > 1e-3


@pytest.mark.parametrize("returns", ["object", "tuple", "tensor"])
def test_reads_what_every_version_of_transformers_returns(
    tiny_clip, processor, pictures, returns, monkeypatch
):
    model = tiny_clip()
    expected = embed(model, find_encoder(model, processor), pictures)
    if returns == "tuple":
        model.config.return_dict = False
    if returns == "tensor":  # transformers 4
        for name in ("get_image_features", "get_text_features"):
            monkeypatch.setattr(model, name, returning_a_tensor(getattr(model, name)))
    assert_close(embed(model, find_encoder(model, processor), pictures), expected, atol=0)


def test_features_that_are_no_joint_space_vectors_are_refused(
    tiny_clip, processor, pictures, monkeypatch
):
    model = tiny_clip()
    monkeypatch.setattr(model, "get_image_features", lambda **inputs: torch.zeros(5, 4, 24))
    with pytest.raises(
        ValueError,
        match=r"\[n, D\], got \[5, 4, 24\] from `embed_images` of CLIPModel; pass `encode",
    ):
        embed(model, find_encoder(model, processor), pictures)


# A model of another kind


def test_an_own_pair_of_functions_gets_the_model_pictures_and_prompts(pictures):
    model = Nameless()
    seen = []

    def images(given, batch):
        assert given is model
        seen.extend(batch)
        rows = [torch.tensor(list(p.resize((4, 4)).tobytes()), dtype=torch.float) for p in batch]
        return given.linear(torch.stack(rows))

    def texts(given, prompts):
        assert given is model
        seen.extend(prompts)
        return torch.ones(len(prompts), 8)

    encoder = find_encoder(model, encode=(images, texts))
    ours = embed(model, encoder, pictures)
    assert [e.shape for e in ours] == [(5, 8), (3, 8)]
    assert seen == [*pictures, *PROMPTS]
    assert "images" in encoder.description
    assert "texts" in encoder.description


def test_a_model_it_cannot_read_is_named_with_what_was_looked_for_and_the_way_out():
    with pytest.raises(ValueError, match="got Nameless") as error:
        find_encoder(Nameless())
    assert "`get_image_features` and `get_text_features`" in str(error.value)
    assert "pass `encode=(encode_images, encode_texts)`" in str(error.value)


def test_finds_the_dual_encoder_deep_inside(tiny_clip):
    model = tiny_clip()
    assert find_dual_encoder(nn.Sequential(nn.ReLU(), Wrapped(model))) is model


# The processor


@pytest.fixture
def saved(tmp_path, tiny_clip, processor):
    """A folder with model and processor, as `save_pretrained` leaves them."""
    tiny_clip().save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def loaded(folder, tiny_clip):
    return type(tiny_clip()).from_pretrained(folder)


def test_the_processor_is_found_where_the_model_was_loaded_from(
    saved, tiny_clip, processor, pictures
):
    model = loaded(saved, tiny_clip)
    ours = embed(model, find_encoder(model), pictures)
    assert_close(ours, embed(model, find_encoder(model, processor), pictures), atol=0)


def test_a_tokenizer_alone_falls_back_to_the_saved_processor(saved, tiny_clip, processor, pictures):
    model = loaded(saved, tiny_clip)
    ours = embed(model, find_encoder(model, processor.tokenizer), pictures)
    assert_close(ours, embed(model, find_encoder(model, processor), pictures), atol=0)


def test_a_part_of_a_processor_is_used_with_the_saved_other_part(
    saved, tiny_clip, processor, pictures
):
    model = loaded(saved, tiny_clip)
    images = copy.deepcopy(processor.image_processor)
    images.image_mean = [0.0, 0.0, 0.0]
    encoder = find_encoder(model, images)
    pixels = images(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(encoder.preprocess(pictures)["pixel_values"], pixels)
    assert encoder.description != find_encoder(model).description
    words = copy.deepcopy(processor.tokenizer)
    words.model_max_length = 3
    encoder = find_encoder(model, words)
    assert encoder.tokenize(PROMPTS)["input_ids"].shape == (3, 3)
    assert encoder.description == find_encoder(model).description


def test_preprocessing_is_described_alike_made_in_code_and_loaded(saved, tiny_clip, processor):
    model = loaded(saved, tiny_clip)
    assert find_encoder(model).description == find_encoder(model, processor).description


def test_the_trainers_processing_class_is_used(make_trainer, colour_task, shape_task):
    # `tiny_clip` was built from a config: there is no folder to load a processor from.
    callback = IIMMCallback(colour_task, [shape_task], verbose=False)
    trainer = make_trainer([callback], max_steps=1)
    trainer.train()
    assert len(callback.monitor.history) == 2


def test_no_processor_to_be_found_says_what_came_and_what_to_do(tiny_clip, processor):
    with pytest.raises(ValueError, match=r"got none, and the model does not say where") as error:
        find_encoder(tiny_clip())
    assert "pass `IIMMCallback(processor=...)` or `Trainer(processing_class=...)`" in str(
        error.value
    )
    with pytest.raises(ValueError, match=f"got {type(processor.tokenizer).__name__}, and"):
        find_encoder(tiny_clip(), processor.tokenizer)
    with pytest.raises(TypeError, match="`processor` must be a processor, got 'openai/clip'; load"):
        find_encoder(tiny_clip(), "openai/clip")


@pytest.mark.parametrize("encode", [len, (len,), (len, len, len), (len, 7), "ab"])
def test_two_functions_encode_or_it_is_refused(tiny_clip, encode):
    with pytest.raises(TypeError, match="`encode` must be two functions"):
        find_encoder(tiny_clip(), encode=encode)


def test_a_folder_without_a_processor_is_named(tmp_path, tiny_clip):
    tiny_clip().save_pretrained(tmp_path / "weights-only")
    with pytest.raises(ValueError, match="weights-only"):
        find_encoder(loaded(tmp_path / "weights-only", tiny_clip))


# The untouched model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_model_of_the_users_stays_as_it_is(tiny_clip, dtype):
    base, like = tiny_clip(), tiny_clip().to(dtype)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = load_untouched(base, like)
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert (found is base) == (dtype == torch.float32)
    for name, value in base.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_a_base_model_is_loaded_as_the_class_that_was_saved(tmp_path):
    model, _ = tiny.FAMILIES["BLIP retrieval"]()
    model.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        found = load_untouched(name, model)
        assert type(found) is type(model)
        assert model_fingerprint(found) == model_fingerprint(model)


def test_a_base_model_of_a_folder_with_an_adapter_is_loaded_with_it(tmp_path, tiny_clip):
    tiny_clip().save_pretrained(tmp_path / "base")
    base = type(tiny_clip()).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    found = load_untouched(tmp_path / "adapter", tiny_clip())
    assert find_dual_encoder(found) is found
    assert found.peft_config


def test_a_base_model_without_all_weights_is_refused(tmp_path, tiny_clip):
    model = tiny_clip()
    state = {n: v for n, v in model.state_dict().items() if n != "visual_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"`base_model` .* lacks 1 weights of CLIPModel, which"):
        load_untouched(tmp_path, model)
    with pytest.raises(OSError, match="nowhere"):
        load_untouched(tmp_path / "nowhere", model)


# Fingerprints


def test_a_model_has_one_fingerprint_bare_and_wrapped(tiny_clip, processor, colour_task, gloo):
    expected = model_fingerprint(tiny_clip())
    assert len(expected) == 16
    adapted = get_peft_model(tiny_clip(), LoraConfig(**LORA, modules_to_save=["visual_projection"]))
    for model in (
        adapted,
        get_peft_model(tiny_clip(), LoraConfig(**LORA, use_dora=True)),
        get_peft_model(
            tiny_clip(), IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
        ),
        torch.compile(tiny_clip(), backend="eager"),
        nn.parallel.DistributedDataParallel(adapted),
        Wrapped(tiny_clip()),
        PromptClassifier(adapted, colour_task, processor),
        tiny_clip().double(),
    ):
        assert model_fingerprint(model) == expected, type(model).__name__


def test_the_fingerprint_differs_for_other_weights(tiny_clip):
    model = tiny_clip()
    before = model_fingerprint(model)
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    assert model_fingerprint(model) != before


def test_the_fingerprint_is_unchanged_by_lora_training_and_changed_by_full(make_trainer, tiny_clip):
    expected = model_fingerprint(tiny_clip())
    adapted = get_peft_model(tiny_clip(), LoraConfig(**LORA, modules_to_save=["text_projection"]))
    make_trainer(model=adapted, max_steps=2).train()
    assert model_fingerprint(adapted) == expected
    full = tiny_clip()
    make_trainer(model=full, max_steps=2).train()
    assert model_fingerprint(full) != expected


def test_a_model_without_feature_functions_has_a_fingerprint_too():
    torch.manual_seed(0)
    one, other = Nameless(), Nameless()
    assert model_fingerprint(one) == model_fingerprint(copy.deepcopy(one))
    assert model_fingerprint(one) != model_fingerprint(other)


# Class embeddings and moving


def test_class_embeddings_normalise_then_average_then_normalise():
    # Class 0: (3, 0) and (0, 4) -> (1, 0) and (0, 1) -> mean (1/2, 1/2) -> (1, 1)/sqrt(2).
    # Class 1: (0, -2) and (0, -5) -> (0, -1) twice -> (0, -1).
    prompts = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -2.0], [0.0, -5.0]])
    expected = torch.tensor([[2**-0.5, 2**-0.5], [0.0, -1.0]])
    torch.testing.assert_close(class_embeddings(prompts, 2), expected)
    half = class_embeddings(prompts.bfloat16(), 2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected)


def test_moving_casts_floats_to_the_weights_dtype_and_nothing_else():
    inputs = {"pixel_values": torch.rand(2, 3), "input_ids": torch.arange(4), "note": "x"}
    moved = move(inputs, nn.Linear(3, 3).bfloat16())
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["input_ids"].dtype == torch.int64
    assert moved["note"] == "x"
    assert inputs["pixel_values"].dtype == torch.float32


def test_the_dtype_is_the_encoders_whatever_is_before_it(tiny_clip):
    model = nn.ModuleList([nn.Linear(2, 2).half(), tiny_clip().double()])
    moved = move({"pixel_values": torch.rand(2, 3)}, model)
    assert moved["pixel_values"].dtype == torch.float64
    assert {p.dtype for p in load_untouched(tiny_clip(), model).parameters()} == {torch.float64}


@pytest.mark.parametrize("inputs", [["a prompt"], torch.rand(2)])
def test_moving_leaves_what_is_no_mapping_as_it_is(inputs):
    assert move(inputs, nn.Linear(3, 3).bfloat16()) is inputs


def test_moving_for_a_model_without_float_weights_changes_nothing():
    inputs = {"pixel_values": torch.rand(2, 3)}
    assert move(inputs, nn.Identity()) is inputs
