"""Lines of a store -> a table of what they hold, read by several processes where there are many.

python -m iimm_callbacks.records.scan FILE START END > table.arrow
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import pyarrow as pa

from . import objects
from .lines import name_of, parse_line
from .log import get_logger
from .outcomes import Outcome, Retired

logger = get_logger(__name__)

DAMAGED, OUTCOME, RETIRED = range(3)  # what the column `kind` says
WORDS = ("model", "model_fingerprint", "method", "task")
SCHEMA = pa.schema(
    [(word, pa.string()) for word in (*WORDS, "name")]
    + [("complete", pa.bool_()), ("has_run", pa.bool_()), ("kind", pa.int8())]
    + [("object", pa.string()), ("start", pa.int64()), ("size", pa.int64()), ("check", pa.int64())]
)
_PIECE = 50_000_000  # bytes at least for each process, which takes half a second to start
_MOST = 8  # processes


def scan_lines(path: Path, start: int, end: int) -> pa.Table:
    """The facts of the lines between two places in a file, in their order.

    Args:
        path: Of JSON lines.
        start: Where a line begins, in bytes.
        end: Where to stop: the line that begins before is read to its end.

    Returns:
        Columns: `Outcome`'s ``model``, ``model_fingerprint``, ``method``, ``task``; ``name`` as
        `lines.name_of`, or of the run that is retired; ``complete``; ``has_run``, whether its
        `Outcome.run` is known; ``kind``; ``object`` as `objects.name_of`; ``start`` and ``size`` in
        bytes; ``check``, the line's CRC-32.

    Raises:
        OSError: The file cannot be read.
    """
    n = max(min(_n_cores(), _MOST, (end - start) // _PIECE), 1)
    with path.open("rb") as file, ThreadPoolExecutor(n) as threads:
        cuts = [start, *(_cut(file, start + (end - start) * i // n) for i in range(1, n)), end]
        others = [threads.submit(_read_elsewhere, path, *cuts[i : i + 2]) for i in range(n - 1)]
        own = _read(file, *cuts[-2:])
        return pa.concat_tables([*(other.result() for other in others), own])


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


def _read(file: BinaryIO, start: int, end: int) -> pa.Table:
    file.seek(start)
    rows = list(_rows(file, start, end))
    columns = list(map(list, zip(*rows, strict=True)))
    return pa.table(columns, SCHEMA) if rows else SCHEMA.empty_table()


def _rows(file: BinaryIO, start: int, end: int) -> Iterator[tuple[Any, ...]]:
    for line in file:
        if start >= end:
            return
        if line.strip():
            yield *_facts(line), objects.name_of(line), start, len(line), crc32(line)
        start += len(line)


def _facts(line: bytes) -> tuple[Any, ...]:
    """The columns up to ``kind``."""
    record = parse_line(line)
    if isinstance(record, Outcome):
        words = (getattr(record, word) for word in WORDS)
        return *words, name_of(record), record.complete, bool(record.run), OUTCOME
    if isinstance(record, Retired):
        return None, None, None, None, record.retired, False, False, RETIRED
    return None, None, None, None, None, False, False, DAMAGED


def _read_elsewhere(path: Path, start: int, end: int) -> pa.Table:
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
        return pa.ipc.open_stream(done.stdout).read_all().cast(SCHEMA)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.debug("another process could not read %s: %s", path, error)
    with path.open("rb") as file:
        return _read(file, start, end)


def _main(path: str, start: str, end: str) -> None:
    with open(path, "rb") as file:
        table = _read(file, int(start), int(end))
    with pa.ipc.new_stream(sys.stdout.buffer, SCHEMA) as stream:
        stream.write_table(table)


if __name__ == "__main__":
    _main(*sys.argv[1:])
