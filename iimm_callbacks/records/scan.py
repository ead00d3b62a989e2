"""Lines of a store -> a table of what they hold, read by several processes where there are many.

python -m iimm_callbacks.records.scan FILE START END > table
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from . import objects
from .lines import name_of, parse_line
from .log import get_logger
from .outcomes import Outcome, Retired

logger = get_logger(__name__)

DAMAGED, OUTCOME, RETIRED = range(3)  # what the column `kind` says
WORDS = ("model", "model_fingerprint", "method", "task")
_ROW = np.dtype(
    [(word, np.int32) for word in WORDS]
    + [("name", "S32"), ("complete", np.bool_), ("has_run", np.bool_), ("kind", np.int8)]
    + [
        ("object", "S32"),
        ("start", np.int64),
        ("size", np.int64),
        ("check", np.int64),
        ("written", np.float64),
    ]
)
_PIECE = 50_000_000  # bytes at least for each process, which takes half a second to start
_MOST = 8  # processes


@dataclass(frozen=True)
class Table:
    """What lines hold. Arrays of numpy: pyarrow would take 90 MB and half of a start.

    Attributes:
        rows: [n] of `Outcome`'s ``model``, ``model_fingerprint``, ``method``, ``task`` as positions
            in `words`; ``name``, `hashed` from `lines.name_of` or from the run that is retired;
            ``complete``; ``has_run``, whether its `Outcome.run` is known; ``kind``; ``object``,
            `objects.digest` of the line; ``start`` and ``size`` in bytes; ``check``, the line's
            CRC-32; ``written``, when its object was, in seconds, or 0.
        words: Of each such column, its different values.
    """

    rows: NDArray[Any]
    words: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[Any]) -> Table:
        """Some of the rows."""
        return Table(self.rows[rows], self.words)

    def to_bytes(self, **told: str) -> bytes:
        """As a file, with what is told of it: a line of JSON, and the rows as they are."""
        rows = self.rows.tobytes()
        head = {"words": self.words, "told": told, "check": crc32(rows)}
        return json.dumps(head).encode() + b"\n" + rows


def from_bytes(data: bytes) -> tuple[Table, dict[str, str]]:
    """The table, and what was told of it.

    Raises:
        ValueError: It is none.
    """
    head, _, rows = data.partition(b"\n")
    try:
        found = json.loads(head)
        if found["check"] != crc32(rows):
            raise ValueError("torn")
        return Table(np.frombuffer(rows, _ROW), found["words"]), found["told"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no table: {error}") from error


def join(tables: Sequence[Table]) -> Table:
    """The rows of all of them, in their order; without any, an empty table."""
    places: dict[str, dict[str, int]] = {word: {} for word in WORDS}
    parts = [np.empty(0, _ROW)]
    for table in tables:
        rows = table.rows.copy()
        for word, place in places.items():
            found = [place.setdefault(value, len(place)) for value in table.words[word]]
            rows[word] = np.array(found, np.int32)[rows[word]]
        parts.append(rows)
    return Table(np.concatenate(parts), {word: list(place) for word, place in places.items()})


def hashed(name: str) -> bytes:
    """What the column ``name`` holds of a name."""
    return hashlib.sha256(name.encode()).hexdigest()[:32].encode()


def scan_lines(path: Path, start: int, end: int) -> Table:
    """The facts of the lines between two places in a file, in their order.

    Args:
        path: Of JSON lines.
        start: Where a line begins, in bytes.
        end: Where to stop: the line that begins before is read to its end.

    Raises:
        OSError: The file cannot be read.
    """
    n = max(min(_n_cores(), _MOST, (end - start) // _PIECE), 1)
    with path.open("rb") as file, ThreadPoolExecutor(n) as threads:
        cuts = [start, *(_cut(file, start + (end - start) * i // n) for i in range(1, n)), end]
        others = [threads.submit(_read_elsewhere, path, *cuts[i : i + 2]) for i in range(n - 1)]
        own = _read(file, *cuts[-2:])
        return join([*(other.result() for other in others), own])


def _n_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cut(file: BinaryIO, near: int) -> int:
    """Where the first line begins from there on."""
    file.seek(near - 1)
    file.readline()
    return file.tell()


def _read(file: BinaryIO, start: int, end: int) -> Table:
    file.seek(start)
    places: dict[str, dict[str, int]] = {word: {} for word in WORDS}
    rows = np.fromiter(_rows(file, start, end, places), _ROW)
    return Table(rows, {word: list(place) for word, place in places.items()})


def _rows(
    file: BinaryIO, start: int, end: int, places: dict[str, dict[str, int]]
) -> Iterator[tuple[Any, ...]]:
    for line in file:
        if start >= end:
            return
        if line.strip():
            words, facts = _facts(line)
            codes = [
                place.setdefault(word, len(place))
                for word, place in zip(words, places.values(), strict=True)
            ]
            yield *codes, *facts, objects.digest(line), start, len(line), crc32(line), 0.0
        start += len(line)


def _facts(line: bytes) -> tuple[list[str], tuple[Any, ...]]:
    """The words, and the columns from ``name`` to ``kind``."""
    record = parse_line(line)
    if isinstance(record, Outcome):
        words = [getattr(record, word) for word in WORDS]
        return words, (hashed(name_of(record)), record.complete, bool(record.run), OUTCOME)
    if isinstance(record, Retired):
        return [""] * len(WORDS), (hashed(record.retired), False, False, RETIRED)
    return [""] * len(WORDS), (b"", False, False, DAMAGED)


def _read_elsewhere(path: Path, start: int, end: int) -> Table:
    """As `_read`, by another process, or here where that fails."""
    # No fork, in which locks of other threads would stay locked, and nothing of `multiprocessing`,
    # which would run the user's script once more.
    paths = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    env = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", __name__, str(path), str(start), str(end)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=env, check=True
        )
        return from_bytes(done.stdout)[0]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.debug("another process could not read %s: %s", path, error)
    with path.open("rb") as file:
        return _read(file, start, end)


def _main(path: str, start: str, end: str) -> None:
    with open(path, "rb") as file:
        sys.stdout.buffer.write(_read(file, int(start), int(end)).to_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
