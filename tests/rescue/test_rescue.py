"""Rescue: each mix is the formula, the choice keeps to the limit, a failure leaves no trace."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from forked import in_a_fork
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from rescue_worker import main
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from iimm_callbacks import IIMMCallback, PromptClassifier
from iimm_callbacks.data.tasks import Task
from iimm_callbacks.measures.results import Measurement
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.models.wrappers import ClipAdapter
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.look import Look
from iimm_callbacks.records.run_file import check_rescue
from iimm_callbacks.records.verdict import Limits
from iimm_callbacks.reports.tables import rescue_table
from iimm_callbacks.rescue.counterparts import save_weights
from iimm_callbacks.rescue.mixing import Mixture, keep_untouched, needs_untouched
from iimm_callbacks.rescue.rescuer import Rescuer, is_exceeded
from iimm_callbacks.rescue.sweep import Mix, choose, held_out, measure_mixes, rescue, sweep

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ANY = Limits(1.0)


def stir(model, scale=0.05):
    """Move all that trains: what a fine-tune would have done, in no time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# --- the mix is the formula ---


@pytest.mark.parametrize("alpha", [0.25, 0.7])
def test_every_weight_is_mixed_by_the_formula_of_wise_ft(tiny_clip, alpha):
    base, model = tiny_clip(), stir(tiny_clip())
    before, after = state(base), state(model)
    Mixture(model, base).set(alpha)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            expected = (1 - alpha) * before[name].double() + alpha * after[name].double()
            torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_both_ends_are_exact_and_the_middle_is_rounded_once(tiny_clip, dtype):
    base, model = tiny_clip().to(torch.float64), stir(tiny_clip().to(dtype))
    tuned, mixture = state(model), Mixture(model, base)
    mixture.set(0.0)
    assert_equal(state(model), state(tiny_clip().to(torch.float64).to(dtype)))
    mixture.set(0.5)
    name = "visual_projection.weight"
    wide = torch.promote_types(dtype, torch.float32)
    half = (base.state_dict()[name].to(wide) + tuned[name].to(wide)) / 2
    eps, atol = torch.finfo(dtype).eps, torch.finfo(wide).eps
    torch.testing.assert_close(model.state_dict()[name].to(wide), half, atol=atol, rtol=eps)
    mixture.set(1.0)
    assert_equal(state(model), tuned)


class Toy(nn.Module):
    """A tied weight, a batch norm with an integer buffer, and a mask of infinities."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.one, self.other = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.register_buffer("mask", torch.full((3, 3), -torch.inf), persistent=False)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.other(self.one(self.norm(x)))


def test_tied_weights_are_mixed_once_integers_kept_and_batch_norms_owned_up_to():
    base, model = Toy(), stir(Toy(), 1.0)
    for _ in range(3):
        model(torch.arange(12.0).reshape(4, 3))
    tuned = state(model)
    mixture = Mixture(model, base.state_dict())
    assert mixture.n_tensors == 7  # of the norm 4, of the tied layers a weight and two biases
    assert "batch norms" in mixture.notes[0]
    mixture.set(0.5)
    mixed = state(model)
    assert mixed["norm.num_batches_tracked"] == 3
    for name in ("norm.running_mean", "one.weight", "other.weight"):
        half = (base.state_dict()[name] + tuned[name]) / 2
        torch.testing.assert_close(mixed[name], half)
    assert model.other.weight is model.one.weight


def wrap_compiled(model, *_):
    return torch.compile(model, backend="eager")


def wrap_classifier(model, task, processor):
    return PromptClassifier(model, task, processor)


@pytest.mark.parametrize("wrap", [wrap_compiled, wrap_classifier])
@pytest.mark.parametrize("as_state", [False, True])
def test_a_wrapped_model_and_a_wrapped_base_find_each_other(
    tiny_clip, colour_task, processor, wrap, as_state
):
    model = wrap(stir(tiny_clip()), colour_task, processor)
    base = PromptClassifier(tiny_clip(), colour_task, processor)
    Mixture(model, base.state_dict() if as_state else base).set(0.0)
    inner = getattr(model, "dual_encoder", model)
    assert_equal(state(getattr(inner, "_orig_mod", inner)), state(tiny_clip()))


# --- adapters and heads ---

ADAPTERS = {
    "LoRA": lambda m: get_peft_model(m, LoraConfig(**LORA)),
    "rank-stabilised": lambda m: get_peft_model(m, LoraConfig(**LORA, use_rslora=True)),
    "of a table": lambda m: get_peft_model(m, LoraConfig(r=2, target_modules=["token_embedding"])),
    "of a weight": lambda m: get_peft_model(
        m, LoraConfig(r=2, target_modules=[], target_parameters=["fc1.weight"])
    ),
    "IA3": lambda m: get_peft_model(
        m, IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"])
    ),
    "whole modules": lambda m: get_peft_model(
        m, LoraConfig(**LORA, modules_to_save=["text_projection"])
    ),
    "AdaLoRA": lambda m: get_peft_model(
        m, AdaLoraConfig(target_modules=["q_proj"], total_step=9, tinit=1, tfinal=2)
    ),
}  # fmt: skip


def merged(model):
    """The plain weights of a model under adapters."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_scaling_an_adapter_mixes_the_weights_that_it_stands_for(tiny_clip, kind):
    model = stir(ADAPTERS[kind](tiny_clip()), 0.2)
    tuned, before, whole = merged(model), tiny_clip().state_dict(), state(model)
    mixture = Mixture(model)
    for alpha in (0.3, 0.8):
        mixture.set(alpha)
        for name, value in merged(model).items():
            expected = torch.lerp(before[name].float(), tuned[name].float(), alpha)
            torch.testing.assert_close(value.float(), expected, atol=1e-6, rtol=1e-5)
    mixture.set(0.0)
    assert_equal(merged(model), before)
    mixture.set(1.0)
    assert_equal(state(model), whole)


@pytest.mark.parametrize("kind", ["LoRA", "IA3", "whole modules"])
def test_a_saved_adapter_is_loaded_as_it_was_rescued(tiny_clip, tmp_path, kind):
    model = stir(ADAPTERS[kind](tiny_clip()), 0.2)
    Mixture(model).set(0.4)
    model.save_pretrained(tmp_path)
    assert_equal(merged(PeftModel.from_pretrained(tiny_clip(), tmp_path)), merged(model))


def test_adapters_beside_tuned_biases_are_rescued_with_the_base(tiny_clip):
    model = stir(get_peft_model(tiny_clip(), LoraConfig(**LORA, bias="all")), 0.2)
    with pytest.raises(ValueError, match=r"`base` must be given: .*tuned biases"):
        Mixture(model)
    tuned, before = merged(model), tiny_clip().state_dict()
    Mixture(model, tiny_clip()).set(0.5)
    for name, value in merged(model).items():
        expected = torch.lerp(before[name].float(), tuned[name].float(), 0.5)
        torch.testing.assert_close(value.float(), expected, atol=1e-6, rtol=1e-5)


def test_a_state_dict_of_a_model_under_adapters_is_a_base(tiny_clip):
    config = LoraConfig(**LORA, bias="all", modules_to_save=["visual_projection"])
    model = get_peft_model(tiny_clip(), config)
    before = state(model)
    stir(model, 0.2)
    plain = copy.deepcopy(model).merge_and_unload()
    Mixture(model, before).set(0.0)
    assert_equal(merged(model), tiny_clip().state_dict())
    Mixture(plain, before).set(0.0)
    assert_equal(state(plain), tiny_clip().state_dict())


@pytest.mark.parametrize("kind", ["kept", "base", "state"])
def test_running_statistics_of_a_copied_batch_norm_are_mixed_with_the_originals(kind):
    name = "vision_model.embeddings.batchnorm"
    model, _ = tiny.FAMILIES["ALIGN"]()
    base = copy.deepcopy(model)
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=[name])
    model = get_peft_model(model, config)
    untouched = {"base": base, "state": state(model), "kept": keep_untouched(model)}[kind]
    copied = model.get_submodule(f"base_model.model.{name}").modules_to_save["default"]
    first = copied.running_mean.clone()
    copied.running_mean.add_(0.5)
    mixture = Mixture(stir(model), untouched)
    mixture.set(0.5)
    torch.testing.assert_close(copied.running_mean, first + 0.25)
    mixture.set(0.0)
    assert torch.equal(copied.running_mean, first)
    assert "batch norms" in mixture.notes[0]


def test_a_clip_adapter_is_scaled_as_by_a_smaller_residual_ratio(tiny_clip, processor):
    model = prepare(tiny_clip(), "clip_adapter", processor=processor)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    stir(model, 0.5)
    r, alpha = model.residual_ratio, 0.4
    smaller = copy.deepcopy(model)
    smaller.residual_ratio = alpha * r / (alpha * r + 1 - r)
    mixture = Mixture(model)
    mixture.set(alpha)
    unit = nn.functional.normalize
    torch.testing.assert_close(unit(model.adapt(x)), unit(smaller.adapt(x)))
    mixture.set(0.0)
    torch.testing.assert_close(unit(model.adapt(x)), unit(x))


# --- what is refused, and why ---


def with_nan(model):
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = torch.nan
    return model


def switched_off(model):
    model.base_model.disable_adapter_layers()
    return model


def fsdp(model):
    kind = type("FSDPModule", (type(model),), {})
    model.__class__ = kind
    return model


def deeper(model):
    layers = model.text_model.encoder.layers
    layers.append(copy.deepcopy(layers[0]))
    return model


def wider(model):
    model.visual_projection.weight = nn.Parameter(torch.zeros(25, 32))
    return model


def in_integers(model):
    weight = model.visual_projection.weight
    model.visual_projection.weight = nn.Parameter(
        torch.zeros(weight.shape, dtype=torch.int8), requires_grad=False
    )
    return model


class OwnHead(nn.Module):
    """A user's classifier on a dual encoder."""

    def __init__(self, model):
        super().__init__()
        self.clip, self.head = model, nn.Linear(24, 4)

    def classify(self, image_embeds):
        return self.head(image_embeds)


def probe_head(model):
    return prepare_probe(model)


def prepare_probe(model):
    from iimm_callbacks.models.wrappers import LinearProbe

    return LinearProbe(model, torch.eye(3, 24))


REFUSED = {
    "diverged": (with_nan, True, r"'visual_projection.weight' with infinity or NaN: training has"),
    "no base": (stir, False, "`base` must be given, as `model` has no adapters"),
    "the same model": (lambda m: m, True, "differs in nothing"),
    "FSDP": (fsdp, True, "that FSDP shards; save it"),
    "a deeper model": (deeper, True, "lacks 'text_model.encoder.layers.2"),
    "a wider one": (wider, True, r"is \[25, 32\] there, got \[24, 32\]"),
    "integers": (in_integers, True, "'visual_projection.weight' in torch.int8"),
    "DoRA": (
        lambda m: get_peft_model(m, LoraConfig(**LORA, use_dora=True)),
        False,
        "cannot be scaled, .*DoRA.*merge_and_unload",
    ),
    "LoHa": (
        lambda m: get_peft_model(m, LoHaConfig(r=2, target_modules=["q_proj"])),
        False,
        "cannot be scaled, 'hada_w1_a' of .*: LoRA without variants .* are supported",
    ),
    "a classifier of one's own": (
        lambda m: OwnHead(m),
        True,
        "has a classifier of its own, OwnHead.classify, of which there is no mix",
    ),
    "PiSSA": (
        lambda m: get_peft_model(m, LoraConfig(**LORA, init_lora_weights="pissa")),
        False,
        "an initialisation that changed the weights",
    ),
    "a merged adapter": (
        lambda m: (a := stir(get_peft_model(m, LoraConfig(**LORA))), a.merge_adapter())[0],
        False,
        "with one merged; unmerge it",
    ),
    "one switched off": (
        lambda m: switched_off(get_peft_model(m, LoraConfig(**LORA))),
        False,
        "must have its adapters switched on",
    ),
    "a linear probe": (probe_head, False, "a LinearProbe, which off-target tasks do not pass"),
    "no residual": (
        lambda m: ClipAdapter(m, 24, residual_ratio=1.0),
        False,
        "`residual_ratio` 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_mixes_is_refused_with_the_reason(tiny_clip, case):
    make, with_base, message = REFUSED[case]
    model = make(tiny_clip())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        Mixture(model, tiny_clip() if with_base else None)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0, equal_nan=True)


def test_a_base_of_another_architecture_names_what_is_too_many(tiny_clip):
    with pytest.raises(ValueError, match=r"has beside them 'text_model.encoder.layers.2"):
        Mixture(stir(tiny_clip()), deeper(tiny_clip()))
    with pytest.raises(TypeError, match="got int"):
        Mixture(stir(tiny_clip()), 3)


def test_a_weight_that_began_to_train_later_was_not_kept(tiny_clip):
    model = prepare(tiny_clip(), "bitfit")
    kept = keep_untouched(model)
    model.visual_projection.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'visual_projection.weight' began to train later"):
        Mixture(stir(model), kept)


# --- the curve and the choice ---


def mix(alpha, gain, forgetting, limit=0.05, worst=None):
    worst = forgetting if worst is None else worst
    return Mix(alpha, 0.5, gain, 0.0, forgetting, 0.0, worst, 0.0, "a", forgetting <= limit)


CURVES = {
    "the most gain inside": ([(0, 0), (0.1, 0.04), (0.2, 0.05), (0.3, 0.06)], 2, "3 of 4 mixes"),
    "not the largest α inside": ([(0, 0), (0.2, 0.02), (0.1, 0.04), (0.3, 0.06)], 1, "3 of 4"),
    "of equals the smaller α": ([(0, 0), (0.1, 0.03), (0.1, 0.01), (0.3, 0.06)], 1, "gains most"),
    "inside again later": ([(0, 0), (0.1, 0.06), (0.2, 0.04), (0.3, 0.06)], 2, "2 of 4"),
    "nothing gains": ([(0, 0), (-0.1, 0.01), (0.0, 0.02), (0.3, 0.06)], 0, "no mix gains"),
    "it was inside all along": ([(0, 0), (0.1, 0.0), (0.2, 0.0), (0.3, 0.01)], 3, "is within"),
}


@pytest.mark.parametrize("case", CURVES)
def test_the_choice(case):
    points, expected, reason = CURVES[case]
    mixes = [mix(i / 3, *point) for i, point in enumerate(points)]
    alpha, why = choose(mixes, Limits(0.05))
    assert alpha == expected / 3
    assert reason in why
    assert "5.0 points of mean forgetting" in why


def look_of(**correct):
    bits = {name: np.array(row, dtype=bool) for name, row in correct.items()}
    return Look(0, Measurement(0.0, 0.0, 0.0, 0.0, 4, 2), bits, 0.0)


def test_a_row_of_the_curve_by_hand():
    looks = {
        0.0: look_of(task=[0, 0, 1, 1], a=[1, 1, 1, 1], b=[1, 1, 0, 0]),
        1.0: look_of(task=[1, 1, 1, 0], a=[1, 1, 1, 0], b=[1, 1, 1, 0]),
    }
    first, last = measure_mixes(looks, Limits(0.2, "worst"))
    assert (first.gain, first.forgetting, first.worst, first.inside) == (0, 0, 0, True)
    assert (last.alpha, last.accuracy, last.gain) == (1.0, 0.75, 0.25)
    assert last.forgetting == pytest.approx((0.25 - 0.25) / 2)
    assert (last.worst, last.worst_task, last.inside) == (0.25, "a", False)
    assert measure_mixes(looks, Limits(0.2))[1].inside


def test_the_best_of_many_equals_flatters_and_held_out_images_do_not():
    # Eleven mixes that are truly alike: each gains and forgets nothing but noise.
    rng = np.random.default_rng(0)
    told, honest = [], []
    for _ in range(40):
        bits = {i / 10: {n: rng.random(200) < 0.5 for n in ("task", "a")} for i in range(11)}
        looks = {alpha: look_of(**correct) for alpha, correct in bits.items()}
        mixes = measure_mixes(looks, Limits(1.0))
        alpha, _ = choose(mixes, Limits(1.0))
        told.append(next(m.gain for m in mixes if m.alpha == alpha))
        honest.append(held_out(looks, Limits(1.0)).gain)
    assert np.mean(told) > 0.04
    assert abs(np.mean(honest)) < 2.5 * np.std(honest) / np.sqrt(len(honest))


# --- model in, model out ---


@pytest.fixture(scope="module")
def trained():
    """Filled by the first test: trained once for all."""
    return {}


@pytest.fixture
def tuned(trained, make_trainer):
    trainer = make_trainer(max_steps=30, learning_rate=2e-3)
    if not trained:
        trainer.train()
        trained.update(state(trainer.model))
    trainer.model.load_state_dict(trained)
    return trainer.model


def test_the_model_is_left_with_the_mix_that_was_chosen(
    tuned, tiny_clip, processor, colour_task, shape_task
):
    after = state(tuned.dual_encoder)
    found = rescue(tuned, tiny_clip(), colour_task, [shape_task], ANY, progress=False)
    assert [m.alpha for m in found.mixes] == pytest.approx(np.linspace(0, 1, 11))
    assert found.chosen.gain == max(m.gain for m in found.mixes) > 0
    assert found.applied
    expected = stir(tiny_clip(), 0.0)
    with torch.no_grad():
        for name, value in expected.named_parameters():
            value.copy_(torch.lerp(value, after[name], found.alpha))
    assert_equal(state(tuned.dual_encoder), state(expected))
    probe = Probe(colour_task, [shape_task], processor=processor, progress=False)
    look, first = probe.look(tuned, 0), probe.look(tiny_clip(), 0)
    assert look.accuracy("colours") == found.chosen.accuracy
    assert found.chosen.gain == pytest.approx(look.accuracy("colours") - first.accuracy("colours"))
    assert found.chosen.forgetting == pytest.approx(
        first.accuracy("shapes") - look.accuracy("shapes")
    )


def test_only_measured_the_model_keeps_its_weights_modes_and_gradients(
    tuned, tiny_clip, colour_task, shape_task
):
    tuned.train()
    before = state(tuned)
    found = rescue(
        tuned, tiny_clip, colour_task, [shape_task], ANY, alphas=[0.5], apply=False, progress=False
    )
    assert [m.alpha for m in found.mixes] == [0, 0.5, 1]
    assert_equal(state(tuned), before)
    assert all(m.training for m in tuned.modules())
    assert all(p.requires_grad for p in tuned.parameters())


class Fails(Probe):
    def look(self, model, step, autocast_dtype=None, **settings):
        self.left = getattr(self, "left", 3) - 1
        if not self.left:
            raise KeyboardInterrupt
        return super().look(model, step, autocast_dtype, **settings)


def test_a_failure_half_way_leaves_every_bit_as_it_was(
    tuned, tiny_clip, processor, colour_task, shape_task, tmp_path
):
    before = state(tuned)
    probe = Fails(colour_task, [shape_task], processor=processor, progress=False)
    with pytest.raises(KeyboardInterrupt):
        sweep(tuned, tiny_clip(), probe, ANY)
    assert_equal(state(tuned), before)
    (tmp_path / "file").touch()
    probe = Probe(colour_task, [shape_task], processor=processor, progress=False)
    with pytest.raises(OSError):  # noqa: PT011  # of the system, which words it differently
        sweep(tuned, tiny_clip(), probe, ANY, keep_tuned=tmp_path / "file" / "tuned.safetensors")
    assert_equal(state(tuned), before)


def test_a_half_trained_model_is_not_taken_for_the_untouched_one(
    tuned, tiny_clip, processor, colour_task, shape_task
):
    before = state(tuned)
    probe = Probe(colour_task, [shape_task], processor=processor, progress=False)
    baseline = probe.look(tiny_clip(), 0)
    half = copy.deepcopy(tuned)
    Mixture(half, tiny_clip()).set(0.9)
    with pytest.raises(ValueError, match=r"must be the model that was measured before training"):
        sweep(tuned, half, probe, ANY, baseline=baseline)
    assert_equal(state(tuned), before)


def test_arguments_are_checked(tiny_clip, processor, colour_task, shape_task):
    model, base = stir(tiny_clip()), tiny_clip()
    for limits, off_target, missing in (
        (Limits(None), [shape_task], "`max_forgetting`"),
        (Limits(), [], "off-target"),
    ):
        with pytest.raises(ValueError, match=f"got no {missing}"):
            rescue(model, base, colour_task, off_target, limits, processor=processor)
    for alpha in (-0.1, 1.1, "half", True):
        with pytest.raises(ValueError, match=r"`alphas` must be numbers in \[0, 1\]"):
            rescue(model, base, colour_task, [shape_task], processor=processor, alphas=[alpha])
    with pytest.raises(ValueError, match=r"`alpha` must lie in \[0, 1\], got 2"):
        Mixture(model, base).set(2)


def test_a_metric_that_is_no_mean_over_images_is_refused(
    tiny_clip, processor, colour_task, shape_task
):
    def half(predictions, references):
        return (predictions == references).mean() / 2

    by_half, by_recall = (
        Task("colours", colour_task.dataset, templates="a {} thing", probe_size=32, metric=metric)
        for metric in (half, "recall@1")
    )
    model, base = stir(tiny_clip()), tiny_clip()
    for task, off_target in ((by_half, shape_task), (shape_task, by_half)):
        for refused in (
            lambda: rescue(model, base, task, [off_target], processor=processor),  # noqa: B023
            lambda: IIMMCallback(task, off_target, action="rescue"),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"'colours' must be accuracy or recall@k .*'half"):
                refused()
    IIMMCallback(by_half, shape_task, action="stop")
    found, plain = (
        rescue(
            model, base, task, [shape_task], ANY, processor=processor, progress=False, apply=False
        )
        for task in (by_recall, colour_task)
    )
    assert [m.accuracy for m in found.mixes] == [m.accuracy for m in plain.mixes]


def test_tasks_of_one_name_and_the_task_itself_are_refused(tiny_clip, colour_task, shape_task):
    model, base = stir(tiny_clip()), tiny_clip()
    twin = Task("shapes", shape_task.dataset, seed=1)
    for off_target, says in (
        ([shape_task, twin], "must have names of their own, got ['shapes'] more than once"),
        ([colour_task], "is the task itself"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            rescue(model, base, colour_task, off_target, progress=False)


def test_the_curve_is_json_a_run_file_can_hold_and_a_table_can_show(
    tuned, tiny_clip, colour_task, shape_task
):
    limits = Limits(0.05, "worst")
    found = rescue(tuned, tiny_clip(), colour_task, [shape_task], limits, progress=False)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert check_rescue(data, "rescue") == data
    assert data["alpha"] == found.alpha
    table = rescue_table(data, "colours")
    assert max(map(len, table.splitlines()[:15])) <= 96
    assert f"Chosen: α = {found.alpha:.3g}, as {found.reason}." in table
    assert "The model is this mix now." in table
    assert re.search("α.*recall@5.*gain", rescue_table(data, "colours", "recall@5"))
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in table.splitlines()]
    for m in found.mixes:
        assert [f"{m.alpha:.2f}", f"{100 * m.accuracy:.1f} %"] in rows
    for broken in (
        {"mixes": []},
        {"alpha": 0.123},
        {"held_out": None},
        {"mixes": [data["mixes"][0] | {"gain": "much"}]},
    ):
        with pytest.raises(ValueError, match="rescue"):
            check_rescue(data | broken, "rescue")


# --- at the end of a run ---


class RescueAtEnd(TrainerCallback):
    """What `action="rescue"` does, with the limit always exceeded."""

    def __init__(self, probe, base_model=None):
        self.probe, self.base_model = probe, base_model
        self.found = self.baseline = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.rescuer = Rescuer(Path(args.output_dir), "iimm_colours", self.base_model)
        if state.global_step:
            self.rescuer.resume(model)
        else:
            self.rescuer.begin(model, will_save=args.save_strategy != "no")
            self.baseline = self.probe.look(model, 0)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.tuned = {name: value.clone() for name, value in model.state_dict().items()}
        self.found = self.rescuer.rescue(model, self.probe, ANY, baseline=self.baseline)


@pytest.fixture
def at_end(processor, colour_task, shape_task):
    def build(base_model=None):
        probe = Probe(colour_task, [shape_task], processor=processor, progress=False)
        return RescueAtEnd(probe, base_model)

    return build


RATES = {"full": 2e-3, "lora": 3e-3, "clip_adapter": 3e-2}


@pytest.mark.parametrize("method", RATES)
def test_a_run_ends_with_the_mix_and_its_tuned_weights_on_disk(
    make_trainer, tiny_clip, processor, at_end, tmp_path, method
):
    options = {"processor": processor} if method == "clip_adapter" else {}
    model = prepare(tiny_clip(), method, **options)
    callback = at_end()
    trainer = make_trainer([callback], model=model, max_steps=20, learning_rate=RATES[method])
    trainer.train()
    found = callback.found
    assert 0 < found.alpha < 1, "choose another learning rate: this tests nothing"
    assert not callback.rescuer.kept_file.exists()  # no checkpoint, nothing to resume
    trainer.model.load_state_dict(load_file(callback.rescuer.tuned_file), strict=False)
    assert_equal(state(trainer.model), callback.tuned)
    assert needs_untouched(model) == (method == "full")


def test_of_a_model_that_trains_in_part_only_that_part_is_kept_and_mixed(tiny_clip):
    model = prepare(tiny_clip(), "bitfit")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = keep_untouched(model)
    assert needs_untouched(model)
    assert set(kept.weights) == trains
    mixture = Mixture(stir(model), kept)
    assert mixture.tuned_weights().keys() == trains
    mixture.set(0.0)
    assert_equal(state(model), state(tiny_clip()))


def test_a_resumed_run_is_rescued_from_the_weights_kept_beside_its_checkpoints(
    make_trainer, tiny_clip, at_end, tmp_path
):
    settings = {"max_steps": 4, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 2}
    whole = at_end()
    trainer = make_trainer([whole], **settings)
    trainer.train()
    kept = load_file(whole.rescuer.kept_file)
    assert_equal(kept, {n: v for n, v in tiny_clip().state_dict().items() if n in kept})
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for base_model in (None, tiny_clip):
        if base_model is not None:
            whole.rescuer.kept_file.unlink()
        resumed = at_end(base_model)
        resumed.baseline = whole.baseline
        again = make_trainer([resumed], **settings)
        again.train(resume_from_checkpoint=checkpoint)
        assert replace(resumed.found, runtime=0) == replace(whole.found, runtime=0)
        assert_equal(state(again.model), state(trainer.model))
    with pytest.raises(ValueError, match="`base_model` must be given to rescue a resumed run"):
        make_trainer([at_end()], **settings).train(resume_from_checkpoint=checkpoint)


STARTED = {
    "trained before": lambda m: stir(get_peft_model(m, LoraConfig(**LORA)), 0.2),
    "a copy trained before": lambda m: stir(
        get_peft_model(m, LoraConfig(**LORA, modules_to_save=["visual_projection"])), 0.2
    ),
    "IA3 trained before": lambda m: stir(ADAPTERS["IA3"](m), 0.2),
    "PiSSA": lambda m: get_peft_model(m, LoraConfig(**LORA, init_lora_weights="pissa")),
}


@pytest.mark.parametrize("kind", STARTED)
def test_adapters_that_do_something_before_the_first_step_need_the_base_model(
    tiny_clip, tmp_path, kind
):
    model = STARTED[kind](tiny_clip())
    with pytest.raises(ValueError, match=r"adapters that do nothing yet .* give `base_model`"):
        Rescuer(tmp_path, "iimm_x").begin(model, will_save=False)
    Rescuer(tmp_path, "iimm_x", tiny_clip()).begin(model, will_save=False)
    Mixture(stir(model), tiny_clip()).set(0.0)
    assert_equal(merged(model), tiny_clip().state_dict())


@pytest.mark.parametrize("kind", ["gaussian", *ADAPTERS])
def test_adapters_that_start_at_nothing_are_kept_for(tiny_clip, tmp_path, kind):
    gaussian = LoraConfig(**LORA, init_lora_weights="gaussian")
    model = ADAPTERS.get(kind, lambda m: get_peft_model(m, gaussian))(tiny_clip())
    rescuer = Rescuer(tmp_path, "iimm_x")
    rescuer.begin(model, will_save=False)
    Rescuer(tmp_path, "iimm_x").begin(stir(model), will_save=False, kept=rescuer)  # tried again


def test_a_classifier_of_ones_own_is_refused_before_training(tiny_clip, tmp_path):
    for base in (None, tiny_clip()):
        with pytest.raises(ValueError, match="has a classifier of its own, OwnHead"):
            Rescuer(tmp_path, "iimm_x", base).begin(OwnHead(tiny_clip()), will_save=False)


def test_a_kept_file_that_is_none_says_so(make_trainer, tiny_clip, tmp_path):
    rescuer = Rescuer(tmp_path, "iimm_x")
    rescuer.kept_file.write_text("no weights")
    with pytest.raises(ValueError, match=r"iimm_x_untouched.safetensors holds no weights"):
        rescuer.resume(tiny_clip())
    save_weights({"a": torch.ones(2, 3).T}, rescuer.kept_file)
    assert torch.equal(load_file(rescuer.kept_file)["a"], torch.ones(3, 2))


def test_the_limit_is_exceeded_by_what_was_observed():
    row = {"eval_iimm_forgetting_observed": 0.04, "eval_iimm_forgetting_worst": 0.09}
    assert is_exceeded(row, Limits(0.03))
    assert not is_exceeded(row, Limits(0.05))
    assert is_exceeded(row, Limits(0.05, "worst"))
    assert not is_exceeded(row, Limits(None))
    assert not is_exceeded({}, Limits(0.05))


# --- several ranks ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_a_fork(main, folder)
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in ("alone", "0", "1")]


def test_two_ranks_choose_the_mix_of_one_and_both_are_left_with_it(ranks):
    alone, *both = ranks
    assert alone["alpha"] > 0
    for rank in both:
        assert rank["alpha"] == alone["alpha"]
        assert rank["mixes"] == alone["mixes"]
        assert_equal(rank["mixed"], alone["mixed"])


def test_a_rank_that_fails_leaves_all_of_them_as_they_were(ranks):
    _, first, second = ranks
    assert first["error"].startswith("RuntimeError: rank 1 failed (OSError: disk on fire)")
    assert second["error"] == "OSError: disk on fire"
    for rank in (first, second):
        assert_equal(rank["after failure"], rank["tuned"])
    assert first["set"] == "RuntimeError: rank 1 failed (OutOfMemoryError: CUDA out of memory)"
    assert second["set"] == "OutOfMemoryError: CUDA out of memory"
    for rank in (first, second):
        assert_equal(rank["after set"], rank["tuned"])
        assert rank["odd"] == "RuntimeError: Odd: the disk is full"
    assert "RuntimeError: rank 1 failed" in first["no base"]
    assert second["no base"].startswith("ValueError: `base` must be given")
