"""An array of any depth -> a picture of 8 bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

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
