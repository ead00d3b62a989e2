"""The Space's page: a file of embeddings in, the measurement out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import evaluate
from safetensors import SafetensorError
from safetensors.numpy import load_file

_HERE = Path(__file__).parent
_NAMES = ("image_embeds", "labels", "text_embeds")


def measure(path: str) -> dict[str, float | None]:
    """The measurement of a file of embeddings.

    Args:
        path: Of a safetensors file with `image_embeds`, `labels` and `text_embeds`.

    Returns:
        What `IIMM.compute` gives, with ``None`` for nan.

    Raises:
        ValueError: It is no such file, an array is missing, or the arrays do not suit.
    """
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"the file must be a safetensors file ({error})") from error
    missing = [name for name in _NAMES if name not in arrays]
    if missing:
        raise ValueError(f"the file must hold {', '.join(_NAMES)}, got no {missing[0]}")
    measurement = evaluate.load(str(_HERE / "iimm.py"), keep_in_memory=True)
    found = measurement.compute(**{name: arrays[name] for name in _NAMES})
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def page() -> Any:
    """The page, not yet shown."""
    import gradio

    card = (_HERE / "README.md").read_text(encoding="utf-8")
    return gradio.Interface(
        measure,
        gradio.File(label=f"Safetensors: {', '.join(_NAMES)}", file_types=[".safetensors"]),
        gradio.JSON(label="Measurement"),
        title="IIMM",
        article=card.split("---", 2)[2],
    )


if __name__ == "__main__":
    page().launch()
