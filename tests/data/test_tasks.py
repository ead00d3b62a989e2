"""Tasks: the probe is balanced, fixed and seeded; what cannot be probed is refused by value."""

import io
import random
import re
import zipfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from iimm_callbacks import Task
from iimm_callbacks.data.images import streams

RED = PILImage.new("RGB", (4, 4), (255, 0, 0))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PNG = png(RED)


def pairs(labels):
    return [(RED, label) for label in labels]


def hub(labels, names=("cat", "dog", "owl"), **columns):
    """A `datasets.Dataset` of undecodable images: whoever decodes one gets an error."""
    rows = {
        "image": [{"bytes": b"rubbish", "path": None}] * len(labels),
        "label": labels,
        **columns,
    }
    kinds = {"image": Image(), "label": ClassLabel(names=list(names))}
    return Dataset.from_dict(
        rows, features=Features(kinds | {key: Value("int64") for key in columns})
    )


class TorchvisionLike:
    """Has `.targets` and `.classes`, and must not be read for its labels."""

    classes = ("cat", "dog")

    def __init__(self, targets, readable=1):
        self.targets, self.readable = targets, readable

    def __len__(self):
        return 6

    def __getitem__(self, position):
        assert position < self.readable
        return RED, position % 2


def test_the_probe_is_balanced_and_keeps_to_its_size():
    task = Task("t", pairs([0] * 500 + [1] * 50 + [2] * 90), class_names="a b c".split())
    for size in (2, 3, 64, 150):
        chosen = task.subset(size)
        assert len(chosen) == len(set(chosen)) == size
        counts = Counter(task.labels(chosen)).values()
        assert max(counts) - min(counts) <= 1


def test_a_class_that_runs_out_is_filled_up_by_the_others():
    task = Task("t", pairs([0] * 500 + [1] * 5 + [2] * 90), class_names="a b c".split())
    assert Counter(task.labels(task.subset(215))) == {0: 120, 1: 5, 2: 90}
    assert sorted(task.subset(10_000)) == list(range(595))


def test_the_probe_is_the_same_every_time_and_another_for_another_seed():
    data = pairs([0, 1] * 100)
    first = Task("t", data, class_names=["a", "b"]).subset(20)
    torch.manual_seed(9)
    np.random.seed(9)
    assert Task("other name", list(data), class_names=["a", "b"]).subset(20) == first
    assert Task("t", data, class_names=["a", "b"], seed=1).subset(20) != first


def test_the_probe_is_not_sorted_by_class():
    task = Task("t", pairs([0] * 50 + [1] * 50), class_names=["a", "b"])
    labels = task.labels(task.subset(40))
    assert sorted(labels) != labels != [0, 1] * 20


def test_probe_size_goes_before_the_default():
    data = pairs([0, 1] * 100)
    assert len(Task("t", data, class_names=["a", "b"], probe_size=7).subset(100)) == 7
    assert len(Task("t", data, class_names=["a", "b"]).subset(100)) == 100


@pytest.mark.parametrize("stream", [False, True])
def test_of_images_that_share_a_caption_one_is_in_the_probe(stream):
    captions = [["a", "b"], ["c"], ["b", "a"], ["d", "b"], ["e", "d"]]
    rows = {"image": [{"bytes": PNG, "path": None}] * 5, "label": captions}
    kinds = {"image": Image(), "label": datasets.Sequence(Value("string"))}
    data = Dataset.from_dict(rows, features=Features(kinds))
    task = Task("t", data.to_iterable_dataset() if stream else data)
    shown = [caption for own in task.captions(task.subset()) for caption in set(own)]
    assert len(shown) == len(set(shown))
    assert "c" in shown


@pytest.mark.parametrize("decode", [False, True])
def test_images_in_an_archive_are_read_undecoded_or_not(tmp_path, decode):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("red.png", PNG)
    rows = {"image": [f"zip://red.png::{tmp_path}/a.zip"] * 2, "label": [0, 1]}
    kinds = {"image": Image(decode=decode), "label": ClassLabel(names=["a", "b"])}
    task = Task("t", Dataset.from_dict(rows, features=Features(kinds)))
    assert [image.getpixel((0, 0)) for image in task.images([0, 1])] == [(255, 0, 0)] * 2


def test_captions_count_once_and_belong_to_their_image():
    task = Task("t", pairs(["a cat", "a dog", "a cat", "an owl", "a dog"]))
    chosen = task.subset()
    assert task.is_captions
    assert sorted(task.prompts(chosen)) == ["a cat", "a dog", "an owl"]
    assert task.labels(chosen) == [0, 1, 2]
    assert len(task.subset(2)) == 2


def test_labels_are_read_without_decoding_an_image():
    task = Task("t", hub([2, 0, 1, 2]))
    assert task.labels(range(4)) == [2, 0, 1, 2]
    assert task.class_names == ("cat", "dog", "owl")


def test_a_transform_on_the_data_set_is_not_applied(colours):
    data = colours.select(range(8))
    data.set_transform(lambda rows: {"image": [torch.zeros(3)] * len(rows["image"])})
    transformed = Task("t", data)
    plain = Task("t", colours.select(range(8)))
    assert transformed.labels(range(8)) == plain.labels(range(8))
    assert transformed.images([3])[0].tobytes() == plain.images([3])[0].tobytes()
    assert set(data[0]) == {"image"}  # the user's own view keeps its transform


def test_prompts_come_class_by_class_with_templates_within():
    task = Task("t", hub([0, 1]), templates=["a {}", "the {}, 100 % {sic}"])
    assert task.prompts([0])[:3] == ["a cat", "the cat, 100 % {sic}", "a dog"]
    assert len(task.prompts([0])) == 6
    assert Task("t", hub([0, 1])).prompts([])[0] == "a photo of a cat."


@pytest.mark.parametrize("targets", [[0, 1] * 3, torch.tensor([0, 1] * 3), np.array([0, 1] * 3)])
def test_torchvision_data_sets_give_targets_and_classes_without_being_read(targets):
    task = Task("t", TorchvisionLike(targets))
    assert task.labels(range(6)) == [0, 1, 0, 1, 0, 1]
    assert task.class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([("tench", "Tinca tinca"), ("goldfish", "Carassius auratus")], ("tench", "goldfish")),
        ([["cat", "kitty"], "dog"], ("cat", "dog")),
        ({"b": 1, "a": 0}, ("a", "b")),
        (np.array(["x", "y"]), ("x", "y")),
    ],
)
def test_the_names_of_a_data_set_are_read_in_the_order_of_its_labels(classes, names):
    data = TorchvisionLike([0, 1] * 3)
    data.classes = classes
    task = Task("t", data)
    assert task.class_names == names
    assert task.prompts([])[0] == f"a photo of a {names[0]}."


@pytest.mark.parametrize(
    ("classes", "error", "says"),
    [
        (2, TypeError, "must be a list of names in the order of the labels, got 2 (int); pass"),
        ([0, 1], TypeError, "must be strings, got 0 for class 0; pass `class_names`"),
        ([(), "b"], TypeError, "must be strings, got () for class 0; pass"),
        ({"b": 1, "a": 2}, ValueError, "must map names to labels 0, 1, 2, ..., got {'b': 1"),
        ({0: "a", 1: "b"}, ValueError, "must map names to labels 0, 1, 2, ..., got {0: 'a'"),
    ],
)
def test_names_of_a_data_set_that_are_none_are_refused_unless_some_are_given(classes, error, says):
    data = TorchvisionLike([0, 1] * 3)
    data.classes = classes
    with pytest.raises(error, match=re.escape(f"`dataset.classes` of task 't' {says}")):
        Task("t", data)
    assert Task("t", data, **TWO).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (["Cat", "Dog"], ["dog", "cat"]),
        (["B", "C", "a"], ["a", "b", "c"]),
        (["001.Zebra", "002.Ant"], ["Ant", "Zebra"]),
        (["zebra-foal", "ant-hill"], ["ant hill", "zebra foal"]),
        (["1_star", "2_stars"], ["2 stars", "1 star"]),
        (["10 years", "20 years"], ["20 Years", "10 Years"]),
        (["c", "C++"], ["C++", "c"]),
    ],
)
def test_given_names_in_another_order_are_refused_however_they_are_written(own, given):
    data = hub([0, 1], names=own)
    with pytest.raises(ValueError, match="must be in the data set's own order"):
        Task("t", data, class_names=given)
    turned = given[::-1] if len(given) == 2 else [given[i] for i in (1, 2, 0)]
    assert Task("t", data, class_names=turned).class_names == tuple(turned)


def test_names_that_say_something_else_are_in_no_order():
    data = hub([0, 1], names=["10 years", "20 years"])
    assert Task("t", data, class_names=["old", "older"]).class_names == ("old", "older")


def test_targets_of_another_length_are_not_taken_for_labels():
    assert Task("t", TorchvisionLike([1, 1], readable=6)).labels(range(6)) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("n_targets", [6, 1])  # 1: labels are read item by item
def test_making_a_task_moves_no_random_stream(n_targets):
    class Drawing(TorchvisionLike):
        def __getitem__(self, position):
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(position)

    before = streams()
    task = Task("t", Drawing(([0, 1] * 3)[:n_targets], readable=6), metric=drawing_share_right)
    assert streams() == before
    assert task.labels(range(6)) == [0, 1] * 3


def drawing_share_right(predictions, references):
    return (predictions == references).mean() * (1 - random.random() / 100)


def test_class_names_may_be_reworded_for_the_prompts():
    assert Task("t", hub([0, 1]), class_names=["tabby", "hound", "barn owl"]).prompts([])[2] == (
        "a photo of a barn owl."
    )


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P", "path", "bytes", "array", "dict"])
def test_images_of_any_kind_become_rgb(kind, tmp_path):
    encoded = io.BytesIO()
    RED.save(encoded, "png")
    (tmp_path / "red.png").write_bytes(encoded.getvalue())
    images = {
        "path": str(tmp_path / "red.png"),
        "bytes": encoded.getvalue(),
        "array": np.asarray(RED),
        "dict": {"bytes": None, "path": tmp_path / "red.png"},
    }
    image = images[kind] if kind in images else RED.convert(kind)
    (read,) = Task("t", [(image, 0), (RED, 1)], class_names=["a", "b"]).images([0])
    assert (read.mode, read.size) == ("RGB", (4, 4))
    assert kind == "L" or read.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"rubbish", "image 1 cannot be read (UnidentifiedImageError"),
        ("/nowhere/cat.png", "No such file or directory: '/nowhere/cat.png'"),
        (torch.zeros(3, 4, 4) - 2, "got -2 to -2; pass it before it is normalised"),
        (np.zeros((5, 5, 2)), "image 1 cannot be read (ValueError: expected a picture [H, W]"),
        (None, "got NoneType"),
    ],
)
def test_an_unreadable_image_is_named_by_task_and_position(image, says):
    task = Task("pets", [(RED, 0), (image, 1)], class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        task.images([0, 1])
    assert "`dataset` of task 'pets': image 1" in str(caught.value)


def test_the_columns_may_be_named():
    data = hub([0, 1], age=[1, 0]).rename_column("label", "species")
    assert Task("t", data, label_column="species").labels([0, 1]) == [0, 1]
    by_age = Task("t", data, label_column="age", class_names=["young", "old"])
    assert by_age.labels([0, 1]) == [1, 0]


def test_a_well_known_name_goes_before_a_column_of_classes():
    data = hub([0, 1, 0, 1], names=["train", "test"]).rename_column("label", "split")
    texts = data.add_column("label", ["cat", "dog", "dog", "cat"])
    assert Task("t", texts).labels(range(4)) == [0, 1, 1, 0]
    captions = data.add_column("caption", [[f"a {i}", f"the {i}"] for i in range(4)])
    assert Task("t", captions).is_captions
    breeds = data.add_column("breed", ["cat", "dog", "dog", "cat"])
    assert Task("t", breeds).class_names == ("cat", "dog")


def test_only_the_column_that_is_probed_is_decoded(tmp_path):
    encoded = io.BytesIO()
    RED.save(encoded, "png")
    red = {"bytes": encoded.getvalue(), "path": None}
    rows = {"image": [red] * 2, "mask": [{"bytes": b"rubbish", "path": None}] * 2, "label": [0, 1]}
    kinds = {"image": Image(), "mask": Image(), "label": ClassLabel(names=["cat", "dog"])}
    data = Dataset.from_dict(rows, features=Features(kinds))
    converted = data.cast_column("image", Image(mode="RGB"))  # read by `datasets`
    for each in (data, converted, data.to_iterable_dataset(), converted.to_iterable_dataset()):
        assert Task("t", each).images([0])[0].getpixel((0, 0)) == (255, 0, 0)


def test_truth_values_are_labels_0_and_1():
    flags = [True, False, True, np.True_, torch.tensor(False)]
    assert Task("t", pairs(flags), **TWO).labels(range(5)) == [1, 0, 1, 1, 0]
    kinds = {"image": Image(), "label": Value("bool")}
    rows = {"image": [{"bytes": b"", "path": None}] * 2, "label": [True, False]}
    data = Dataset.from_dict(rows, features=Features(kinds))
    for each in (data, data.to_iterable_dataset(), data.rename_column("label", "is_cat")):
        assert Task("t", each, **TWO).labels([0, 1]) == [1, 0]
    ids = data.rename_column("label", "is_cat").add_column("breed", [0, 1])
    assert Task("t", ids, **TWO).labels([0, 1]) == [0, 1]


def test_a_row_without_an_image_is_named():
    kinds = {"image": Image(), "label": ClassLabel(names=["cat", "dog"])}
    data = Dataset.from_dict({"image": [None, None], "label": [0, 1]}, features=Features(kinds))
    with pytest.raises(ValueError, match=r"image 1 cannot be read \(TypeError: .* got NoneType"):
        Task("t", data).images([1])


class Frame:
    """As a DataFrame of pandas."""

    iloc = None

    def __len__(self):
        return 4

    def __getitem__(self, key):
        raise KeyError(key)


class OneHot(TorchvisionLike):
    def __getitem__(self, position):
        return RED, self.targets[position]


TWO = {"class_names": ["a", "b"]}
UNLABELLED = hub([0, 1]).remove_columns("label")
CHOICE = hub([0, 1], age=[1, 0], size=[2, 3]).remove_columns("label")


@pytest.mark.parametrize(
    ("dataset", "settings", "error", "says"),
    [
        ([], TWO, ValueError, "must hold at least 2 images, got 0"),
        (hub([0]), {}, ValueError, "must hold at least 2 images, got 1"),
        (hub([0, 0], names=["cat"]), {}, ValueError, "must hold at least 2 classes, got 1"),
        (pairs([0, 1]), {"class_names": ["a", "b", "a"]}, ValueError, "got ['a'] more than once"),
        (hub([0, 1]), TWO, ValueError, "data set's 3 classes (cat, dog, owl, ...), got 2"),
        (hub([0, 1]), {"class_names": ["dog", "cat", "owl"]}, ValueError, "got ['dog', 'cat'"),
        (pairs([0, 1]), {"class_names": "ab"}, TypeError, "order of the labels, got 'ab' (str)"),
        (pairs([0, 1]), {"class_names": {0: "cat", 1: "dog"}}, TypeError, "`class_names` of task "
         "'t' must be a list of names in the order of the labels, got {0: 'cat', 1: 'dog'} (dict)"),
        (pairs([0, 1]), {"class_names": {"cat"}}, TypeError, "labels, got {'cat'} (set)"),
        (pairs([0, 1]), {"class_names": 5}, TypeError, "in the order of the labels, got 5 (int)"),
        (pairs([0, 1]), {"class_names": np.array("a")}, TypeError, "got array('a', dtype='<U1')"),
        (pairs([0, 1]), {"class_names": b"ab"}, TypeError, "labels, got b'ab' (bytes)"),
        (pairs([0, 1]), {"class_names": ["a", None]}, TypeError, "got None (NoneType) for class 1"),
        (pairs([0, 1]), {"class_names": ["a", float("nan")]}, TypeError, "got nan (float) for cl"),
        (pairs([0, 1]), {"class_names": ["a", 1]}, TypeError, "must be strings, got 1 (int) for"),
        (pairs([0, 1]), {"class_names": ["", "b"]}, ValueError, "not be blank, got '' for class 0"),
        (hub([0, 1]), {"class_names": ["a", "b", " "]}, ValueError, "blank, got ' ' for class 2"),
        (pairs([0, 1]), {"class_names": ["a", "d\udcff"]}, ValueError, "`class_names` of task 't' "
         "must be valid UTF-8, got 'd\\udcff' with '\\udcff' at 1"),
        (hub([0, 1], names=["a", "d\udcff"]), {}, ValueError, "UTF-8, got 'd\\udcff'"),
        (pairs([0, 1]), {}, ValueError, "`class_names` of task 't' must be given"),
        (pairs([0, 2]), TWO, ValueError, "label 1 must lie in [0, 2) for 2 class names, got 2"),
        (hub([0, -1]), {}, ValueError, "label 1 must lie in [0, 3) for 3 class names, got -1; -1"),
        (pairs([0.5, 1]), TWO, TypeError, "label 0 must be an integer, or all labels str"),
        (pairs(np.eye(2, dtype=int)), TWO, TypeError, "label 0 must be an integer, or all labels "
         "strings, got array([1, 0]) (ndarray); of one-hot labels pass int(label.argmax())"),
        (OneHot(np.eye(6, dtype=int)), {}, TypeError, "of one-hot labels pass int(label.argmax"),
        (pairs(torch.tensor([0.0, 1.0])), TWO, TypeError, "got tensor(0.) (Tensor); pass int"),
        (Frame(), TWO, TypeError, "(image, label) pairs, got a Frame of pandas; pass e.g. li"),
        (pairs([None, "a"]), {}, TypeError, "label 0 must be an integer, a string or a list"),
        (pairs(["a", None]), {}, TypeError, "label 1 must be an integer, a string or a list"),
        (pairs([0, None]), TWO, TypeError, "got None (NoneType); leave images without a"),
        (pairs(["a", "z"]), TWO, ValueError, "among the 2 class names ('a', 'b'), got 'z'"),
        (pairs(["a cat", 1]), {}, TypeError, "caption 1 must be a string, got 1"),
        (pairs(["a cat", "a d\ud83d"]), {}, ValueError, "'t': caption 1 must be valid UTF-8, got "),
        (pairs(["a cat"] * 2), {}, ValueError, "2 distinct captions, got 'a cat' only"),
        (pairs([0, 1]), TWO | {"templates": "a photo"}, ValueError, "one '{}' for the class name"),
        (pairs([0, 1]), TWO | {"templates": ["{}", "{} {}"]}, ValueError, "got '{} {}'"),
        (pairs([0, 1]), TWO | {"templates": []}, ValueError, "exactly one '{}'"),
        (pairs([0, 1]), TWO | {"templates": 5}, TypeError, "`templates` of task 't' must be a "
         "template or a list of them, got 5 (int)"),
        (pairs([0, 1]), TWO | {"templates": {"a {}", "{}"}}, TypeError, "list of them, got {"),
        (pairs([0, 1]), TWO | {"templates": {"{}": 1}}, TypeError, "got {'{}': 1} (dict)"),
        (pairs([0, 1]), TWO | {"templates": [5]}, ValueError, "exactly one '{}' for the class"),
        (pairs([0, 1]), TWO | {"templates": ["{}", "{}\ud800"]}, ValueError, "`templates` of task "
         "'t' must be valid UTF-8, got '{}\\ud800'"),
        (pairs([0, 1]), TWO | {"probe_size": 1}, ValueError, "at least 2, got 1"),
        (pairs([0, 1]), TWO | {"probe_size": 9.5}, ValueError, "got 9.5"),
        (pairs([0, 1]), TWO | {"probe_size": True}, ValueError, "`probe_size` must be an integer"),
        (pairs([0, 1]), TWO | {"stream_size": True}, ValueError, "`stream_size` must be an inte"),
        (pairs([0, 1]), TWO | {"seed": None}, ValueError, "an integer of at least 0, got None"),
        (pairs([0, 1]), TWO | {"seed": True}, ValueError, "`seed` must be an integer"),
        (pairs([0, 1]), TWO | {"seed": -1}, ValueError, "an integer of at least 0, got -1"),
        (pairs([0, 1]), TWO | {"seed": 0.5}, ValueError, "an integer of at least 0, got 0.5"),
        (datasets.DatasetDict(test=hub([0, 1])), {}, TypeError, "dict of ['test']; pick one"),
        (iter(pairs([0, 1])), TWO, TypeError, "task 't' is an iterator, which is used up"),
        (hub([0, 1]), {"label_column": "labels"}, ValueError, "['image', 'label'], got 'labels'"),
        (hub([0, 1]), {"image_column": "pixels"}, ValueError, "got 'pixels'"),
        (UNLABELLED, {}, ValueError, "must have one column for `label_column`"),
        (CHOICE, {}, ValueError, "name the column"),
        ([{"image": RED}] * 2, TWO, TypeError, "(image, label) pairs, got items of type dict"),
        ([(RED, 0), (RED,)], TWO, TypeError, "'t' must yield (image, label) pairs, got items of "
         "type tuple and length 1, the first at 1"),
        ([(RED, 0), "no"], TWO, TypeError, "pairs, got items of type str, the first at 1"),
        (7, {}, TypeError, "or a sequence of (image, label) pairs, got int"),
    ],
)  # fmt: skip
def test_bad_tasks_are_refused_by_value(dataset, settings, error, says):
    with pytest.raises(error, match=re.escape(says)):
        Task("t", dataset, **settings)


@pytest.mark.parametrize("names", [("a", "b"), np.array(["a", "b"]), {"a": 0, "b": 1}.keys()])
def test_whatever_lists_names_in_their_order_does(names):
    task = Task("t", pairs([0, 1]), class_names=names)
    assert task.class_names == ("a", "b")
    assert [type(name) for name in task.class_names] == [str, str]


def test_a_name_that_utf_8_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"`name` must be valid UTF-8, got 'a\\udcff'"):
        Task("a\udcff", pairs([0, 1]), **TWO)
    assert Task("köter 🐕", pairs([0, 1]), **TWO).name == "köter 🐕"


@pytest.mark.parametrize("name", ["", " ", 7, None])
def test_a_task_needs_a_name(name):
    with pytest.raises(TypeError, match=re.escape(f"non-empty string, got {name!r}")):
        Task(name, pairs([0, 1]), **TWO)


@pytest.mark.parametrize("seed", range(5))
def test_the_subset_is_that_of_classes_taking_turns_one_by_one(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, 60).tolist() + list(range(7))
    picture = PILImage.new("RGB", (4, 4))
    task = Task("t", [(picture, label) for label in labels], class_names=list("abcdefg"), seed=seed)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(labels))
    queues = [[i for i in order if labels[i] == c] for c in range(7)]
    turns = {i: queue.index(i) for queue in queues for i in queue}
    chosen = sorted(order, key=lambda i: turns[i])[:23]  # stable
    assert task.subset(23) == [int(i) for i in draw.permutation(chosen)]


CLASSES, INTEGER, TEXT = ClassLabel(names=["a", "b"]), Value("int64"), Value("string")
SPLITS = ClassLabel(names=["Train", "validation"])


@pytest.mark.parametrize(
    ("features", "picked"),
    [
        ({"breed": CLASSES, "id": INTEGER, "path": TEXT}, "breed"),  # the only names of classes
        ({"label": TEXT, "kind": CLASSES}, "label"),
        ({"breed": TEXT, "part": SPLITS}, "breed"),
        ({"part": SPLITS}, None),
        ({"label": INTEGER, "breed": CLASSES, "text": TEXT}, "label"),
        ({"class": CLASSES, "coarse": CLASSES}, "class"),
        ({"caption": TEXT, "id": INTEGER}, "caption"),
        ({"caption": TEXT, "source": CLASSES}, None),
        ({"fine": CLASSES, "coarse": CLASSES}, None),
        ({"id": INTEGER, "size": INTEGER}, None),
    ],
)
def test_the_column_of_labels_is_the_one_called_so_or_the_only_one_of_classes(features, picked):
    from iimm_callbacks.data.labels import pick_columns

    features = {"image": datasets.Image()} | features
    if picked:
        assert pick_columns("t", features, None, None) == ("image", picked)
    else:
        with pytest.raises(ValueError, match="name the column"):
            pick_columns("t", features, None, None)
