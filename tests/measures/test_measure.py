"""The measure against hand-worked values, the authors' values, a slow double loop and itself."""

import json
import math
import re
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iimm_callbacks import IIMMAccumulator, drift_bound, iimm

GOLDEN = json.loads((Path(__file__).parent / "golden" / "authors_values.json").read_text())["cases"]


def draw(n, c, d, seed=0, cone=0.0, dtype=torch.float64):
    """Random embeddings, with a common direction of strength `cone`, and labels."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, d, generator=g, dtype=torch.float64) + cone
    texts = torch.randn(c, d, generator=g, dtype=torch.float64) + cone
    return images.to(dtype), texts.to(dtype), torch.randint(c, (n,), generator=g)


def double_loop(images, texts, labels):
    """(inter, intra), written from the formula: no sums, no tricks."""
    x = [row / np.linalg.norm(row) for row in images.double().numpy()]
    t = [row / np.linalg.norm(row) for row in texts.double().numpy()]
    n, c = len(x), len(t)
    inter = (
        sum(sum(x[i] @ t[k] for k in range(c) if k != labels[i]) / (c - 1) for i in range(n)) / n
    )
    intra = 2 / (n * (n - 1)) * sum(x[i] @ x[j] for i in range(n) for j in range(i + 1, n))
    return inter, intra


def assert_same(a, b, tolerance=1e-9):
    """All four floats agree; the counts are equal."""
    assert astuple(a)[:4] == pytest.approx(astuple(b)[:4], abs=tolerance, nan_ok=True)
    assert astuple(a)[4:] == astuple(b)[4:]


def test_three_images_two_classes_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [3.0, 4.0]])  # units (1, 0), (0, 1), (.6, .8)
    texts = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    measured = iimm(images, texts, torch.tensor([0, 1, 1]))
    inter = (0.0 + 0.0 + 0.6) / 3  # x1·t2, x2·t1, x3·t1
    intra = (0.0 + 0.6 + 0.8) / 3  # x1·x2, x1·x3, x2·x3
    assert measured.inter == pytest.approx(inter, abs=1e-7)
    assert measured.intra == pytest.approx(intra, abs=1e-7)
    assert measured.iimm == pytest.approx((inter + intra) / 2, abs=1e-7)
    assert (measured.n_images, measured.n_classes) == (3, 2)
    assert all(type(value) is float for value in astuple(measured)[:4])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_values_equal_those_of_the_authors_code(case):
    arrays = [np.array(case[key]) for key in ("image_embeds", "text_embeds", "labels")]
    measured = iimm(*arrays)
    for name in ("inter", "intra", "iimm"):
        assert getattr(measured, name) == pytest.approx(case[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("n", "c", "d"), [(2, 2, 1), (3, 2, 2), (5, 7, 3), (33, 4, 16), (40, 40, 5)]
)
def test_iimm_equals_the_double_loop(n, c, d):
    images, texts, labels = draw(n, c, d, seed=n)
    inter, intra = double_loop(images, texts, labels)
    measured = iimm(images, texts, labels)
    expected = (inter, intra, (inter + intra) / 2)
    assert (measured.inter, measured.intra, measured.iimm) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), c=st.integers(2, 6), d=st.integers(1, 9), seed=st.integers(0, 999))
def test_iimm_ignores_image_order_class_order_and_scale_and_stays_in_range(n, c, d, seed):
    images, texts, labels = draw(n, c, d, seed)
    rng = np.random.default_rng(seed)
    whole = iimm(images, texts, labels)
    assert all(-1 - 1e-9 <= value <= 1 + 1e-9 for value in (whole.iimm, whole.inter, whole.intra))
    order, classes = rng.permutation(n), rng.permutation(c)
    moved = iimm(images[order], texts[classes], np.argsort(classes)[labels[order]])
    assert astuple(moved)[:3] == pytest.approx(astuple(whole)[:3], abs=1e-12)
    scale = torch.from_numpy(10 ** rng.uniform(-6, 6, n))[:, None]
    assert_same(iimm(images * scale, texts * 1e-3, labels), whole, 1e-12)


def test_identical_images_and_texts_reach_the_ends_of_the_range():
    images = torch.ones(4, 3)
    assert iimm(images, torch.ones(2, 3), [0, 0, 1, 1]).iimm == pytest.approx(1)
    opposed = iimm(torch.tensor([[1.0], [-1.0]]), torch.tensor([[-1.0], [1.0]]), [1, 0])
    assert opposed.iimm == pytest.approx(-1)  # x1·x2 = -1; x1·t1 = x2·t2 = -1


def test_numpy_and_torch_give_the_same_numbers():
    images, texts, labels = draw(50, 4, 8, dtype=torch.float32)
    assert iimm(images, texts, labels) == iimm(images.numpy(), texts.numpy(), labels.numpy())
    assert iimm(images, texts, labels) == iimm(images, texts, labels.tolist())
    assert iimm(images, texts, labels) == iimm(images, texts, labels.to(torch.uint8))


def test_arrays_that_torch_would_refuse_or_warn_of_are_read():
    images, texts, labels = (part.numpy() for part in draw(50, 4, 8))
    whole = iimm(images, texts, labels)
    frozen = images.copy()
    frozen.flags.writeable = False  # as memory maps are; torch warns
    assert iimm(frozen, texts, labels) == whole
    reverse = iimm(np.ascontiguousarray(images[::-1]), texts, labels[::-1])
    assert iimm(images[::-1], texts, labels[::-1]) == reverse
    assert iimm(images.astype(">f8"), texts, labels.astype(">i8")) == whole
    assert_same(iimm(images.astype(np.longdouble), texts, labels), whole)


def test_embeddings_that_require_gradients_are_measured_without_a_graph():
    images, texts, labels = draw(9, 3, 4)
    assert iimm(images.requires_grad_(), texts.requires_grad_(), labels).n_images == 9


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 2e-4), (torch.bfloat16, 2e-3), (torch.float32, 1e-7)],
    ids=str,
)
def test_lower_precision_stays_near_float64(dtype, tolerance):
    images, texts, labels = draw(400, 5, 64, cone=0.5)
    low = iimm(images.to(dtype), texts.to(dtype), labels)
    assert_same(low, iimm(images, texts, labels), tolerance)


def test_float16_rows_whose_squares_overflow_are_measured():
    images, texts, labels = draw(20, 3, 64)
    big = (images.sign() * 6e4).half()  # |x|² is 2.3e11; float16 ends at 65504
    assert_same(iimm(big, texts, labels), iimm(images.sign(), texts, labels), 1e-6)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_chunked_and_merged_equal_whole(sizes, seed):
    images, texts, labels = draw(sum(sizes) + 2, 4, 8, seed, cone=0.3, dtype=torch.float32)
    whole = iimm(images, texts, labels)
    chunked, merged = IIMMAccumulator(texts), IIMMAccumulator(texts)
    start = 0
    for size in [*sizes, 2]:
        rows = slice(start, start + size)
        chunked.update(images[rows], labels[rows])
        rank = IIMMAccumulator(texts, offset=start)
        rank.update(images[rows], labels[rows])
        merged.merge(rank)
        start += size
    assert_same(chunked.compute(), whole)
    assert_same(merged.compute(), whole)


@pytest.mark.parametrize(
    ("n", "d", "size"),
    [(300, 32, 1), (5000, 32, 7), (5000, 32, 999), (3000, 512, 64), (3000, 512, 2500)],
)
def test_chunked_equals_whole_in_a_tight_cone_of_float32(n, d, size):
    # CLIP's cone, and worse: nearly all of each unit vector is shared, rounding adds up.
    images, texts, labels = draw(n, 10, d, cone=4.0, dtype=torch.float32)
    whole = iimm(images, texts, labels)
    assert whole.intra > 0.9
    assert_same(whole, iimm(images.double(), texts.double(), labels), 1e-7)
    parts = IIMMAccumulator(texts)
    for start in range(0, n, size):
        parts.update(images[start : start + size], labels[start : start + size])
    assert_same(parts.compute(), whole)


def test_captions_are_the_case_of_one_text_per_image():
    images, texts, _ = draw(30, 30, 6)
    whole = iimm(images, texts)
    assert whole == iimm(images, texts, torch.arange(30))
    first, second = IIMMAccumulator(texts), IIMMAccumulator(texts, offset=10)
    first.update(images[:10])
    second.update(images[10:20])
    first.merge(second)
    first.update(images[20:])  # goes on where the merged ones end
    assert_same(first.compute(), whole)


def test_an_empty_chunk_changes_nothing():
    images, texts, labels = draw(10, 3, 4)
    accumulator = IIMMAccumulator(texts)
    accumulator.update(images[:0], [])
    accumulator.update(images, labels)
    accumulator.update(images[:0], labels[:0])
    assert accumulator.compute() == iimm(images, texts, labels)


def test_a_failing_update_leaves_the_accumulator_unchanged():
    images, texts, labels = draw(300, 3, 4)
    accumulator = IIMMAccumulator(texts)
    accumulator.update(images, labels)
    before = accumulator.compute()
    broken = images.clone()
    broken[299, 2] = math.nan
    with pytest.raises(ValueError, match="row 299 has norm nan"):
        accumulator.update(broken, labels)
    with pytest.raises(ValueError, match="got 3"):
        accumulator.update(images, labels + (torch.arange(300) == 299) * (3 - labels))
    assert accumulator.compute() == before
    accumulator.update(images, labels)  # positions did not move either
    twice = iimm(torch.cat([images, images]), texts, torch.cat([labels, labels]))
    assert_same(accumulator.compute(), twice)


def test_standard_error_is_near_that_of_the_linearised_mean():
    images, texts, labels = draw(1500, 6, 16, cone=0.4)
    x = torch.nn.functional.normalize(images, dim=1)
    t = torch.nn.functional.normalize(texts, dim=1)
    a = ((x @ t.T).sum(1) - (x * t[labels]).sum(1)) / 5
    b = ((x @ x.T).sum(1) - 1) / 1499
    expected = float(((a + 2 * b) / 2).std()) / math.sqrt(1500)
    assert iimm(images, texts, labels).standard_error == pytest.approx(expected, rel=0.3)


def test_standard_error_equals_the_spread_over_repeated_draws():
    images, texts, labels = draw(120 * 200, 6, 16, cone=0.4)
    draws = [iimm(images[k::120], texts, labels[k::120]) for k in range(120)]
    spread = np.std([m.iimm for m in draws], ddof=1)
    typical = math.sqrt(np.mean([m.standard_error**2 for m in draws]))
    assert typical == pytest.approx(spread, rel=0.2)  # of 120 draws: ± 13 % is two sigma


def test_standard_error_of_data_sorted_by_class_is_that_of_shuffled_data():
    texts = torch.eye(4, dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave(256)
    images = texts[labels] + 0.3 * draw(1024, 2, 4)[0]
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    shuffled = iimm(images[order], texts, labels[order]).standard_error
    assert iimm(images, texts, labels).standard_error == pytest.approx(shuffled, rel=0.4)


def test_standard_error_is_unknown_below_three_images():
    images, texts, labels = draw(3, 2, 4)
    assert math.isnan(iimm(images[:2], texts, labels[:2]).standard_error)
    assert iimm(images, texts, labels).standard_error >= 0


def test_drift_bound_by_hand():
    # The first image turns by 90°: ‖(0,1) - (1,0)‖ = √2, so d = √2/2. The second text turns by 90°;
    # only the first image sees it as a wrong class, so e = √2/2.
    before, after = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    turned = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    d = e = math.sqrt(2) / 2
    bound = drift_bound(before, after, before, turned, torch.tensor([0, 1]))
    assert bound == pytest.approx(d + (d + e) / 2)
    assert drift_bound(before, 7 * before, before, before / 9, [0, 1]) == 0.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), size=st.floats(1e-3, 30))
def test_iimm_never_moves_by_more_than_the_drift_bound(seed, size):
    images, texts, labels = draw(12, 4, 5, seed)
    g = torch.Generator().manual_seed(seed + 1)
    # A common push, which moves the mean, and noise, which does not.
    push = size * torch.randn(2, 5, generator=g, dtype=torch.float64)
    new_images = images + push[0] + 0.1 * torch.randn(12, 5, generator=g, dtype=torch.float64)
    new_texts = texts + push[1]
    moved = iimm(new_images, new_texts, labels).iimm - iimm(images, texts, labels).iimm
    assert abs(moved) <= drift_bound(images, new_images, texts, new_texts, labels) + 1e-12


X, T, Y = draw(4, 3, 5)
NAN, ZERO = X.clone(), X.clone()
NAN[2, 1] = math.nan
ZERO[1] = 0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((X, T[:1], [0, 0, 0, 0]), ValueError, "`text_embeds` must hold at least 2 classes, got 1"),
        ((X[:1], T, [0]), ValueError, "`image_embeds` must hold at least 2 images, got 1"),
        ((X[:0], T, []), ValueError, "at least 2 images, got 0"),
        ((X, T, [0, 1, 2, 12]), ValueError, "[0, 3) for 3 class texts, got 12; pass one text"),
        ((X, T, [0, 1, -1, 2]), ValueError, "[0, 3) for 3 class texts, got -1"),
        ((NAN, T, Y), ValueError, "`image_embeds` must be finite and non-zero, row 2 has norm nan"),
        ((ZERO, T, Y), ValueError, "`image_embeds` must be finite and non-zero, row 1 has norm 0"),
        ((X, T / 0, Y), ValueError, "`text_embeds` must be finite and non-zero, row 0"),
        ((X, T * 0, Y), ValueError, "`text_embeds` must be finite and non-zero, row 0 has norm 0"),
        ((X, T[:, :2], Y), ValueError, "must have the same width, got 5 and 2"),
        ((X, T, Y.double()), TypeError, "`labels` must be integers, got torch.float64"),
        ((X, T, Y > 0), TypeError, "`labels` must be integers, got torch.bool"),
        ((X, T, ["a", "b", "c", "a"]), TypeError, "`labels` must be integers, got list"),
        ((X, T, [0, 1, 2]), ValueError, "expected shape (4,), got (3,)"),
        ((X, T, Y[:, None]), ValueError, "expected shape (4,), got (4, 1)"),
        ((X, T), ValueError, "there are 4 images and 3 texts; pass `labels`"),
        ((X[0], T, [0]), ValueError, "`image_embeds` must be a matrix with one embedding per row"),
        ((X, T[None], Y), ValueError, "got shape (1, 3, 5)"),
        ((X[:, :0], T[:, :0], Y), ValueError, "got shape (4, 0)"),
        (
            (X.tolist(), T, Y),
            TypeError,
            "`image_embeds` must be a torch tensor or numpy array, got",
        ),
        ((X.long(), T, Y), TypeError, "`image_embeds` must be of a float dtype, got torch.int64"),
        ((X, T.to(torch.complex64), Y), TypeError, "`text_embeds` must be of a float dtype"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        iimm(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((X, X[:2], T, T, Y), ValueError, "one shape with at least 2 rows, got (4, 5) and (2, 5)"),
        ((X, X, T[:1], T[:1], Y), ValueError, "`text_embeds_before` and `text_embeds_after`"),
        ((X, X, T, T, [0, 1, 2, 3]), ValueError, "[0, 3) for 3 class texts, got 3"),
        ((X, X, T, T, None), TypeError, "`labels` must be integers, got NoneType"),
        ((X, NAN, T, T, Y), ValueError, "`image_embeds_after` must be finite and non-zero, row 2"),
    ],
)
def test_drift_bound_refuses_what_does_not_compare(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        drift_bound(*arguments)


def test_accumulators_of_other_texts_do_not_merge():
    with pytest.raises(ValueError, match=r"got \(2, 5\) against \(3, 5\)"):
        IIMMAccumulator(T).merge(IIMMAccumulator(T[:2]))
    with pytest.raises(ValueError, match="or other values"):
        IIMMAccumulator(T).merge(IIMMAccumulator(T + 1))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        IIMMAccumulator(T).compute()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rows_whose_squares_leave_the_range_of_float32_are_measured(scale):
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.eye(2)
    expected = iimm(images, texts, torch.tensor([0, 1, 1]))
    scaled = iimm(images * scale, texts * scale, torch.tensor([0, 1, 1]))
    assert astuple(scaled) == pytest.approx(astuple(expected), abs=1e-7)
