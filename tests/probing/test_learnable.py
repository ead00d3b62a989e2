"""The linear probe of the first look: which images it learns from, and that all entries agree."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from torch import nn
from transformers import TrainerCallback

from iimm_callbacks import IIMMCallback, IIMMMonitor, Task, linear_probe, sample
from iimm_callbacks.data.training import NoTrainingSetError, training_task
from iimm_callbacks.models.encoders import class_embeddings, find_encoder
from iimm_callbacks.probing.learnable import TrainingSet
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.look import PARTS, Look


@pytest.fixture
def halves(colours):
    """Training and held-out halves of the colours, as a data set and a task."""
    half = len(colours) // 2
    held = Task("colours", colours.select(range(half, len(colours))), templates="a {} thing")
    return colours.select(range(half)), held


@pytest.fixture
def first_look(tiny_clip, processor):
    def look(task, train=None, given=True, off_target=(), **settings):
        trains = None if train is None else TrainingSet(train, given)
        settings = {"processor": processor, "progress": False, "train": trains} | settings
        return Probe(task, off_target, **settings).look(tiny_clip(), 0, linear_probe=True)

    return look


def expected(model, processor, task, train=None):
    """The same number from the embeddings and `linear_probe` alone."""
    encoder = find_encoder(model.eval(), processor)

    @torch.no_grad()
    def embed(of):
        rows = of.subset()
        images = encoder.embed_images(model, encoder.preprocess(of.images(rows)))
        return images, torch.tensor(of.labels(rows))

    with torch.no_grad():
        prompts = task.prompts(task.subset())
        texts = class_embeddings(encoder.embed_texts(model, encoder.tokenize(prompts)), 1)
    scale = model.logit_scale.detach().exp().item()
    images, labels = embed(task)
    if train is None:
        return linear_probe(images, texts, labels, logit_scale=scale)
    learnt = embed(train)
    return linear_probe(learnt[0], texts, learnt[1], logit_scale=scale, held_out=(images, labels))


# --- what it learns from ---


def test_without_a_training_set_it_is_cross_validated(first_look, halves, tiny_clip, processor):
    found = first_look(halves[1]).learnable
    assert found.probe.accuracy == expected(tiny_clip(), processor, halves[1]).accuracy
    assert not found.probe.held_out
    assert "cross-validated on" in found.note
    assert found.n_train is None


def test_every_entry_gives_the_same_number(
    first_look, halves, tiny_clip, processor, make_trainer, tmp_path
):
    train, task = halves
    true = expected(tiny_clip(), processor, task, training_task(train, task))
    found = first_look(task, train).learnable
    assert found.probe.accuracy == true.accuracy
    assert found.probe.held_out
    assert found.n_train == found.probe.n_train == len(train)
    assert found.note == (
        f"fitted to {len(train)} of {len(train)} training images, scored on {len(task)} held-out "
        "ones"
    )
    monitor = IIMMMonitor(
        task, [], processor=processor, train=train, outcomes=None, verbose=False, method="full"
    )
    monitor.begin(tiny_clip())
    guard = IIMMCallback(task, [], max_forgetting=None, train=train, outcomes=None, verbose=False)
    make_trainer([guard], max_steps=1).train()
    for outcome in (monitor.end(tiny_clip(), 0), guard.outcome):
        assert outcome.linear_probe_accuracy == true.accuracy
        assert outcome.linear_probe_standard_error == true.standard_error
        assert (outcome.n_train, outcome.linear_probe_n_train) == (len(train), len(train))
        assert outcome.images["linear_probe_accuracy"] == found.note
    assert guard.monitor.history[0]["eval_iimm_linear_probe_accuracy"] == true.accuracy
    assert guard.record()["linear_probe"]["accuracy"] == true.accuracy


def test_the_trainers_own_training_set_is_found(make_trainer, colours, colour_task):
    guard = IIMMCallback(colour_task, [], max_forgetting=None, outcomes=None, verbose=False)
    make_trainer([guard], max_steps=1).train()
    found = guard.monitor.record()["linear_probe"]
    # make_trainer trains on the same images that the task is probed on
    assert guard.outcome.n_train == len(colours)
    assert "as they are probe images" in found["note"] or "cross-validated" in found["note"]


def test_probe_images_are_not_learnt_from(first_look, colours):
    task = Task("colours", colours, templates="a {} thing", probe_size=len(colours) // 2)
    found = first_look(task, colours).learnable
    n = len(task.subset())
    assert found.probe.n_train == len(colours) - n
    assert f"({n} of them left out, as they are probe images)" in found.note


def test_the_sample_is_bounded_and_balanced(colours, halves):
    many = Dataset.from_dict(
        {"image": [colours[0]["image"]] * 1500, "label": [0] * 1200 + [1] * 300}
    )
    names = list(halves[1].class_names)
    task = Task("colours", halves[1].dataset, class_names=names)
    many = many.cast_column("image", colours.features["image"])
    read = training_task(many, task)
    labels = read.labels(read.subset(1024))
    assert len(labels) == 1024
    assert labels.count(1) == 300


def test_a_shipped_task_has_the_number_saved():
    name = "emoji_groups"
    task = sample.load_task(name, "test")
    train = sample.load_task(name, "train", probe_size=1000)
    probe = Probe(
        task, [], processor=sample.load_processor(), progress=False, train=TrainingSet(train)
    )
    found = probe.look(sample.load_model(), 0, linear_probe=True).learnable.probe
    outcomes = [o for o in sample.load_outcomes() if o.task == name]
    assert {o.linear_probe_accuracy for o in outcomes} == {round(found.accuracy, 6)}
    assert {o.n_train for o in outcomes} == {found.n_train}


# --- what cannot serve ---


class Unreadable:
    """Pairs of which no image can be read."""

    def __init__(self, rows, classes):
        self.targets = [row["label"] for row in rows]
        self.classes = classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        raise OSError("disk on fire")


def test_a_training_set_that_raises_costs_the_probe_not_the_run(first_look, halves, caplog):
    train = Unreadable(halves[0], halves[1].class_names)
    found = first_look(halves[1], train).learnable
    assert not found.probe.held_out
    assert "disk on fire" in found.note
    assert "cannot be used" in caplog.text


def test_other_classes_or_another_order_are_an_error_that_shows_both(first_look, halves):
    train, task = halves
    names = list(task.class_names)
    turned = Task("colours", train, class_names=None)
    backwards = [(row["image"], len(names) - 1 - row["label"]) for row in train]
    other = Task("colours", backwards, class_names=names[::-1])
    with pytest.raises(NoTrainingSetError, match="in another order") as error:
        first_look(task, other)
    assert repr(names[0]) in str(error.value)
    assert f"[{names[-1]!r}" in str(error.value)
    fewer = Task("colours", [(r["image"], r["label"] % 2) for r in train], class_names=names[:2])
    with pytest.raises(NoTrainingSetError, match="other classes than `task`"):
        first_look(task, fewer)
    assert first_look(task, turned).learnable.probe.held_out


@pytest.mark.parametrize("given", [list, dict])
@pytest.mark.parametrize("strings", [False, True])
def test_a_training_set_of_the_same_own_names_takes_over_the_given_ones(halves, given, strings):
    half, task = halves
    raw = [f"n{i:08d}" for i in range(len(task.class_names))]
    words = [f"the {name}" for name in task.class_names]
    label = Value("string") if strings else ClassLabel(names=raw)

    def data(of):
        return [(row["image"], raw[row["label"]] if strings else row["label"]) for row in of]

    def hub(of):
        columns = {"image": of["image"], "label": [label for _, label in data(of)]}
        return Dataset.from_dict(columns, features=Features({"image": Image(), "label": label}))

    names = words if given is list else dict(zip(raw, words, strict=True))
    if strings and given is list:
        names = None
    own = Task("colours", hub(task.dataset), class_names=names)
    assert own.own_names == tuple(raw)
    for train in (hub(half), Task("train", hub(half)), data(half)):
        read = training_task(train, own, given=False)
        assert read.class_names == own.class_names
        assert read.labels(range(len(half))) == list(half["label"])


def test_string_labels_of_a_training_set_may_have_underscores(halves):
    half, task = halves
    names = [f"a_{name}" for name in task.class_names]
    own = Task("colours", [(row["image"], names[row["label"]]) for row in task.dataset])
    read = training_task([(row["image"], names[row["label"]]) for row in half], own)
    assert read.class_names == own.class_names == tuple(sorted(n.replace("_", " ") for n in names))
    pretty = training_task(
        [(row["image"], f"a {task.class_names[row['label']]}") for row in half], own
    )
    assert pretty.labels(range(len(half))) == read.labels(range(len(half)))


@pytest.mark.parametrize("change", ["backwards", "one more", "none"])
def test_a_training_set_with_a_class_at_another_label_is_warned_of(
    first_look, halves, caplog, change
):
    """As where one class has no held-out image: all labels after it are off by one."""
    half, task = halves
    names = {
        "backwards": list(task.class_names)[::-1],
        "one more": ["mauve", *task.class_names],
        "none": [*task.class_names, "mauve"],
    }[change]
    labels = [names.index(task.class_names[label]) for label in half["label"]]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"image": half["image"], "label": labels}, features=features)
    assert not first_look(task, data, given=False).learnable.probe.held_out
    warned = [r.getMessage() for r in caplog.records if "learns wrong classes" in r.getMessage()]
    assert len(warned) == (change != "none")
    if warned:
        assert f"first label 0, {names[0]!r} against {task.class_names[0]!r}" in warned[0]


def test_probe_images_that_are_trained_on_are_warned_of(first_look, halves, shapes, caplog):
    half, task = halves
    first_look(task, half)
    assert "too high" not in caplog.text
    both = concatenate_datasets([half, task.dataset.select(range(5))])
    other = Task("twins", half.select(range(8)), templates="a {}")
    first_look(task, both, off_target=[other, Task("shapes", shapes, templates="a {}")])
    warned = [r.getMessage() for r in caplog.records if "too high" in r.getMessage()]
    assert [w.split(" are among the training images")[0] for w in warned] == [
        f"5 of {len(task)} probe images of 'colours'",
        "8 of 8 probe images of 'twins'",
    ]


def test_names_given_in_two_orders_are_refused_whatever_the_own_ones(halves):
    half, task = halves
    names = [f"the {name}" for name in task.class_names]
    one, other = (Task("colours", half, class_names=given) for given in (names, names[::-1]))
    with pytest.raises(NoTrainingSetError, match="in another order"):
        training_task(one, other)


def test_what_the_guard_found_itself_is_passed_over_where_it_does_not_suit(first_look, halves):
    train, task = halves
    pairs = [(row["image"], len(task.class_names) - 1 - row["label"]) for row in train]
    other = Task("colours", pairs, class_names=list(task.class_names)[::-1])
    for data, why in (
        (other, "in another order"),
        (train.to_iterable_dataset(), "a stream"),
        (object(), "cannot be read without reading every image"),
        (train.remove_columns("image"), "one column for `image_column`"),
    ):
        found = first_look(task, data, given=False).learnable
        assert not found.probe.held_out
        assert why in found.note


def test_rows_in_a_list_serve_too(first_look, halves):
    train, task = halves
    rows = first_look(task, list(train), given=False).learnable
    assert rows.probe == first_look(task, train).learnable.probe


def test_captions_and_other_metrics_have_none(first_look, colours):
    captions = Task("captions", [(row["image"], f"picture {i}") for i, row in enumerate(colours)])
    found = first_look(captions).learnable
    assert (found.probe, found.note) == (
        None,
        "captions have no classes, so there is no linear probe",
    )
    task = Task("colours", colours, metric=lambda p, r: float(np.mean(p == r)))
    found = first_look(task).learnable
    assert found.probe is None
    assert "metric" in found.note


def test_one_image_per_class_gives_no_number(first_look, colours):
    firsts = {row["label"]: row["image"] for row in colours}
    pairs = [(image, label) for label, image in sorted(firsts.items())]
    names = list(Task("c", colours).class_names)
    found = first_look(Task("colours", pairs, class_names=names)).learnable
    assert found.probe is None
    assert "at least 2 images" in found.note


@pytest.mark.filterwarnings("ignore:1 of .* classes have no training image")
def test_a_class_without_a_training_image_is_no_obstacle(first_look, halves):
    train, task = halves
    rows = [i for i, label in enumerate(train["label"]) if label != 0]
    found = first_look(task, train.select(rows)).learnable
    assert found.probe.held_out
    assert found.probe.n_train == len(rows)


def test_a_model_that_tells_no_scale_gets_the_likeliest(halves, tiny_clip, processor):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = [tiny_clip()]  # out of sight

    model = Bare()
    encoder = find_encoder(model.inner[0], processor)

    def images(of, pictures):
        return encoder.embed_images(of.inner[0], encoder.preprocess(pictures))

    def texts(of, prompts):
        return encoder.embed_texts(of.inner[0], encoder.tokenize(prompts))

    probe = Probe(halves[1], [], encode=(images, texts), progress=False)
    found = probe.look(model, 0, linear_probe=True).learnable
    assert found.probe is not None
    assert "fitted, as the model has none" in found.note


# --- what becomes of it ---


def test_later_looks_and_plain_ones_have_none(halves, tiny_clip, processor):
    probe = Probe(halves[1], [], processor=processor, progress=False)
    assert probe.look(tiny_clip(), 0).learnable is None
    assert probe.look(tiny_clip(), 1).learnable is None


def test_a_checkpoint_keeps_it(first_look, halves):
    for look in (first_look(halves[1], halves[0]), first_look(halves[1])):
        again = Look.from_json(json.loads(json.dumps(look.to_json())))
        assert again.learnable == look.learnable
    old = first_look(halves[1]).to_json()
    del old["learnable"]
    assert Look.from_json(old).learnable is None


def test_the_random_streams_are_as_before(halves, tiny_clip, processor):
    model, trains = tiny_clip(), TrainingSet(halves[0])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe = Probe(halves[1], [], processor=processor, progress=False, train=trains)
    assert probe.look(model, 0, linear_probe=True).learnable.probe.held_out
    assert torch.equal(torch.get_rng_state(), before)


def test_training_loss_and_iimm_are_saved(make_trainer, colour_task, shape_task):
    class Seen(TrainerCallback):
        losses = ()

        def on_train_end(self, args, state, control, **kwargs):
            self.losses = [row["loss"] for row in state.log_history if "loss" in row]

    guard, seen = (
        IIMMCallback(colour_task, [shape_task], every=1, outcomes=None, verbose=False,
                     max_overhead=None),
        Seen(),
    )  # fmt: skip
    make_trainer([guard, seen], max_steps=3, logging_steps=1).train()
    looks = guard.outcome.trajectory
    assert [look["iimm"] for look in looks] == [row["eval_iimm"] for row in guard.monitor.history]
    known = [look["training_loss"] for look in looks if "training_loss" in look]
    assert known
    assert set(known) <= set(seen.losses)


# --- fewer images ---


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_part_of_the_images_is_the_first_ones_of_every_task(
    colour_task, shape_task, tiny_clip, processor, batch_size
):
    probe = Probe(
        colour_task, [shape_task], processor=processor, progress=False, batch_size=batch_size
    )
    model = tiny_clip()
    whole, part = probe.look(model, 0), probe.look(model, 1, part=0.25)
    for name, row in whole.correct.items():
        n = len(part.correct[name])
        assert n == max(math.ceil(len(row) / 4), min(8, len(row)))
        np.testing.assert_array_equal(part.correct[name], row[:n])
        assert len(whole.first(part).correct[name]) == n
    assert part.measurement.n_images == len(part.correct["colours"])


@pytest.mark.parametrize("part", PARTS)
def test_the_first_look_knows_iimm_of_the_images_that_later_ones_show(
    colours, tiny_clip, processor, part
):
    task = Task("colours", colours, templates="a {} thing", probe_size=30)
    probe = Probe(task, [], processor=processor, progress=False, batch_size=7)
    whole = probe.look(tiny_clip(), 0, linear_probe=True)
    whole = Look.from_json(json.loads(json.dumps(whole.to_json())))
    look = probe.look(tiny_clip(), 1, part=part)
    assert look.measurement.n_images == max(math.ceil(30 * part), 8)
    shown = asdict(whole.first(look).measurement)
    # A batch of other images is rounded otherwise.
    assert shown == pytest.approx(asdict(look.measurement), abs=1e-6, nan_ok=True)
    assert (look.measurement.iimm == pytest.approx(whole.measurement.iimm, abs=1e-4)) == (part == 1)


def test_a_metric_of_its_own_is_of_all_images(colours, tiny_clip, processor):
    task = Task("colours", colours, metric=lambda p, r: float(np.mean(p == r)), probe_size=16)
    probe = Probe(task, [], processor=processor, progress=False, batch_size=4)
    look = probe.look(tiny_clip(), 1, part=0.25)
    assert len(look.correct["colours"]) == 16
