"""Whatever goes wrong costs one clear warning: not the run, and no number that is not one."""

import errno
import gc
import io
import itertools
import logging
import math
import time
import warnings
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_outcomes import RUN
from tqdm.auto import tqdm
from transformers import CLIPModel, TrainerCallback

from iimm_callbacks import IIMMCallback, Task, append_outcome, read_outcomes
from iimm_callbacks.measures.embeddings import zero_shot_scores
from iimm_callbacks.models.encoders import find_encoder, undisturbed
from iimm_callbacks.records.run_file import read_run
from iimm_callbacks.records.store import FileLock
from iimm_callbacks.records.verdict import LEVELS

LOOKS = (0, 2, 4, 6)  # where a run is looked at that nothing goes wrong in
TASKS = {  # prompt, classes and images, all of which are in the probe
    "colours": ("a {} thing", ["red", "green", "blue", "grey"], 32),
    "shapes": ("a {}", ["circle", "square", "cross"], 24),
}


@dataclass
class Fault:
    """What happens, and what is to come of it."""

    inject: Any  # changes a run, see `start`, before it begins
    warning: str | None = None  # words of the only one; None: there is none
    steps: tuple = LOOKS  # that there are numbers of
    ended: str = "finished"
    error: type | None = None  # that training ends in, with the guard and without
    same: bool = True  # numbers are those of a run without the fault
    left_out: int = 0  # of the task's images
    lost: str = ""  # file that cannot be written
    check: Any = None  # more to be asserted of the looks


# What is injected


def image(run, item, *positions, task="colours"):
    for position in positions or [5]:
        run.data[task][position] = (item, run.data[task][position][1])


def encoded(image, form="PNG", **options):
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def claims_to_be(width, height):
    """A PNG of a few bytes whose header promises more."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"):
        data += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return data


def large_image(run, filtered):
    """In size between what Pillow warns of and what it refuses, which is twice that."""
    run.patch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    warnings.simplefilter(filtered, Image.DecompressionBombWarning)
    image(run, encoded(NOISE.resize((20, 20))))


def labels(run, task, choose):
    run.data[task] = [(image, choose(i)) for i, (image, _) in enumerate(run.data[task])]


def data_set(run, then):
    """Once its labels have been read, `then(position, image, label)` is what it gives."""

    class Fickle(list):
        reads = 0

        def __getitem__(self, position):
            self.reads += 1
            pair = super().__getitem__(position)
            return pair if self.reads <= 1 + len(self) else then(position, *pair)

    run.data["colours"] = Fickle(run.data["colours"])


def unreadable(run, when, **settings):
    def then(position, image, label):
        if position == 5 and when(run.step):
            raise OSError(errno.EIO, "Input/output error")
        return image, label

    run.settings |= settings
    data_set(run, then)


def weights(run, change, since=4):
    """Training itself goes wrong, at every step from one on."""

    def spoil(model, logs):
        if run.step >= since:
            with torch.no_grad():
                change(model.dual_encoder)

    run.before.append(calling("on_step_end", spoil))


def fill(part, value, **since):
    return lambda run: weights(run, lambda model: getattr(model, part).weight.fill_(value), **since)


def class_vectors(run, model, task):
    """[C, D] embeddings of a task's prompts, now."""
    template, names, _ = TASKS[task]
    encoder = find_encoder(model, run.processor)
    with undisturbed(model):
        return encoder.embed_texts(model, encoder.tokenize([template.format(n) for n in names]))


def taken_for(run, task):
    """Classes that the untouched model takes a task's images for."""
    encoder = find_encoder(run.model, run.processor)
    with undisturbed(run.model):
        pixels = encoder.preprocess([image for image, _ in run.data[task]])
        images = encoder.embed_backbone(run.model, pixels)
    return zero_shot_scores(images, class_vectors(run, run.model, task)).argmax(1).tolist()


def nothing_right(run):
    untouched = taken_for(run, "shapes")
    labels(run, "shapes", lambda i: (untouched[i] + 1) % 3)


def collapse(run):
    """All shapes are right, then all images become the vector of the rarest one."""
    untouched = taken_for(run, "shapes")
    rarest = min(range(3), key=untouched.count)

    def change(model):
        norm, projection = model.vision_model.post_layernorm, model.visual_projection.weight
        norm.weight.zero_()
        norm.bias.copy_(torch.linalg.pinv(projection) @ class_vectors(run, model, "shapes")[rarest])

    weights(run, change)
    labels(run, "shapes", lambda i: untouched[i])
    labels(run, "colours", lambda i: i % 4)


def probing(run, hook):
    """Calls `hook(n)` whenever the probe is to embed n images."""
    embed = CLIPModel.get_image_features

    def spoilt(self, pixel_values=None, **kwargs):
        if not self.training:
            hook(len(pixel_values))
        return embed(self, pixel_values=pixel_values, **kwargs)

    run.patch.setattr(CLIPModel, "get_image_features", spoilt)


def out_of_memory(run, most, since=0):
    def hook(n):
        if n > most and run.step >= since:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    probing(run, hook)


def best_model_cannot_be_measured(run):
    """The model of step 6 can, and then the Trainer puts the best one in its place."""
    looks = []

    def hook(n):
        if n == TASKS["colours"][2] and run.step == 6:
            looks.append(n)
            if len(looks) > 1:
                boom()

    run.arguments |= {
        "load_best_model_at_end": True, "metric_for_best_model": "loss",
        "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    probing(run, hook)


def clock(max_overhead, in_look=0, in_step=0):
    """`time.perf_counter` stands still but for jumps, in the look at step 2 or in every step."""

    def inject(run):
        now = [1000.0]
        jump = lambda seconds: now.append(now[-1] + seconds)  # noqa: E731
        run.settings["max_overhead"] = max_overhead
        run.patch.setattr(time, "perf_counter", lambda: now[-1])
        run.before.append(calling("on_step_begin", lambda model, logs: jump(in_step)))
        probing(run, lambda n: jump(in_look * (run.step == 2)))

    return inject


def store_below_a_file(run):
    (run.folder / "file").write_text("")
    run.settings["outcomes"] = run.folder / "file" / "below"


def folder_in_the_way(run):
    path = run.folder / "out" / "iimm_colours.json"
    if path.is_file():  # of the run without the fault
        path.unlink()
    path.mkdir(parents=True, exist_ok=True)


def full_disk(run, prefix):
    """From step 4 on, files of such a name take 20 more bytes."""
    append_outcome(run.store, RUN)
    opened = Path.open

    def spoilt(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        write = file.write

        def write_some(data):
            write(data[:20])
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        if path.name.startswith(prefix) and mode != "r" and run.step >= 4:
            file.write = write_some
        return file

    run.patch.setattr(Path, "open", spoilt)


def no_locks(run):
    def acquire(self, *args, **kwargs):  # what filelock did up to 3.23
        raise NotImplementedError("FileSystem does not appear to support flock")

    run.patch.setattr(FileLock, "acquire", acquire)


def boom(*args, **kwargs):
    raise ConnectionError("no route to host")


def tracker(run, when):
    run.after.append(calling("on_log", lambda model, logs: when(logs) and boom()))


def encode(images=torch.clone, texts=torch.clone, since=4):
    def inject(run):
        def function(preprocess, embed, spoil):
            def call(model, items):
                encoder = find_encoder(model, run.processor)
                out = getattr(encoder, embed)(model, getattr(encoder, preprocess)(items))
                return spoil(out) if run.step >= since else out

            return call

        run.settings["encode"] = (
            function("preprocess", "embed_backbone", images),
            function("tokenize", "embed_texts", texts),
        )

    return inject


def calling(hook, do):
    """A callback that calls `do(model, logs)` at one hook."""

    def call(self, args, state, control, model=None, logs=None, **kwargs):
        do(model, logs)

    return type("Calling", (TrainerCallback,), {hook: call})()


# What comes of it


def collapsed(first, second, *rest):
    assert first["eval_iimm_shapes_accuracy"] == 1
    for row in rest:
        right = row["eval_iimm_shapes_accuracy"]
        assert right <= 1 / 3
        assert row["eval_iimm_forgetting_observed"] == pytest.approx(1 - right)
        assert row["level"] == "stop"
        assert row["eval_iimm_accuracy"] == pytest.approx(1 / 4)
        assert row["eval_iimm_intra"] == pytest.approx(1, abs=1e-5)


def none_forgotten(first, *rest):
    assert first["eval_iimm_shapes_accuracy"] == 0
    assert all(row["eval_iimm_forgetting_observed"] <= 0 for row in rest)
    assert all(row["level"] == "continue" for row in (first, *rest))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
RGB = NOISE.convert("RGB")
ANIMATED = encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)])
UNREAD = "1 of the IIMM probe's images cannot be read and are left out"
UNMEASURED = "could not measure the model at step 4 "
DIVERGED = "training has diverged, which is not forgetting: "
LEFT_OUT = {"same": False, "left_out": 1}
FAILED = {"steps": (0, 2), "ended": "the last look failed"}
NAN = {"steps": (0, 2), "ended": "training diverged"}
OTHER = {"same": False}  # other images, other numbers

# fmt: off
FAULTS = {
    # Images that cannot be read
    "corrupt": Fault(lambda run: image(run, b"no image"), UNREAD, **LEFT_OUT),
    "corrupt, off target": Fault(
        lambda run: image(run, b"no image", task="shapes"), UNREAD, **OTHER),
    "truncated": Fault(lambda run: image(run, encoded(RGB)[:300]), UNREAD, **LEFT_OUT),
    "no such file": Fault(lambda run: image(run, "/nowhere/5.png"), UNREAD, **LEFT_OUT),
    "bomb of 900 megapixels": Fault(
        lambda run: image(run, claims_to_be(30_000, 30_000)), UNREAD, **LEFT_OUT),
    "first one corrupt, off_target=None": Fault(
        lambda run: (image(run, b"no image", 0), run.settings.update(off_target=None)),
        UNREAD, **LEFT_OUT),
    # Images that can
    "large, Pillow warns": Fault(lambda run: large_image(run, "ignore"), **OTHER),
    "large, Pillow raises": Fault(lambda run: large_image(run, "error"), **OTHER),
    "greyscale": Fault(lambda run: image(run, encoded(NOISE)), **OTHER),
    "RGBA": Fault(lambda run: image(run, encoded(RGB.convert("RGBA"))), **OTHER),
    "CMYK": Fault(lambda run: image(run, encoded(RGB.convert("CMYK"), "JPEG")), **OTHER),
    "1 pixel": Fault(lambda run: image(run, encoded(RGB.crop((0, 0, 1, 1)))), **OTHER),
    "animated": Fault(lambda run: image(run, ANIMATED), **OTHER),
    # Data sets
    "raises at once": Fault(lambda run: unreadable(run, lambda step: True), UNREAD, **LEFT_OUT),
    "raises later, images in memory": Fault(lambda run: unreadable(run, lambda step: step >= 4)),
    "raises later": Fault(
        lambda run: unreadable(run, lambda step: step >= 4, cache_limit=0), UNMEASURED, **FAILED),
    "raises once": Fault(
        lambda run: unreadable(run, lambda step: step == 4, cache_limit=0), UNMEASURED, (0, 2, 6)),
    "labels change type": Fault(lambda run: data_set(run, lambda i, image, y: (image, str(y)))),
    "nothing right off target": Fault(nothing_right, check=none_forgotten, **OTHER),
    # Training
    "images NaN": Fault(fill("visual_projection", math.nan), DIVERGED, **NAN),
    "texts infinite": Fault(fill("text_projection", math.inf), DIVERGED, **NAN),
    "images NaN at the last step": Fault(
        fill("visual_projection", math.nan, since=6), DIVERGED, (0, 2, 4), "training diverged"),
    "images zero": Fault(fill("visual_projection", 0.0), "row 0 has norm 0.0", **FAILED),
    "collapse to one class": Fault(collapse, check=collapsed, **OTHER),
    "training raises": Fault(
        lambda run: tracker(run, lambda logs: "loss" in logs and run.step == 5),
        None, (0, 2, 4), "interrupted", ConnectionError),
    "best model cannot be measured": Fault(
        best_model_cannot_be_measured, "at step 6 ", ended="the last look failed",
        **OTHER),
    # Memory
    "no memory for more than 8": Fault(lambda run: out_of_memory(run, 8), "in batches of 8"),
    "no memory for a single one": Fault(
        lambda run: out_of_memory(run, 0, since=4), UNMEASURED, **FAILED),
    # A user's functions
    "encode raises": Fault(encode(boom), UNMEASURED, **FAILED),
    "encode gives NaN": Fault(encode(lambda x: x * math.nan), DIVERGED, **NAN),
    "encode gives too few images": Fault(encode(lambda x: x[1:]), UNMEASURED, **FAILED),
    "encode gives too many": Fault(encode(lambda x: torch.cat([x, x])), UNMEASURED, **FAILED),
    "encode gives narrow ones": Fault(encode(lambda x: x[:, 1:]), UNMEASURED, **FAILED),
    "encode gives numbers": Fault(encode(lambda x: x[:, 0]), UNMEASURED, **FAILED),
    "encode gives nothing": Fault(encode(lambda x: None), UNMEASURED, **FAILED),
    "encode gives too few texts": Fault(encode(texts=lambda x: x[1:]), UNMEASURED, **FAILED),
    "action raises": Fault(
        lambda run: run.settings.update(action=boom), "`action` raised ConnectionError: no route"),
    "tracker raises": Fault(
        lambda run: tracker(run, lambda logs: "eval_iimm" in logs), "a tracker raised Connection"),
    "terminal raises": Fault(
        lambda run: (run.settings.update(verbose=True), run.patch.setattr(tqdm, "write", boom)),
        "printing raised ConnectionError"),
    # Disks
    "disk full, run file": Fault(
        lambda run: full_disk(run, "iimm_colours"), "No space left", lost="run file"),
    "disk full, store": Fault(lambda run: full_disk(run, "outcomes"), "No space", lost="store"),
    "a folder for a run file": Fault(folder_in_the_way, "is not up to date", lost="run file"),
    "store below a file": Fault(store_below_a_file, "was not saved", lost="store"),
    "store cannot be locked": Fault(no_locks, "was not saved", lost="store"),
    "a setting that JSON has not": Fault(
        lambda run: run.arguments.update(learning_rate=np.float32(1e-3)), **OTHER),
    # Clocks
    "time runs backwards": Fault(
        lambda run: run.patch.setattr(time, "time", partial(next, itertools.count(2e9, -60.0)))),
    "clock stands still": Fault(clock(None)),
    "clock stands still, on a budget": Fault(clock(0.05)),
    "an hour in a look": Fault(clock(None, in_look=3600)),
    "an hour in a look, on a budget": Fault(clock(0.05, in_look=3600), **OTHER),
    "an hour in each step": Fault(clock(None, in_step=3600)),
    "an hour in each step, on a budget": Fault(clock(0.05, in_step=3600)),
}
# fmt: on


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """The Trainer collects garbage when a run starts, among all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def start(make_trainer, tiny_clip, processor, colours, shapes, tmp_path, own_store):
    """(inject, guarded=True) -> trainer, guard, and what training ended in."""

    def go(inject=lambda run: None, guarded=True, **settings):
        data = {
            name: [(row["image"], row["label"]) for row in rows.select(range(TASKS[name][2]))]
            for name, rows in (("colours", colours), ("shapes", shapes))
        }
        with pytest.MonkeyPatch.context() as patch:
            run = SimpleNamespace(
                patch=patch, folder=tmp_path, store=own_store, processor=processor, step=0,
                data=data,  # task -> (image, label) pairs
                model=tiny_clip(dropout=0.3),
                settings={}, arguments={},  # of the guard, of the Trainer
                before=[], after=[],  # callbacks, as seen from the guard
            )  # fmt: skip
            count = calling("on_step_end", lambda model, logs: setattr(run, "step", run.step + 1))
            inject(run)
            tasks = [
                Task(name, run.data[name], templates=template, class_names=names)
                for name, (template, names, _) in TASKS.items()
            ]
            usual = {"every": 2, "max_overhead": None, "verbose": False, "off_target": tasks[1:]}
            guard = IIMMCallback(tasks[0], **usual | run.settings | settings)
            callbacks = [count, *run.before, *[guard] * guarded, *run.after]
            trainer = make_trainer(callbacks, model=run.model, max_steps=6, **run.arguments)
            error = None
            try:
                trainer.train()
            except Exception as raised:
                error = raised.with_traceback(None)
        return trainer, guard, error

    return go


def seen(trainer):
    return [row for row in trainer.state.log_history if "eval_iimm" in row]


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.endswith("runtime")} for row in rows]


def warned(caplog):
    """The warnings: those of faults, and those of verdicts."""
    messages = [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name.startswith("iimm_callbacks")
    ]
    # It trains on its probe images here, which is told, too.
    messages = [m for m in messages if "too high: use held-out ones" not in m]
    of_verdicts = [message for message in messages if message.startswith("IIMM guard, step")]
    return [message for message in messages if message not in of_verdicts], of_verdicts


def verdicts(looks):
    """The warnings there are to be: one whenever a verdict is worse than all before."""
    levels = [LEVELS.index(look["level"]) for look in looks]
    return [
        f"IIMM guard, step {look['step']}: {look['reason']}"
        for i, look in enumerate(looks)
        if levels[i] > max(levels[:i], default=0)
    ]


def on_disk(trainer, guard, tmp_path, own_store):
    """The run file, if there is one, and what is in the store once the run is over."""
    # What ended in an exception is saved when it goes; the Trainer has it for its card.
    guard.monitor = None
    vars(trainer).pop("create_model_card", None)
    gc.collect()
    path = tmp_path / "out" / "iimm_colours.json"
    outcomes = read_outcomes(own_store) if own_store.exists() else []
    return read_run(path) if path.is_file() else None, [o for o in outcomes if o != RUN]


def unforeseen(row):
    """A row without what was forecast, and what that rests on."""
    words = ("forecast", "exceed", "linear_probe")
    return {k: v for k, v in row.items() if not any(word in k for word in words)}


CLEAN = []  # rows of a run that nothing goes wrong in


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_one_warning(start, name, caplog, tmp_path, own_store):
    fault = FAULTS[name]
    if not CLEAN:
        CLEAN.extend(timeless(seen(start(outcomes=None)[0])))
    plain, _, plain_error = start(fault.inject, guarded=False)
    caplog.clear()
    trainer, guard, error = start(fault.inject)

    # Training ends as it would have without the guard.
    assert repr(error) == repr(plain_error)
    assert type(error) is (fault.error or type(None))
    assert trainer.state.global_step == plain.state.global_step
    losses = [[r for r in t.state.log_history if "loss" in r] for t in (plain, trainer)]
    assert repr(losses[0]) == repr(losses[1])  # NaN is not itself
    states = [t.model.state_dict() for t in (plain, trainer)]
    torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)

    # One clear warning, and no number that is not one.
    messages, of_verdicts = warned(caplog)
    assert len(messages) == (fault.warning is not None), messages
    assert all(fault.warning in message for message in messages)
    rows = seen(trainer)
    assert tuple(row["step"] for row in rows) == fault.steps
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if fault.same:
        expected = [row for row in CLEAN if row["step"] in fault.steps]
        assert len(rows) == len(expected)
        for row, clean in zip(timeless(rows), expected, strict=True):
            # Its store has a run to learn from; or the probe starts at a guessed logit scale.
            if fault.lost or "encode" in name:
                row, clean = unforeseen(row), unforeseen(clean)
            assert row == pytest.approx(clean, abs=1e-6)
    record = guard.record()
    assert of_verdicts == ([] if callable(guard.action) else verdicts(record["looks"]))
    if fault.check:
        fault.check(*record["looks"])

    # Everything measured up to then is on disk.
    saved, outcomes = on_disk(trainer, guard, tmp_path, own_store)
    if saved:
        disk_full = fault.lost == "run file"
        assert saved["looks"] == record["looks"][: 2 if disk_full else None]
        assert [look["step"] for look in record["looks"]] == list(fault.steps)
        assert saved["ended"] == ("running" if disk_full or error else fault.ended)
        assert saved["n_images"] == 32 - fault.left_out
    assert (saved is None) == (name == "a folder for a run file")
    assert not list(tmp_path.rglob("*.unfinished"))
    assert len(outcomes) == (fault.lost != "store")
    for outcome in outcomes:
        assert (outcome.complete, outcome.ended) == (fault.ended == "finished", fault.ended)
        assert [look["share"] * 6 for look in outcome.trajectory] == pytest.approx(fault.steps)


STRICT = {  # what raises, and the steps that there are numbers of
    "encode raises": (0, 2),
    "images NaN": (0, 2),
    "action raises": (0,),
    "tracker raises": (0,),
    "terminal raises": (0,),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_ends_in_an_exception(start, name, tmp_path, own_store, caplog):
    trainer, guard, error = start(FAULTS[name].inject, strict=True)
    assert (DIVERGED if name == "images NaN" else "no route to host") in str(error)
    assert trainer.state.global_step == (4 if len(STRICT[name]) > 1 else 0)
    assert warned(caplog)[0] == []
    saved, (outcome,) = on_disk(trainer, guard, tmp_path, own_store)
    assert tuple(look["step"] for look in saved["looks"]) == STRICT[name]
    assert (outcome.complete, outcome.ended) == (False, "interrupted")


UNMEASURABLE = {
    "1 image": (
        lambda run: image(run, b"no image", *range(1, 32)),
        "`dataset` of task 'colours' must hold at least 2 images that can be read, got 1 of 32: ",
    ),
    "no memory": (lambda run: out_of_memory(run, 0), "CUDA out of memory. Tried to allocate"),
    "NaN": (encode(lambda x: x * math.nan, since=0), "row 0 has norm nan"),
}


@pytest.mark.parametrize("name", UNMEASURABLE)
def test_without_a_first_measurement_nothing_is_trained(
    start, name, tiny_clip, own_store, tmp_path
):
    inject, words = UNMEASURABLE[name]
    trainer, guard, error = start(inject)
    assert words in str(error)
    assert "diverged" not in str(error)
    assert (trainer.state.global_step, seen(trainer)) == (0, [])
    untouched = tiny_clip(dropout=0.3).state_dict()
    torch.testing.assert_close(trainer.model.dual_encoder.state_dict(), untouched, rtol=0, atol=0)
    assert on_disk(trainer, guard, tmp_path, own_store) == (None, [])


@pytest.mark.parametrize("name", ["raises later", "images NaN"])
def test_a_look_that_failed_is_counted_once(start, name):
    _, guard, _ = start(FAULTS[name].inject)
    assert guard.record()["failures"] == 2  # at steps 4 and 6


def test_a_look_that_failed_is_not_tried_again_after_a_partial_one(start, monkeypatch):
    def fails_last(run):
        unreadable(run, lambda step: step == 6, cache_limit=0)

    monkeypatch.setattr("iimm_callbacks.guard.pace.Budget.part", lambda *_: 0.5)
    _, guard, _ = start(fails_last, max_overhead=0.05)
    assert guard.record()["failures"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [0, 1, 2, "3"],
            r"label 3 must be an integer, or all labels strings, got '3' \(str\)",
        ),
        (["red", "green", 2, "grey"], "caption 2 must be a string, got 2"),
    ],
)
def test_labels_of_several_types_are_refused_before_training(values, message):
    names = None if isinstance(values[0], str) else TASKS["colours"][1]
    with pytest.raises(TypeError, match=message):
        Task("colours", [(RGB, value) for value in values], class_names=names)
