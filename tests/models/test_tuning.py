"""The fine-tuning methods: what each trains, how it starts, and how it is recognised."""

import contextlib
import copy
import itertools
import logging
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from iimm_callbacks import ImageCollator, PromptClassifier, Task
from iimm_callbacks.models.encoders import class_embeddings, find_encoder, move
from iimm_callbacks.models.tuning import detect, prepare, trainable_share
from iimm_callbacks.models.untouched import zero_shot_twin
from iimm_callbacks.models.wrappers import ClipAdapter, LinearProbe, bare_name, model_fingerprint
from iimm_callbacks.probing.probe import Probe

FAMILIES = dict(tiny.FAMILIES)
with contextlib.suppress(ModuleNotFoundError):  # an environment of its own: see .ci/README.md
    import open_clip
    import tiny_open_clip

    FAMILIES |= tiny_open_clip.FAMILIES
needs_open_clip = pytest.mark.skipif("open_clip CLIP" not in FAMILIES, reason="without open_clip")

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
IA3 = {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]}
METHODS = ("full", "bitfit", "attention", "lora", "clip_adapter", "linear_probe")
PIXELS = torch.linspace(-1, 1, 3 * 3 * 16 * 16).reshape(3, 3, 16, 16).sin()


def build(name):
    """(model, processor), or a skip."""
    if name not in FAMILIES:
        pytest.skip(tiny.UNAVAILABLE.get(name, "without open_clip"))
    model, processor = FAMILIES[name]()
    return model.eval(), processor


def options(method, processor, task):
    return {
        "clip_adapter": {"processor": processor},
        "linear_probe": {"processor": processor, "task": task},
    }.get(method, {})


def tuned(model):
    """Names of what trains, as they are in the bare model; adapters by the weight they adapt."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "")
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def spell(*patterns):
    """Shell braces: `spell("{a,b}.c")` is {"a.c", "b.c"}."""
    names = set()
    for pattern in patterns:
        parts = re.split(r"\{(.*?)\}", pattern)
        choices = [p.split(",") if i % 2 else [p] for i, p in enumerate(parts)]
        names |= {"".join(choice) for choice in itertools.product(*choices)}
    return names


def embed_images(model, processor, pictures):
    """Unit embeddings, in the mode the model is in."""
    encoder = find_encoder(model, processor)
    with torch.no_grad():
        vectors = encoder.embed_images(model, move(encoder.preprocess(pictures), model))
    return nn.functional.normalize(vectors, dim=1)


def embed_both(model, processor, task):
    encoder = find_encoder(model, processor)
    with torch.no_grad():
        return (
            encoder.embed_images(model, encoder.preprocess(task.images(range(5)))),
            encoder.embed_texts(model, encoder.tokenize(task.prompts([]))),
        )


def train(classifier, rows, processor, folder, **more):
    arguments = {
        "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "remove_unused_columns": False,
        "disable_tqdm": True,
    }  # fmt: skip
    Trainer(
        classifier,
        TrainingArguments(str(folder), **arguments | more),
        train_dataset=rows,
        data_collator=ImageCollator(processor),
    ).train()


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# What trains

CLIP_TOWERS = "{text,vision}_model.encoder.layers.{0,1}."
CLIP_BIASES = (
    CLIP_TOWERS + "{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.bias",
    CLIP_TOWERS + "self_attn.{q_proj,k_proj,v_proj,out_proj}.bias",
)
BERT = "text_model.encoder.layer.{0,1}."
BERT_BIASES = (
    BERT + "attention.self.{query,key,value}.bias",
    BERT + "attention.output.{dense,LayerNorm}.bias",
    BERT + "{intermediate.dense,output.dense,output.LayerNorm}.bias",
)
BERT_ATTENTION = BERT + "attention.self.{query,key,value}.weight"
BERT_LORA = BERT + "attention.{self.query,self.key,self.value,output.dense}.lora_{A,B}"
VISION = "vision_model.encoder.layers.{0,1}."
SPLIT_BIASES = tuple(b.replace("{text,vision}", "vision") for b in CLIP_BIASES)
RESBLOCK = ".resblocks.{0,1}."
RESBLOCK_BIASES = (
    RESBLOCK + "{ln_1,ln_2,mlp.c_fc,mlp.c_proj,attn.out_proj}.bias",
    RESBLOCK + "attn.in_proj_bias",
)

TRAINS = {
    ("CLIP", "bitfit"): spell(*CLIP_BIASES),
    ("CLIP", "attention"): spell(CLIP_TOWERS + "self_attn.{q_proj,k_proj,v_proj}.weight"),
    ("CLIP", "lora"): spell(
        CLIP_TOWERS + "self_attn.{q_proj,k_proj,v_proj,out_proj}.lora_{A,B}.default.weight"
    ),
    ("Chinese-CLIP", "bitfit"): spell(*BERT_BIASES, *SPLIT_BIASES),
    ("Chinese-CLIP", "attention"): spell(
        BERT_ATTENTION, VISION + "self_attn.{q_proj,k_proj,v_proj}.weight"
    ),
    ("Chinese-CLIP", "lora"): spell(
        BERT_LORA + ".default.weight",
        VISION + "self_attn.{q_proj,k_proj,v_proj,out_proj}.lora_{A,B}.default.weight",
    ),
    # No `crossattention` of the text tower: a dual encoder never runs it.
    ("BLIP", "bitfit"): spell(
        *BERT_BIASES,
        VISION + "{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}.bias",
        VISION + "self_attn.{qkv,projection}.bias",
    ),
    ("BLIP", "attention"): spell(BERT_ATTENTION, VISION + "self_attn.qkv.weight"),
    ("BLIP", "lora"): spell(
        BERT_LORA + ".default.weight",
        VISION + "self_attn.{qkv,projection}.lora_{A,B}.default.weight",
    ),
    ("open_clip CLIP", "bitfit"): spell(
        *("{visual.,}transformer" + names for names in RESBLOCK_BIASES)
    ),
    ("open_clip CLIP", "attention"): spell(
        "{visual.,}transformer" + RESBLOCK + "attn.in_proj_weight"
    ),
    ("open_clip CLIP", "lora"): spell(
        "{visual.,}transformer" + RESBLOCK + "attn.lora_{A,B}.default.weight"
    ),
    # No `text_decoder`, which writes captions, and no pooling by attention, which is no block.
    ("open_clip CoCa", "bitfit"): spell(
        *("{visual,text}.transformer" + names for names in RESBLOCK_BIASES)
    ),
    ("open_clip CoCa", "attention"): spell(
        "{visual,text}.transformer" + RESBLOCK + "attn.in_proj_weight"
    ),
    ("open_clip CoCa", "lora"): spell(
        "{visual,text}.transformer" + RESBLOCK + "attn.lora_{A,B}.default.weight"
    ),
}
# With `n_blocks=1`: the innermost blocks of which the towers consist, however they are nested.
LAST_BLOCKS = {
    "CLIP": r"(text|vision)_model\.encoder\.layers\.1\.",
    "GroupViT": r"(text_model\.encoder\.layers\.1|vision_model\.encoder\.stages\.1\.layers\.0)\.",
    "CLAP": (r"(text_model\.encoder\.layer\.1|audio_model\.audio_encoder\.layers\.1\.blocks\.0)\."),
    "X-CLIP": r"(text_model\.encoder\.layers\.1|mit\.encoder\.layers\.1|vision_model\.\D*\.1)\.",
    "open_clip CLIP": r"(visual\.)?transformer\.resblocks\.1\.",
    "open_clip SigLIP": r"(text\.transformer\.resblocks|visual\.trunk\.blocks)\.1\.",
    "open_clip CoCa": r"(text|visual)\.transformer\.resblocks\.1\.",
    "open_clip EVA-02-CLIP": r"(text\.transformer\.resblocks|visual\.trunk\.blocks)\.1\.",
}


@pytest.mark.parametrize(("name", "method"), TRAINS)
def test_trains_these_and_no_others(name, method):
    model, _ = build(name)
    assert tuned(prepare(model, method)) == TRAINS[name, method]


@pytest.mark.parametrize("method", ["bitfit", "attention", "lora"])
def test_in_one_block_of_clip_trains_these_and_no_others(method):
    model, _ = build("CLIP")
    expected = {name for name in TRAINS["CLIP", method] if ".layers.1." in name}
    assert tuned(prepare(model, method, n_blocks=1)) == expected
    assert len(expected) == len(TRAINS["CLIP", method]) / 2


@pytest.mark.parametrize("method", ["bitfit", "attention", "lora"])
@pytest.mark.parametrize("name", LAST_BLOCKS)
def test_in_one_block_only_the_last_of_each_tower_trains(name, method):
    whole, last = (tuned(prepare(build(name)[0], method, n_blocks=n)) for n in (None, 1))
    assert last == {n for n in whole if re.match(LAST_BLOCKS[name], n)}
    towers = {name.split(".")[0] for name in whole}
    assert {name.split(".")[0] for name in last} == towers
    assert last < whole


@needs_open_clip
@pytest.mark.parametrize("mlp", [False, True])
def test_lora_in_blocks_that_peft_cannot_tell_apart_is_refused(mlp):
    # peft takes names of parameters by their ends, and one tower's are the ends of the other's.
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    with pytest.raises(ValueError, match=r"visual.transformer.resblocks.1.attn.in_proj_weight too"):
        prepare(open_clip.CLIP(24, vision, text), "lora", n_blocks=1, mlp=mlp)
    names = tuned(prepare(open_clip.CLIP(24, vision, text), "lora", mlp=mlp))
    blocks = {re.match(r".*?resblocks\.\d", name)[0] for name in names}
    assert blocks == spell("{visual.,}transformer.resblocks.{0,1}") | {
        "visual.transformer.resblocks.2"
    }


@pytest.mark.parametrize("name", ["CLIP", "open_clip CLIP"])
def test_full_trains_everything_whatever_was_frozen(name):
    model, _ = build(name)
    prepared = prepare(model.requires_grad_(False), "full")
    assert prepared is model
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["CLIP", "ALIGN", "open_clip CLIP"])
@pytest.mark.parametrize(
    ("method", "names"),
    [("clip_adapter", "{down,up}.weight"), ("linear_probe", "classifier.{weight,bias}")],
)
def test_a_head_trains_and_no_weight_of_the_encoder(name, method, names, colour_task):
    model, processor = build(name)
    prepared = prepare(model, method, **options(method, processor, colour_task))
    assert tuned(prepared) == spell(names)
    assert prepared.dual_encoder is model


def test_lora_with_mlp_adapts_the_mlps_too():
    names = tuned(prepare(build("CLIP")[0], "lora", mlp=True))
    mlps = spell(CLIP_TOWERS + "mlp.{fc1,fc2}.lora_{A,B}.default.weight")
    assert names == TRAINS["CLIP", "lora"] | mlps


@needs_open_clip
def test_lora_with_mlp_adapts_the_mlps_beside_fused_attention_too():
    names = tuned(prepare(build("open_clip CLIP")[0], "lora", mlp=True))
    mlps = "{visual.,}transformer" + RESBLOCK + "mlp.{c_fc,c_proj}.lora_{A,B}.default.weight"
    assert names == TRAINS["open_clip CLIP", "lora"] | spell(mlps)


def test_lora_takes_its_settings():
    config = prepare(build("CLIP")[0], "lora", rank=3, dropout=0.25).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 6, 0.25, "none")
    assert prepare(build("CLIP")[0], "lora", alpha=5).peft_config["default"].lora_alpha == 5


def test_a_tower_without_what_is_tuned_is_named_and_stays(caplog):
    model, _ = build("ALIGN")
    with caplog.at_level(logging.WARNING):
        names = tuned(prepare(model, "attention"))
    assert "'vision_model' has no attention input projection: it stays as it is" in caplog.text
    assert names == spell(BERT_ATTENTION)


def test_the_share_that_trains_is_told_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        prepare(build("CLIP")[0], "full")
    assert "full trains 100 % of " in caplog.text


# 4 blocks, each with 4 projections of 32 x 32, an MLP of 32 to 64 and back and two norms, ...
BLOCK_BIASES = 4 * 32 + 64 + 32 + 2 * 32
BLOCK = 4 * 32 * 32 + 2 * 32 * 64 + 2 * 32 + BLOCK_BIASES
# ... 514 tokens and 32 positions; 4 patches of 8 x 8 and a class; norms, projections, the scale.
REST = (514 + 32) * 32 + (3 * 64 + 5 + 1) * 32 + 3 * 2 * 32 + 2 * 24 * 32 + 1
TOTAL = 4 * BLOCK + REST
SHARES = {
    "full": 1,
    "bitfit": 4 * BLOCK_BIASES / TOTAL,
    "attention": 4 * 3 * 32 * 32 / TOTAL,
    "lora": 4 * 4 * 2 * 8 * 32 / (TOTAL + 4 * 4 * 2 * 8 * 32),
    "clip_adapter": 2 * 6 * 24 / (TOTAL + 2 * 6 * 24),
    "linear_probe": (24 + 1) * 4 / (TOTAL + (24 + 1) * 4),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_share_that_trains_is_that_of_the_parameters(method, tiny_clip, processor, colour_task):
    model = prepare(tiny_clip(), method, **options(method, processor, colour_task))
    assert trainable_share(model) == pytest.approx(SHARES[method], rel=1e-12)


def test_a_model_without_parameters_trains_no_share():
    assert trainable_share(nn.Identity()) == 0


# What is refused


@pytest.mark.parametrize(
    ("method", "wrong", "error", "message"),
    [
        (
            "adapter",
            {},
            ValueError,
            "`method` must be one of 'full', 'bitfit', 'attention', 'lora', 'clip_adapter', "
            "'linear_probe', got 'adapter'",
        ),
        ("bitfit", {"rank": 2}, TypeError, "unexpected keyword argument 'rank'"),
        ("full", {"n_blocks": 1}, TypeError, "unexpected keyword argument 'n_blocks'"),
        ("linear_probe", {}, TypeError, "'task'"),
        ("bitfit", {"n_blocks": 0}, ValueError, "`n_blocks` must be an integer .* 1, got 0"),
        ("attention", {"n_blocks": -1}, ValueError, "`n_blocks` must be .* 1, got -1"),
        ("lora", {"n_blocks": 1.5}, ValueError, "`n_blocks` must be .* 1, got 1.5"),
        ("lora", {"rank": 0}, ValueError, "`rank` must be an integer of at least 1, got 0"),
        ("clip_adapter", {"reduction": 0}, ValueError, "`reduction` must be .* 1, got 0"),
        ("clip_adapter", {"residual_ratio": 0}, ValueError, r"in \(0, 1\], got 0"),
        ("clip_adapter", {"residual_ratio": 1.5}, ValueError, r"in \(0, 1\], got 1.5"),
        ("clip_adapter", {"residual_ratio": float("nan")}, ValueError, r"in \(0, 1\], got nan"),
    ],
)
def test_a_wrong_method_or_option_is_named_and_changes_nothing(
    tiny_clip, processor, method, wrong, error, message
):
    model = tiny_clip()
    if method == "clip_adapter":
        wrong = wrong | {"processor": processor}
    with pytest.raises(error, match=message):
        prepare(model, method, **wrong)
    assert detect(model) == "full"


def test_captions_have_no_linear_probe(tiny_clip, processor, colours):
    task = Task("captions", [(colours[i]["image"], f"no {i}") for i in range(4)])
    with pytest.raises(ValueError, match="'captions' must have classes, got captions"):
        prepare(tiny_clip(), "linear_probe", task=task, processor=processor)


WRAPPERS = {
    "Sequential": lambda m, *_: nn.Sequential(m),
    "PeftModel": lambda m, *_: get_peft_model(m, LoraConfig(**LORA)),
    "PromptClassifier": lambda m, task, processor: PromptClassifier(m, task, processor),
    "ClipAdapter": lambda m, *_: ClipAdapter(m, 24),
    "OptimizedModule": lambda m, *_: torch.compile(m, backend="eager"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_around_the_dual_encoder_is_refused(
    wrapper, method, tiny_clip, processor, colour_task
):
    model = WRAPPERS[wrapper](tiny_clip(), colour_task, processor)
    before = tuned(model)
    with pytest.raises(ValueError, match=f"itself, got {wrapper} around CLIPModel; prepare that"):
        prepare(model, method, **options(method, processor, colour_task))
    assert tuned(model) == before


def test_lora_without_peft_says_what_to_install(tiny_clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'iimm_callbacks\[peft\]'"):
        prepare(tiny_clip(), "lora")


@needs_open_clip
@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "CoCa", "EVA-02-CLIP"])
def test_lora_on_fused_attention_takes_no_dropout(name):
    model, _ = build(f"open_clip {name}")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"`dropout` must be 0 for .*, got 0.1: its attention"):
        prepare(model, "lora", dropout=0.1)
    assert detect(model) == "full"
    assert same(model.parameters(), before.parameters())


# How the heads start and what they compute


@pytest.mark.parametrize("name", ["CLIP", "ALIGN", "SigLIP", "open_clip CLIP", "open_clip CoCa"])
def test_clip_adapter_starts_at_the_zero_shot_model(name, colour_task):
    model, processor = build(name)
    pictures = colour_task.images(range(6))
    before = embed_images(model, processor, pictures)
    look = Probe(colour_task, processor=processor).look(model, 0)
    adapted = prepare(model, "clip_adapter", processor=processor, residual_ratio=0.7)
    after = embed_images(adapted, processor, pictures)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    again = Probe(colour_task, processor=processor).look(adapted, 0)
    assert np.array_equal(look.correct["colours"], again.correct["colours"])
    assert again.measurement.iimm == pytest.approx(look.measurement.iimm, abs=1e-6)


def test_clip_adapter_by_hand():
    head = ClipAdapter(nn.Linear(1, 1), 2, reduction=1, residual_ratio=0.25)
    with torch.no_grad():
        head.down.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        head.up.weight.copy_(torch.tensor([[2.0, 5.0], [1.0, 5.0]]))
    # W1 x = (1, -2), relu (1, 0), W2 (2, 1); 0.25 (2, 1) + 0.75 (1, 2) = (1.25, 1.75).
    adapted = head.adapt(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(adapted, torch.tensor([[1.25, 1.75]]))
    assert head.classify(adapted) is None


@pytest.mark.parametrize(("reduction", "width"), [(4, 6), (5, 4), (100, 1)])
def test_clip_adapter_reduces_by_a_factor_to_one_at_the_least(reduction, width):
    head = ClipAdapter(nn.Linear(1, 1), 24, reduction=reduction)
    assert head.down.weight.shape == (width, 24)
    assert head.up.weight.shape == (24, width)


@pytest.mark.parametrize("templates", ["a {} thing", ("a {} thing", "a photo of the {} circle")])
@pytest.mark.parametrize("name", ["CLIP", "ALIGN", "SigLIP", "open_clip CLIP"])
def test_linear_probe_starts_at_the_zero_shot_predictions(name, templates, colours):
    model, processor = build(name)
    task = Task("colours", colours, templates=templates)
    batch = ImageCollator(processor)([colours[i] for i in range(40)])
    with torch.no_grad():
        zero_shot = PromptClassifier(model, task, processor)(**batch)["logits"]
        probe = prepare(model, "linear_probe", task=task, processor=processor)
        logits = PromptClassifier(probe, task, processor)(**batch)["logits"]
    assert torch.equal(logits.argmax(1), zero_shot.argmax(1))
    shift = logits - zero_shot  # SigLIP's bias is the same for all classes
    torch.testing.assert_close(shift, torch.full_like(shift, shift[0, 0]), atol=1e-4, rtol=0)


def test_linear_probe_by_hand():
    probe = LinearProbe(nn.Linear(1, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 10)
    embeds = torch.tensor([[3.0, 4.0]])  # of length 5
    torch.testing.assert_close(probe.classify(embeds), torch.tensor([[6.0, 8.0]]))
    with torch.no_grad():
        probe.classifier.bias.copy_(torch.tensor([0.1, -0.1]))
    torch.testing.assert_close(probe.classify(embeds), torch.tensor([[7.0, 7.0]]))
    assert probe.adapt(embeds) is embeds


def test_a_linear_probe_of_many_prompts_embeds_them_in_batches(tiny_clip, processor, colour_task):
    seen, task = [], copy.copy(colour_task)
    task.templates = [f"{i} {{}}" for i in range(100)]
    model = tiny_clip()
    model.text_model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
    )
    head = prepare(model, "linear_probe", task=task, processor=processor)
    assert seen == [256, 100 * len(task.class_names) - 256]
    with torch.no_grad():
        encoder = find_encoder(model, processor)
        whole = encoder.embed_texts(model, encoder.tokenize(task.prompts([])))
    expected = class_embeddings(whole, 100)
    torch.testing.assert_close(head.classifier.weight, expected, atol=1e-5, rtol=0)


def test_the_scale_of_a_linear_probe_is_the_models_and_stays(tiny_clip, processor, colour_task):
    model = tiny_clip()
    probe = prepare(model, "linear_probe", task=colour_task, processor=processor)
    assert probe.logit_scale.item() == pytest.approx(np.exp(2.6592), rel=1e-5)
    assert not probe.logit_scale.requires_grad
    with torch.no_grad():
        model.logit_scale.zero_()
    assert probe.logit_scale.item() == pytest.approx(np.exp(2.6592), rel=1e-5)


@pytest.mark.parametrize("method", ["clip_adapter", "linear_probe"])
def test_under_a_head_the_encoder_stays_in_eval_mode_and_as_it_was(
    method, tiny_clip, processor, colour_task, colours, tmp_path
):
    model = tiny_clip(dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = prepare(model, method, **options(method, processor, colour_task))
    classifier = PromptClassifier(prepared, colour_task, processor).train()
    assert classifier.training
    assert prepared.training
    assert not any(module.training for module in model.modules())
    batch = ImageCollator(processor)([colours[i] for i in range(4)])
    assert torch.equal(classifier(**batch)["logits"], classifier(**batch)["logits"])
    train(classifier, colours, processor, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    assert same(model.state_dict().values(), before.values())


# Batch norm


def batch_norms(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running_" in name}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ALIGN", "CLAP"])
def test_batch_norms_follow_the_data_only_in_full_fine_tuning(name, method, colour_task):
    model, processor = build(name)
    prepared = prepare(model, method, **options(method, processor, colour_task))
    before = batch_norms(model)
    assert before
    rng = np.random.default_rng(0)
    sounds = [{"array": rng.normal(size=8000).astype("f"), "sampling_rate": 8000} for _ in "123"]
    inputs = colour_task.images(range(3)) if name == "ALIGN" else sounds
    for _ in range(2):
        embed_images(prepared.train(), processor, inputs)
    after = batch_norms(model)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved == (list(before) if method == "full" else [])


# LoRA


@pytest.mark.parametrize(
    "name", ["CLIP", "Chinese-CLIP", "BLIP", *(n for n in FAMILIES if n.startswith("open_clip"))]
)
def test_after_a_run_the_untouched_model_is_under_the_adapters_bit_for_bit(
    name, colours, colour_task, tmp_path
):
    model, processor = build(name)
    untouched = copy.deepcopy(model).requires_grad_(False)  # torch's attention minds the flag
    expected = embed_both(untouched.eval(), processor, colour_task)
    prepared = prepare(model, "lora", rank=2)
    train(PromptClassifier(prepared, colour_task, processor), colours, processor, tmp_path)
    adapted = embed_both(prepared.eval(), processor, colour_task)
    assert all((a - e).abs().max() > 1e-5 for a, e in zip(adapted, expected, strict=True))
    with prepared.disable_adapter():
        assert same(embed_both(prepared, processor, colour_task), expected)
    with zero_shot_twin(prepared):
        assert same(embed_both(prepared, processor, colour_task), expected)
    assert same(embed_both(prepared, processor, colour_task), adapted)


def adapter_gradients(model, processor, task, colours):
    """Largest gradient in each adapter weight, once `lora_B` is no longer zero."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.1)
    classifier = PromptClassifier(model, task, processor).train()
    classifier(**ImageCollator(processor)([colours[i] for i in range(8)]))["loss"].backward()
    return {n: p.grad.abs().max().item() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(
    "name", ["CLIP", "Chinese-CLIP", "BLIP", *(n for n in FAMILIES if n.startswith("open_clip"))]
)
def test_every_adapter_gets_a_gradient(name, colour_task, colours):
    model, processor = build(name)
    prepared = prepare(model, "lora", rank=2)
    gradients = adapter_gradients(prepared, processor, colour_task, colours)
    assert gradients
    assert min(gradients.values()) > 0, gradients


@needs_open_clip
def test_attention_that_reads_its_fused_weight_by_itself_gets_a_gradient_too(colour_task, colours):
    from timm.models.eva import EvaAttention

    model, processor = build("open_clip EVA-02-CLIP")
    for block in model.visual.trunk.blocks:
        block.attn = EvaAttention(32, num_heads=2, qkv_fused=True, scale_norm=False)
        nn.init.normal_(block.attn.q_bias, std=0.1)
        nn.init.normal_(block.attn.v_bias, std=0.1)
    model.eval()
    untouched = embed_both(copy.deepcopy(model).requires_grad_(False), processor, colour_task)
    prepared = prepare(model, "lora", rank=2)
    fused = spell("visual.trunk.blocks.{0,1}.attn.qkv.lora_{A,B}.default.weight")
    assert fused < tuned(prepared)
    gradients = adapter_gradients(prepared, processor, colour_task, colours)
    assert min(gradients.values()) > 0, gradients
    with prepared.eval().disable_adapter():
        for base, own in zip(embed_both(prepared, processor, colour_task), untouched, strict=True):
            torch.testing.assert_close(base, own, atol=1e-5, rtol=0)


# What is recognised


def by_hand(model, wanted):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = bool(re.search(wanted, name))
    return model


def with_adapter(model, config):
    model.add_adapter(config)
    return model


def thawed(head):
    head.dual_encoder.visual_projection.requires_grad_(True)
    return head


def beside(model, wanted, **config):
    adapted = get_peft_model(model, LoraConfig(**LORA, **config))
    for name, parameter in adapted.named_parameters():
        if re.search(wanted, name):
            parameter.requires_grad_(True)
    return adapted


def fake_config(model, **config):
    model.peft_config = {"default": SimpleNamespace(**config)}
    return model.requires_grad_(False)


PROJECTIONS = r"self_attn\.[qkv]_proj\.weight$"
DETECTED = {
    "all": (lambda m: m, "full"),
    "all but the scale": (lambda m: by_hand(m, r"^(?!logit_scale)"), "full"),
    "nothing": (lambda m: by_hand(m, r"^$"), "frozen"),
    "the scale alone": (lambda m: by_hand(m, "logit_scale"), "frozen"),
    "locked image tower": (lambda m: by_hand(m, r"^(?!vision_model|visual_proj)"), "partial"),
    "one projection": (lambda m: by_hand(m, "visual_projection"), "partial"),
    "biases": (lambda m: by_hand(m, r"bias$"), "bitfit"),
    "biases and the scale": (lambda m: by_hand(m, r"bias$|logit_scale"), "bitfit"),
    "biases of the last block": (lambda m: by_hand(m, r"\.1\..*bias$"), "bitfit"),
    "biases and a norm": (lambda m: by_hand(m, r"bias$|post_layernorm"), "partial"),
    "q, k, v": (lambda m: by_hand(m, PROJECTIONS), "attention"),
    "q, k, v of one tower": (lambda m: by_hand(m, "text.*" + PROJECTIONS), "attention"),
    "q, k, v and their biases": (lambda m: by_hand(m, r"self_attn\.[qkv]_proj"), "partial"),
    "q, k, v and out": (lambda m: by_hand(m, r"self_attn.*weight$"), "partial"),
    "LoRA": (lambda m: get_peft_model(m, LoraConfig(**LORA)), "lora"),
    "DoRA": (lambda m: get_peft_model(m, LoraConfig(**LORA, use_dora=True)), "dora"),
    "IA3": (lambda m: get_peft_model(m, IA3Config(**IA3)), "ia3"),
    "LoRA by transformers": (lambda m: with_adapter(m, LoraConfig(**LORA)), "lora"),
    "DoRA by transformers": (lambda m: with_adapter(m, LoraConfig(**LORA, use_dora=True)), "dora"),
    "LoRA and a tower": (lambda m: beside(m, r"vision_model.*layer"), "partial"),
    "LoRA and biases": (lambda m: beside(m, r"bias$"), "partial"),
    "LoRA and a module it copies": (
        lambda m: get_peft_model(m, LoraConfig(**LORA, modules_to_save=["visual_projection"])),
        "lora",
    ),
    "LoRA with biases": (lambda m: get_peft_model(m, LoraConfig(**LORA, bias="all")), "lora"),
    "LoRA with its own biases": (
        lambda m: get_peft_model(m, LoraConfig(**LORA, bias="lora_only")),
        "lora",
    ),
    "LoRA with its own biases and more": (
        lambda m: beside(m, r"norm\d\.bias$", bias="lora_only"),
        "partial",
    ),
    "a frozen LoRA": (
        lambda m: get_peft_model(m, LoraConfig(**LORA)).requires_grad_(False),
        "frozen",
    ),
    "biases beside a frozen LoRA": (
        lambda m: by_hand(get_peft_model(m, LoraConfig(**LORA)), r"bias$"),
        "bitfit",
    ),
    "any by name": (lambda m: fake_config(m, peft_type="PREFIX_TUNING"), "prefix_tuning"),
    "an empty config": (lambda m: setattr(m, "peft_config", {}) or m, "full"),
    "CLIP-Adapter": (lambda m: ClipAdapter(m, 24), "clip_adapter"),
    "CLIP-Adapter and more": (lambda m: thawed(ClipAdapter(m, 24)), "partial"),
    "linear probe": (lambda m: LinearProbe(m, torch.eye(24)), "linear_probe"),
    "linear probe and more": (lambda m: thawed(LinearProbe(m, torch.eye(24))), "partial"),
}


@pytest.mark.parametrize("case", DETECTED)
def test_the_method_is_recognised_bare_and_wrapped(tiny_clip, processor, colour_task, case):
    make, method = DETECTED[case]
    model = make(tiny_clip())
    assert detect(model) == method
    assert detect(PromptClassifier(model, colour_task, processor)) == method
    assert detect(torch.compile(copy.deepcopy(model), backend="eager")) == method


def test_prompt_tuning_is_recognised():
    config = hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert detect(nn.Sequential(get_peft_model(hf.GPT2LMHeadModel(config), tuning))) == (
        "prompt_tuning"
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["CLIP", "ALIGN", "open_clip CLIP"])
def test_what_is_prepared_for_a_method_is_recognised_as_it(name, method, colour_task):
    model, processor = build(name)
    assert detect(prepare(model, method, **options(method, processor, colour_task))) == method


@needs_open_clip
def test_fused_attention_tuned_by_hand_is_recognised():
    model, _ = build("open_clip CLIP")
    assert detect(by_hand(model, r"in_proj_weight$")) == "attention"
    assert detect(by_hand(model, r"bias$")) == "bitfit"
    coca, _ = build("open_clip CoCa")
    assert detect(by_hand(coca, r"attn.*(in_proj|[qkv]_proj)_weight$")) == "attention"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["CLIP", "ALIGN", "open_clip CLIP"])
def test_a_model_has_one_fingerprint_bare_and_prepared(name, method, colour_task):
    model, processor = build(name)
    expected = model_fingerprint(model)
    prepared = prepare(model, method, **options(method, processor, colour_task))
    assert model_fingerprint(prepared) == expected
    classifier = PromptClassifier(prepared, colour_task, processor)
    assert model_fingerprint(classifier) == expected
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim > 1).add_(1)
    assert model_fingerprint(classifier) != expected


# The untouched model under adapters


def spoil(model):
    """As training would: every adapter weight gets another value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return model


def merged(model):
    model.merge_adapter()
    return model


def with_bias(model):
    model.base_model.model.text_model.final_layer_norm.bias.requires_grad_(True)
    return model


def lora(**more):
    return lambda m: get_peft_model(m, LoraConfig(**LORA | more))


def on_towers(*towers):
    """LoRA on each of these towers alone, by a `PeftModel` of its own; else frozen."""

    def prepared(model):
        model.requires_grad_(False)
        for tower in towers:
            setattr(model, tower, get_peft_model(getattr(model, tower), LoraConfig(**LORA)))
        return model

    return prepared


def beside_a_tower_that_trains(model):
    model = on_towers("vision_model")(model)
    model.text_model.requires_grad_(True)
    return model


TWINS = {
    "LoRA": lora(),
    "LoRA on each tower": on_towers("text_model", "vision_model"),
    "LoRA on one tower": on_towers("vision_model"),
    "LoRA on random": lora(init_lora_weights=False),
    "LoRA with a copy of a module": lora(modules_to_save=["visual_projection"]),
    "DoRA": lora(use_dora=True),
    "IA3": lambda m: get_peft_model(m, IA3Config(**IA3)),
    "prepared": lambda m: prepare(m, "lora", rank=2),
    "wrapped": lambda m: nn.Sequential(lora()(m)),
    "by transformers": lambda m: with_adapter(m, LoraConfig(**LORA)),
    "frozen since": lambda m: lora()(m).requires_grad_(False),
    "by transformers, frozen": lambda m: with_adapter(m, LoraConfig(**LORA)).requires_grad_(False),
}
NO_TWIN = {
    "no peft": lambda m: m,
    "bitfit": lambda m: prepare(m, "bitfit"),
    "tuned biases": lora(bias="all"),
    "biases of LoRA layers": lora(bias="lora_only"),
    "tuned biases, frozen since": lambda m: lora(bias="all")(m).requires_grad_(False),
    "merged": lambda m: merged(lora()(m)),
    "thawed": lambda m: with_bias(lora()(m)),
    "beside a tower that trains": beside_a_tower_that_trains,
    "PiSSA": lora(init_lora_weights="pissa"),
    "another config": lambda m: fake_config(m, peft_type="LORA", bias="all"),
}


@pytest.mark.parametrize("case", TWINS)
def test_inside_the_twin_the_model_is_the_untouched_one(tiny_clip, processor, colour_task, case):
    expected = embed_both(tiny_clip().eval(), processor, colour_task)
    model = spoil(TWINS[case](tiny_clip())).eval()
    flags = [p.requires_grad for p in model.parameters()]
    adapted = embed_both(model, processor, colour_task)
    assert not same(adapted, expected)
    with zero_shot_twin(model):
        assert same(embed_both(model, processor, colour_task), expected)
    assert same(embed_both(model, processor, colour_task), adapted)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("case", NO_TWIN)
def test_there_is_no_twin_where_the_untouched_model_is_gone(tiny_clip, case):
    assert zero_shot_twin(NO_TWIN[case](tiny_clip())) is None


def test_the_twin_ends_when_what_runs_inside_fails(tiny_clip, processor, colour_task):
    for make in (TWINS["LoRA"], TWINS["by transformers"]):
        model = spoil(make(tiny_clip())).eval()
        adapted = embed_both(model, processor, colour_task)
        with pytest.raises(RuntimeError, match="inside"), zero_shot_twin(model):
            raise RuntimeError("inside")
        assert same(embed_both(model, processor, colour_task), adapted)
        assert detect(model) == "lora"


def test_a_thawed_logit_scale_changes_no_method(processor, tiny_clip):
    model = prepare(tiny_clip(), "clip_adapter", processor=processor)
    model.dual_encoder.logit_scale.requires_grad_(True)
    assert detect(model) == "clip_adapter"


def test_adapters_on_a_base_that_trains_too_are_partial(tiny_clip):
    model = prepare(tiny_clip(), "lora").requires_grad_(True)
    assert detect(model) == "partial"


class Beside(nn.Module):
    """A user's module with other modules beside the one that trains."""

    def __init__(self, model, **others):
        super().__init__()
        for name, other in others.items():
            setattr(self, name, other)
        self.student = model


@pytest.mark.parametrize("method", ["full", "bitfit", "attention", "lora"])
def test_what_is_frozen_around_the_encoder_changes_no_method(tiny_clip, method):
    teacher, loss = tiny_clip().requires_grad_(False), nn.Linear(2, 2).requires_grad_(False)
    assert detect(Beside(prepare(tiny_clip(), method), teacher=teacher, loss=loss)) == method
    thawed = nn.Linear(2, 2)
    assert detect(Beside(prepare(tiny_clip(), "bitfit"), head=thawed)) == "partial"


PEFT_KINDS = {
    "LoRA": LoraConfig(**LORA),
    "AdaLoRA": AdaLoraConfig(target_modules=["q_proj"], total_step=9, tinit=1, tfinal=2),
    "IA3": IA3Config(**IA3),
    "tokens": LoraConfig(**LORA, trainable_token_indices={"token_embedding": [1, 2]}),
    "nested": LoraConfig(
        r=2, target_modules=[], target_parameters=["fc1.weight", "fc2.weight", "q_proj.weight"]
    ),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_a_model_has_one_fingerprint_under_every_adapter(tiny_clip, kind):
    if kind == "tokens" and hf.__version__.startswith("4."):
        pytest.skip("peft cannot find the token table of transformers 4's CLIPModel")
    expected = model_fingerprint(tiny_clip())
    assert model_fingerprint(get_peft_model(tiny_clip(), PEFT_KINDS[kind])) == expected


def test_a_weights_name_has_no_wrapper_however_many_are_around():
    assert bare_name("module.module.q.base_layer.base_layer.weight") == "q.weight"
    assert bare_name("base_model.model.submodule.weight") == "submodule.weight"


def test_the_active_adapter_counts(tiny_clip):
    model = prepare(tiny_clip(), "lora")
    targets = ["q_proj", "v_proj"]
    model.add_adapter("second", LoraConfig(r=2, target_modules=targets, use_dora=True))
    assert detect(model) == "lora"
    model.set_adapter("second")
    assert detect(model) == "dora"


def test_there_is_no_twin_where_batch_norms_move():
    moving = get_peft_model(
        tiny.FAMILIES["ALIGN"]()[0], LoraConfig(r=2, target_modules=["query", "value"])
    )
    assert zero_shot_twin(moving) is None
    assert zero_shot_twin(prepare(tiny.FAMILIES["ALIGN"]()[0], "lora")) is not None
