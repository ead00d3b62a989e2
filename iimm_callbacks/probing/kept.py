"""Preprocessed pictures in a quarter of their memory, bit for bit.

Most processors map each of the 256 levels of a channel to one float. Kept are the levels, and a
table of the floats; a batch that the table does not give back exactly is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LEAST = 64 * 1024  # values of a picture; below it there is little to save
_PIXELS = "pixel_values"


@dataclass(frozen=True)
class Levels:
    """What a processor makes of each level of each channel.

    Attributes:
        table: [C, 256] float32.
    """

    table: Tensor

    def pack(self, inputs: Any) -> Packed | None:
        """The model inputs as levels; None where that would not give them back exactly."""
        pixels = inputs.get(_PIXELS) if isinstance(inputs, dict) else None
        channels = len(self.table)
        if getattr(pixels, "dtype", None) != self.table.dtype:
            return None
        if not isinstance(pixels, Tensor) or pixels.shape[1:2] != (channels,) or pixels.ndim != 4:
            return None
        levels = torch.empty(pixels.shape, dtype=torch.uint8)
        kept, values = levels.numpy(), pixels.numpy()
        near = np.empty(values.shape[2:], values.dtype)  # small enough for a core's cache
        for c, table in enumerate(self.table.numpy()):
            step = 255 / (table[255] - table[0])
            for picture in range(len(values)):
                np.subtract(values[picture, c], table[0], out=near)
                np.multiply(near, step, out=near)
                np.rint(near, out=near)
                np.clip(near, 0, 255, out=near)
                with np.errstate(invalid="ignore"):  # NaN is told by the comparison
                    np.copyto(kept[picture, c], near, casting="unsafe")
                np.take(table, kept[picture, c], out=near, mode="clip")
                if not np.array_equal(near, values[picture, c]):
                    return None
        return Packed(levels, self.table, {k: v for k, v in inputs.items() if k != _PIXELS})


@dataclass(frozen=True)
class Packed:
    """Model inputs of n pictures.

    Attributes:
        levels: [n, C, H, W] uint8.
        table: [C, 256] float32.
        others: Further model inputs, as they are.
    """

    levels: Tensor
    table: Tensor
    others: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Of memory."""
        others = (value.nbytes for value in self.others.values() if isinstance(value, Tensor))
        return self.levels.nbytes + sum(others)

    def some(self, rows: slice | list[int]) -> Packed:
        """Some of the pictures."""
        others = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.others.items()}
        return replace(self, levels=self.levels[rows], others=others)

    def pinned(self) -> Packed:
        """In memory that a GPU reads while the CPU goes on."""
        return replace(self, levels=self.levels.pin_memory())

    def inputs(self, device: torch.device | None = None) -> dict[str, Any]:
        """The model inputs, on the device or where they are; a quarter as much is copied to it."""
        levels = self.levels if device is None else self.levels.to(device, non_blocking=True)
        table = self.table.to(levels.device)
        if levels.device.type == "cpu":
            pixels = torch.empty(levels.shape, dtype=table.dtype)
            kept, values = levels.numpy(), pixels.numpy()
            for c, of_level in enumerate(table.numpy()):
                for picture in range(len(values)):
                    np.take(of_level, kept[picture, c], out=values[picture, c], mode="clip")
        else:
            offsets = 256 * torch.arange(len(table), device=levels.device).reshape(1, -1, 1, 1)
            pixels = table.flatten()[levels.long() + offsets]
        return {_PIXELS: pixels} | self.others


def find_levels(preprocess: Callable[[list[Any]], Any]) -> Levels | None:
    """The processor's table; None where it has none, or pictures are too small to be worth it.

    Args:
        preprocess: Images -> model inputs.
    """
    try:
        grey = preprocess([Image.new("RGB", (8, 8))])
        pixels = grey.get(_PIXELS) if isinstance(grey, dict) else None
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels[0].numel() < LEAST:
            return None
        height, width = pixels.shape[2:]
        ramp = np.resize(np.arange(256, dtype=np.uint8), (height, width))
        found = preprocess([Image.fromarray(np.repeat(ramp[..., None], 3, axis=2))])[_PIXELS]
    except Exception:  # it reads no such pictures, so none of them can be kept like this
        return None
    if found.shape[2:] != (height, width) or found.dtype != torch.float32:
        return None
    table = found[0].flatten(1)[:, :256].contiguous()
    return Levels(table) if bool((table.diff(dim=1) > 0).all()) else None
