"""Paths on the command line -> a run that was read, a folder that can be written to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..storage.run_file import read_run


def read_run_file(path: Path) -> dict[str, Any]:
    """The record in the run file of this name.

    Args:
        path: As ``RUN.json``, its ``~`` expanded.

    Raises:
        ValueError: There is no such file, it cannot be read, or it is no run file.
    """
    try:
        return read_run(path)
    except OSError as error:
        raise ValueError(
            f"`RUN.json` must be a run file, as the guard writes one for each run, got "
            f"{str(path)!r} ({error.strerror or error}); name one of those"
        ) from error


@contextmanager
def folder_to_write(folder: Path, argument: str) -> Iterator[None]:
    """Make a folder and try it before the work; what stays empty of it is removed at the end.

    Args:
        folder: Which, its ``~`` expanded; it may be there.
        argument: Which of the command's arguments asks for it, for errors.

    Raises:
        ValueError: It cannot be made or written to.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"`{argument}` needs a folder that can be written to, got {str(folder)!r} "
                f"({error.strerror or error}); name another"
            ) from error
        yield
    finally:
        with suppress(OSError):  # of the first that holds something
            for path in made:
                path.rmdir()
