"""An image, a sound or a video of a data set -> what a processor reads; random streams are kept."""

from __future__ import annotations

import io
import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..records.log import get_logger

logger = get_logger(__name__)

_SLACK = 1e-3  # of the scale, by which resizing and rounding carry floats over its ends


def as_array(tensor: Any) -> Any:
    """A tensor as an array; those of 16 bits as float32, since numpy has no bfloat16."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    return tensor.numpy()


def picture_of(array: Any) -> Image.Image:
    """A picture of an array [H, W], [H, W, channels] or [channels, H, W].

    Raises:
        TypeError: It holds no numbers.
        ValueError: It has another shape, or values of another range.
    """
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[2] not in channels and array.shape[0] in channels:
        array = array.transpose(1, 2, 0)
    is_sound = array.ndim == 2 and min(array.shape) <= 2 and array.dtype.kind == "f"  # in stereo
    known = array.ndim in (2, 3) and 0 not in array.shape and (*array.shape, 1)[2] in channels
    if is_sound or not known:
        raise ValueError(
            f"expected a picture [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, got shape "
            f"{list(array.shape)} of {array.dtype}"
        )
    levels = _as_bytes(array)
    if levels.ndim == 3 and levels.shape[2] == 1:
        levels = levels[..., 0]
    return Image.fromarray(np.ascontiguousarray(levels)).convert("RGB")


@cache  # once
def _tell_dark() -> None:
    logger.warning(
        "A picture of 16 bits has no value of 4096 or more, and is read as nearly black. If all "
        "of them are so, scale them: 16 bits are read from 0 to 65535"
    )


def _as_bytes(array: Any) -> Any:
    """The same picture in uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise TypeError(f"expected numbers for a picture, got an array of {array.dtype}")
    low, high = float(array.min()), float(array.max())
    is_float, is_wide = array.dtype.kind == "f", array.dtype.kind + str(array.itemsize) == "u2"
    scales, slack = ((1, 255), _SLACK) if is_float else ((65535 if is_wide else 255,), 0)
    scale = next((scale for scale in scales if high <= scale * (1 + slack)), None)
    if scale is None or not low >= -slack * scale:
        raise ValueError(
            f"expected a picture with values from 0 to {' or '.join(map(str, scales))} for "
            f"{array.dtype}, got {low:g} to {high:g}; pass it before it is normalised, and levels "
            "of 16 bits as uint16"
        )
    if is_float and scale == 255 and high < 2:
        raise ValueError(
            f"expected a picture with values from 0 to 1 or 255 for {array.dtype}, got "
            f"{low:g} to {high:g}, which may be either; clip it to [0, 1], or pass uint8"
        )
    if is_wide and 0 < high < 4096:
        _tell_dark()
    return np.rint(array.astype(np.float64).clip(0, scale) * (255 / scale)).astype(np.uint8)


_READING = threading.RLock()  # a data set may be made of another task


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
            is_encoded = isinstance(item, dict) and "bytes" in item
            if not is_encoded and not isinstance(item, bytes | str | os.PathLike):
                return as_image(item)
        return as_image(item)


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


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Inside, anything may draw random numbers; after, the streams of the CPU are as before.

    Those of accelerators are left alone: to ask for them would start the accelerator.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_all(seed: int) -> None:
    """Seed every random stream; `random_streams_kept` and `undisturbed` restore them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def streams() -> tuple[Any, ...]:
    """The state of all random streams of the CPU, to be compared."""
    own = np.random.get_state(legacy=False)
    state = own["state"]
    return (
        random.getstate(),
        (state["key"].tobytes(), state["pos"], own["has_gauss"], own["gauss"]),
        torch.get_rng_state().numpy().tobytes(),
    )
