"""The probe: what it measures, and that it leaves no trace."""

import copy
import gc
import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn

from iimm_callbacks import Task, iimm
from iimm_callbacks.measures.embeddings import zero_shot_correct
from iimm_callbacks.models.encoders import class_embeddings, find_encoder, undisturbed
from iimm_callbacks.probing.probe import Probe


@pytest.fixture
def make_probe(colour_task, shape_task, processor):
    def build(task=colour_task, off_target=(shape_task,), **settings):
        settings = {"processor": processor, "progress": False} | settings
        return Probe(task, off_target, **settings)

    return build


@pytest.fixture
def captions(colours):
    rows = [colours[i] for i in range(12)]
    return [(row["image"], f"picture {i} of a {row['label']}") for i, row in enumerate(rows)]


def assert_same_look(one, other, atol=0.0):
    numbers = [
        [x.measurement.iimm, x.measurement.inter, x.measurement.intra, x.measurement.standard_error]
        for x in (one, other)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0, abs=atol)
    assert one.correct.keys() == other.correct.keys()
    for name in one.correct:
        np.testing.assert_array_equal(one.correct[name], other.correct[name])


def embeds(model, processor, task, positions):
    """Image and class embeddings of a task, straight from the model."""
    encoder = find_encoder(model, processor)
    model.eval()
    with torch.no_grad():
        images = encoder.embed_images(model, encoder.preprocess(task.images(positions)))
        texts = encoder.embed_texts(model, encoder.tokenize(task.prompts(positions)))
    return images, class_embeddings(texts, len(task.templates))


# That it leaves no trace


def test_streams_of_other_accelerators_are_restored_too(tiny_clip, monkeypatch):
    """`torch.manual_seed` seeds all of them."""
    stream = [123]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: stream[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: stream.__setitem__(0, state))
    with undisturbed(tiny_clip()):
        stream[0] = 0
    assert stream == [123]


def test_modes_are_restored_module_by_module(tiny_clip):
    model = tiny_clip().train()
    model.vision_model.eval()
    before = [m.training for m in model.modules()]
    assert len(set(before)) == 2
    with undisturbed(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert [m.training for m in model.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("raises", [False, True])
def test_random_streams_and_modes_are_restored_even_by_an_exception(tiny_clip, raises):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(7), np.random.seed(7), torch.manual_seed(7)

    model = tiny_clip().train()
    seed()
    expected = draws()
    seed()
    try:
        with undisturbed(model):
            draws()
            if raises:
                raise KeyError("inside")
    except KeyError:
        assert raises
    assert draws() == expected
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_look_leaves_weights_gradients_and_graph_alone(tiny_clip, make_probe, compiled):
    bare = tiny_clip(dropout=0.5).train()
    before = {k: v.clone() for k, v in bare.state_dict().items()}
    model = torch.compile(bare, backend="eager") if compiled else bare
    probe = make_probe()
    probe.look(model, 0)
    assert all(torch.equal(v, before[k]) for k, v in bare.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in bare.parameters())
    assert all(m.training for m in bare.modules())


def test_the_embeddings_carry_no_graph(tiny_clip, make_probe, monkeypatch):
    seen = []

    def watching(images, texts, labels):
        seen.extend([images, texts])
        return zero_shot_correct(images, texts, labels)

    monkeypatch.setattr("iimm_callbacks.probing.scoring.zero_shot_correct", watching)
    make_probe().look(tiny_clip(), 0)
    assert [t.requires_grad for t in seen] == [False] * 4


def test_a_look_within_autocast_leaves_no_weights_without_gradient_behind(tiny_clip, make_probe):
    # Autocast keeps its casts of the weights; one made under no_grad has no way back to them.
    model, probe = tiny_clip(), make_probe()
    probe.prepare(model)
    pixels = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        probe.look(model, 0)
        out = model.get_image_features(pixel_values=pixels)
        out = out if isinstance(out, torch.Tensor) else out.pooler_output
        out.float().sum().backward()
    assert all(p.grad is not None for p in model.visual_projection.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_look_leaves_no_tensor_behind(tiny_clip, make_probe, frozen):
    def alive():
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), sum(t.nbytes for t in tensors)

    model, probe = tiny_clip().requires_grad_(not frozen), make_probe()
    probe.look(model, 0)  # reads the images, which stay
    before = alive()
    look = probe.look(model, 1)
    assert alive() == before
    assert look.step == 1


# What it measures


def test_measures_what_the_embeddings_give(
    tiny_clip, make_probe, processor, colour_task, shape_task
):
    model = tiny_clip()
    look = make_probe().look(model, 3)
    assert look.step == 3
    positions = colour_task.subset()
    images, texts = embeds(model, processor, colour_task, positions)
    labels = torch.tensor(colour_task.labels(positions))
    assert look.measurement.iimm == pytest.approx(iimm(images, texts, labels).iimm, abs=1e-6)
    for task in (colour_task, shape_task):
        positions = task.subset(256)
        images, texts = embeds(model, processor, task, positions)
        nearest = (nn.functional.normalize(images, dim=1) @ texts.T).argmax(1)
        right = (nearest == torch.tensor(task.labels(positions))).float().mean().item()
        assert look.accuracy(task.name) == pytest.approx(right)
    assert list(look.correct) == ["colours", "shapes"]


def test_captions_are_measured_by_recall_at_1(tiny_clip, make_probe, processor, captions):
    task = Task("captions", captions)
    model = tiny_clip()
    look = make_probe(task).look(model, 0)
    positions = task.subset()
    images, texts = embeds(model, processor, task, positions)
    nearest = (nn.functional.normalize(images, dim=1) @ texts.T).argmax(1)
    right = (nearest == torch.arange(12)).float().mean().item()
    assert look.accuracy("captions") == pytest.approx(right)
    assert look.measurement.n_images == look.measurement.n_classes == 12


def test_every_look_shows_the_same_images(tiny_clip, make_probe):
    model, probe = tiny_clip(), make_probe()
    assert_same_look(probe.look(model, 0), probe.look(model, 1))


def test_preprocessing_anew_gives_bit_equal_results(tiny_clip, make_probe):
    model = tiny_clip()
    cached, again = make_probe(), make_probe(cache_limit=0)
    assert_same_look(cached.look(model, 0), again.look(model, 0))
    assert_same_look(cached.look(model, 1), again.look(model, 1))
    assert cached.fingerprints == again.fingerprints


def test_without_cache_images_are_read_at_every_look_and_with_it_once(
    tiny_clip, make_probe, shapes, monkeypatch
):
    reads = []
    images = Task.images
    monkeypatch.setattr(
        Task, "images", lambda self, positions: reads.extend(positions) or images(self, positions)
    )
    n_images, witness = 32 + 24, 1
    for limit, expected in ((2**31, n_images), (0, n_images * 3)):
        reads.clear()
        model, probe = tiny_clip(), make_probe(cache_limit=limit)
        probe.look(model, 0)
        probe.look(model, 1)
        assert len(reads) == expected + witness


class Drawing:
    """A random level for every picture, each time; the ninth cannot be read."""

    classes = ("a", "b")
    targets = (0, 1) * 16

    def __len__(self):
        return 32

    def __getitem__(self, position):
        levels = [random.randrange(256), np.random.randint(256), int(torch.randint(256, ()))]
        if position == 9:
            raise OSError("lost")
        return Image.new("RGB", (8, 8), tuple(levels)), position % 2


@pytest.mark.parametrize("cache_limit", [2**31, 0])
def test_images_that_are_drawn_at_random_are_drawn_once(tiny_clip, make_probe, cache_limit):
    model = tiny_clip()
    probes = [
        make_probe(Task("t", Drawing()), [], batch_size=size, cache_limit=limit)
        for size, limit in ((8, 2**31), (8, cache_limit), (5, cache_limit))
    ]
    first = probes[0].look(model, 0)
    for step, probe in enumerate(probes * 2):
        torch.rand(3), np.random.rand(), random.random()
        assert_same_look(probe.look(model, step), first, atol=1e-6)
    assert len({probe.fingerprints["t"] for probe in probes}) == 1
    assert probes[0]._share.draws


def test_the_cache_takes_the_tasks_that_fit(tiny_clip, make_probe):
    task_only = 32 * 3 * 16 * 16 * 4  # float32 pixels of the task's 32 images
    probe = make_probe(cache_limit=task_only)
    probe.prepare(tiny_clip())
    assert [batch.inputs is None for batch in probe._share.batches] == [False, True]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_nothing(tiny_clip, make_probe, batch_size):
    model = tiny_clip()
    whole, parts = make_probe(), make_probe(batch_size=batch_size)
    assert_same_look(whole.look(model, 0), parts.look(model, 0), atol=1e-6)
    assert whole.fingerprints == parts.fingerprints


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, None])
def test_a_batch_has_at_least_one_image(make_probe, batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` must be a whole number .* {batch_size}"):
        make_probe(batch_size=batch_size)


def test_class_texts_are_encoded_anew_at_every_look(tiny_clip, make_probe):
    model, probe = tiny_clip(), make_probe()
    before = probe.look(model, 0).measurement
    with torch.no_grad():
        model.text_projection.weight.normal_()
    after = probe.look(model, 1).measurement
    assert after.inter != before.inter
    assert after.intra == before.intra  # the images are embedded by the other tower


def test_without_its_adapter_a_model_measures_as_its_base(tiny_clip, make_probe):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, probe = get_peft_model(tiny_clip(), lora), make_probe()
    base = make_probe().look(tiny_clip(), 0)
    with model.disable_adapter():
        assert_same_look(probe.look(model, 0), base)
    assert probe.look(model, 0).measurement.iimm != base.measurement.iimm


@pytest.mark.parametrize("precision", ["weights", "autocast"])
def test_bfloat16_measures_nearly_as_float32(tiny_clip, make_probe, precision):
    exact = make_probe().look(tiny_clip(), 0).measurement
    model = tiny_clip().bfloat16() if precision == "weights" else tiny_clip()
    dtype = torch.bfloat16 if precision == "autocast" else None
    look = make_probe().look(model, 0, autocast_dtype=dtype)
    assert look.measurement.iimm == pytest.approx(exact.iimm, abs=0.02)
    assert look.measurement.iimm != exact.iimm
    assert next(model.parameters()).dtype == (torch.bfloat16 if dtype is None else torch.float32)


def test_an_own_pair_of_functions_is_measured_like_the_models_own(tiny_clip, make_probe, processor):
    model = tiny_clip()
    own = find_encoder(model, processor)
    pair = (
        lambda m, images: own.embed_images(m, own.preprocess(images)),
        lambda m, prompts: own.embed_texts(m, own.tokenize(prompts)),
    )
    by_pair = make_probe(processor=None, encode=pair)
    assert_same_look(by_pair.look(model, 0), make_probe().look(model, 0))
    assert by_pair.fingerprints.keys() == {"colours", "shapes"}


# Fingerprints


class Pairs(torch.nn.Module):
    """Embeddings by number, of a grey picture's level and of a text: no product of the model's."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.nn.Parameter(torch.randn(200, 64, generator=generator) + 3)
        self.t = torch.nn.Parameter(0.1 * torch.randn(50, 64, generator=generator) + 3)

    def images(self, _, images):
        return self.x[[image.getpixel((0, 0))[0] for image in images]] * 1

    def texts(self, _, texts):
        return self.t[[int(text) for text in texts]] * 1


def test_an_autocast_around_a_look_rounds_no_cosine():
    model = Pairs()
    unit = torch.nn.functional.normalize
    labels = (unit(model.x) @ unit(model.t).T).argmax(1).tolist()
    pairs = [(Image.new("RGB", (8, 8), (i,) * 3), y) for i, y in enumerate(labels)]
    task = Task("t", pairs, class_names=[str(c) for c in range(50)], templates="{}")
    probe = Probe(task, encode=(model.images, model.texts), progress=False)
    plain = probe.look(model, 0, linear_probe=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = probe.look(model, 0, linear_probe=True)
    assert plain.accuracy("t") == inside.accuracy("t") == 1
    assert inside.measurement == plain.measurement
    assert inside.learnable == plain.learnable


def test_an_autocast_around_a_look_is_that_of_the_model(tiny_clip, make_probe):
    model, probe = tiny_clip(), make_probe()
    given = probe.look(model, 0, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        around = probe.look(model, 0)
    assert around.measurement == given.measurement != probe.look(model, 0).measurement


def test_there_are_no_fingerprints_before_the_images_were_read(make_probe):
    assert make_probe().fingerprints == {}


def test_fingerprints_change_with_prompts_images_labels_and_preprocessing_only(
    tiny_clip, make_probe, colours, processor
):
    def fingerprint(dataset=colours, templates="a {} thing", model=None, **settings):
        task = Task("colours", dataset, templates=templates, probe_size=32)
        probe = make_probe(task, [], **settings)
        probe.prepare(model or tiny_clip())
        return probe.fingerprints["colours"]

    expected = fingerprint()
    other_weights = tiny_clip()
    nn.init.normal_(other_weights.visual_projection.weight)
    assert fingerprint(cache_limit=0, batch_size=5, progress=True) == expected
    assert fingerprint(model=other_weights) == expected
    assert fingerprint(dataset=colours.select(range(96))) == expected

    pairs = [(row["image"], row["label"]) for row in colours]
    names = colours.features["label"].names

    def from_pairs(pairs):
        task = Task("colours", pairs, templates="a {} thing", class_names=names, probe_size=32)
        probe = make_probe(task, [])
        probe.prepare(tiny_clip())
        return probe.fingerprints["colours"], task.subset()

    same, positions = from_pairs(pairs)
    assert same == expected
    image, label = pairs[positions[3]]
    pixels = np.asarray(image).copy()
    pixels[0, 0, 0] ^= 1
    one_bit = list(pairs)
    one_bit[positions[3]] = (Image.fromarray(pixels), label)
    swapped = [(i, {0: 1, 1: 0}.get(y, y)) for i, y in pairs]
    larger = copy.deepcopy(processor)
    larger.image_processor.size = {"height": 24, "width": 24}
    others = {
        "prompts": fingerprint(templates="one {} thing"),
        "images": from_pairs(one_bit)[0],
        "labels": from_pairs(swapped)[0],
        "preprocessing": fingerprint(processor=larger),
    }
    assert len({expected, *others.values()}) == 5, others


# Bad input


def test_an_off_target_task_with_the_images_and_prompts_of_the_task_is_refused(
    tiny_clip, make_probe, colour_task, colours
):
    again = Task("again", colours, templates="a {} thing", probe_size=32)
    with pytest.raises(ValueError, match="'again' is the task itself"):
        make_probe(colour_task, [again]).prepare(tiny_clip())


def test_an_off_target_task_with_some_images_of_the_task_is_warned_of(
    tiny_clip, make_probe, colour_task, colours, shape_task, caplog
):
    shown = [colours[i] for i in colour_task.subset(32)[:3]]
    rows = [(row["image"], row["label"]) for row in shown]
    names = list(colour_task.class_names)
    some = Task("some", rows, templates="a {}", class_names=names)
    make_probe(colour_task, [shape_task, some]).prepare(tiny_clip())
    warned = [r.getMessage() for r in caplog.records if "hides" in r.getMessage()]
    assert [w.split(":")[0] for w in warned] == [
        "3 of 3 probe images of 'some' are among those of task 'colours'"
    ]


def test_weights_that_are_not_finite_are_refused(tiny_clip, make_probe):
    model = tiny_clip()
    with torch.no_grad():
        model.visual_projection.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="finite"):
        make_probe().look(model, 0)
