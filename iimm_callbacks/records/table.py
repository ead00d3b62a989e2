"""A large store -> a table with a row for each of its lines.

A row says where a line begins, and of which model, method and task it is. The table is a Parquet
file in the user's cache folder, brought up to date by what was appended to the store; it is safe to
lose. Of an address it is a table of a copy of its objects, one line each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray
from platformdirs import user_cache_path
from pyarrow import parquet

from . import objects
from .catalog import LEARNT_FROM, Catalog, Listed, matcher, thin_cells
from .lines import Found, name_of, parse_line, report
from .log import get_logger
from .objects import Address
from .outcomes import Outcome, Retired
from .run_file import write_whole
from .scan import DAMAGED, OUTCOME, RETIRED, SCHEMA, scan_lines

logger = get_logger(__name__)

_VERSION = b"3"  # of this layout
_LOCK_SECONDS = 30.0
_Positions = NDArray[np.int64]
_SAMPLE = 4096  # bytes that tell whether a store still begins with what its table is of


class Tabled:
    """The catalog of a store that has a table.

    Args:
        store: The store.
        table: As `table.of_file`.
        lines: The file that has the lines.
        others: What is not in that file.
        again: Opens the store once more, where the table turns out to be of another content.
    """

    def __init__(
        self,
        store: Path | Address,
        table: pa.Table,
        lines: Path,
        others: Sequence[Found],
        again: Callable[[], Catalog],
    ) -> None:
        self._store = store
        self._table = table
        self._lines = lines
        self._others = others
        self._again = again

    @cached_property
    def _retired(self) -> set[str]:
        """Names of the runs that no longer count."""
        rows = np.flatnonzero(self._column("kind") == RETIRED)
        also = {found.retired for _, found in self._others if isinstance(found, Retired)}
        return also.union(self._table["name"].take(rows).to_pylist())

    @cached_property
    def _counted(self) -> _Positions:
        """Rows of the outcomes that are not retired."""
        counts = self._column("kind") == OUTCOME
        if self._retired:
            counts &= ~self._fits("name", self._retired.__contains__)
        return np.flatnonzero(counts)

    @cached_property
    def _rest(self) -> Listed:
        """The runs that are not in the file."""
        found = report(self._others, str(self._store))
        gone = self._retired
        return Listed([o for o in found if name_of(o) not in gone] if gone else found)

    @property
    def n_outcomes(self) -> int:
        """As `Catalog`."""
        return len(self._counted) + self._rest.n_outcomes

    def methods(self) -> set[str]:
        """As `Catalog`."""
        known = self._table["method"].take(self._counted).unique().to_pylist()
        return self._rest.methods().union(known)

    def relevant(self, model: str, first: int | None = None) -> list[Outcome]:
        """As `Catalog`."""
        rows = self._counted[:first]
        rows = rows[self._column("complete")[rows]]
        rows = rows[self._is_latest(rows)]
        facts = [self._codes(word)[0][rows] for word in ("model_fingerprint", "method", "task")]
        cells = np.unique(np.stack(facts), axis=1, return_inverse=True)[1].reshape(-1)
        own = self._fits("model_fingerprint", lambda value: value == model)[rows]
        chosen = rows[thin_cells(own, cells, LEARNT_FROM)]
        damaged = np.flatnonzero(self._column("kind") == DAMAGED)  # to be reported
        try:
            found = self._read(np.sort(np.r_[chosen, damaged]))
        except _ChangedError:
            forget(self._store)
            return self._again().relevant(model, first)
        left = None if first is None else max(first - len(self._counted), 0)
        rest = self._rest.read(range(self._rest.n_outcomes)[:left])
        return Listed([*found, *rest]).relevant(model)

    def select(self, model: str = "*", method: str = "*", task: str = "*") -> list[int]:
        """As `Catalog`."""
        is_model, is_method, is_task = (matcher(words) for words in (model, method, task))
        fits = self._fits("model", is_model) | self._fits("model_fingerprint", is_model)
        fits &= self._fits("method", is_method) & self._fits("task", is_task)
        here, n = np.flatnonzero(fits[self._counted]).tolist(), len(self._counted)
        return [*here, *(n + i for i in self._rest.select(model, method, task))]

    def read(self, positions: Sequence[int]) -> list[Outcome]:
        """As `Catalog`.

        Raises:
            OSError: The store has changed meanwhile, otherwise than by appending.
        """
        n = len(self._counted)
        try:
            here = self._read(self._counted[[i for i in positions if i < n]])
        except _ChangedError:
            forget(self._store)
            raise OSError(f"{self._store} has changed while it was read; read it again") from None
        return [*here, *self._rest.read([i - n for i in positions if i >= n])]

    def _read(self, rows: _Positions) -> list[Outcome]:
        columns = [self._column(name)[rows].tolist() for name in ("start", "size", "check")]
        found: list[Found] = []
        try:
            file = self._lines.open("rb")
        except FileNotFoundError as error:  # another process has made its table anew
            raise _ChangedError from error
        with file:
            for start, size, check in zip(*columns, strict=True):
                file.seek(start)
                line = file.read(size)
                if crc32(line) != check:
                    raise _ChangedError
                found.append((f"line at byte {start}", parse_line(line)))
        return report(found, str(self._store))

    def _is_latest(self, rows: _Positions) -> NDArray[np.bool_]:
        """[n] whether no later row of these is of the same run; those of unknown run all are."""
        latest = np.zeros(len(rows), dtype=bool)
        latest[np.unique(self._codes("name")[0][rows][::-1], return_index=True)[1]] = True
        is_latest: NDArray[np.bool_] = latest[::-1] | ~self._column("has_run")[rows]
        return is_latest

    def _fits(self, word: str, matches: Callable[[str], Any]) -> NDArray[np.bool_]:
        """[N] rows whose value matches."""
        codes, values = self._codes(word)
        known = [value is not None and bool(matches(value)) for value in values.to_pylist()]
        return np.array(known, dtype=bool)[codes]

    def _codes(self, word: str) -> tuple[_Positions, pa.Array]:
        """[N] position of each row's value in the values."""
        column = self._table[word].combine_chunks().dictionary_encode("encode")
        return column.indices.to_numpy(), column.dictionary

    def _column(self, name: str) -> NDArray[Any]:
        column: NDArray[Any] = self._table[name].to_numpy()
        return column


class _ChangedError(Exception):
    """A line is not the one that the table was made of."""


def of_file(path: Path) -> pa.Table:
    """The table of a JSON-lines file, in its order.

    Returns:
        Columns as `scan.scan_lines`.

    Raises:
        OSError: The file cannot be read.
    """
    saved = _load(_place(path))
    told = saved.schema.metadata or {}
    state = path.stat()
    stamp = f"{state.st_size} {state.st_mtime_ns}".encode()
    if told.get(b"stamp") == stamp:
        return saved
    end = int(told.get(b"end", b"0"))
    with path.open("rb") as file:
        if state.st_size <= end or told.get(b"sample") != _sample(file, end):
            end = 0
        new = scan_lines(path, end, state.st_size)
        whole = _whole(file, new) or end
        sample = _sample(file, whole)
    saved = saved.filter(pc.less(saved["start"], end))
    table = pa.concat_tables([saved.replace_schema_metadata(None), new]).combine_chunks()
    table = table.replace_schema_metadata(
        {b"v": _VERSION, b"end": str(whole).encode(), b"stamp": stamp, b"sample": sample}
    )
    try:
        _place(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = pa.BufferOutputStream()
        parquet.write_table(table, buffer)
        write_whole(_place(path), buffer.getvalue().to_pybytes())
    except OSError as error:
        logger.debug("the table of %s is not kept: %s", path, error)
    return table


def of_address(address: Address, listing: dict[str, float]) -> tuple[pa.Table, list[Found]]:
    """The table of the copy of an address, by the time at which the objects were written.

    Args:
        address: The store.
        listing: What is there now, as `objects.listing`.

    Returns:
        As `of_file`, and what is there that is not in the copy.

    Raises:
        OSError: The address cannot be read, or the copy not be written.
    """
    lines = copy_of(address)
    lines.parent.mkdir(parents=True, exist_ok=True)
    others: list[Found] = []
    with FileLock(f"{lines}.lock", timeout=_LOCK_SECONDS):
        table = of_file(lines) if lines.exists() else SCHEMA.empty_table()
        known = set(table["object"].to_pylist())
        lacking = [name for name in listing if name not in known]
        with lines.open("ab") as file:
            end = int((table.schema.metadata or {}).get(b"end", b"0"))
            if file.tell() > end:  # a line that a crash cut short
                file.truncate(end)
            for name, data in objects.fetch(address, lacking):
                if isinstance(data, bytes) and data.count(b"\n") == data.endswith(b"\n") == 1:
                    file.write(data)
                else:
                    others.append((name, parse_line(data)))
        table = of_file(lines) if lacking else table
    written = pa.array([listing.get(name) for name in table["object"].to_pylist()], pa.float64())
    table = table.append_column("written", written).filter(written.is_valid())
    return table.sort_by([("written", "ascending"), ("object", "ascending")]), others


def copy_of(address: Address) -> Path:
    """The file with a copy of an address's objects."""
    return _folder() / f"{_key(str(address))}.jsonl"


def forget(store: Path | Address) -> None:
    """Remove the table and the copy: they are made anew when they are needed."""
    lines = store if isinstance(store, Path) else copy_of(store)
    for path in (_place(lines), *([] if lines == store else [lines])):
        with suppress(OSError):
            path.unlink()


def _whole(file: BinaryIO, lines: pa.Table) -> int:
    """Where the last line that has an end ends."""
    if not len(lines):
        return 0
    start, size = int(lines["start"][-1].as_py()), int(lines["size"][-1].as_py())
    file.seek(start + size - 1)
    return start + size if file.read(1) == b"\n" else start


def _load(path: Path) -> pa.Table:
    """The saved table; an empty one where there is none."""
    with suppress(OSError, pa.ArrowException):
        found = parquet.read_table(path, use_threads=False)
        if found.schema.equals(SCHEMA) and (found.schema.metadata or {}).get(b"v") == _VERSION:
            return found
    return SCHEMA.empty_table()


def _sample(file: Any, end: int) -> bytes:
    """A hash of the first and the last bytes before `end`."""
    file.seek(0)
    first = file.read(min(_SAMPLE, end))
    file.seek(max(end - _SAMPLE, 0))
    return hashlib.sha256(first + file.read(min(_SAMPLE, end))).hexdigest().encode()


def _place(lines: Path) -> Path:
    return _folder() / f"{_key(os.path.realpath(lines))}.parquet"


def _key(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]


def _folder() -> Path:
    return user_cache_path("iimm_callbacks") / "tables"
