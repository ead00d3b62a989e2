"""A user's data set -> its labels without decoding, and its images one by one."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np

from .streams import STREAM_SIZE, is_stream, read_stream

_IMAGES = ("Image", "Audio")  # features of `datasets`


class _HubSource:
    """A `datasets.Dataset`, read without its transform and without decoding for the labels."""

    def __init__(self, name: str, dataset: Any, image: str | None, label: str | None) -> None:
        self._dataset = dataset.with_format(None)
        self._image, self._label = _columns(name, dataset.features, image, label)
        self.class_names = getattr(dataset.features[self._label], "names", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def labels(self) -> list[Any]:
        return list(self._dataset[self._label])

    def image(self, position: int) -> Any:
        return self._dataset[position][self._image]


class _PairSource:
    """Any sequence of (image, label) or (image, caption) pairs."""

    def __init__(self, name: str, pairs: Any) -> None:
        self._name = name
        self._pairs = pairs
        self.class_names = getattr(pairs, "classes", None)

    def __len__(self) -> int:
        return len(self._pairs)

    def labels(self) -> list[Any]:
        targets = getattr(self._pairs, "targets", None)
        if targets is not None and len(targets) == len(self):
            return list(targets)
        return [self._pair(i)[1] for i in range(len(self))]

    def image(self, position: int) -> Any:
        return self._pair(position)[0]

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


def _columns(name: str, features: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the columns of images and of labels."""
    from datasets import ClassLabel, Value

    def pick(argument: str, given: str | None, *kinds: Any) -> str:
        if given is not None:
            if given not in features:
                raise ValueError(
                    f"`{argument}` of task {name!r} must be one of {list(features)}, got {given!r}"
                )
            return given
        for is_kind in kinds:
            found = [str(k) for k, f in features.items() if is_kind(f)]
            if len(found) == 1:
                return found[0]
            if found:
                break
        raise ValueError(
            f"`dataset` of task {name!r} must have one column for `{argument}`, got features "
            f"{dict(features)}; name the column"
        )

    return (
        pick("image_column", image, lambda f: type(f).__name__ in _IMAGES),
        pick(
            "label_column",
            label,
            lambda f: isinstance(f, ClassLabel),
            lambda f: isinstance(f, Value) and "int" in f.dtype,
            lambda f: isinstance(f, Value) and "string" in f.dtype,
        ),
    )


def _open_stream(
    name: str, stream: Any, image: str | None, label: str | None, **draw: int
) -> _PairSource:
    features = stream.features
    if features is None:
        if image is None or label is None:
            raise ValueError(
                f"`dataset` of task {name!r} is a stream that does not say what its columns are; "
                "name `image_column` and `label_column`"
            )
    else:
        image, label = _columns(name, features, image, label)
    source = _PairSource(name, read_stream(name, stream, image, label, **draw))
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
) -> Any:
    """The source for a data set: ``len``, ``labels()``, ``image(position)``, ``class_names``.

    Args:
        name: Of the task, for errors.
        dataset: As `Task`.
        image: Name of the image column, or None.
        label: Name of the label column, or None.
        size: Of the draw from a stream, see `streams.read_stream`.
        first: Likewise.
        seed: Likewise.

    Raises:
        TypeError: The data set is of another kind.
        ValueError: A column is missing or ambiguous, or a stream cannot be read.
    """
    if is_stream(dataset):
        return _open_stream(name, dataset, image, label, size=size, first=first, seed=seed)
    if hasattr(dataset, "features") and hasattr(dataset, "with_format"):
        return _HubSource(name, dataset, image, label)
    if isinstance(dataset, dict):
        raise TypeError(
            f"`dataset` of task {name!r} must be one split, got a dict of {list(dataset)}; "
            "pick one, e.g. dataset['test']"
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
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


def as_image(item: Any) -> Any:
    """What a model's processor reads, from what a data set holds.

    Args:
        item: An image (PIL image, path, encoded bytes, uint8 array [H, W, 3]), a sound (floats
            [n], ``{"array", "sampling_rate"}`` or a decoded `datasets.Audio`) or a video (list of
            images, uint8 array [T, H, W, 3]).

    Returns:
        An RGB PIL image; ``{"array": [n] float32, "sampling_rate": int or None}``; or a list of RGB
        PIL images.

    Raises:
        TypeError: It is none of these.
        ValueError: A sound has several channels, or integers.
    """
    if hasattr(item, "get_all_samples"):  # what `datasets.Audio` decodes to
        samples = item.get_all_samples()
        item = {"array": samples.data.mean(0).numpy(), "sampling_rate": samples.sample_rate}
    if isinstance(item, list) and item and isinstance(item[0], float):
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


def _as_rgb(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, dict):  # an undecoded `datasets.Image`
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = Image.fromarray(image)
    elif isinstance(image, str | os.PathLike):
        image = Image.open(image)
    elif not isinstance(image, Image.Image):
        got = type(image).__name__
        if isinstance(image, np.ndarray):
            got = f"{got} of {image.dtype} and shape {image.shape}"
        raise TypeError(
            f"expected a PIL image, path, bytes or uint8 array, got {got}; pass the data set "
            "without its transform"
        )
    return image.convert("RGB")
