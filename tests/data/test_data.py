"""Where a task's images come from: the Hub, a folder, a stream; and prompts by name."""

import gc
import hashlib
import io
import json
import logging
import os
import random
import re
import tempfile
import weakref
from collections import Counter
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from shared_fixtures import make_dataset

from iimm_callbacks import IIMMCallback, Task
from iimm_callbacks.data import prompts
from iimm_callbacks.data.sources import ImageFolder, has_class_folders
from iimm_callbacks.data.streams import Draw
from iimm_callbacks.probing.probe import Probe

FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "owl"])})
TWO = {"class_names": ["a", "b"]}


def png(red):
    encoded = io.BytesIO()
    PILImage.new("RGB", (4, 4), (red % 256, red // 256, 0)).save(encoded, "png")
    return encoded.getvalue()


# --- prompts by name ---

LENGTHS = {
    "birdsnap": 1, "caltech101": 34, "cifar10": 18, "cifar100": 18, "clevr_counts": 1,
    "country211": 5, "dtd": 8, "eurosat": 3, "fer2013": 6, "fgvc_aircraft": 2, "flowers102": 1,
    "food101": 1, "gtsrb": 3, "hateful_memes": 1, "imagenet": 80, "imagenet_7": 7,
    "kinetics700": 28, "kitti": 1, "mnist": 1, "oxford_pets": 1, "pascal_voc2007": 1, "pcam": 1,
    "rendered_sst2": 1, "resisc45": 18, "stanford_cars": 8, "stl10": 2, "sun397": 2, "ucf101": 48,
}  # fmt: skip


def test_every_list_is_there_and_is_the_one_that_was_held_against_its_source():
    assert {name: len(prompts.get(name)) for name in prompts.names()} == {
        f"clip:{name}": n for name, n in LENGTHS.items()
    }
    said = json.dumps([prompts.get(name) for name in prompts.names()])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "486f8dc370bc6fdb"
    assert set(prompts.get("clip:imagenet_7")) < set(prompts.get("clip:imagenet"))


def test_a_template_has_a_gap_and_a_name_has_none():
    for name in prompts.names():
        assert "{}" not in name
        found = prompts.get(name)
        assert [t.count("{}") for t in found] == [1] * len(found)
        assert len(set(found)) == len(found)


def test_source_and_licence_are_shipped_with_the_prompts():
    text = (Path(prompts.__file__).parent / "clip_prompts" / "SOURCE.md").read_text()
    for needed in ("github.com/openai/CLIP", "MIT License", "Copyright (c) 2021 OpenAI"):
        assert needed in text
    for name in ("eurosat", "gtsrb", "fer2013"):
        assert f"`{name}`" in text


def test_a_task_takes_names_and_templates_side_by_side():
    pairs = [(png(0), 0), (png(1), 1)]
    task = Task("t", pairs, templates=["clip:eurosat", "clip:{} aside"], **TWO)
    assert task.templates == (*prompts.get("clip:eurosat"), "clip:{} aside")
    assert task.prompts([])[:2] == [
        "a centered satellite photo of a.",
        "a centered satellite photo of a a.",
    ]
    assert Task("t", pairs, templates="clip:mnist", **TWO).templates == (
        'a photo of the number: "{}".',
    )


@pytest.mark.parametrize(
    ("name", "own"),
    [("clip:DescribableTextures", "dtd"), ("clip:Oxford-Pets", "oxford_pets"), ("clip:SST2", None)],
)
def test_headings_of_the_source_are_names_too(name, own):
    assert prompts.get(name) == prompts.get(f"clip:{own or 'rendered_sst2'}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip:eurosta", "got 'clip:eurosta', which is close to 'clip:eurosat'; names are clip:bi"),
        ("clip:zzzzzzzzzz", "got 'clip:zzzzzzzzzz'; names are clip:birdsnap, clip:caltech101,"),
        ("imagenet", "exactly one '{}' for the class name, got 'imagenet'; write e.g."),
    ],
)
def test_an_unknown_name_tells_which_there_are(name, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Task("t", [(png(0), 0), (png(1), 1)], templates=name, **TWO)


# --- folders ---


def write(folder, **classes):
    """`folder/class/file` for each file named; no image in any."""
    for name, files in classes.items():
        for file in files:
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"rubbish")
    return folder


def test_labels_go_by_sorted_folders_and_underscores_become_spaces(tmp_path):
    write(tmp_path / "pets", tabby_cat=["b.png", "a.jpg"], Dog=["x.webp"], owl=["d/e/deep.PNG"])
    task = Task.from_folder(tmp_path / "pets")
    assert task.name == "pets"
    assert task.class_names == ("Dog", "owl", "tabby cat")
    assert task.labels(range(4)) == [0, 1, 2, 2]
    found = [Path(task.dataset[i][0]).relative_to(tmp_path).as_posix() for i in range(4)]
    assert found == [
        "pets/Dog/x.webp",
        "pets/owl/d/e/deep.PNG",
        "pets/tabby_cat/a.jpg",
        "pets/tabby_cat/b.png",
    ]


def test_arguments_of_a_task_are_passed_on(tmp_path):
    write(tmp_path, a=["1.png", "2.png"], b=["1.png"])
    names = ["apple", "pear"]
    task = Task.from_folder(tmp_path, name="fruit", class_names=names, templates="my {}", seed=3)
    assert (task.name, task.seed, task.prompts([])) == ("fruit", 3, ["my apple", "my pear"])
    with pytest.raises(ValueError, match=r"in the data set's own order \['a', 'b'\]"):
        Task.from_folder(tmp_path, class_names=["b", "a"])


def test_no_image_of_a_folder_is_opened_before_the_probe(tmp_path):
    write(tmp_path, a=["1.png", "2.png"], b=["1.png"])
    task = Task.from_folder(tmp_path)
    (tmp_path / "a" / "1.png").write_bytes(png(7))
    assert task.images([0])[0].getpixel((0, 0)) == (7, 0, 0)
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        task.images([1])


def test_hidden_things_are_passed_over_and_other_files_are_counted(tmp_path, caplog):
    write(tmp_path, a=["1.png", ".2.png", ".git/3.png"], b=["1.png"], **{".c": ["1.png"]})
    (tmp_path / "README.md").write_text("hello")
    assert (len(ImageFolder(tmp_path)), caplog.text) == (2, "")
    write(tmp_path, a=["notes.txt", "table.h5", "old.eps"], b=["2.png.part"])
    images = ImageFolder(tmp_path)
    assert (len(images), images.skipped, images.folders) == (2, 4, ["a", "b"])
    assert "4 files or links" in caplog.text


def test_links_out_of_the_folder_and_links_to_folders_are_not_followed(tmp_path):
    write(tmp_path / "outside", z=["secret.png"])
    root = write(tmp_path / "root", a=["1.png"], b=["1.png"])
    (root / "a" / "out.png").symlink_to(tmp_path / "outside" / "z" / "secret.png")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "z").symlink_to(tmp_path / "outside" / "z")
    (root / "b" / "in.png").symlink_to(root / "a" / "1.png")
    (tmp_path / "link").symlink_to(root)
    images = ImageFolder(tmp_path / "link")
    assert [Path(path).name for path, _ in images] == ["1.png", "1.png", "in.png"]
    assert (images.folders, images.skipped) == (["a", "b"], 4)


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ({}, "got '{}' with none (hidden ones and links do not count)"),
        ({"a": ["1.png"]}, "at least 2 folders, one per class, got '{}' with a (hidden"),
        ({"a": ["1.png"], "b": ["1.txt"]}, "every class folder, got none in '{}/b'"),
        ({"test/a": ["1.png"], "train/a": ["1.png"]}, "test, train in it; pass e.g. '{}/train'"),
        ({"a_b": ["1.png"], "a b": ["1.png"]}, "must be unique, got ['a b'] more than once"),
    ],
)
def test_a_folder_that_is_no_task_is_refused_by_value(tmp_path, classes, says):
    write(tmp_path, **classes)
    with pytest.raises(ValueError, match=re.escape(says.replace("{}", str(tmp_path)))):
        Task.from_folder(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="nowhere', which does not exist"):
        Task.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="file', which is a file"):
        Task.from_folder(tmp_path / "file")


@pytest.mark.parametrize("path", [5, None, b"pets"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(TypeError, match=re.escape(f"a folder of class folders, got {path!r} (")):
        Task.from_folder(path)


def test_folders_whose_names_are_no_text_are_refused(tmp_path):
    odd = os.fsdecode(b"d\xff")
    try:
        write(tmp_path / odd, a=["1.png"], b=["1.png"])
    except OSError:
        pytest.skip("this file system takes text only")
    with pytest.raises(ValueError, match=r"`name` must be valid UTF-8, got 'd\\udcff'"):
        Task.from_folder(tmp_path / odd)
    assert Task.from_folder(tmp_path / odd, name="fine").class_names == ("a", "b")
    write(tmp_path / "pets", cat=["1.png"], **{odd: ["1.png"]})
    with pytest.raises(ValueError, match=r"`class_names` of task 'pets' must be valid UTF-8, got"):
        Task.from_folder(tmp_path / "pets")
    named = Task.from_folder(tmp_path / "pets", class_names=["cat", "dog"])
    assert named.class_names == ("cat", "dog")


letters = st.characters(categories=("L", "N", "P", "S", "Zs"), exclude_characters="/")
folder_names = st.text(letters, min_size=1, max_size=20).filter(
    lambda n: not n.startswith(".") and n.replace("_", "").strip() and not n[:2].isdecimal()
)


@settings(max_examples=50, deadline=None)
@given(names=st.sets(folder_names, min_size=2, max_size=5))
def test_any_folder_names_are_class_names(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            write(Path(folder), **{name: ["1.png"]})
        if len({name.replace("_", " ") for name in names}) < len(names):
            with pytest.raises(ValueError, match="must be unique"):
                Task.from_folder(folder)
            return
        task = Task.from_folder(folder)
        assert task.class_names == tuple(name.replace("_", " ") for name in sorted(names))
        for position in range(len(task)):
            path = Path(task.dataset[position][0])
            named = task.class_names[task.labels([position])[0]]
            assert named == path.parent.name.replace("_", " ")
            assert path.exists()


def test_a_folder_reads_as_the_same_images_in_a_data_set(tmp_path, colours, tiny_clip, processor):
    for i, row in enumerate(colours):
        name = colours.features["label"].int2str(row["label"])
        (tmp_path / name).mkdir(exist_ok=True)
        row["image"].save(tmp_path / name / f"{i:03}.png")
    folder = Task.from_folder(tmp_path, templates="a {} thing")
    order = [int(Path(folder.dataset[i][0]).stem) for i in range(len(folder))]
    names = list(folder.class_names)
    known = colours.features["label"]
    pairs = [
        (row["image"], names.index(known.int2str(row["label"]))) for row in colours.select(order)
    ]
    plain = Task(folder.name, pairs, templates="a {} thing", class_names=names)
    model = tiny_clip()
    probes = [Probe(task, processor=processor, progress=False) for task in (folder, plain)]
    looks = [probe.look(model, 0) for probe in probes]
    assert probes[0].fingerprints == probes[1].fingerprints
    assert looks[0].measurement == looks[1].measurement


def test_class_folders_are_told_from_other_folders(tmp_path):
    write(tmp_path / "yes", a=["1.png"], b=["x.txt", "1.jpg"])
    (tmp_path / "yes" / "README.md").write_text("")
    write(tmp_path / "nested", train=["a/1.png"], test=["a/1.png"])
    write(tmp_path / "one", a=["1.png"])
    write(tmp_path / "captions", a=["1.png"], b=["1.png"])
    (tmp_path / "captions" / "metadata.jsonl").write_text("")
    found = [name for name in sorted(os.listdir(tmp_path)) if has_class_folders(tmp_path / name)]
    assert found == ["yes"]
    assert not has_class_folders(tmp_path / "yes" / "README.md")


# --- the Hub and what `datasets` reads ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of parquet files with two splits, one with one, and one of `save_to_disk`."""
    folder = tmp_path_factory.mktemp("hub")
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(9)], "label": [0, 1, 2] * 3}
    data = Dataset.from_dict(rows, features=FEATURES)
    for name, splits in {"pets": ("train", "test"), "only": ("test",)}.items():
        (folder / name).mkdir()
        for split in splits:
            data.select(range(9 if split == "train" else 6)).to_parquet(
                folder / name / f"{split}.parquet"
            )
    DatasetDict(train=data, test=data.select(range(4))).save_to_disk(folder / "disk")
    data.save_to_disk(folder / "flat")
    return folder


def test_a_named_split_becomes_a_task(saved):
    task = Task.from_hub(saved / "pets", "test", templates="a {}", probe_size=4)
    assert (task.name, len(task), task.class_names) == ("pets", 6, ("cat", "dog", "owl"))
    assert (task.probe_size, task.prompts([])[0]) == (4, "a cat")
    assert task.images([5])[0].getpixel((0, 0)) == (5, 0, 0)
    assert len(Task.from_hub(str(saved / "pets"), "train[:5]", task_name="some")) == 5
    assert len(Task.from_hub(saved / "only", None)) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk_is_read_as_well(saved, streaming):
    assert len(Task.from_hub(saved / "disk", "test", streaming=streaming)) == 4
    assert len(Task.from_hub(saved / "flat", None, streaming=streaming)) == 9


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("split", "positions"),
    [
        ("train[:4]", range(4)),
        ("train[-3:]", range(6, 9)),
        ("train[2:99]", range(2, 9)),
        ("train[50%:]", range(4, 9)),
        ("train[10%:60%]", range(1, 5)),
        ("train[6:]+train[:2]", [6, 7, 8, 0, 1]),
        (datasets.ReadInstruction("train", to=4, unit="abs"), range(4)),
        (datasets.Split.TRAIN, range(9)),
    ],
)
def test_slices_of_what_was_saved_are_those_that_load_dataset_takes(
    saved, split, positions, streaming
):
    task = Task.from_hub(saved / "disk", split, streaming=streaming)
    seen = [image.getpixel((0, 0))[0] for image in task.images(range(len(task)))]
    assert seen == list(positions)
    plain = Task.from_hub(saved / "pets", split)
    assert [image.getpixel((0, 0))[0] for image in plain.images(range(len(plain)))] == seen


@pytest.mark.parametrize("name", ["pets", "disk", "flat"])
@pytest.mark.parametrize("split", [["test"], 5, b"test"])
def test_a_split_of_another_type_is_refused(saved, name, split):
    says = f"`split` must be the name of one split, such as 'test' or 'test[:1000]', got {split!r}"
    with pytest.raises(TypeError, match=re.escape(says)):
        Task.from_hub(saved / name, split)


def test_a_streamed_split_shows_the_images_of_the_split(saved):
    whole = Task.from_hub(saved / "pets", "train")
    streamed = Task.from_hub(saved / "pets", "train", streaming=True)
    assert isinstance(streamed.dataset, IterableDataset)
    assert streamed.labels(range(9)) == whole.labels(range(9))
    assert [i.tobytes() for i in streamed.images(range(9))] == [
        i.tobytes() for i in whole.images(range(9))
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "split", "more", "says"),
    [
        ("pets", "validation", {}, "`split` must be one of train, test for '.*pets', got 'valid"),
        ("pets", None, {}, "`split` must be one of train, test for '.*pets', got none"),
        ("disk", "validation", {}, "`split` must be one of train, test for '.*disk', got 'valid"),
        ("disk", None, {}, "`split` must be one of train, test for '.*disk', got none"),
        ("disk", "dev[:4]", {}, "one of train, test for '.*disk', got 'dev.:4.' .Unknown split"),
        ("disk", "test[a]", {}, "one of train, test for .* got 'test.a.' .Unrec.*; a slice is wr"),
        ("disk", "test[:900%]", {}, "of train, test for .* got 'test.:900%.' .Percent slice bound"),
        ("flat", "test[:4]", {}, "`split` must be left out, as there are none, for '.*flat', got"),
        ("disk", "test", {"config": "big"}, "`config` must be left out for .*disk', .* got 'big'"),
        ("disk", "test", {"revision": "v1"}, "`revision` must be left out for .*disk', got 'v1'"),
        ("pets", "test", {"revision": "v1"}, "`revision` must be left out for .*pets', got 'v1'"),
        ("flat", "test", {}, "`split` must be left out, as there are none, for '.*flat', got 'te"),
        ("pets", "test", {"config": "big"}, "`name` must be .*'big' not found. Available: .'defau"),
        ("nowhere", "test", {}, "`name` must be .*nowhere', which does not exist"),
        ("pets/test.parquet", "test", {}, "`name` must be .*test.parquet', a file"),
    ],
)
def test_what_there_is_not_is_told(saved, name, split, more, says, streaming):
    with pytest.raises(ValueError, match=says):
        Task.from_hub(saved / name, split, streaming=streaming, **more)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such_data", "or a folder that `datasets` reads, got 'no/such_data': .*offline|reach"),
        ("parquet", "got 'parquet', which is a file format; pass the folder"),
        ("imagefolder", "got 'imagefolder', which is a file format"),
        ("", "`name` must be a folder or a name on the Hub, got ''"),
        (7, "`name` must be a folder or a name on the Hub, got 7"),
    ],
)
def test_a_name_that_is_no_data_set_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        Task.from_hub(name, "test")


def test_code_that_comes_with_a_data_set_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    mark = tmp_path / "mark"
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError, match="`name` must be a data set"):
        Task.from_hub(tmp_path / "evil", "test")
    assert not mark.exists()
    asked = {}

    def load(name, config, **more):
        asked.update(more, name=name, config=config)
        return make_dataset("colour", 8, seed=0)

    monkeypatch.setattr(datasets, "load_dataset", load)
    Task.from_hub("us/colours", "test", config="small", revision="abc")
    assert asked == {
        "name": "us/colours",
        "config": "small",
        "split": "test",
        "revision": "abc",
        "streaming": False,
    }


# --- streams ---


class Source:
    """What a stream is made from: counts what is read; may be endless or fail."""

    def __init__(self, n=10**9, label=lambda i: i % 3, fails=None, image=None):
        self.n, self.label, self.fails, self.read = n, label, fails, []
        self.image = image or (lambda i: {"bytes": b"rubbish %d" % i, "path": None})

    def __call__(self):
        for i in range(self.n):
            if i == self.fails:
                raise OSError("the line is down")
            self.read.append(i)
            yield {"image": self.image(i), "label": self.label(i)}

    def stream(self, features=FEATURES):
        return IterableDataset.from_generator(self, features=features)

    def __reduce__(self):  # `datasets` names a generator by its pickle
        return Source, (self.n,)


def test_an_endless_stream_is_read_once_in_order_and_never_decoded():
    source = Source()
    task = Task("t", source.stream(), stream_size=100, probe_size=9)
    assert source.read == list(range(100))
    assert Counter(task.labels(task.subset())) == {0: 3, 1: 3, 2: 3}
    kept = [task._source.image(i)["bytes"] for i in range(len(task))]
    assert len(kept) == 9
    numbers = [int(k.split()[1]) for k in kept]
    assert numbers == sorted(numbers)
    assert max(numbers) > 9  # not only the first


def test_the_default_reads_4096_for_512():
    source = Source()
    task = Task("t", source.stream())
    assert (len(source.read), len(task)) == (4096, 512)


def test_the_same_stream_gives_the_same_probe_and_another_seed_another(tiny_clip, processor):
    def look(seed, noise):
        torch.manual_seed(noise)
        np.random.seed(noise)
        random.seed(noise)
        source = Source(image=lambda i: {"bytes": png(i), "path": None})
        task = Task("t", source.stream(), stream_size=200, probe_size=12, seed=seed)
        probe = Probe(task, processor=processor, progress=False)
        probe.prepare(tiny_clip())
        return probe.fingerprints["t"]

    assert look(0, 1) == look(0, 2) != look(1, 1)


def test_reading_a_stream_changes_neither_it_nor_random_numbers(colours):
    stream = colours.to_iterable_dataset(num_shards=3).shuffle(seed=5, buffer_size=8)
    rows = iter(stream)
    first = [next(rows)["label"] for _ in range(4)]
    state = stream.state_dict()
    drawn = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    Task("t", stream, probe_size=8)
    assert stream.state_dict() == state
    assert drawn == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    rest = [row["label"] for row in rows]
    assert first + rest == [row["label"] for row in stream]


def test_a_short_stream_is_all_of_it(colours, tiny_clip, processor):
    streamed = Task("colours", colours.to_iterable_dataset(), templates="a {} thing")
    whole = Task("colours", colours, templates="a {} thing")
    assert (len(streamed), streamed.class_names) == (96, whole.class_names)
    looks = [
        Probe(task, processor=processor, progress=False).look(tiny_clip(), 0)
        for task in (streamed, whole)
    ]
    assert looks[0].measurement == looks[1].measurement


rows_of_a_stream = st.lists(st.integers(0, 5), max_size=80)


def draw_all(examples, size, seed):
    draw = Draw(size, seed)
    for item, label in examples:
        draw.add(item, label)
    return draw.drawn()


@settings(max_examples=200, deadline=None)
@given(labels=rows_of_a_stream, size=st.integers(1, 30), seed=st.integers(0, 9))
def test_a_draw_in_passing_is_that_from_all_at_once(labels, size, seed):
    numbers = np.random.default_rng(seed).random(len(labels))
    turn = [
        sum(numbers[j] < numbers[i] for j in range(len(labels)) if labels[j] == labels[i])
        for i in range(len(labels))
    ]
    order = sorted(range(len(labels)), key=lambda i: (turn[i], numbers[i]))
    drawn = draw_all(enumerate(labels), size, seed)
    assert drawn == [(i, labels[i]) for i in sorted(order[:size])]
    counts, there = Counter(y for _, y in drawn), Counter(labels)
    for a in counts:  # balanced, but for a class that ran out
        assert counts[a] == there[a] or counts[a] >= max(counts.values()) - 1


def test_never_more_than_twice_the_probe_is_in_memory():
    class Picture:
        pass

    alive = weakref.WeakSet()
    most = 0

    def examples():
        nonlocal most
        for i in range(2000):
            picture = Picture()
            alive.add(picture)
            most = max(most, len(alive))
            yield picture, i % 7
            del picture

    gc.collect()
    assert len(draw_all(examples(), 20, seed=0)) == 20
    assert most <= 41


def test_captions_of_a_stream_count_once():
    features = Features({"image": Image(), "label": Value("string")})
    source = Source(19, label=lambda i: f"caption {i % 10}")  # not twice each
    task = Task("t", source.stream(features), probe_size=8)
    assert task.is_captions
    assert (len(task), len(set(task.prompts(task.subset())))) == (8, 8)
    assert [int(task._source.image(i)["bytes"].split()[1]) for i in range(8)] == [
        int(task.prompts([i])[0].split()[1]) for i in range(8)
    ]


STRINGS = Features({"image": Image(), "label": Value("string")})
SIX = [f"class {c}" for c in range(6)]


@pytest.mark.parametrize("names", [None, SIX, {name: name for name in SIX}])
def test_a_stream_sorted_by_strings_has_their_classes(names):
    source = Source(120, label=lambda i: SIX[i // 20])  # no second string among the first 12
    task = Task("t", source.stream(STRINGS), probe_size=12, class_names=names)
    assert task.class_names == tuple(SIX)
    assert Counter(task.labels(range(len(task)))) == dict.fromkeys(range(6), 2)


@pytest.mark.parametrize("given", [False, True])
def test_a_stream_of_more_classes_than_the_probe_has_images_is_no_captions(given, caplog):
    names = [f"class {c:03d}" for c in range(100)]
    source = Source(400, label=lambda i: names[i * 7 % 100])
    settings = {"class_names": names} if given else {}
    task = Task("t", source.stream(STRINGS), probe_size=20, **settings)
    assert task.class_names == tuple(names)
    assert len(set(task.labels(range(20)))) == 20
    assert given or "the 100 distinct strings of 400 labels are taken as classes" in caplog.text


def test_strings_of_a_stream_are_told_apart_as_those_of_a_list():
    source = Source(40, label=lambda i: f"caption {i if i < 30 else 0}")
    task = Task("t", source.stream(STRINGS), probe_size=35)
    assert task.is_captions
    assert len(task) == 30


@pytest.mark.parametrize(
    ("label", "features", "settings", "says"),
    [
        (
            7,
            {"label": Value("int64")},
            {"class_names": list("abcdefghij")},
            "one of its 10 classes, 7",
        ),
        ("cat", {"label": Value("string")}, {}, "one class or caption, 'cat'"),
        ("cat", {"label": Value("string")}, TWO, "one of its 2 classes, 'cat'"),
    ],
)
def test_a_stream_of_one_class_is_refused_whatever_its_labels(label, features, settings, says):
    source = Source(60, label=lambda i: label if i < 50 else "dog" if label == "cat" else 1)
    stream = source.stream(Features({"image": Image()} | features))
    with pytest.raises(ValueError, match=f"first 50 examples of the stream are all of {says}"):
        Task("t", stream, stream_size=50, **settings)


def test_images_at_an_address_are_fetched_only_if_drawn():
    files = fsspec.filesystem("memory")
    for i in range(90):
        files.pipe(f"/pictures/{i}.png", png(i))
    source = Source(90, image=lambda i: {"path": f"memory://pictures/{i}.png", "bytes": None})
    task = Task("t", source.stream(), probe_size=3, seed=1)
    numbers = [int(re.findall(r"\d+", task._source.image(i)["path"])[0]) for i in range(3)]
    assert [image.getpixel((0, 0))[0] for image in task.images(range(3))] == numbers
    for i in set(range(90)) - set(numbers):
        files.rm(f"/pictures/{i}.png")
    assert len(Task("t", source.stream(), probe_size=3, seed=1)) == 3
    files.rm("/pictures", recursive=True)
    with pytest.raises(ValueError, match=r"an image of the stream cannot be fetched from 'memory:"):
        Task("t", source.stream(), probe_size=3, seed=1)


def test_a_stream_that_says_nothing_of_its_columns_needs_their_names():
    source = Source(12, image=lambda i: PILImage.new("RGB", (4, 4), (i, 0, 0)))
    stream = source.stream(features=None)
    with pytest.raises(ValueError, match="name `image_column` and `label_column`"):
        Task("t", stream, class_names=["x", "y", "z"])
    columns = {"image_column": "image", "label_column": "label"}
    task = Task("t", stream, class_names=["x", "y", "z"], **columns)
    assert task.images([5])[0].getpixel((0, 0)) == (5, 0, 0)
    with pytest.raises(ValueError, match=r"column 'pixels', got \['image', 'label'\]"):
        Task("t", stream, class_names=["x", "y"], image_column="pixels", label_column="label")


@pytest.mark.parametrize(
    ("source", "more", "error", "says"),
    [
        (Source(fails=17), {}, ValueError, "failed at example 17 of the first 4096 (OSError: the"),
        (Source(fails=0), {}, ValueError, "failed at example 0 of the first 4096 (OSError: the li"),
        (Source(0), {}, ValueError, "at least 2 images, got 0"),
        (Source(label=lambda i: 1), {}, ValueError, "4096 examples of the stream are all of one of "
         "its 3 classes, 'dog'; shuffle it with a seed"),
        (Source(9, label=lambda i: -1 if i == 4 else 1), {}, ValueError, "must lie in [0, 3)"),
        (Source(9, label=lambda i: None), {}, TypeError, "label 0 of the stream must be an int"),
        (Source(9), {"stream_size": 1}, ValueError, "`stream_size` must be an integer of at least"),
        (Source(9), {"image_column": "no"}, ValueError, "one of ['image', 'label'], got 'no'"),
    ],
)  # fmt: skip
def test_a_stream_that_cannot_be_probed_is_refused_before_training(source, more, error, says):
    with pytest.raises(error, match=re.escape(says)):
        Task("t", source.stream(), **more)


def test_what_lies_beyond_stream_size_does_not_matter():
    assert len(Task("t", Source(fails=17).stream(), stream_size=17)) == 17


def test_a_stream_sorted_by_class_is_warned_of(caplog):
    names = [f"c{i}" for i in range(9)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    caplog.set_level(logging.WARNING)
    Task("t", Source(label=lambda i: i // 30).stream(features), stream_size=90)
    assert "hold 3 of its 9 classes" in caplog.text
    caplog.clear()
    Task("t", Source(label=lambda i: i % 9).stream(features), stream_size=90)
    assert caplog.text == ""


def test_one_ranks_part_of_a_stream_is_refused(colours):
    part = split_dataset_by_node(colours.to_iterable_dataset(num_shards=2), rank=1, world_size=2)
    with pytest.raises(ValueError, match="before `split_dataset_by_node`"):
        Task("t", part)


def test_a_plain_generator_is_no_data_of_a_task():
    with pytest.raises(TypeError, match="is an iterator, which is used up"):
        Task("t", Source()(), **TWO)


def test_a_run_is_guarded_on_streams_and_folders(make_trainer, tmp_path, colours, shapes):
    for i, row in enumerate(shapes):
        name = shapes.features["label"].int2str(row["label"])
        (tmp_path / "shapes" / name).mkdir(parents=True, exist_ok=True)
        row["image"].save(tmp_path / "shapes" / name / f"{i}.png")
    task = Task("colours", colours.to_iterable_dataset(), templates="clip:stl10", probe_size=16)
    other = Task.from_folder(tmp_path / "shapes", probe_size=12)
    guard = IIMMCallback(task=task, off_target=[other], outcomes=[], max_overhead=None)
    trainer = make_trainer([guard], max_steps=2)
    trainer.train()
    looked = [row for row in trainer.state.log_history if "eval_iimm" in row]
    assert looked[0]["step"] == 0
    assert {"eval_iimm_accuracy", "eval_iimm_shapes_accuracy"} <= looked[-1].keys()
