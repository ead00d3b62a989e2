"""Saved runs <-> a table of `datasets`: for the Hub, and for folders of `save_to_disk`.

A folder is read as data; nothing outside it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from .checks import Check, list_of, object_of, refuse, text
from .lines import Found, parse_line, report, to_line
from .outcomes import Outcome

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_AS_JSON = (
    "off_target_before", "off_target_after", "trajectory", "recipe", "versions", "images",
    "provenance",
)  # fmt: skip
_STATE = "state.json"


def to_dataset(outcomes: Iterable[Outcome]) -> Dataset:
    """Outcomes as a table for the Hub: numbers and words as columns, the rest as JSON strings.

    Args:
        outcomes: The records, none included.

    Returns:
        A `datasets.Dataset` with a column per field of `Outcome`; `from_dataset` undoes it.

    Raises:
        ValueError: An outcome could not be read back.
    """
    from datasets import Dataset, Features, Value

    rows = [json.loads(to_line(outcome)) for outcome in outcomes]
    kinds = {"float": "float64", "int": "int64", "bool": "bool"}  # all else is text
    columns = {f.name: kinds.get(str(f.type).split(" |")[0], "string") for f in fields(Outcome)}
    data = {
        name: [json.dumps(row[name]) if name in _AS_JSON else row[name] for row in rows]
        for name in columns
    }
    features = Features({name: Value(kind) for name, kind in columns.items()})
    return Dataset.from_dict(data, features=features)


def write_new(outcomes: Iterable[Outcome], target: Path) -> None:
    """Outcomes as a new file of JSON lines, ``.jsonl``, or a folder of `datasets`.

    Raises:
        ValueError: It is there already, has another suffix, or cannot be written.
    """
    if target.exists():
        raise ValueError(f"`TARGET` must not exist yet, got {target}; remove it or name another")
    if target.suffix == ".jsonl":
        try:
            target.write_bytes(b"".join(map(to_line, outcomes)))
        except OSError as error:
            raise ValueError(
                f"`TARGET` must be a file that can be written, got {target} "
                f"({error.strerror or error}); make its folder, or name another"
            ) from error
    elif target.suffix:
        raise ValueError(
            f"`TARGET` must end in .jsonl, or be a folder without a suffix, got {target}"
        )
    else:
        to_dataset(outcomes).save_to_disk(target)


def from_dataset(dataset: Dataset) -> list[Outcome]:
    """The outcomes in a table that `to_dataset` made; a row that is none is reported and skipped.

    Args:
        dataset: One split, wherever it has been in between.

    Returns:
        The outcomes, in the order of the rows.

    Raises:
        TypeError: It is no `datasets.Dataset`.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` must be one datasets.Dataset, got {type(dataset).__name__}; "
            "of several splits pass one, such as dataset['train']"
        )
    # As they are stored: another format opens the files that a column of images names.
    return report(scan_tables(dataset.with_format("arrow").iter(1000)), "dataset")


def scan_tables(tables: Iterable[pa.Table]) -> Iterator[Found]:
    """Each row of these tables: where it is, and the outcome or what is wrong."""
    rows = (table.slice(n, 1) for table in tables for n in range(table.num_rows))
    for n, row in enumerate(rows):
        yield f"row {n} (from 0)", parse_line(row, _decode)


def _decode(row: pa.Table) -> dict[str, Any]:
    decoded: dict[str, Any] = row.to_pylist()[0]
    for name in decoded.keys() & set(_AS_JSON):
        try:
            decoded[name] = json.loads(decoded[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` must be a JSON string: {error}") from error
    return decoded


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


def _files(folder: Path) -> list[Path]:
    entries = _listed(folder / _STATE, "_data_files", object_of({"filename": _name}))
    return [folder / entry["filename"] for entry in entries]


def _listed(file: Path, name: str, check: Check) -> list[Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found: list[Any] = object_of({name: list_of(check)})(data, "")[name]
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
