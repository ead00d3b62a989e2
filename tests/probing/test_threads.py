"""Reading the probe's images: by threads as by one, kept in a quarter of the memory."""

import copy
import io
import pickle
import random
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from iimm_callbacks import Task
from iimm_callbacks.data.images import streams
from iimm_callbacks.models.encoders import Encoder, find_encoder
from iimm_callbacks.probing import kept, reading
from iimm_callbacks.probing.kept import Levels, Packed, find_levels
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.probing.reading import ahead, n_threads

NAMES = ["red", "green"]


def jpeg(i, **more):
    pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(file, "JPEG", **more)
    return file.getvalue()


PICTURES = [(jpeg(i), i % 2) for i in range(40)]


class Pairs:
    """A data set that no two threads may read together."""

    def __init__(self, pairs=PICTURES):
        self.pairs, self.busy = pairs, threading.Lock()
        self.targets, self.classes = [label for _, label in pairs], NAMES

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, position):
        assert self.busy.acquire(blocking=False), "read by two threads"
        try:
            time.sleep(0.001)
            return self.pairs[position]
        finally:
            self.busy.release()


@pytest.fixture
def by_threads(monkeypatch):
    """Three threads read, whatever the machine and however small the pictures; and they pack."""
    monkeypatch.setattr(reading, "n_threads", lambda: 3)
    monkeypatch.setattr(reading, "_WORTH_THREADS", 0.0)
    monkeypatch.setattr(kept, "LEAST", 0)


def task(data=None, **more):
    return Task("t", Pairs() if data is None else data, class_names=NAMES, **more)


def prepared(model, processor, data=None, **more):
    probe = Probe(task(data), processor=processor, progress=False, batch_size=4, **more)
    probe.prepare(model)
    return probe


def pixels_of(probe):
    read = [x.inputs() if isinstance(x, Packed) else x
            for x in (batch.inputs for batch in probe._share.batches)]  # fmt: skip
    return torch.cat([x["pixel_values"] for x in read])


def test_threads_give_what_one_gives_bit_for_bit(tiny_clip, processor, monkeypatch, by_threads):
    model = tiny_clip()
    many = prepared(model, processor)
    monkeypatch.setattr(reading, "n_threads", lambda: 1)
    monkeypatch.setattr(kept, "LEAST", 10**9)
    one = prepared(model, processor)
    assert (many._share.threads, one._share.threads) == (3, 1)
    assert all(isinstance(batch.inputs, Packed) for batch in many._share.batches)
    assert not any(isinstance(batch.inputs, Packed) for batch in one._share.batches)
    assert torch.equal(pixels_of(many), pixels_of(one))
    assert many.fingerprints == one.fingerprints
    a, b = many.look(model, 0), one.look(model, 0)
    assert a.measurement == b.measurement
    assert np.array_equal(a.correct["t"], b.correct["t"])


def test_what_is_not_kept_is_read_ahead_and_the_same(tiny_clip, processor, by_threads):
    model = tiny_clip()
    whole, again = (prepared(model, processor, cache_limit=limit) for limit in (2**31, 0))
    assert all(batch.inputs is None for batch in again._share.batches)
    for step in (0, 1):
        assert whole.look(model, step).measurement == again.look(model, step).measurement


@pytest.mark.parametrize(("room", "most"), [(1, 4), (2 * 4 * 3700, 16), (2**32, 20)])
def test_large_pictures_are_not_read_far_ahead(
    tiny_clip, processor, monkeypatch, by_threads, room, most
):
    monkeypatch.setattr(reading, "_DECODED", room)  # a picture has 3,609 bytes
    model, waiting, seen = tiny_clip(), set(), []
    real, read = find_encoder(model, processor), reading.Reader._read_image

    def read_image(self, batch, row):
        waiting.add((batch.first, row))
        seen.append(len(waiting))
        return read(self, batch, row)

    def preprocess(images):
        time.sleep(0.02)
        for key in sorted(waiting)[: len(images)]:
            waiting.discard(key)
        return real.preprocess(images)

    monkeypatch.setattr(reading.Reader, "_read_image", read_image)
    slow = Encoder(**{**real.__dict__, "preprocess": preprocess})
    monkeypatch.setattr("iimm_callbacks.probing.probe.find_encoder", lambda *_: slow)
    probe = prepared(model, processor)
    assert len(seen) == 40
    assert max(seen) <= most
    assert most == 4 or max(seen) > 4
    assert probe._share.threads == {4: 1, 16: 2, 20: 3}[most]


def test_a_picture_is_kept_in_a_quarter_of_its_memory(tiny_clip, processor, by_threads):
    probe = prepared(tiny_clip(), processor)
    assert sum(b.inputs.nbytes for b in probe._share.batches) == 40 * 3 * 16 * 16
    half = 20 * 3 * 16 * 16
    probe = prepared(tiny_clip(), processor, cache_limit=half)
    assert [batch.inputs is None for batch in probe._share.batches] == [False] * 5 + [True] * 5


@pytest.mark.parametrize(
    "draws",
    [lambda: random.random(), lambda: np.random.rand(), lambda: torch.rand(()).item()],
    ids=["random", "numpy", "torch"],
)
@pytest.mark.parametrize("first", [0, 30], ids=["at once", "later"])
def test_a_processor_that_draws_is_seeded_for_each_batch(
    tiny_clip, processor, monkeypatch, by_threads, draws, first
):
    model, seen = tiny_clip(), []
    real = find_encoder(model, processor)

    def preprocess(images):
        inputs = real.preprocess(images)
        seen.extend(images)
        if len(seen) > first:
            inputs["pixel_values"] = inputs["pixel_values"] + draws()
        return inputs

    drawing = Encoder(**{**real.__dict__, "preprocess": preprocess})
    monkeypatch.setattr("iimm_callbacks.probing.probe.find_encoder", lambda *_: drawing)
    once = prepared(model, processor)
    assert once._share.draws
    assert once._share.threads == 1
    seen.extend(range(99))  # from here on it draws in any case
    again = prepared(model, processor, cache_limit=0)
    for step in (0, 1):
        assert again.look(model, step).measurement == again.look(model, 2).measurement
    if not first:
        assert once.look(model, 0).measurement == again.look(model, 0).measurement


def test_the_first_problem_in_order_is_told_whichever_thread_met_it(
    tiny_clip, processor, by_threads, caplog
):
    pairs = list(PICTURES)
    order = task(Pairs(pairs)).subset()
    late, early = order[30], order[6]
    pairs[late], pairs[early] = (b"late", pairs[late][1]), (b"early", pairs[early][1])
    prepared(tiny_clip(), processor, Pairs(pairs))
    (told,) = [r.message for r in caplog.records if "cannot be read" in r.message]
    assert told.startswith("2 of the IIMM probe's images")
    assert f"image {early} cannot be read" in told


def test_pictures_of_datasets_are_decoded_by_threads_as_datasets_does(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    rows = {
        "image": [
            {"bytes": jpeg(0, exif=rotated), "path": None},
            {"bytes": None, "path": str(tmp_path / "a.jpg")},
        ],
        "label": [0, 1],
    }
    for feature in (ImageFeature(), ImageFeature(mode="L")):
        data = Dataset.from_dict(rows, Features({"image": feature, "label": Value("int64")}))
        read = Task("t", data, class_names=NAMES)
        assert (read._source._encoded is None) == (feature.mode == "L")
        for i in (0, 1):
            expected = data[i]["image"].convert("RGB")
            assert read.images([i])[0].tobytes() == expected.tobytes()
    assert read.images([0])[0].size == (30, 40)


def test_large_pictures_are_read_by_threads_and_the_filters_are_as_before(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # those have 1,200
    before = list(warnings.filters)
    read = list(ahead(lambda i: task().images([i])[0].size, range(20), 4))
    assert read == [(40, 30)] * 20
    assert warnings.filters == before


def test_tasks_that_share_a_data_set_are_read_one_at_a_time(tiny_clip, processor, by_threads):
    shared = Pairs()
    tasks = [Task(name, shared, class_names=NAMES, templates=f"{name} {{}}") for name in "ab"]
    probe = Probe(tasks[0], tasks[1:], processor=processor, progress=False, batch_size=4)
    probe.prepare(tiny_clip())
    assert all(len(shown.labels) == 40 for shown in probe._share.tasks)  # none was lost to a clash


def test_a_task_goes_through_pickle_and_copy():
    one = Task("t", PICTURES, class_names=NAMES)
    for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert other.images([3])[0].tobytes() == one.images([3])[0].tobytes()


# --- levels


def affine(images):
    """A processor: rescaled, normalised, channel by channel."""
    pixels = np.stack([np.asarray(image.resize((32, 24))) for image in images]).astype(np.float32)
    mean, std = (np.array(x, np.float32) for x in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    scaled = (pixels * np.float32(1 / 255) - mean) / std
    return {"pixel_values": torch.from_numpy(scaled).permute(0, 3, 1, 2), "mask": torch.ones(4, 2)}


def test_any_level_of_any_channel_comes_back_exactly(monkeypatch):
    monkeypatch.setattr(kept, "LEAST", 0)
    levels = find_levels(affine)
    assert levels.table.shape == (3, 256)
    noise = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    inputs = affine([Image.fromarray(one) for one in noise])
    packed = levels.pack(inputs)
    assert torch.equal(packed.levels, torch.from_numpy(noise).permute(0, 3, 1, 2))
    back = packed.inputs()
    assert torch.equal(back["pixel_values"], inputs["pixel_values"])
    assert torch.equal(back["mask"], inputs["mask"])
    assert torch.equal(packed.some([2, 0]).inputs()["pixel_values"], inputs["pixel_values"][[2, 0]])
    assert packed.some(slice(1)).nbytes == 3 * 24 * 32 + 2 * 4
    on_meta = packed.inputs(torch.device("meta"))["pixel_values"]  # the way of a GPU
    assert (on_meta.shape, on_meta.dtype) == (inputs["pixel_values"].shape, torch.float32)


def test_what_is_between_levels_not_finite_or_of_another_shape_is_kept_as_it_is():
    levels = Levels(torch.linspace(-2, 2, 256).repeat(3, 1))
    exact = levels.table[:, :4].reshape(1, 3, 2, 2).clone()
    assert levels.pack({"pixel_values": exact}) is not None
    for wrong in (
        exact.double(),
        exact + 0.003,
        exact * torch.nan,
        exact + 99,
        exact[0],
        exact[:, :2],
        [1],
    ):
        assert levels.pack({"pixel_values": wrong}) is None
    assert levels.pack([1, 2]) is None


@pytest.mark.parametrize(
    "preprocess",
    [
        list,
        lambda images: {"pixel_values": torch.zeros(len(images), 3, 32, 32)},
        lambda images: {"pixel_values": torch.zeros(len(images), 64, 48)},
        lambda images: {"pixel_values": affine(images)["pixel_values"].half()},
        lambda images: 1 / 0,
    ],
    ids=["functions", "constant", "patches", "half", "raises"],
)
def test_a_processor_without_such_a_table_has_none(preprocess, monkeypatch):
    monkeypatch.setattr(kept, "LEAST", 0)
    assert find_levels(preprocess) is None


def test_small_pictures_are_kept_as_they_are():
    assert find_levels(affine) is None


# --- ahead


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order_and_an_error_at_its_place(threads):
    def slow(i):
        time.sleep(0.002 * (i % 3))
        if i == 7:
            raise KeyError(i)
        return i

    found = []
    with pytest.raises(KeyError, match="7"):
        found.extend(ahead(slow, range(20), threads))
    assert found == list(range(7))


def test_no_more_is_computed_ahead_than_there_are_threads():
    begun = []
    results = ahead(lambda i: begun.append(i), range(100), 4)
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 5
    results.close()
    assert len(begun) <= 5
    assert not any(thread.name.startswith("iimm") for thread in threading.enumerate())


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = n_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert (alone >= 1, n_threads()) == (True, 1)


def test_a_draw_from_any_stream_shows():
    for draw in (random.random, np.random.rand, lambda: torch.rand(1), lambda: np.random.randn()):
        before = streams()
        assert streams() == before
        draw()
        assert streams() != before


# The first look embeds while threads still read


def first_look(model, processor, data=None, *, overlaps, **more):
    probe = Probe(task(data), processor=processor, progress=False, batch_size=4, **more)
    probe.overlaps = overlaps
    before = streams()
    look = probe.look(model, 0, linear_probe=True)
    assert streams() == before
    return probe, look


def assert_same(one, other):
    assert one.measurement == other.measurement
    assert np.array_equal(one.correct["t"], other.correct["t"])
    assert one.learnable == other.learnable


@pytest.mark.parametrize("limit", [0, 2**31])
def test_a_look_that_embeds_while_it_reads_has_the_same_numbers(
    tiny_clip, processor, by_threads, limit
):
    model = tiny_clip()
    _, plain = first_look(model, processor, overlaps=False, cache_limit=limit)
    probe, look = first_look(model, processor, overlaps=True, cache_limit=limit)
    assert_same(look, plain)
    torch.nn.init.normal_(model.visual_projection.weight)  # trained: nothing is left of the first
    later = probe.look(model, 1)
    assert later.measurement == first_look(model, processor, overlaps=False)[1].measurement
    assert later.measurement.iimm != look.measurement.iimm


def test_batches_that_lose_images_are_embedded_again(tiny_clip, processor, by_threads):
    pairs = list(PICTURES)
    pairs[9] = (b"gone", 1)
    pairs[21] = (pairs[5][0], 1)  # the same picture twice
    looks = [first_look(tiny_clip(), processor, Pairs(pairs), overlaps=o)[1] for o in (False, True)]
    assert_same(*looks)


def test_reading_and_embedding_take_the_longer_of_both_not_the_sum(
    tiny_clip, processor, by_threads, monkeypatch
):
    reads = processor.image_processor.preprocess
    model, busy, both = tiny_clip(), [0], [0]

    def slow_reading(*arguments, **settings):
        busy[0] += 1
        time.sleep(0.03)
        found = reads(*arguments, **settings)
        busy[0] -= 1
        return found

    monkeypatch.setattr(processor.image_processor, "preprocess", slow_reading)

    def device(module, inputs, output):
        before = busy[0]
        time.sleep(0.03)
        both[0] += before > 0 or busy[0] > 0

    model.vision_model.register_forward_hook(device)
    for overlaps in (False, True):
        both[0] = 0
        probe = Probe(task(), processor=processor, progress=False, batch_size=4)
        probe.overlaps = overlaps
        probe.look(model, 0)
        assert (both[0] >= 4) is overlaps
        assert probe.seconds > 10 * 0.03  # what a later look will take
    assert not any(thread.name.startswith("iimm") for thread in threading.enumerate())


def test_an_error_while_embedding_ahead_is_that_of_the_look(tiny_clip, processor, by_threads):
    model, calls = tiny_clip(), []

    def fails(module, inputs, output):
        calls.append(len(output[0]))
        if len(calls) > 3:
            raise OSError("the device is gone")

    model.vision_model.register_forward_hook(fails)
    with pytest.raises(OSError, match="the device is gone"):
        first_look(model, processor, overlaps=True)
    assert not [t for t in threading.enumerate() if t.name.startswith("iimm")]
