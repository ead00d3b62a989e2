"""A user's data set or folder -> its labels without decoding, and its images one by one."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..records.log import get_logger
from .labels import SPLITS, pick_columns
from .streams import is_stream, read_stream

logger = get_logger(__name__)

_BESIDE_SPLITS = (
    "set", "data", "dataset", "images", "seg", "pred", "predict", "prediction", "predictions",
    "sample", "samples", "extra", "unlabeled", "unlabelled", "holdout",
)  # fmt: skip

# Told by Pillow, but not read; and EPS by another program only, which it would start.
_UNREAD = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_COMPARED = 16  # items of a data set that also has `.targets`


class _HubSource:
    """A `datasets.Dataset`, read without its transform and without decoding for the labels."""

    strings: Counter[str] | None = None

    def __init__(self, name: str, dataset: Any, image: str | None, label: str | None) -> None:
        self._dataset = dataset.with_format(None)
        self._image, self._label = pick_columns(name, dataset.features, image, label)
        self.class_names = getattr(dataset.features[self._label], "names", None)
        images = self._dataset.select_columns([self._image])  # all of a row is decoded
        self._images, self._encoded = _decoded(images, self._image)

    def __len__(self) -> int:
        return len(self._dataset)

    def labels(self) -> list[Any]:
        return list(self._dataset[self._label][:])  # item by item it takes seven times as long

    def image(self, position: int) -> Any:
        if self._encoded is not None:
            held = self._encoded[position][self._image]
            if held is None or held["bytes"] is not None or os.path.isfile(held["path"]):
                return held
        return self._images[position][self._image]


def _decoded(dataset: Any, column: str) -> tuple[Any, Any]:
    """The data set with its images decoded; and as bytes, which threads can decode.

    The second is None where that differs.
    """
    from datasets import Image as ImageFeature

    feature = dataset.features[column]
    if not isinstance(feature, ImageFeature):
        return dataset, None
    if not feature.decode:
        dataset = dataset.cast_column(column, replace(feature, decode=True))
    plain = getattr(feature, "mode", None) is None
    encoded = dataset.cast_column(column, ImageFeature(decode=False)) if plain else None
    return dataset, encoded


class _PairSource:
    """Any sequence of (image, label) or (image, caption) pairs."""

    strings: Counter[str] | None = None  # of a stream: labels of all that was read

    def __init__(self, name: str, pairs: Any) -> None:
        self._name = name
        self._pairs = pairs
        self.class_names = getattr(pairs, "classes", None)

    def __len__(self) -> int:
        return len(self._pairs)

    def labels(self) -> list[Any]:
        targets = getattr(self._pairs, "targets", None)
        if targets is not None and len(targets) == len(self):
            self._check_targets(targets)
            return list(targets)
        return [self._pair(i)[1] for i in range(len(self))]

    def image(self, position: int) -> Any:
        return self._pair(position)[0]

    def _check_targets(self, targets: Any) -> None:
        """Raise where items have other labels than `.targets` says: compares some of them."""
        n = len(self)
        for position in sorted({n * part // _COMPARED for part in range(_COMPARED)}):
            try:
                label = self._pairs[position][1]
            except Exception:  # the probe reports one that cannot be read
                continue
            if not np.array_equal(np.asarray(label), np.asarray(targets[position])):
                raise ValueError(
                    f"`dataset` of task {self._name!r}: `.targets` says {targets[position]!r} for "
                    f"item {position}, and the item itself {label!r}; pass it without "
                    "`target_transform`, or a list of its (image, label) pairs"
                )

    def _pair(self, position: int) -> Any:
        pair = self._pairs[position]
        _check_pair(self._name, pair, position)
        return pair


def _check_pair(name: str, item: Any, position: int) -> None:
    if isinstance(item, tuple | list) and len(item) == 2:
        return
    length = f" and length {len(item)}" if isinstance(item, tuple | list) else ""
    raise TypeError(
        f"`dataset` of task {name!r} must yield (image, label) pairs, got items of type "
        f"{type(item).__name__}{length}, the first at {position}"
    )


def _open_stream(
    name: str, stream: Any, image: str | None, label: str | None, **draw: Any
) -> _PairSource:
    features = stream.features
    if features is None:
        if image is None or label is None:
            raise ValueError(
                f"`dataset` of task {name!r} is a stream that does not say what its columns are; "
                "name `image_column` and `label_column`"
            )
    else:
        image, label = pick_columns(name, features, image, label)
    pairs, strings = read_stream(name, stream, image, label, **draw)
    source = _PairSource(name, pairs)
    source.strings = strings
    source.class_names = getattr((features or {}).get(label), "names", None)
    return source


def open_source(name: str, dataset: Any, image: str | None, label: str | None, **draw: Any) -> Any:
    """The source for a data set.

    It has ``len``, ``labels()``, ``image(position)``, ``class_names``, and ``strings`` as
    `labels.read_labels` takes them.

    Args:
        name: Of the task, for errors.
        dataset: As `Task`.
        image: Name of the image column, or None.
        label: Name of the label column, or None.
        draw: Of a stream: `size`, `first`, `seed` and `given` of `streams.read_stream`.

    Raises:
        TypeError: The data set is of another kind.
        ValueError: A column is missing or ambiguous, or a stream cannot be read.
    """
    if is_stream(dataset):
        return _open_stream(name, dataset, image, label, **draw)
    if hasattr(dataset, "features") and hasattr(dataset, "with_format"):
        return _HubSource(name, dataset, image, label)
    if isinstance(dataset, dict):
        raise TypeError(
            f"`dataset` of task {name!r} must be one split, got a dict of {list(dataset)}; "
            "pick one, e.g. dataset['test']"
        )
    if hasattr(dataset, "iloc"):
        raise TypeError(
            f"`dataset` of task {name!r} must hold (image, label) pairs, got a "
            f"{type(dataset).__name__} of pandas; pass e.g. "
            "list(zip(frame['image'], frame['label']))"
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        for argument, column in (("image_column", image), ("label_column", label)):
            if column is not None:
                raise ValueError(
                    f"`{argument}` of task {name!r} must be left out, got {column!r}: "
                    f"{type(dataset).__name__} holds (image, label) pairs and has no columns"
                )
        if len(dataset):
            _check_pair(name, dataset[0], 0)
        return _PairSource(name, dataset)
    if hasattr(dataset, "__next__"):
        raise TypeError(
            f"`dataset` of task {name!r} is an iterator, which is used up by being read; pass a "
            "list of its pairs, or `datasets.IterableDataset.from_generator` of what makes it"
        )
    raise TypeError(
        f"`dataset` of task {name!r} must be a datasets.Dataset or a sequence of (image, label) "
        f"pairs, got {type(dataset).__name__}"
    )


class ImageFolder:
    """(path, label) pairs of the images in `path/CLASS/**`, classes in sorted order.

    The `imagefolder` builder of `datasets` writes a cache, hashes every file, takes sub-folders
    called `train` or `test` for splits, and follows links out of the folder: not so here.

    Every file whose extension Pillow reads is an image; nothing is opened here. Of a class all
    images below its folder count, in sorted order. What is hidden (its name starts with a dot) is
    passed over. Other files, links to folders, and links that lead out of the folder are skipped,
    and a warning is logged that counts them.

    Args:
        path: The folder.

    Attributes:
        path: The folder, its own links resolved.
        folders: Names of the class folders, in label order.
        classes: The same; see `prompts.checked_class_names` for what prompts have.
        targets: Label of every image.
        skipped: How many files and links were skipped.

    Raises:
        TypeError: `path` is no path.
        ValueError: There is no such folder, it has fewer than two class folders, they are splits,
            or one of them has no image.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"`path` must be a folder of class folders, got {path!r:.80} "
                f"({type(path).__name__}); pass its path as a string or pathlib.Path"
            )
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_dir():
            got = "which is a file" if self.path.exists() else "which does not exist"
            raise ValueError(f"`path` must be a folder of class folders, got {str(path)!r}, {got}")
        self.folders = [entry.name for entry in _visible(self.path) if _is_folder(entry)]
        self.classes = self.folders
        self._check_folders(path)
        self.skipped = sum(entry.is_symlink() for entry in _visible(self.path))
        self._paths: list[Path] = []
        self.targets: list[int] = []
        for label, name in enumerate(self.folders):
            found = list(self._images(self.path / name))
            if not found:
                raise ValueError(
                    f"`path` must have images in every class folder, got none in "
                    f"{str(self.path / name)!r} that Pillow reads; remove it, or name it with a "
                    "dot in front"
                )
            self._paths += found
            self.targets += [label] * len(found)
        if self.skipped:
            logger.warning(
                "%d files or links in %s are skipped: no images, or links out of it or to folders",
                self.skipped,
                self.path,
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> tuple[str, int]:
        return str(self._paths[position]), self.targets[position]

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.path)!r}, {len(self)} images, {len(self.folders)} classes)"

    def _check_folders(self, path: str | os.PathLike[str]) -> None:
        if _are_splits(self.folders):
            raise ValueError(
                f"`path` must be the folder of one split, got {str(path)!r} with "
                f"{', '.join(self.folders)} in it; pass e.g. "
                f"{str(Path(path) / self.folders[-1])!r}"
            )
        if len(self.folders) < 2:
            raise ValueError(
                f"`path` must hold at least 2 folders, one per class, got {str(path)!r} with "
                f"{', '.join(self.folders) or 'none'} (hidden ones and links do not count)"
            )

    def _images(self, folder: Path) -> Iterator[Path]:
        for entry in _visible(folder):
            if _is_folder(entry):
                yield from self._images(folder / entry.name)
            elif _is_image(entry.name) and self._is_inside(entry):
                yield folder / entry.name
            else:
                self.skipped += 1

    def _is_inside(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a file, and if by a link then one of this folder."""
        if not entry.is_symlink():
            return entry.is_file()
        target = Path(entry.path).resolve()
        return target.is_file() and target.is_relative_to(self.path)


def _are_splits(folders: list[str]) -> bool:
    """Whether folders are splits of a data set: words for splits, and nothing but such words."""
    words = [set(re.split(r"[\W_\d]+", name.lower())) - {""} for name in folders]
    splits, beside = set(SPLITS), {*SPLITS, *_BESIDE_SPLITS}
    return any(w & splits for w in words) and all(w and w <= beside for w in words)


def has_class_folders(path: Path) -> bool:
    """Whether a folder has two or more folders with images right in them, and no other data."""
    if not path.is_dir():
        return False
    entries = _visible(path)
    folders = [path / entry.name for entry in entries if _is_folder(entry)]
    files = [entry.name for entry in entries if not _is_folder(entry)]
    return (
        len(folders) > 1
        and all(any(_is_image(inner.name) for inner in _visible(folder)) for folder in folders)
        and all(os.path.splitext(name)[1].lower() in ("", ".md", ".txt") for name in files)
    )


def _is_image(name: str) -> bool:
    """Whether Pillow reads files of this extension."""
    return os.path.splitext(name)[1].lower() in _extensions()


@cache
def _extensions() -> frozenset[str]:
    found = Image.registered_extensions()  # loads Pillow's plugins
    readable = set(Image.OPEN) - set(_UNREAD)
    return frozenset(extension for extension, kind in found.items() if kind in readable)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)
