"""Accuracy, gain and forgetting: signs, standard errors and refusals."""

import math
import re

import numpy as np
import pytest
import torch

from iimm_callbacks import forgetting, gain_over_zero_shot_error, zero_shot_accuracy
from iimm_callbacks.measures.embeddings import zero_shot_correct, zero_shot_scores
from iimm_callbacks.measures.results import paired_drop


def bits(text):
    return np.array([c == "1" for c in text])


def test_nearest_text_by_cosine_not_by_dot_product():
    texts = torch.tensor([[1.0, 0.0], [9.0, 9.0]])  # the long second text wins every dot product
    images = torch.tensor([[5.0, 1.0], [0.1, 0.1], [0.0, 1.0]])
    assert zero_shot_correct(images, texts, [0, 1, 0]).tolist() == [True, True, False]
    assert zero_shot_accuracy(images, texts, [0, 1, 0]) == 2 / 3


def test_the_scores_order_each_images_texts_by_cosine():
    g = torch.Generator().manual_seed(0)
    images, texts = torch.randn(20, 4, generator=g), torch.randn(6, 4, generator=g)
    cosines = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1)
    scores = zero_shot_scores(images, texts)
    lengths = images.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scores, cosines * lengths)
    assert scores.argsort(1).tolist() == cosines.argsort(1).tolist()
    with pytest.raises(ValueError, match=r"got shapes \(20, 4\) and \(6, 3\)"):
        zero_shot_scores(images, texts[:, :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_accuracy_is_the_same_in_any_dtype_and_scale(dtype):
    g = torch.Generator().manual_seed(0)
    texts, labels = torch.eye(5), torch.arange(100) % 5
    images = texts[labels] + 0.3 * torch.randn(100, 5, generator=g)
    expected = zero_shot_accuracy(images, texts, labels)
    assert 0.5 < expected < 1
    assert zero_shot_accuracy(images.to(dtype), texts.to(dtype), labels) == expected
    assert zero_shot_accuracy(1e-3 * images.numpy(), texts.numpy(), labels.numpy()) == expected


def test_a_callers_autocast_rounds_nothing():
    # Cosines of 1 and 0.9995, which bfloat16 rounds to 1 both.
    texts = torch.tensor([[1.0, 0.03125], [1.0, 0.0], [1.0, -0.03125]])
    labels = torch.arange(300) % 3
    with torch.autocast("cpu", torch.bfloat16):
        scores = zero_shot_scores(texts[labels], texts)
        assert zero_shot_accuracy(texts[labels], texts, labels) == 1
    assert scores.dtype == torch.float32
    assert torch.equal(scores, zero_shot_scores(texts[labels], texts))


def test_gain_over_zero_shot_error_is_the_share_of_error_removed():
    assert gain_over_zero_shot_error(0.6, 0.9) == pytest.approx(0.75)  # 0.3 of 0.4
    assert gain_over_zero_shot_error(0.5, 0.25) == pytest.approx(-0.5)
    assert gain_over_zero_shot_error(0.95, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("before", [0.951, 1.0])
def test_gain_over_zero_shot_error_is_no_number_near_the_ceiling(before):
    assert gain_over_zero_shot_error(before, 1.0) is None


def test_forgetting_is_positive_for_loss_with_mean_and_worst():
    before = {"a": bits("1111"), "b": bits("1100"), "c": bits("1111")}
    after = {"a": bits("1110"), "b": bits("1111"), "c": bits("0001")}
    found = forgetting(before, after)
    assert {name: drop.value for name, drop in found.tasks.items()} == {
        "a": 0.25,
        "b": -0.5,
        "c": 0.75,
    }
    assert found.mean.value == pytest.approx((0.25 - 0.5 + 0.75) / 3)
    assert found.worst_task == "c"
    assert found.worst is found.tasks["c"]
    assert found.share_over(0.25) == 1 / 3  # 0.25 itself is not over
    errors = [drop.standard_error for drop in found.tasks.values()]
    assert found.mean.standard_error == pytest.approx(math.hypot(*errors) / 3)


def test_paired_standard_error_counts_changed_images_only():
    # Changes +1, 0, 0, 0 and the two half images ±0.5: mean 1/6, mean square (1 + 0.5)/6.
    expected = math.sqrt(1.5 / 6 - 1 / 36) / math.sqrt(4)
    assert paired_drop(bits("1100"), bits("0100")).standard_error == pytest.approx(expected)
    unchanged = paired_drop(bits("10" * 50), bits("10" * 50))
    assert unchanged.value == 0
    assert unchanged.standard_error == pytest.approx(math.sqrt(0.5 / 102) / 10)  # small, not zero


def test_paired_standard_error_equals_the_spread_over_draws():
    rng = np.random.default_rng(0)
    drops = []
    for _ in range(300):
        before = rng.random(200) < 0.7
        drops.append(paired_drop(before, before ^ (rng.random(200) < 0.1)))
    typical = np.mean([drop.standard_error for drop in drops])
    assert typical == pytest.approx(np.std([drop.value for drop in drops]), rel=0.15)


EYE = torch.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((EYE, EYE, [0, 1, 3]), ValueError, "[0, 3) for 3 class texts, got 3"),
        ((EYE, EYE, [0.0, 1.0, 2.0]), TypeError, "must be integers, got torch.float32"),
        ((EYE, EYE, [0, 1]), ValueError, "expected shape (3,), got (2,)"),
        ((EYE, EYE[:, :2], [0, 1, 2]), ValueError, "got shapes (3, 3) and (3, 2)"),
        ((EYE * math.nan, EYE, [0, 1, 2]), ValueError, "`image_embeds` must be finite"),
        ((EYE, EYE / 0, [0, 1, 2]), ValueError, "`text_embeds` must be finite"),
        (
            (EYE * 0, EYE, [0, 1, 2]),
            ValueError,
            "`image_embeds` must be finite and non-zero, row 0",
        ),
        ((EYE, EYE * 0, [0, 1, 2]), ValueError, "`text_embeds` must be finite and non-zero, row 0"),
        ((EYE[:0], EYE, []), ValueError, "at least one image, got 0"),
    ],
)
def test_bad_embeddings_are_refused(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        zero_shot_accuracy(*arguments)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({}, {}, "at least one"),
        ({"a": bits("1")}, {"b": bits("1")}, "expected ['a'], got ['b']"),
        ({"a": bits("1")}, {"a": bits("10")}, "expected shape (1,), got (2,)"),
        ({"a": 0.8}, {"a": 0.7}, "expected shape (), got ()"),
    ],
)
def test_forgetting_refuses_what_does_not_compare(before, after, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        forgetting(before, after)
