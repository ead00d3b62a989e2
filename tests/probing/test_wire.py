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
    accumulator.state = whole.state
    found, expected = accumulator.compute(), iimm(images[0], texts, tasks[0].labels)
    assert found.n_images == 130
    for name in ("iimm", "inter", "intra", "standard_error"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12)
    for task, x, seen in zip(tasks, images, whole.seen, strict=True):
        nearest = (x @ torch.nn.functional.normalize(texts[: task.n_prompts]).T).argmax(1)
        right = nearest if task.task.metric else nearest == task.labels
        assert torch.equal(seen, right.double())
    assert whole.n_shown.tolist() == [130, 70, 60]
    assert whole.seconds.tolist() == [rank + 1.0 for rank in range(world)]


@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize("n_classes", [10, 1000])
def test_a_look_sends_as_much_whatever_classes_and_images(width, n_classes, monkeypatch):
    state = 8 * 32 * (width + 2)  # the groups of the jackknife: 132 kB at D = 512
    for world, n_off_target in ((64, 10), (512, 100)):
        monkeypatch.setattr(ranks, "world", lambda world=world: (0, world))
        tasks = [probed("task", 512, n_classes)] + [probed("off", 256, 10)] * n_off_target
        size = Sums.zeros(tasks, width, keep=False).message().nbytes
        n_images = 512 + 256 * n_off_target
        # A bit an image, in eights of 52 bits; 8 bytes for each rank's clock and each task.
        assert size <= state + 8 * (n_images / 52 + 2 * len(tasks) + world + 1)
        assert size < state + 12_000


def test_packed_numbers_come_back_and_add_up():
    rng = np.random.default_rng(0)
    for bits in (1, 8, 26):
        for n in (0, 1, 51, 52, 53, 300):
            numbers = torch.from_numpy(rng.integers(0, 2**bits, n))
            owner = torch.from_numpy(rng.integers(0, 5, n))
            parts = [ranks.packed(numbers * (owner == rank), bits) for rank in range(5)]
            assert torch.equal(ranks.unpacked(sum(parts), bits, n), numbers.double())
