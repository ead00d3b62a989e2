"""Saved runs in files of JSON lines, and at addresses."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Container, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from . import objects
from .catalog import Catalog, Listed
from .lines import Found, name_of, parse_line, report, to_line
from .log import get_logger
from .objects import Address, as_store
from .outcomes import Outcome, Retired, provenance

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

LOCK_SECONDS = 60.0
_told_waiting: set[Address] = set()  # places that were said to be waited for
_LARGE, _MANY = 4_000_000, 500  # bytes of a file, objects at an address: what has a table


def default_store() -> Path | Address:
    """The store of all runs: ``$IIMM_CALLBACKS_STORE``, else a file in the user's cache folder."""
    named = os.environ.get("IIMM_CALLBACKS_STORE")
    if named:
        return as_store(named)
    return user_cache_path("iimm_callbacks") / "outcomes.jsonl"


def append_outcome(path: str | Path | Address, outcome: Outcome) -> None:
    """Add one outcome to a store, which is made if it does not exist.

    Any number of processes may do so at once. In a file of JSON lines a lock file beside it,
    ``<path>.lock``, lets one at a time; the line is on disk when this returns; a crash before costs
    this line only. In a folder, or at an address, it becomes an object, see `objects`. Where an
    address cannot be written it is kept on this machine, which is said once, and the next outcome
    that reaches the address, or `sync`, carries it over.

    Args:
        path: A file, or as `objects.as_store`.
        outcome: The record.

    Raises:
        ImportError: The address needs a package that is not installed.
        OSError: The file cannot be written, or others have held the lock for a minute.
        ValueError: The outcome could not be read back, such as one with NaN in it; or there is no
            such kind of address.
    """
    _add(as_store(path), to_line(outcome))


def _add(store: Path | Address, line: bytes) -> None:
    if isinstance(store, Path):
        _append_line(store, line)
        return
    waiting = _waiting(store)
    try:
        objects.put(store, line)
    except OSError as error:
        if store.folder is not None:
            raise
        _append_line(waiting, line)
        tell = logger.debug if store in _told_waiting else logger.warning
        tell(
            "%s; it is kept in %s until the next outcome that can be written there, or "
            "`iimm outcomes sync`, and so are those that follow", error, waiting,
        )  # fmt: skip
        _told_waiting.add(store)
        return
    try:
        _carry_over(store)
    except OSError as error:  # of those before; this one is there
        logger.warning("%s; the outcomes in %s still wait", error, waiting)


def _append_line(path: Path, line: bytes) -> None:
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
        raise objects.cannot_add(error, path) from error


def _waiting(address: Address) -> Path:
    """The file on this machine with what could not be written to an address."""
    name = hashlib.sha256(str(address).encode()).hexdigest()[:16]
    return user_cache_path("iimm_callbacks") / "waiting" / f"{name}.jsonl"


def _carry_over(address: Address) -> None:
    """Write what waits for an address there; a damaged line stays where it is."""
    path = _waiting(address)
    if not path.exists():
        return
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        found = [item for _, item in _scan_file(path)]
        for record in found:
            if not isinstance(record, ValueError):
                objects.put(address, to_line(record))
        if not any(isinstance(item, ValueError) for item in found):
            path.unlink()


def sync(one: str | Path | Address, other: str | Path | Address) -> tuple[int, int]:
    """Give each of two stores what only the other has; nothing is changed or deleted.

    What waits on this machine for either of them is carried over first. Equal outcomes are one.

    Args:
        one: As `append_outcome`.
        other: Likewise.

    Returns:
        How many were added to `one`, and to `other`.

    Raises:
        OSError, ImportError, TypeError, ValueError: As `read_outcomes` and `append_outcome`; or a
            store cannot be written, or there is neither.
    """
    stores = [as_store(path) for path in (one, other)]
    if not any(store.exists() for store in stores):
        raise ValueError(f"`one` or `other` must exist, got {one} and {other}: neither does")
    lines: list[dict[bytes, None]] = []
    for store in stores:
        if isinstance(store, Address):
            _carry_over(store)
        found = _scan(store) if store.exists() else ()
        lines.append({to_line(r): None for _, r in found if not isinstance(r, ValueError)})
    added = []
    for store, own, others in zip(stores, lines, reversed(lines), strict=True):
        missing = [line for line in others if line not in own]
        for line in missing:
            objects.put(store, line) if isinstance(store, Address) else _append_line(store, line)
        added.append(len(missing))
    return added[0], added[1]


def read_outcomes(path: str | Path | Address) -> list[Outcome]:
    """All outcomes in a store; a line or object that is no outcome is reported and skipped.

    Needs no lock and writes nothing: what is being appended meanwhile is there or is not.

    Args:
        path: A JSON-lines file, a folder written by `datasets.Dataset.save_to_disk`, or a folder
            or address of objects, see `objects.as_store`.

    Returns:
        The outcomes, in the order of the file; objects by the time at which they were written, and
        last what waits on this machine to be written to an address.

    Raises:
        ImportError: The address needs a package that is not installed.
        OSError: The file or address cannot be read.
        TypeError: It is a folder of several splits.
        ValueError: It is a folder that is damaged as a whole, or names files outside of it; or
            there is no such kind of address.
    """
    return report(_scan(path), str(path))


def open_store(path: str | Path | Address, tables: int = 2) -> Catalog:
    """The catalog of a store.

    Args:
        path: As `read_outcomes`; one that does not exist holds nothing.
        tables: How many may turn out to be of another content before all of it is read.

    Raises:
        ImportError, OSError, TypeError, ValueError: As `read_outcomes`.
    """
    store = as_store(path)
    again = partial(open_store, store, tables - 1)
    if not store.exists():
        return Listed([])
    if isinstance(store, Address):
        listing = objects.listing(store)
        if tables and len(listing) >= _MANY:
            from . import table

            try:
                rows, others = table.of_address(store, listing)
            except (OSError, NotImplementedError) as error:  # of filelock before 3.24 the latter
                # Such as a cache folder that may not be written, or has no locks.
                logger.debug("the objects of %s cannot be copied here: %s", store, error)
            else:
                others += _waiting_for(store, listing)
                return table.Tabled(store, rows, table.copy_of(store), others, again)
    elif tables and store.is_file() and store.stat().st_size >= _LARGE:
        from . import table

        return table.Tabled(store, table.of_file(store), store, [], again)
    return Listed(read_outcomes(store))


def as_catalog(source: str | Path | Address | Dataset | Iterable[Outcome]) -> Catalog:
    """The catalog of outcomes, in whatever form they are given; as `as_outcomes`."""
    if isinstance(source, str | Path | Address):
        return open_store(source)
    return Listed(as_outcomes(source))


def check_store(path: str | Path | Address) -> list[str]:
    """What `read_outcomes` would report and skip.

    Args:
        path: As `read_outcomes`.

    Returns:
        One problem each, such as ``"line 3: `iimm` is missing"``; none where all is well.

    Raises:
        OSError, TypeError, ValueError: As `read_outcomes`.
    """
    return [f"{where}: {found}" for where, found in _scan(path) if isinstance(found, ValueError)]


def as_outcomes(
    source: str | Path | Address | Dataset | Iterable[Outcome] | None,
) -> list[Outcome]:
    """Outcomes, in whatever form they are given, as a list.

    Args:
        source: A store, as `read_outcomes`, a `datasets.Dataset` of `as_dataset.to_dataset`, or
            records. ``None``: none.

    Returns:
        The outcomes.

    Raises:
        TypeError: It holds something else than `Outcome` records.
        OSError, TypeError, ValueError: As `read_outcomes`.
    """
    if source is None:
        return []
    if isinstance(source, str | Path | Address):
        return read_outcomes(source)
    if "datasets" in sys.modules and isinstance(source, sys.modules["datasets"].Dataset):
        from .as_dataset import from_dataset

        return from_dataset(source)
    outcomes = list(source) if isinstance(source, Iterable) else [source]
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise TypeError(f"`outcomes` must hold Outcome records, got {type(outcome).__name__}")
    return outcomes


def retire(path: str | Path | Address, name: str, why: str) -> Outcome:
    """Say that a saved run no longer counts: `read_outcomes` leaves it out from now on.

    The run stays where it is, with why, who and when beside it; `sync` carries that over. To
    correct a run, retire it and add the right one under another `Outcome.run`.

    Args:
        path: As `append_outcome`.
        name: As `name_of`.
        why: In words.

    Returns:
        The run.

    Raises:
        OSError, ImportError: As `append_outcome`.
        ValueError: There is no such run, or no reason.
    """
    if not why.strip():
        raise ValueError(f"`why` must say why the run does not count, got {why!r}")
    store = as_store(path)
    known = {name_of(o): o for o in (read_outcomes(store) if store.exists() else [])}
    if name not in known:
        raise ValueError(
            f"`name` must be that of a saved run that counts, got {name!r:.60}; "
            "`iimm outcomes list --json` has them"
        )
    _add(store, to_line(Retired(name, why, provenance())))
    return known[name]


def _scan(path: str | Path | Address) -> Iterator[Found]:
    """Each line, row or object: where it is, and the outcome or what is wrong."""
    store = as_store(path)
    if isinstance(store, Address):
        listing = objects.listing(store)
        for name, data in objects.fetch(store, objects.oldest_first(store, listing, listing)):
            yield name, parse_line(data)
        yield from _waiting_for(store, listing)
    elif store.is_dir():
        from .as_dataset import read_table, scan_tables

        table = read_table(store)
        yield from scan_tables([] if table is None else [table])
    else:
        yield from _scan_file(store)


def _waiting_for(address: Address, there: Container[str]) -> list[Found]:
    """What waits on this machine to be written to an address, and is not `there`."""
    path = _waiting(address)
    return [
        (where, found)
        for where, found in (_scan_file(path) if path.exists() else ())
        if isinstance(found, ValueError) or objects.name_of(to_line(found)) not in there
    ]


def _scan_file(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:  # as in `scan`, a bare carriage return ends no line
        for n, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {n}", parse_line(line)
