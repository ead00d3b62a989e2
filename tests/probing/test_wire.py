"""What ranks send each other: how much it is, and that any number of them adds up to the whole."""

import numpy as np
import pytest
import torch
from PIL import Image

from iimm_callbacks import Task, iimm
from iimm_callbacks.probing import ranks
from iimm_callbacks.probing.reading import Batch
from iimm_callbacks.probing.scoring import Sums, accumulate
from iimm_callbacks.probing.share import ProbeTask

GREY = Image.new("RGB", (8, 8))


def agreement(predictions, references):
    return float((predictions == references).mean())


def probed(name, n_images, n_classes, metric=None):
    names = [f"class {c}" for c in range(n_classes)]
    pairs = [(GREY, i % n_classes) for i in range(max(n_images, n_classes))]
    task = Task(name, pairs, class_names=names, metric=metric)
    labels = torch.arange(n_images) % n_classes
    return ProbeTask(task, labels, None, [], n_classes, "", torch.zeros(n_images, 32))


def shown(tasks, texts, images, monkeypatch, rank, world):
    """The sums of a rank that has every world-th image, and those of all, from their messages."""
    monkeypatch.setattr(ranks, "world", lambda: (rank, world))
    sums = Sums.zeros(tasks, texts.shape[1], keep=False)
    for number, task in enumerate(tasks):
        for i in range(rank, len(task.labels), world):
            one = Batch(number, i, [i])
            sums.add(one, images[number][i : i + 1], texts[: task.n_prompts], task, None)
    sums.seconds[rank] = rank + 1.0
    return sums


@pytest.mark.parametrize("world", [1, 64, 512])
def test_the_messages_of_any_number_of_ranks_add_up_to_the_whole(world, monkeypatch):
    torch.manual_seed(0)
    tasks = [probed("task", 130, 7), probed("off", 70, 5), probed("metric", 60, 6, agreement)]
    texts = torch.randn(7, 16)
    images = [torch.randn(len(t.labels), 16) + 0.2 for t in tasks]
    parts = [shown(tasks, texts, images, monkeypatch, rank, world) for rank in range(world)]
    whole = parts[0].read(sum(part.message() for part in parts))
    accumulator = accumulate(texts, tasks[0])
    accumulator.state = whole.state()
    found, expected = accumulator.compute(), iimm(images[0], texts, tasks[0].labels)
    assert found.n_images == 130
    for name in ("iimm", "inter", "intra"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    alone = shown(tasks, texts, images, monkeypatch, 0, 1)
    assert torch.equal(whole.groups, alone.groups)  # of one process: to the last bit
    accumulator.state = alone.state()
    assert found.standard_error == pytest.approx(accumulator.compute().standard_error, abs=1e-12)
    for task, x, seen in zip(tasks, images, whole.seen, strict=True):
        nearest = (x @ torch.nn.functional.normalize(texts[: task.n_prompts]).T).argmax(1)
        right = nearest if task.task.metric else nearest == task.labels
        assert torch.equal(seen, right.double())
    assert whole.n_shown.tolist() == [130, 70, 60]
    assert whole.seconds.tolist() == [rank + 1.0 for rank in range(world)]


@pytest.mark.parametrize("n_images", [3, 100, 512, 3000])
@pytest.mark.parametrize("narrow", [0.0, 0.5, 3.0])
def test_rounding_moves_the_standard_error_by_less_than_its_second_digit(
    n_images, narrow, monkeypatch
):
    torch.manual_seed(n_images)
    task = probed("task", n_images, 10)
    texts = torch.randn(10, 512)
    centre = narrow * torch.randn(512) + 5 * narrow * torch.eye(512)[0]  # of a narrow cone
    images = torch.randn(n_images, 512) + centre + 0.5 * torch.randn(10, 512)[task.labels]
    sums = Sums.zeros([task], 512, keep=False)
    for first in range(0, n_images, 64):
        some = images[first : first + 64]
        sums.add(Batch(0, first, list(range(len(some)))), some, texts, task, None)
    accumulator = accumulate(texts, task)
    accumulator.state = sums.read(sums.message()).state()
    found, expected = accumulator.compute(), iimm(images, texts, task.labels)
    assert found.iimm == pytest.approx(expected.iimm, abs=1e-12)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=0.01)


def test_images_that_are_all_the_same_fill_their_bits_and_leave_none(monkeypatch):
    for sign in (1.0, -1.0):
        task = probed("task", 512, 2)
        sums = Sums.zeros([task], 4, keep=False)
        for i in range(512):
            image = torch.tensor([[sign, 0.0, 0.0, 0.0]])
            sums.add(Batch(0, i, [i]), image, torch.eye(4)[:2], task, None)
        read = sums.read(sums.message())
        assert torch.equal(read.groups, sums.groups)
        assert 2**15 < read.groups.abs().max() < 2**16
        assert read.state()[:, 0].sum() == pytest.approx(512 * sign, abs=1e-12)


@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("n_classes", [10, 1000])
def test_a_look_sends_as_much_whatever_classes_and_images(width, n_classes, monkeypatch):
    # The sum of images; those of 32 groups, three numbers in a float64, and two exact ones of each.
    state = 8 * (width + 32 * width / 3 + 1 + 64)
    for world, n_off_target in ((64, 10), (512, 100)):
        monkeypatch.setattr(ranks, "world", lambda world=world: (0, world))
        tasks = [probed("task", 512, n_classes)] + [probed("off", 256, 10)] * n_off_target
        size = Sums.zeros(tasks, width, keep=False).message().nbytes
        n_images = 512 + 256 * n_off_target
        # A bit an image, in eights of 52 bits; 8 bytes for each rank's clock and each task.
        assert size <= state + 8 * (n_images / 52 + 2 * len(tasks) + world + 1)
        assert size < {512: 64_000, 768: 84_000, 1024: 108_000}[width]


def test_signed_packed_numbers_come_back_and_add_up():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 3, 100):
        parts = [torch.from_numpy(rng.integers(-(2**14), 2**14, n)) for _ in range(4)]
        parts[0][:2] = 2**16 - 1 - parts[1][:2] - parts[2][:2] - parts[3][:2]  # the extremes
        parts[0][2:4] = 1 - 2**16 - parts[1][2:4] - parts[2][2:4] - parts[3][2:4]
        added = sum(ranks.packed(part, 17) for part in parts)
        assert torch.equal(ranks.unpacked(added, 17, n, signed=True), sum(parts).double())


def test_packed_numbers_come_back_and_add_up():
    rng = np.random.default_rng(0)
    for bits in (1, 8, 26):
        for n in (0, 1, 51, 52, 53, 300):
            numbers = torch.from_numpy(rng.integers(0, 2**bits, n))
            owner = torch.from_numpy(rng.integers(0, 5, n))
            parts = [ranks.packed(numbers * (owner == rank), bits) for rank in range(5)]
            assert torch.equal(ranks.unpacked(sum(parts), bits, n), numbers.double())
