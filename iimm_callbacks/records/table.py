"""A large store -> a table with a row for each of its lines.

A row says where a line begins, and of which model, method and task it is. The table is a file in
the user's cache folder, brought up to date by what was appended to the store; it is safe to lose.
Of an address it is a table of a copy of its objects, one line each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from platformdirs import user_cache_path

from . import objects
from .catalog import LEARNT_FROM, Catalog, Listed, matcher, thin_cells
from .lines import Found, name_of, parse_line, report
from .log import get_logger
from .objects import Address, Listing
from .outcomes import Outcome, Retired
from .run_file import write_whole
from .scan import DAMAGED, EMPTY, OUTCOME, RETIRED, Table, from_bytes, hashed, scan_lines

logger = get_logger(__name__)

_VERSION = "5"  # of this layout
_LOCK_SECONDS = 30.0
_Positions = NDArray[np.int64]
_SAMPLE = 4096  # bytes that tell whether a store still begins with what its table is of


@dataclass(eq=False)
class Tabled:
    """The catalog of a store that has a table.

    Attributes:
        store: The store.
        table: As `table.of_file`.
        lines: The file that has the lines.
        others: What is not in that file.
        again: Opens the store once more, where the table turns out to be of another content.
    """

    store: Path | Address
    table: Table
    lines: Path
    others: Sequence[Found]
    again: Callable[[], Catalog]

    @cached_property
    def _retired(self) -> set[bytes]:
        """Names of the runs that no longer count, hashed."""
        also = {hashed(found.retired) for _, found in self.others if isinstance(found, Retired)}
        return also.union(self.table.rows["name"][self.table.rows["kind"] == RETIRED].tolist())

    @cached_property
    def _counted(self) -> _Positions:
        """Rows of the outcomes that are not retired."""
        counts = self.table.rows["kind"] == OUTCOME
        if self._retired:
            counts &= ~np.isin(self.table.rows["name"], list(self._retired))
        return np.flatnonzero(counts)

    @cached_property
    def _rest(self) -> Listed:
        """The runs that are not in the file."""
        found = report(self.others, str(self.store))
        gone = self._retired
        return Listed([o for o in found if hashed(name_of(o)) not in gone] if gone else found)

    @property
    def n_outcomes(self) -> int:
        """As `Listed`."""
        return len(self._counted) + self._rest.n_outcomes

    def methods(self) -> set[str]:
        """As `Listed`."""
        known = np.unique(self.table.rows["method"][self._counted]).tolist()
        return self._rest.methods().union(self.table.words["method"][code] for code in known)

    def relevant(self, model: str, first: int | None = None) -> list[Outcome]:
        """As `Listed`."""
        rows = self._counted[:first]
        rows = rows[self.table.rows["complete"][rows]]
        # Of one run the last counts, of unknown runs each.
        latest = np.zeros(len(rows), dtype=bool)
        latest[np.unique(self.table.rows["name"][rows][::-1], return_index=True)[1]] = True
        rows = rows[latest[::-1] | ~self.table.rows["has_run"][rows]]
        facts = [self.table.rows[word][rows] for word in ("model_fingerprint", "method", "task")]
        cells = np.unique(np.stack(facts), axis=1, return_inverse=True)[1].reshape(-1)
        own = self._fits("model_fingerprint", lambda value: value == model)[rows]
        chosen = rows[thin_cells(own, cells, LEARNT_FROM)]
        damaged = np.flatnonzero(self.table.rows["kind"] == DAMAGED)  # to be reported
        try:
            found = self._read(np.sort(np.r_[chosen, damaged]))
        except _ChangedError:
            forget(self.store)
            return self.again().relevant(model, first)
        left = None if first is None else max(first - len(self._counted), 0)
        rest = self._rest.read(range(self._rest.n_outcomes)[:left])
        return Listed([*found, *rest]).relevant(model)

    def select(self, model: str = "*", method: str = "*", task: str = "*") -> list[int]:
        """As `Listed`."""
        is_model, is_method, is_task = (matcher(words) for words in (model, method, task))
        fits = self._fits("model", is_model) | self._fits("model_fingerprint", is_model)
        fits &= self._fits("method", is_method) & self._fits("task", is_task)
        here, n = np.flatnonzero(fits[self._counted]).tolist(), len(self._counted)
        return [*here, *(n + i for i in self._rest.select(model, method, task))]

    def read(self, positions: Sequence[int]) -> list[Outcome]:
        """As `Listed`.

        Raises:
            OSError: The store has changed meanwhile, otherwise than by appending.
        """
        n = len(self._counted)
        try:
            here = self._read(self._counted[[i for i in positions if i < n]])
        except _ChangedError:
            forget(self.store)
            raise OSError(f"{self.store} has changed while it was read; read it again") from None
        return [*here, *self._rest.read([i - n for i in positions if i >= n])]

    def _read(self, rows: _Positions) -> list[Outcome]:
        places = self.table.rows[["start", "size", "check"]][rows].tolist()
        found: list[Found] = []
        try:
            file = self.lines.open("rb")
        except FileNotFoundError as error:  # another process has made its table anew
            raise _ChangedError from error
        with file:
            for start, size, check in places:
                file.seek(start)
                line = file.read(size)
                if crc32(line) != check:
                    raise _ChangedError
                found.append((f"line at byte {start}", parse_line(line)))
        return report(found, str(self.store))

    def _fits(self, word: str, matches: Callable[[str], Any]) -> NDArray[np.bool_]:
        """[N] rows whose word matches."""
        known = np.array([bool(matches(value)) for value in self.table.words[word]], dtype=bool)
        fits: NDArray[np.bool_] = known[self.table.rows[word]]
        return fits


class _ChangedError(Exception):
    """A line is not the one that the table was made of."""


def of_file(path: Path) -> Table:
    """The table of a JSON-lines file, in its order.

    Raises:
        OSError: The file cannot be read.
    """
    saved, told = _load(path)
    state = path.stat()
    stamp = f"{state.st_size} {state.st_mtime_ns}"
    if told.get("stamp") == stamp:
        return saved
    end = int(told.get("end", 0))
    with path.open("rb") as file:
        if state.st_size <= end or told.get("sample") != _sample(file, end):
            end = 0
        table = scan_lines(path, end, state.st_size, saved.take(saved.rows["start"] < end))
        whole = _whole(file, table)
        sample = _sample(file, whole)
    told = {"v": _VERSION, "end": str(whole), "stamp": stamp, "sample": sample}
    _save(path, table, told)
    return table


def of_address(address: Address, listing: Listing) -> tuple[Table, list[Found]]:
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
        table = of_file(lines) if lines.exists() else EMPTY
        names = _objects(table)
        lacking = objects.oldest_first(address, listing, listing.keys() - names)
        if lacking:
            others = _copy(address, lacking, lines)
            table = of_file(lines)
            names = _objects(table)
        rows = table.rows.copy()
        for i in np.flatnonzero(rows["written"] == 0).tolist():
            rows["written"][i] = objects.written(address, listing, names[i])
        if (rows["written"] != table.rows["written"]).any():  # so that none is asked again
            table = Table(rows, table.words)
            _save(lines, table, _load(lines)[1])
    there = np.array([name in listing for name in names], dtype=bool)
    order = np.lexsort((rows["object"], rows["written"]))
    return table.take(order[there[order]]), others


def _copy(address: Address, names: Sequence[str], lines: Path) -> list[Found]:
    """Append these objects to the copy; what has no line in it is returned."""
    others: list[Found] = []
    with lines.open("ab") as file:
        end = int(_load(lines)[1].get("end", 0))
        if file.tell() > end:  # a line that a crash cut short
            file.truncate(end)
        for name, data in objects.fetch(address, names):
            if isinstance(data, bytes) and data.count(b"\n") == data.endswith(b"\n") == 1:
                file.write(data)
            else:
                others.append((name, parse_line(data)))
    return others


def _objects(table: Table) -> list[str]:
    """The name of each row's object."""
    return list(map(objects.name_by, table.rows["object"].astype("U32").tolist()))


def copy_of(address: Address) -> Path:
    """The file with a copy of an address's objects."""
    return _folder() / f"{_key(str(address))}.jsonl"


def forget(store: Path | Address) -> None:
    """Remove the table and the copy: they are made anew when they are needed."""
    lines = store if isinstance(store, Path) else copy_of(store)
    for path in (_place(lines), *([] if lines == store else [lines])):
        with suppress(OSError):
            path.unlink()


def _whole(file: BinaryIO, lines: Table) -> int:
    """Where the last line that has an end ends."""
    if not len(lines.rows):
        return 0
    start, size = lines.rows[["start", "size"]][-1].tolist()
    file.seek(start + size - 1)
    return int(start + size if file.read(1) == b"\n" else start)


def _save(lines: Path, table: Table, told: dict[str, str]) -> None:
    try:
        _place(lines).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_place(lines), table.to_bytes(**told))
    except OSError as error:
        logger.debug("the table of %s is not kept: %s", lines, error)


def _load(lines: Path) -> tuple[Table, dict[str, str]]:
    """The saved table of a file; an empty one where there is none."""
    with suppress(OSError, ValueError):
        found, told = from_bytes(_place(lines).read_bytes())
        if told.get("v") == _VERSION:
            return found, told
    return EMPTY, {}


def _sample(file: Any, end: int) -> str:
    """A hash of the first and the last bytes before `end`."""
    file.seek(0)
    first = file.read(min(_SAMPLE, end))
    file.seek(max(end - _SAMPLE, 0))
    return hashlib.sha256(first + file.read(min(_SAMPLE, end))).hexdigest()


def _place(lines: Path) -> Path:
    return _folder() / f"{_key(os.path.realpath(lines))}.table"


def _key(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]


def _folder() -> Path:
    return user_cache_path("iimm_callbacks") / "tables"
