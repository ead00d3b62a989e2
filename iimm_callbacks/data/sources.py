"""A user's data set -> its labels without decoding, and its images one by one, by one decoder."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .labels import pick_columns
from .pixels import as_array, picture_of
from .streams import STREAM_SIZE, is_stream, read_stream

_READING = threading.RLock()  # a data set may be made of another task
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


def open_source(
    name: str,
    dataset: Any,
    image: str | None,
    label: str | None,
    *,
    size: int,
    first: int = STREAM_SIZE,
    seed: int = 0,
    given: Any = None,
) -> Any:
    """The source for a data set.

    It has ``len``, ``labels()``, ``image(position)``, ``class_names``, and ``strings`` as
    `labels.read_labels` takes them.

    Args:
        name: Of the task, for errors.
        dataset: As `Task`.
        image: Name of the image column, or None.
        label: Name of the label column, or None.
        size: Of the draw from a stream, see `streams.read_stream`.
        first: Likewise.
        seed: Likewise.
        given: Likewise.

    Raises:
        TypeError: The data set is of another kind.
        ValueError: A column is missing or ambiguous, or a stream cannot be read.
    """
    if is_stream(dataset):
        draw = {"size": size, "first": first, "seed": seed, "given": given}
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


class _ReadLargeImages:
    """Inside, what Pillow only warns of it reads, whatever the filters of warnings say.

    Those are of the whole process: the first thread that comes sets them, the last restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_LARGE_IMAGES = _ReadLargeImages()


def read_image(source: Any, position: int) -> Any:
    """An image of a source, as `as_image`; threads may call it together.

    Data sets, which tasks may share, and what is open already are read by one at a time; encoded
    images are decoded by all.

    Raises:
        Exception: It cannot be read.
    """
    with _LARGE_IMAGES:
        with _READING:
            item = source.image(position)
            if not isinstance(item, bytes | str | os.PathLike) and not _is_undecoded(item):
                return as_image(item)
        return as_image(item)


def _is_undecoded(item: Any) -> bool:
    return isinstance(item, dict) and "bytes" in item


def as_image(item: Any) -> Any:
    """What a model's processor reads, from what a data set holds.

    Pictures are turned as their EXIF orientation says. Levels of uint16, and of files of 16 bits,
    are from 0 to 65535, as in torchvision and scikit-image, however dark a picture is; those of all
    other integers from 0 to 255; floats from 0 to 1 or 255, and a thousandth over, as after a
    resize.

    Args:
        item: An image (PIL image, path, encoded bytes, an open file; or an array, a tensor or lists
            [H, W], [H, W, 1 or 3 or 4] or [1 or 3 or 4, H, W] of integers, booleans, or floats in
            [0, 1] or [0, 255]), a sound (floats [n], ``{"array", "sampling_rate"}`` or a decoded
            `datasets.Audio`) or a video (list of images, array [T, H, W, 3]).

    Returns:
        An RGB PIL image; ``{"array": [n] float32, "sampling_rate": int or None}``; or a list of RGB
        PIL images.

    Raises:
        TypeError: It is none of these.
        ValueError: A sound has several channels, or integers; a picture has another shape, or
            values of another range.
    """
    if hasattr(item, "get_all_samples"):  # what `datasets.Audio` decodes to
        samples = item.get_all_samples()
        item = {"array": samples.data.mean(0).numpy(), "sampling_rate": samples.sample_rate}
    if hasattr(item, "detach") and hasattr(item, "numpy"):  # a tensor
        item = as_array(item)
    if isinstance(item, list) and item and isinstance(item[0], float | list):
        item = np.asarray(item)
    if isinstance(item, np.ndarray) and item.ndim == 1 and item.dtype.kind == "f":
        item = {"array": item, "sampling_rate": None}
    if isinstance(item, dict) and "array" in item:
        array = np.asarray(item["array"])
        if array.ndim != 1 or array.dtype.kind != "f":
            raise ValueError(
                "expected a sound of one channel, [n] floats in [-1, 1], got shape "
                f"{array.shape} of {array.dtype}; average its channels, scale its integers"
            )
        return {"array": array.astype(np.float32), "sampling_rate": item.get("sampling_rate")}
    if isinstance(item, list | tuple) or (isinstance(item, np.ndarray) and item.ndim == 4):
        return [_as_rgb(frame) for frame in item]
    return _as_rgb(item)


def kind(image: Any) -> str:
    """What `as_image` returned: ``"image"``, ``"sound"`` or ``"video"``."""
    if isinstance(image, list):
        return "video"
    return "sound" if isinstance(image, dict) else "image"


def content(image: Any) -> bytes:
    """What `as_image` returned, as bytes to be hashed."""
    if isinstance(image, list):
        return b"".join(map(content, image))
    if isinstance(image, dict):
        return repr(image["sampling_rate"]).encode() + bytes(image["array"].tobytes())
    return repr(image.size).encode() + bytes(image.tobytes())


def _as_rgb(image: Any) -> Image.Image:
    if isinstance(image, dict):  # an undecoded `datasets.Image`
        held = image.get("bytes")
        image = image.get("path") if held is None else held
    if hasattr(image, "detach") and hasattr(image, "numpy"):
        image = as_array(image)
    if isinstance(image, bytes | bytearray | memoryview):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, np.ndarray):
        return picture_of(image)
    elif isinstance(image, str | os.PathLike) or hasattr(image, "read"):
        image = Image.open(image)
    elif not isinstance(image, Image.Image):
        raise TypeError(
            f"expected a PIL image, path, bytes or array, got {type(image).__name__}; pass the "
            "data set without its transform"
        )
    # Pillow opens files of 16 bits as 32 where it has no mode for them.
    is_wide = image.mode == "I" and image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # which `convert` would clip
        return picture_of(np.asarray(image, np.uint16 if is_wide else None))
    rgb: Image.Image = image.convert("RGB")
    return rgb
