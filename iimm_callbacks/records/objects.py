"""Outcomes as one immutable object each, in a folder or at any address that fsspec knows.

An object's name is a hash of its content. So nothing is locked, any number of writers on any number
of machines may add to one place, and the same outcome twice is one.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .log import get_logger
from .run_file import write_whole

logger = get_logger(__name__)

_T = TypeVar("_T")
# Name of each object -> when it was written, in seconds; None: the folder was not asked yet
Listing = dict[str, "float | None"]
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # of one slash: what `Path` leaves
_OBJECT = re.compile(r"outcome-([0-9a-f]{32})\.json")
_DATASET = ("state.json", "dataset_dict.json", "dataset_info.json")  # of `save_to_disk`
_PAUSES = (0.5, 2.0)  # seconds before another try
_AT_ONCE = 256  # objects that are fetched together
_READERS = 4  # threads that read them from a folder
# Where `makedirs` would make a bucket, and a prefix needs no folder.
_FLAT = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "hf", "http", "https"}
# Where file systems tell when an object was written.
_TIMES = ("mtime", "LastModified", "updated", "last_modified", "created")


class Address:
    """Where outcomes are kept as objects: ``s3://bucket/team``, ``hf://datasets/org/name``...

    It has those methods of a `Path` that a store needs.

    Args:
        text: The address; of a folder on this machine ``file://`` and its path.

    Raises:
        ImportError: The package that reads it is not installed.
        ValueError: No file system has its scheme, or nothing follows that.
    """

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")
        if self._text.endswith(":"):  # fsspec would take it for a folder of this name
            raise ValueError(
                f"a store of outcomes must name a place, such as s3://bucket/team, got {text!r}"
            )
        self._root = self.filesystem()[1]

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Address({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Address) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def filesystem(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path in it. Credentials are the environment's."""
        import fsspec

        if self._text.startswith("file:"):  # its path may hold what chains addresses
            local = fsspec.filesystem("file")
            return local, local._strip_protocol(self._text).rstrip("/")
        try:
            files, root = fsspec.core.url_to_fs(self._text)
        except ImportError as error:
            raise ImportError(f"the store {self} needs another package: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"a store of outcomes must be a file, a folder or an address that fsspec knows, "
                f"such as s3://bucket/team or hf://datasets/org/name, got {self._text!r} ({error})"
            ) from error
        return files, root.rstrip("/")

    @property
    def folder(self) -> Path | None:
        """The folder that it is, on this machine."""
        return Path(self._root) if self._text.startswith("file:") else None

    def exists(self) -> bool:
        """Whether it may hold outcomes: elsewhere than on this machine it is not asked."""
        return self.folder is None or self.folder.is_dir()

    is_dir = exists


def as_store(path: str | Path | Address) -> Path | Address:
    """A file of outcomes, or the address of a folder of objects.

    Args:
        path: ``s3://...`` and the like is an address; so is a folder that ends in ``/``, or
            that holds objects, unless `datasets` wrote it. All else is a file.

    Raises:
        ImportError, ValueError: As `Address`; or a `Path` of an address, which has lost a slash.
    """
    if isinstance(path, Address):
        return path
    if _SCHEME.match(str(path)):
        if isinstance(path, Path):
            raise ValueError(f"an address must be given as text, got {path!r}")
        return Address(str(path))
    found = Path(path).expanduser()
    ends_as_folder = isinstance(path, str) and path.endswith(("/", os.sep))
    if any((found / name).exists() for name in _DATASET):
        return found
    is_objects = ends_as_folder or (found.is_dir() and _has_objects(found))
    return Address(f"file://{found.absolute()}") if is_objects else found


def why_not_writable(store: Path | Address) -> str | None:
    """Why a store on this machine cannot be written, in words; changes nothing.

    Args:
        store: As `as_store` gives it.

    Returns:
        None where it can, or where it is elsewhere: that is known only once it is written.
    """
    place = store.absolute().parent if isinstance(store, Path) else store.folder
    if place is None:
        return None
    folder = next(p for p in (place, *place.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):  # the lock is a file beside the record
            pass
        if isinstance(store, Path) and store.exists():
            if not store.is_file():  # such as a device, whose reading might never end
                return "no file; an empty folder ends with a slash"
            store.open("ab").close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def check_writable(store: Path | Address) -> None:
    """Raise before work whose outcomes a store on this machine could not take.

    Raises:
        ValueError: `store` cannot be written.
    """
    why = why_not_writable(store)
    if why is not None:
        raise ValueError(
            f"`store` must be one that can be written, got {store} ({why}); name another"
        )


def _has_objects(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(_OBJECT.fullmatch(entry.name) for entry in entries)


def put(address: Address, data: bytes) -> None:
    """Add an object; it is there as a whole or not at all, and once however often it is added.

    Raises:
        OSError: It cannot be written, after some tries.
    """
    name = name_of(data)
    if address.folder is not None:
        try:
            address.folder.mkdir(parents=True, exist_ok=True)
            write_whole(address.folder / name, data)
        except OSError as error:
            raise cannot_add(error, address.folder) from error
        return

    def write() -> None:
        files, root = address.filesystem()
        try:
            files.pipe_file(f"{root}/{name}", data)
        except FileNotFoundError:
            if str(address).partition(":")[0] in _FLAT:
                raise
            files.makedirs(root, exist_ok=True)
            files.pipe_file(f"{root}/{name}", data)

    _tried(write, f"write an outcome to {address}")


def cannot_add(error: OSError, place: Path) -> OSError:
    """The error to raise where an outcome cannot be added to a file or folder."""
    words = error.strerror or str(error)
    if isinstance(error, IsADirectoryError):
        words += f"; an empty folder of outcomes ends with a slash: {place}/"
    return OSError(error.errno, f"cannot append an outcome ({words})", str(place))


def fetch(address: Address, names: Sequence[str]) -> Iterator[tuple[str, bytes | ValueError]]:
    """Name and content of each of these objects; or what is wrong with it.

    What is none is told, and never deleted.

    Raises:
        OSError: The place cannot be read, after some tries.
    """
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        ours = [name for name in some if _OBJECT.fullmatch(name)]
        contents = _tried(partial(_fetch, address, ours), f"read outcomes of {address}")
        for name in some:
            data: bytes | ValueError = contents.get(name) or ValueError(
                "it is gone, or not named as an outcome is"
            )
            if isinstance(data, bytes) and name_of(data) != name:
                data = ValueError("its content is not what its name says: torn, or changed")
            yield name, data


def listing(address: Address) -> Listing:
    """What is there.

    Raises:
        OSError: The place cannot be read, after some tries.
    """
    found = _tried(lambda: _list(address), f"list the outcomes in {address}")
    return {
        name: at
        for name, at in found
        if name and name[0] != "." and not name.endswith((".md", ".unfinished"))
    }


def oldest_first(address: Address, there: Listing, names: Iterable[str]) -> list[str]:
    """Names by the time at which the objects were written.

    Args:
        address: The store.
        there: As `listing`.
        names: Some of it.
    """
    return sorted(names, key=lambda name: (written(address, there, name), name))


def written(address: Address, there: Listing, name: str) -> float:
    """When an object was written, in seconds; 0 where that is not known. A folder is asked once."""
    if there.get(name, 0.0) is None:
        there[name] = 0.0
        with suppress(FileNotFoundError):
            there[name] = os.stat(f"{address.folder}/{name}").st_mtime
    return there.get(name) or 0.0


def _list(address: Address) -> list[tuple[str, float | None]]:
    with suppress(FileNotFoundError):
        if address.folder is not None:  # a tenth of the time that fsspec takes
            with os.scandir(address.folder) as entries:
                return [(e.name, None) for e in entries if e.is_file()]
        files, root = address.filesystem()
        files.invalidate_cache(root)
        rows = files.ls(root, detail=True)
        return [
            (row["name"].rsplit("/", 1)[-1], _written(row)) for row in rows if row["type"] == "file"
        ]
    return []


def _written(row: dict[str, Any]) -> float:
    """Seconds; 0 where the file system does not tell."""
    told = next((row[name] for name in _TIMES if row.get(name) is not None), 0.0)
    return float(told.timestamp()) if hasattr(told, "timestamp") else float(told)


def _fetch(address: Address, names: list[str]) -> dict[str, bytes]:
    folder = address.folder
    if folder is not None:  # a sixth of the time that fsspec takes
        with ThreadPoolExecutor(_READERS) as threads:  # a cold disk is waited for together
            parts = [names[i::_READERS] for i in range(_READERS)]
            read = threads.map(lambda part: {n: _read(f"{folder}/{n}") for n in part}, parts)
            return {name: data for part in read for name, data in part.items()}
    files, root = address.filesystem()
    if not names:
        return {}
    found = files.cat([f"{root}/{name}" for name in names], on_error="return")
    for data in found.values():
        if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
            raise data
    return {path.rsplit("/", 1)[-1]: d for path, d in found.items() if isinstance(d, bytes)}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:  # quicker than a `Path`
            return file.read()
    except FileNotFoundError:  # it went since it was listed
        return b""


def _tried(act: Callable[[], _T], what: str) -> _T:
    """What `act` returns; tried again where a network may have failed half-way."""
    for pause in (*_PAUSES, None):
        try:
            return act()
        except Exception as error:  # each file system has its own
            told = f"cannot {what}: {type(error).__name__}: {' '.join(str(error).split())}"
            status = getattr(getattr(error, "response", None), "status_code", None)  # of the Hub
            if isinstance(error, PermissionError | NotImplementedError) or status in (401, 403):
                raise PermissionError(told) from error
            if pause is None:
                raise OSError(told) from error
            logger.debug("%s failed (%s), trying again in %g s", what, error, pause)
            time.sleep(pause)
    raise AssertionError  # the last try returns or raises


def digest(data: bytes) -> str:
    """A hash of the content of an object."""
    return hashlib.sha256(data).hexdigest()[:32]


def name_by(digest: str) -> str:
    """What the object with this hash is called."""
    return f"outcome-{digest}.json"


def name_of(data: bytes) -> str:
    """What the object with this content is called."""
    return name_by(digest(data))
