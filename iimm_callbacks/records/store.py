"""Outcomes in files: JSON lines, a `datasets.Dataset` for the Hub."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from .log import get_logger
from .outcomes import Outcome, parse_outcome
from .saved import read_table

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

logger = get_logger(__name__)

LOCK_SECONDS = 60.0
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # of one slash: what `Path` leaves
_AS_JSON = (
    "off_target_before", "off_target_after", "trajectory", "recipe", "versions", "images",
)  # fmt: skip
_T = TypeVar("_T")


def default_store() -> Path:
    """The store of all runs: ``$IIMM_CALLBACKS_STORE``, else a file in the user's cache folder."""
    named = os.environ.get("IIMM_CALLBACKS_STORE")
    if named:
        return Path(named).expanduser()
    return user_cache_path("iimm_callbacks") / "outcomes.jsonl"


def check_is_path(path: str | Path) -> None:
    """Raise where a path is the address of a store elsewhere, which would become a folder here.

    Raises:
        ValueError: It is one, such as ``memory://team`` or ``s3://bucket/runs``.
    """
    if _ADDRESS.match(str(path)):
        raise ValueError(
            f"a store of outcomes must be a file on a disk of this machine, got {str(path)!r}; "
            "exchange runs with other places by `iimm outcomes export` and `import`"
        )


def append_outcome(path: str | Path, outcome: Outcome) -> None:
    """Add one outcome to a JSON-lines file, which is made if it does not exist.

    Any number of processes may do so at once: a lock file beside it, ``<path>.lock``, lets one at a
    time. The line is on disk when this returns; a crash before costs this line only.

    Args:
        path: The file.
        outcome: The record.

    Raises:
        OSError: The file cannot be written, or others have held the lock for a minute.
        ValueError: The outcome could not be read back, such as one with NaN in it; or `path` is an
            address.
    """
    check_is_path(path)
    path = Path(path)
    line = _line(outcome)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS), path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash cut the last line short: do not lose this one
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except Timeout as error:
        raise TimeoutError(
            f"cannot append to {path}: others have held {error.lock_file} for "
            f"{LOCK_SECONDS:g} seconds; try again, or append to a file of your own"
        ) from error
    except NotImplementedError as error:  # filelock before 3.24, where there are no locks
        raise OSError(f"cannot append to {path}: {error}") from error
    except OSError as error:
        raise OSError(
            error.errno, f"cannot append an outcome ({error.strerror or error})", str(path)
        ) from error


def read_outcomes(path: str | Path) -> list[Outcome]:
    """All outcomes in a file; a line that is no outcome is reported and skipped.

    Needs no lock and writes nothing: what is being appended meanwhile is there or is not.

    Args:
        path: A JSON-lines file, or a folder written by `datasets.Dataset.save_to_disk`.

    Returns:
        The outcomes, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        TypeError: It is a folder of several splits.
        ValueError: It is a folder that is damaged as a whole, or names files outside of it; or an
            address such as ``s3://...``.
    """
    return _report(_scan(path), str(path))


def check_store(path: str | Path) -> list[str]:
    """What `read_outcomes` would report and skip.

    Args:
        path: As `read_outcomes`.

    Returns:
        One problem each, such as ``"line 3: `iimm` is missing"``; none where all is well.

    Raises:
        OSError: The file cannot be read.
        TypeError, ValueError: As `read_outcomes`.
    """
    return [f"{where}: {found}" for where, found in _scan(path) if isinstance(found, ValueError)]


def as_outcomes(source: str | Path | Dataset | Iterable[Outcome] | None) -> list[Outcome]:
    """Outcomes, in whatever form they are given, as a list.

    Args:
        source: A JSON-lines file, a folder written by `datasets.Dataset.save_to_disk`, a
            `datasets.Dataset` of `to_dataset`, or records. ``None``: none.

    Returns:
        The outcomes.

    Raises:
        OSError: The file cannot be read.
        TypeError: It holds something else than `Outcome` records, or a folder of several splits.
        ValueError: As `read_outcomes`.
    """
    if source is None:
        return []
    if isinstance(source, str | Path):
        return read_outcomes(source)
    if "datasets" in sys.modules and isinstance(source, sys.modules["datasets"].Dataset):
        return from_dataset(source)
    outcomes = list(source)
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise TypeError(f"`outcomes` must hold Outcome records, got {type(outcome).__name__}")
    return outcomes


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

    rows = [json.loads(_line(outcome)) for outcome in outcomes]
    kinds = {"float": "float64", "int": "int64", "bool": "bool"}  # all else is text
    columns = {f.name: kinds.get(str(f.type).split(" |")[0], "string") for f in fields(Outcome)}
    data = {
        name: [json.dumps(row[name]) if name in _AS_JSON else row[name] for row in rows]
        for name in columns
    }
    features = Features({name: Value(kind) for name, kind in columns.items()})
    return Dataset.from_dict(data, features=features)


def from_dataset(dataset: Dataset) -> list[Outcome]:
    """The outcomes in a table that `to_dataset` made; a row that is none is reported and skipped.

    Args:
        dataset: One split, wherever it has been in between.

    Returns:
        The outcomes, in the order of the rows.

    Raises:
        TypeError: It is no `datasets.Dataset`.
    """
    return _report(_scan_dataset(dataset), "dataset")


def _line(outcome: Outcome) -> bytes:
    """The outcome as it stands in a file, once it is sure that it can be read back."""
    try:
        line = json.dumps(asdict(outcome), allow_nan=False, sort_keys=True)
        parse_outcome(json.loads(line))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`outcome` cannot be saved: {error}") from error
    return f"{line}\n".encode()


def _scan(path: str | Path) -> Iterator[tuple[str, Outcome | ValueError]]:
    """Each line of a file, or row of a folder: where it is, and the outcome or what is wrong."""
    check_is_path(path)
    if Path(path).is_dir():
        table = read_table(Path(path))
        yield from _scan_tables([] if table is None else [table])
        return
    with Path(path).open(encoding="utf-8", errors="surrogateescape") as file:
        lines = ((f"line {n}", line) for n, line in enumerate(file, start=1) if line.strip())
        yield from _parse_each(lines, json.loads)


def _scan_dataset(dataset: Dataset) -> Iterator[tuple[str, Outcome | ValueError]]:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`dataset` must be one datasets.Dataset, got {type(dataset).__name__}; "
            "of several splits pass one, such as dataset['train']"
        )
    # As they are stored: another format opens the files that a column of images names.
    yield from _scan_tables(dataset.with_format("arrow").iter(1000))


def _scan_tables(tables: Iterable[pa.Table]) -> Iterator[tuple[str, Outcome | ValueError]]:
    rows = (table.slice(n, 1) for table in tables for n in range(table.num_rows))
    yield from _parse_each(((f"row {n} (from 0)", row) for n, row in enumerate(rows)), _decode)


def _decode(row: pa.Table) -> dict[str, Any]:
    decoded: dict[str, Any] = row.to_pylist()[0]
    for name in decoded.keys() & set(_AS_JSON):
        try:
            decoded[name] = json.loads(decoded[name])
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{name}` must be a JSON string: {error}") from error
    return decoded


def _parse_each(
    rows: Iterable[tuple[str, _T]], decode: Callable[[_T], Any]
) -> Iterator[tuple[str, Outcome | ValueError]]:
    """The one loop that tells outcomes from what is none."""
    for where, row in rows:
        try:
            yield where, parse_outcome(decode(row))
        except RecursionError:
            yield where, ValueError("nested too deep to be an outcome")
        except ValueError as error:
            yield where, error


def _report(found: Iterable[tuple[str, Outcome | ValueError]], origin: str) -> list[Outcome]:
    outcomes = []
    for where, item in found:
        if isinstance(item, Outcome):
            outcomes.append(item)
        else:
            logger.warning("%s %s is not an outcome and is skipped: %s", origin, where, item)
    return outcomes
