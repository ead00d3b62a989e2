"""The linear probe against refits, the zero-shot classifier and the shipped model."""

import math

import numpy as np
import pytest
import torch

from iimm_callbacks import linear_probe, sample, zero_shot_accuracy
from iimm_callbacks.measures import probe_accuracy
from iimm_callbacks.models.encoders import class_embeddings, find_encoder

SCALE = 20.0


def planted(n_images=60, width=8, n_classes=3, seed=0):
    """Images around class centres that have nothing to do with the texts."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_classes, width, generator=draw)
    labels = torch.arange(n_images) % n_classes
    images = centres[labels] + 0.3 * torch.randn(n_images, width, generator=draw)
    return images, torch.randn(n_classes, width, generator=draw), labels


def ridge_of(images, texts, labels):
    unit = torch.nn.functional.normalize
    return probe_accuracy._Ridge(unit(images, dim=1), unit(texts, dim=1), labels, SCALE)


def refitted(images, texts, labels, penalty, step):
    """Log-loss and images right, with one ridge regression for every image left out."""
    x = torch.nn.functional.normalize(images.double(), dim=1).numpy()
    t = torch.nn.functional.normalize(texts.double(), dim=1).numpy()
    logits = SCALE * x @ t.T
    zero_shot = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.eye(len(t))[labels.numpy()]
    loss, right = 0.0, 0
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        gram = x[rest].T @ x[rest] + penalty * np.eye(x.shape[1])
        weights = np.linalg.solve(gram, x[rest].T @ (truth - zero_shot)[rest])
        scores = logits[i] + step * x[i] @ weights
        loss += np.log(np.exp(scores).sum()) - scores[labels[i]]
        right += int(scores.argmax() == labels[i])
    return loss, right


def test_the_closed_form_equals_refits_without_each_image():
    data = planted(n_images=24)
    ridge = ridge_of(*data)
    losses, correct = ridge.leave_one_out()
    assert len(losses) == 1 + len(probe_accuracy.PENALTIES) * len(probe_accuracy.STEPS)
    for form, loss in losses.items():
        if form != (math.inf, 0.0):
            assert refitted(*data, *form) == (
                pytest.approx(loss, rel=1e-3, abs=1e-5),
                correct[form],
            )


def test_the_form_of_the_least_loss_left_out_is_taken():
    images, texts, labels = planted(n_images=48)
    images += torch.randn(48, 8, generator=torch.Generator().manual_seed(2))
    found = linear_probe(images, texts, labels, logit_scale=SCALE)
    losses, correct = ridge_of(images, texts, labels).leave_one_out()
    best = min(losses, key=losses.get)
    assert (found.penalty, found.step) == pytest.approx(best, rel=1e-5)
    assert 0.5 < found.accuracy < 1
    assert found.accuracy == correct[best] / 48


def test_no_step_is_the_zero_shot_classifier():
    images, texts, labels = planted()
    ridge = ridge_of(images, texts, labels)
    expected = zero_shot_accuracy(images, texts, labels)
    assert 0 < expected < 1
    assert ridge.correct(ridge._images, labels, math.inf, 0.0) / 60 == expected
    assert ridge.leave_one_out()[1][math.inf, 0.0] / 60 == expected


def test_it_learns_what_the_texts_do_not_say():
    images, texts, labels = planted(n_images=120)
    found = linear_probe(
        images[:60], texts, labels[:60], logit_scale=SCALE, held_out=(images[60:], labels[60:])
    )
    assert zero_shot_accuracy(images[60:], texts, labels[60:]) < 0.7
    assert found.accuracy > 0.95
    assert (found.n_train, found.n_scored, found.held_out) == (60, 60, True)


def test_where_labels_are_random_it_keeps_to_the_zero_shot_classifier():
    images, texts, _ = planted(n_images=300, width=64)
    labels = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(1))
    assert linear_probe(images, texts, labels, logit_scale=0.01).accuracy < 0.45  # chance 0.33


def test_the_standard_error_is_that_of_a_share():
    images, texts, labels = planted()
    noisy = images + 0.8 * torch.randn(60, 8, generator=torch.Generator().manual_seed(2))
    found = linear_probe(noisy, texts, labels, logit_scale=SCALE)
    p = found.accuracy
    assert 0 < p < 1
    assert found.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 60))


def test_neither_order_nor_scale_nor_chunks_nor_repetition_matter(monkeypatch):
    images, texts, labels = planted()
    expected = linear_probe(images, texts, labels, logit_scale=SCALE)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert linear_probe(
        7 * images[order], 3 * texts, labels[order], logit_scale=SCALE
    ).accuracy == pytest.approx(expected.accuracy, abs=1e-9)
    monkeypatch.setattr(probe_accuracy, "_CHUNK", 21)  # seven images at once
    assert linear_probe(images, texts, labels, logit_scale=SCALE).accuracy == expected.accuracy
    assert linear_probe(
        images.numpy(), texts.half(), labels.numpy(), logit_scale=SCALE
    ).accuracy == (pytest.approx(expected.accuracy, abs=0.02))


def test_embeddings_all_alike_give_chance():
    found = linear_probe(torch.ones(40, 4), torch.eye(4), torch.arange(40) % 4, logit_scale=SCALE)
    assert 0 <= found.accuracy <= 0.5


def test_a_class_without_a_training_image_is_told():
    images, texts, labels = planted()
    more = torch.cat([texts, torch.ones(1, 8)])
    with pytest.warns(UserWarning, match="1 of 4 classes have no training image"):
        linear_probe(images, more, labels, logit_scale=SCALE)


GOOD = planted()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"logit_scale": 0.0}, ValueError, "`logit_scale` must be positive and finite, got 0.0"),
        ({"logit_scale": math.nan}, ValueError, "got nan"),
        ({"text_embeds": GOOD[1][:1]}, ValueError, "at least 2 classes, got 1"),
        ({"text_embeds": torch.ones(3, 5)}, ValueError, "the same width, got 8 and 5"),
        ({"labels": GOOD[2] + 1}, ValueError, r"lie in \[0, 3\) for 3 class texts, got 3"),
        ({"labels": GOOD[2].float()}, TypeError, "must be integers, got torch.float32"),
        ({"image_embeds": torch.zeros(60, 8)}, ValueError, "`image_embeds`.* row 0 has norm 0"),
        ({"image_embeds": GOOD[0][:1], "labels": GOOD[2][:1]}, ValueError, "2 images, got 1"),
        ({"image_embeds": GOOD[0][:3], "labels": GOOD[2][:3]}, ValueError, "captions have no"),
        ({"held_out": GOOD[0]}, TypeError, "`held_out` must be .*, got Tensor"),
        ({"held_out": (GOOD[0], GOOD[2] + 5)}, ValueError, "`held_out`: .* got 7"),
        ({"held_out": (GOOD[0][:0], GOOD[2][:0])}, ValueError, "at least 1 image, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, kind, message):
    given = {
        "image_embeds": GOOD[0],
        "text_embeds": GOOD[1],
        "labels": GOOD[2],
        "logit_scale": SCALE,
    } | change
    with pytest.raises(kind, match=message):
        linear_probe(**given)


@torch.no_grad()
def test_it_sees_that_the_shipped_model_can_learn_digits_and_knows_letters():
    model = sample.load_model().eval()
    encoder = find_encoder(model, sample.load_processor(), None)
    headroom = {}
    for name in ("handwritten_digits", "printed_letters"):
        embeds = {}
        for split in ("train", "test"):
            task = sample.load_task(name, split, probe_size=256)
            positions = task.subset()
            inputs = encoder.preprocess(task.images(positions))
            embeds[split] = (
                encoder.embed_images(model, inputs),
                torch.tensor(task.labels(positions)),
            )
        texts = encoder.embed_texts(model, encoder.tokenize(task.prompts(positions)))
        classes = class_embeddings(texts, len(task.templates))
        scale = float(model.logit_scale.exp())
        found = linear_probe(
            embeds["train"][0],
            classes,
            embeds["train"][1],
            logit_scale=scale,
            held_out=embeds["test"],
        )
        headroom[name] = found.accuracy - zero_shot_accuracy(
            embeds["test"][0], classes, embeds["test"][1]
        )
    assert headroom["handwritten_digits"] > 0.1  # full tuning gains 0.24
    assert headroom["printed_letters"] < 0.05  # and here it loses 0.05
