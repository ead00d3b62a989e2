"""IIMM as a measurement of `evaluate`: the class, and the folder that `evaluate.load` loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .iimm.iimm import IIMM

# What `evaluate.load(str(FOLDER))` loads without the internet, and what is pushed as a Space.
FOLDER = Path(__file__).parent / "iimm"

__all__ = ["FOLDER", "IIMM"]


def __getattr__(name: str) -> Any:
    if name != "IIMM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .iimm.iimm import IIMM
    except ModuleNotFoundError as error:
        if error.name != "evaluate":
            raise
        raise ImportError(
            "`IIMM` as a measurement needs evaluate; pip install iimm_callbacks[evaluate], or call "
            "`iimm_callbacks.iimm`, which needs nothing"
        ) from error
    return IIMM
