"""A folder that `datasets` saved, read as data; nothing outside it is read."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .checks import Check, fields, list_of, object_of, refuse, text

if TYPE_CHECKING:
    import pyarrow as pa


def check_names(folder: Path) -> None:
    """Refuse a folder that names files outside of itself, which `load_from_disk` would read.

    Args:
        folder: Written by `save_to_disk` of a `datasets.Dataset` or `datasets.DatasetDict`.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is no such folder, or names a file elsewhere.
    """
    if (folder / _STATE).exists():
        _files(folder)
        return
    for split in _listed(folder / "dataset_dict.json", "splits", _name):
        _files(folder / split)


def read_table(folder: Path) -> pa.Table | None:
    """The rows as they are stored; None where there are none.

    Nothing is decoded: `datasets` would open the files that a column of images names. All that
    offsets and lengths in the file claim is checked, as pyarrow does not of its own accord.

    Args:
        folder: Written by `Dataset.save_to_disk`.

    Raises:
        OSError: A file cannot be read.
        TypeError: It is a folder of several splits.
        ValueError: It is no such folder, is damaged, or names a file elsewhere.
    """
    import pyarrow as pa

    if not (folder / _STATE).exists() and (folder / "dataset_dict.json").exists():
        raise TypeError(
            f"{folder} must hold one datasets.Dataset, got DatasetDict; of several splits name the "
            "folder of one"
        )
    contents = [file.read_bytes() for file in _files(folder)]
    try:
        parts = [pa.ipc.open_stream(content).read_all() for content in contents]
        table = pa.concat_tables(parts) if parts else None
        if table is not None:
            table.validate(full=True)
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return table


_STATE = "state.json"


def _files(folder: Path) -> list[Path]:
    entries = _listed(folder / _STATE, "_data_files", object_of({"filename": _name}))
    return [folder / entry["filename"] for entry in entries]


def _listed(file: Path, name: str, check: Check) -> list[Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found: list[Any] = fields(data, "", {name: list_of(check)})[name]
    except RecursionError:
        raise ValueError(f"{file} is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{file} is not one that `datasets` saved: {error}") from error
    return found


def _name(value: Any, name: str) -> str:
    known = text(value, name)
    inside = known == Path(known).name == PureWindowsPath(known).name and "\0" not in known
    if not inside or known in ("", ".."):
        raise refuse(name, "the name of a file beside it", value)
    return known
