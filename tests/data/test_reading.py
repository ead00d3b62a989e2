"""What is read is what is meant, by every entry: the same data give the same numbers.

Each test is one kind of situation; `ENTRIES` are the ways in.
"""

import io
import json
import logging
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from iimm_callbacks import ImageCollator, Task
from iimm_callbacks.cli import app
from iimm_callbacks.data import images
from iimm_callbacks.data.images import as_image
from iimm_callbacks.models.encoders import find_encoder
from iimm_callbacks.probing.probe import Probe

NAMES = ["blue", "red"]


def drawing(kind, k):
    """Not the same when turned."""
    image = Image.new("RGB", (60, 40), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([5, 5 + k, 20, 15 + k], fill=NAMES[kind])
    draw.line([0, 39, 59, 39], fill="black", width=3)
    return image


@pytest.fixture
def root(tmp_path):
    """A folder of classes of JPEGs that are to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for label, name in enumerate(NAMES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            path = tmp_path / "photos" / name / f"{k}.jpg"
            drawing(label, k).save(path, exif=exif, quality=95)
    return tmp_path / "photos"


class TorchPairs(torch.utils.data.Dataset):
    """The interface of torchvision's data sets."""

    def __init__(self, pairs, classes, target_transform=None):
        self.pairs, self.classes, self.target_transform = pairs, classes, target_transform
        self.targets = [label for _, label in pairs]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, position):
        image, label = self.pairs[position]
        return image, label if self.target_transform is None else self.target_transform(label)


def labelled(pairs, label=None):
    """A `Dataset` of pairs; labels are of `label`, a `ClassLabel` by default."""
    label = label or datasets.ClassLabel(names=NAMES)
    columns = {"image": [x for x, _ in pairs], "label": [y for _, y in pairs]}
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict(columns, features=features)


def paths(root):
    return [(str(p), NAMES.index(p.parent.name)) for p in sorted(root.glob("*/*.jpg"))]


def saved(root):
    labelled(paths(root)).save_to_disk(str(root.parent / "saved"))
    return Task.from_hub(str(root.parent / "saved"), None, task_name="t")


def image_folder(root):
    cache = str(root.parent / "cache")
    data = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=cache)
    return Task("t", data)


ENTRIES = {
    "data set": lambda root: Task("t", labelled(paths(root))),
    "imagefolder": image_folder,
    "saved": saved,
    "stream": lambda root: Task("t", labelled(paths(root)).to_iterable_dataset()),
    "folder": lambda root: Task.from_folder(root, name="t"),
    "paths": lambda root: Task("t", paths(root), class_names=NAMES),
    "bytes": lambda root: Task(
        "t", [(Path(p).read_bytes(), y) for p, y in paths(root)], class_names=NAMES
    ),
    "files": lambda root: Task(
        "t", [(io.BytesIO(Path(p).read_bytes()), y) for p, y in paths(root)], class_names=NAMES
    ),
    "PIL": lambda root: Task("t", [(Image.open(p), y) for p, y in paths(root)], class_names=NAMES),
    "torch": lambda root: Task("t", TorchPairs(paths(root), NAMES)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_photo_is_turned_as_its_exif_says_by_every_entry(root, entry, tiny_clip, processor):
    found = Probe(ENTRIES[entry](root), processor=processor, progress=False)
    turned = [(drawing(y, int(Path(p).stem)).rotate(-90, expand=True), y) for p, y in paths(root)]
    task = ENTRIES[entry](root)
    assert {image.size for image in task.images(range(8))} == {(40, 60)}
    expected = Probe(Task("t", turned, class_names=NAMES), processor=processor, progress=False)
    model = tiny_clip()
    # A JPEG is not quite what was drawn.
    one, other = (probe.look(model, 0).measurement.iimm for probe in (found, expected))
    assert one == pytest.approx(other, abs=0.01)
    same = Probe(ENTRIES["paths"](root), processor=processor, progress=False)
    assert one == pytest.approx(same.look(model, 0).measurement.iimm, abs=1e-9)


def test_the_command_line_reads_the_same_pictures(root, tiny_clip, processor, tmp_path):
    model = tiny_clip()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["measure", str(tmp_path / "model"), str(root), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    probe = Probe(ENTRIES["data set"](root), processor=processor, progress=False)
    expected = probe.look(model, 0).measurement.iimm
    assert json.loads(done.stdout)["iimm"] == pytest.approx(expected, abs=1e-6)


def test_the_collator_reads_the_same_pictures(root, processor):
    (path, label), *_ = paths(root)
    rows = [(path, label), (Path(path).read_bytes(), label), (Image.open(path), label)]
    batch = ImageCollator(processor)(rows)["pixel_values"]
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], batch[2])


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(picture, kind):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def opened_as_32_bits(levels):
    """A PNG of 16 bits as Pillow before 11 opens it."""
    picture = Image.fromarray(levels)
    picture.format = "PNG"
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        GREY,
        GREY[..., None],
        GREY[None],
        np.dstack([GREY] * 3),
        np.stack([GREY] * 3),
        torch.from_numpy(np.stack([GREY] * 3)),
        GREY / 255,
        GREY.astype(np.float32),
        GREY.astype(np.uint16) * 257,
        GREY.astype(np.int64),
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        (GREY.astype(np.uint16) * 257).astype(">u2"),
        torch.from_numpy(GREY.astype(np.uint16) * 257),
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
        b"P5 16 16 65535\n" + (GREY.astype(np.uint16) * 257).astype(">u2").tobytes(),
        opened_as_32_bits(GREY.astype(np.int32) * 257),
        GREY.tolist(),
        np.dstack([GREY] * 3).tolist(),
        (GREY / 255).tolist(),
        Image.fromarray(GREY.astype(np.float32) / 255),
        Image.fromarray(GREY).convert("I"),
        Image.fromarray(GREY).convert("F"),
    ],
)
def test_grey_levels_are_those_of_8_bits_however_they_are_stored(picture):
    assert np.array_equal(np.asarray(as_image(picture)), np.dstack([GREY] * 3))


@pytest.mark.parametrize(
    ("picture", "level"),
    [
        (np.full((5, 5, 3), 1.0000001, np.float32), 255),  # of interpolate(antialias=True)
        (np.full((5, 5, 3), 1.001), 255),
        (np.full((5, 5, 3), 255.00003, np.float32), 255),
        (np.full((5, 5, 3), -1e-7), 0),
        (np.full((5, 5, 3), 2.0), 2),
        (torch.full((3, 5, 5), 0.5, dtype=torch.bfloat16), 128),
    ],
)
def test_floats_a_hair_over_their_range_are_clipped(picture, level):
    assert np.asarray(as_image(picture)).tolist() == np.full((5, 5, 3), level).tolist()


@pytest.mark.parametrize("most", [200, 255, 256, 4000, 4095, 4096, 65535])
def test_sixteen_bits_are_read_on_one_scale_however_dark_a_picture_is(most, caplog):
    images._tell_dark.cache_clear()
    levels = np.linspace(0, most, 256).astype(np.uint16).reshape(16, 16)
    for picture in (levels, Image.fromarray(levels), encoded(Image.fromarray(levels), "PNG")):
        read = np.asarray(as_image(picture))[..., 0]
        assert np.abs(read - levels * (255 / 65535)).max() <= 0.5
    assert [("read as nearly black" in r.message) for r in caplog.records] == [True] * (most < 4096)
    as_image(np.zeros((4, 4), np.uint16))
    assert len(caplog.records) == (most < 4096)  # once, and not of a picture without any light


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (np.zeros((5, 5, 2), np.uint8), "got shape [5, 5, 2] of uint8"),
        (np.zeros((0, 5, 3), np.uint8), "got shape [0, 5, 3] of uint8"),
        (np.full((5, 5), -1.0), "got -1 to -1; pass it before it is normalised"),
        (np.full((5, 5), -0.002), "got -0.002 to -0.002; pass it before it is normalised"),
        (np.full((5, 5), 1.002), "got 1.002 to 1.002, which may be either; clip it to [0, 1]"),
        (np.full((5, 5), 255.3), "got 255.3 to 255.3; pass it before it is normalised"),
        (np.full((5, 5), np.nan), "got nan to nan"),
        (np.full((5, 5), 256), "values from 0 to 255 for int64, got 256 to 256"),
        (Image.fromarray(GREY.astype(np.int32) * 257), "from 0 to 255 for int32, got 0 to 65535"),
        (np.full((5, 5), 256, np.int16), "levels of 16 bits as uint16"),
        (np.full((5, 5), -1, np.int16), "values from 0 to 255 for int16, got -1 to -1"),
    ],
)
def test_a_picture_of_an_unknown_shape_or_range_is_refused_with_it(picture, says):
    with pytest.raises(ValueError, match="expected a picture") as caught:
        as_image(picture)
    assert says in str(caught.value)


# --- labels and names ---


def numbered(tmp_path, names):
    for name in names:
        (tmp_path / "n" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "n" / name / "0.png")
    return tmp_path / "n"


def by_folder(tmp_path, names, **settings):
    return Task.from_folder(numbered(tmp_path, names), **settings)


def by_data_set(tmp_path, names, **settings):
    label = datasets.ClassLabel(names=sorted(names))
    pairs = [(Image.new("RGB", (8, 8)), i) for i in range(len(names))]
    return Task("n", labelled(pairs, label), **settings)


NUMBERS = [str(i) for i in range(12)]
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
]


@pytest.mark.parametrize("entry", [by_folder, by_data_set])
def test_names_for_classes_that_are_numbers_must_say_which_is_which(tmp_path, entry):
    with pytest.raises(ValueError, match=r"'10', '11', \.\.\. by label and '0', '1', '2', '3'"):
        entry(tmp_path, NUMBERS, class_names=WORDS)


@pytest.mark.parametrize("entry", [by_folder, by_data_set])
def test_a_mapping_says_which_name_is_which(tmp_path, entry):
    task = entry(tmp_path, NUMBERS, class_names=dict(zip(NUMBERS, WORDS, strict=True)))
    assert task.class_names[:4] == ("zero", "one", "ten", "eleven")
    with pytest.raises(ValueError, match="must map all names of the data set"):
        entry(tmp_path / "again", NUMBERS, class_names={"0": "zero"})


@pytest.mark.parametrize("entry", [by_folder, by_data_set])
def test_names_in_prompts_are_words_by_every_entry(tmp_path, entry, caplog):
    assert entry(tmp_path, ["hot_dog", "ice_cream"]).class_names == ("hot dog", "ice cream")
    birds = entry(tmp_path / "b", ["001.Black_footed_Albatross", "002.Laysan_Albatross"])
    assert birds.class_names == ("Black footed Albatross", "Laysan Albatross")
    assert entry(tmp_path / "s", ["1_star", "2_stars"]).class_names == ("1 star", "2 stars")
    assert not caplog.records
    entry(tmp_path / "w", ["n01440764", "n01443537"])
    assert "WordNet ids ('n01440764', 'n01443537')" in caplog.text


def test_targets_that_say_other_than_the_items_are_refused(root):
    data = TorchPairs(paths(root), NAMES, target_transform=lambda y: 1 - y)
    with pytest.raises(ValueError, match=r"`.targets` says 0 for item 0, and the item itself 1"):
        Task("t", data)


def test_a_column_called_label_is_the_label_whatever_its_type(root):
    pairs = [(p, NAMES[y]) for p, y in paths(root)]
    data = labelled(pairs, datasets.Value("string")).add_column("fold", [0, 1] * 4)
    task = Task("t", data, class_names=["red", "blue"])
    assert task.labels(range(8)) == [1] * 4 + [0] * 4


def test_a_choice_of_columns_is_refused_and_listed(root):
    data = labelled(paths(root), datasets.Value("int64")).rename_column("label", "breed")
    data = data.add_column("fold", [0, 1] * 4)
    with pytest.raises(ValueError, match=r"got \['breed', 'fold'\] among features"):
        Task("t", data, class_names=NAMES)
    named = Task("t", data, class_names=NAMES, label_column="breed")
    assert named.labels([0, 7]) == [0, 1]


def strings(root):
    return [(p, NAMES[y]) for p, y in paths(root)]


STRINGS = {
    "data set": lambda rows: labelled(rows, datasets.Value("string")),
    "stream": lambda rows: labelled(rows, datasets.Value("string")).to_iterable_dataset(),
    "pairs": lambda rows: rows,
    "torch": lambda rows: TorchPairs(rows, None),
}


@pytest.mark.parametrize("entry", STRINGS)
def test_strings_that_come_again_are_classes_and_it_is_said(root, entry, caplog):
    task = Task("t", STRINGS[entry](strings(root)))
    assert not task.is_captions
    assert task.class_names == ("blue", "red")
    assert task.labels(range(8)) == [0] * 4 + [1] * 4
    assert "the 2 distinct strings of 8 labels are taken as classes: 'blue', 'red'" in caplog.text


@pytest.mark.parametrize("entry", STRINGS)
def test_strings_of_one_image_each_are_captions(root, entry, caplog):
    rows = [(p, f"a {y} drawing, number {i}") for i, (p, y) in enumerate(strings(root))]
    assert Task("t", STRINGS[entry](rows)).is_captions
    assert not caplog.records


@pytest.mark.parametrize("entry", STRINGS)
def test_string_labels_go_by_given_names(root, entry):
    task = Task("t", STRINGS[entry](strings(root)), class_names=["red", "blue"])
    assert task.labels(range(8)) == [1] * 4 + [0] * 4
    with pytest.raises(ValueError, match=r"class names \('red', 'green'\), got 'blue'"):
        Task("t", STRINGS[entry](strings(root)), class_names=["red", "green"])


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (None, "got None (NoneType); leave images without a label out"),
        (float("nan"), "got nan (float); leave images without a label out"),
        (b"cat", "got b'cat' (bytes); decode it"),
        (["cat", "pet"], "must be one of `class_names`, got ['cat', 'pet']; lists are captions"),
    ],
)
def test_a_label_of_another_kind_has_an_error_of_its_own(label, says):
    with pytest.raises(TypeError) as caught:
        Task("t", [(Image.new("RGB", (8, 8)), label)] * 2, class_names=["cat", "dog"])
    assert says in str(caught.value)


def test_a_blank_caption_is_refused():
    rows = [(Image.new("RGB", (8, 8)), "a cat"), (Image.new("RGB", (8, 8)), " ")]
    with pytest.raises(ValueError, match="caption 1 must not be blank, got ' '"):
        Task("t", rows)


@pytest.mark.parametrize(
    "folders",
    [
        ["seg_train", "seg_test", "seg_pred"],
        ["training_set", "test_set"],
        ["train", "predict"],
        ["train", "test", "sample"],
        ["Train_Images", "Test_Images"],
    ],
)
def test_folders_that_are_splits_are_not_classes(tmp_path, folders):
    with pytest.raises(ValueError, match="must be the folder of one split"):
        by_folder(tmp_path, folders)


# --- texts that are one to the model ---


def look(names, tiny_clip, processor, n=2):
    rows = [(Image.new("RGB", (8, 8), (k, 0, 99)), k % len(names)) for k in range(n * len(names))]
    task = Task("t", rows, class_names=names)
    return Probe(task, processor=processor, progress=False).look(tiny_clip(), 0)


@pytest.mark.parametrize(
    "names",
    [
        ["red", "Blue", "blue"],
        ["red", "hot dog", "hot  dog"],
        ["red", "café", unicodedata.normalize("NFD", "café")],
        ["red", "very " * 200 + "blue", "very " * 200 + "green"],
    ],
    ids=["case", "spaces", "Unicode forms", "too long"],
)
def test_classes_that_are_the_same_tokens_are_refused(names, tiny_clip, processor, caplog):
    with pytest.raises(ValueError, match="that are the same tokens"):
        look(names, tiny_clip, processor)
    assert ("are cut" in caplog.text) == (len(names[1]) > 200)


def test_a_few_double_names_of_many_run_with_a_warning(tiny_clip, processor, caplog):
    names = [f"thing {i}" for i in range(299)] + ["thing 0"]
    look(names, tiny_clip, processor, n=1)
    assert "['thing 0'] more than once; of classes with one prompt only the first" in caplog.text


def test_a_processor_that_fails_is_named_and_not_the_data(tiny_clip, processor, root, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such size")

    monkeypatch.setattr(type(processor.image_processor), "__call__", broken)
    probe = Probe(ENTRIES["paths"](root), processor=processor, progress=False)
    with pytest.raises(ValueError, match=r"`processor` failed \(RuntimeError: no such size\)"):
        probe.prepare(tiny_clip())


def test_rows_that_have_lost_their_digits_are_refused():
    from iimm_callbacks import iimm

    rows = torch.rand(4, 8) + 1
    with pytest.raises(ValueError, match=r"row \d has .*; multiply all rows"):
        iimm(rows * 1e-42, rows[:2], [0, 1, 0, 1])


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.WARNING, logger="iimm_callbacks")


# --- several captions of an image ---


def captioned(n=6):
    """n images, and three captions of each."""
    images = [Image.new("RGB", (8, 8), (40 * k, 250 - 40 * k, 90)) for k in range(n)]
    words = ("a", "the", "one")
    return [(x, [f"{word} picture {k}" for word in words]) for k, x in enumerate(images)]


def rows_of(pairs):
    return [(image, caption) for image, captions in pairs for caption in captions]


LISTS = datasets.Sequence(datasets.Value("string"))
CAPTIONED = {
    "lists in a data set": lambda: labelled(captioned(), LISTS),
    "lists in a stream": lambda: labelled(captioned(), LISTS).to_iterable_dataset(),
    "lists in pairs": captioned,
    "rows of a data set": lambda: labelled(rows_of(captioned()), datasets.Value("string")),
    "rows in pairs": lambda: rows_of(captioned()),
}


@pytest.mark.parametrize("entry", CAPTIONED)
def test_an_image_counts_once_and_any_of_its_captions_is_right(entry, tiny_clip, processor):
    model, task = tiny_clip(), Task("t", CAPTIONED[entry]())
    probe = Probe(task, processor=processor, progress=False, batch_size=4)
    look = probe.look(model, 0)
    encoder = find_encoder(model, processor)
    images = [x for x, _ in captioned()]
    texts = [caption for _, captions in captioned() for caption in captions]
    with torch.no_grad():
        x = encoder.embed_images(model, encoder.preprocess(images)).double()
        t = encoder.embed_texts(model, encoder.tokenize(texts)).double()
    x, t = x / x.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    cosines, owner = x @ t.T, torch.arange(18) // 3
    own = owner == torch.arange(6)[:, None]
    assert look.measurement.n_images == len(look.correct["t"]) == 6
    right = owner[cosines.argmax(1)] == torch.arange(6)
    assert look.accuracy("t") == pytest.approx(float(right.double().mean()))
    assert look.measurement.inter == pytest.approx(float(cosines[~own].mean()), abs=1e-6)
    intra = x @ x.T
    assert look.measurement.intra == pytest.approx(float((intra.sum() - 6) / 30), abs=1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_recall_counts_an_image_with_any_of_its_captions_among_the_first_k(k, tiny_clip, processor):
    task = Task("t", captioned(), metric=f"recall@{k}")
    model = tiny_clip()
    look = Probe(task, processor=processor, progress=False).look(model, 0)
    encoder = find_encoder(model, processor)
    with torch.no_grad():
        x = encoder.embed_images(model, encoder.preprocess([x for x, _ in captioned()]))
        texts = [caption for _, captions in captioned() for caption in captions]
        t = encoder.embed_texts(model, encoder.tokenize(texts))
    scores = x @ (t / t.norm(dim=1, keepdim=True)).T
    nearest = scores.argsort(1, descending=True)[:, :k] // 3
    expected = float((nearest == torch.arange(6)[:, None]).any(1).double().mean())
    assert look.accuracy("t") == pytest.approx(expected)


class Numbers(torch.nn.Module):
    """One vector for each number: of a grey picture's level, of the first word of a text."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def images(self, _, images):
        levels = [image.getpixel((0, 0))[0] for image in images]
        return torch.eye(32)[levels] * self.scale

    def texts(self, _, texts):
        ends = torch.tensor([[0.1] if text.endswith("b") else [0.0] for text in texts])
        return (torch.eye(32)[[int(text.split()[0]) for text in texts]] + ends) * self.scale


def share_right(predictions, references):
    return float((predictions == references).mean())


@pytest.mark.parametrize("n_wrong", [0, 6])
@pytest.mark.parametrize("flat", [False, True])
def test_a_metric_is_given_the_image_that_the_nearest_caption_belongs_to(n_wrong, flat):
    shown = [(k + 1) % n_wrong if k < n_wrong else k for k in range(30)]  # the wrong go round
    pairs = [
        (Image.new("RGB", (8, 8), (level,) * 3), [f"{k} a", f"{k} b"])
        for k, level in enumerate(shown)
    ]
    task = Task("t", rows_of(pairs) if flat else pairs, metric=share_right)
    model = Numbers()
    look = Probe(task, encode=(model.images, model.texts), progress=False).look(model, 0)
    assert look.scores["t"].value == pytest.approx(1 - n_wrong / 30)
    assert look.correct["t"].mean() == pytest.approx(1 - n_wrong / 30)
