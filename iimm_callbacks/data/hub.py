"""A name on the Hub or a folder -> one split of its data; no code that comes with it is run."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .saved import check_names


def load(
    name: str | os.PathLike[str],
    split: str | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    argument: str = "name",
) -> Any:
    """The data set of this name.

    Args:
        name: On the Hub; or a folder that `datasets.load_dataset` reads, or that `save_to_disk` of
            a `datasets.Dataset` or `datasets.DatasetDict` wrote.
        split: As `datasets.load_dataset`, such as ``"test"`` or ``"test[:1000]"``.
        config: Of several configurations of the data set, this one.
        revision: Branch, tag or commit on the Hub.
        streaming: Do not download it as a whole.
        argument: What `name` is called in errors.

    Returns:
        A `datasets.Dataset` or, streaming, `datasets.IterableDataset`; without a `split` a dict of
        them, or the only one of a folder that has no splits.

    Raises:
        ValueError: There is no such data set, configuration or split, it cannot be had offline, or
            it needs code of its own.
    """
    import datasets

    name = local_name(name, argument)
    folder = Path(name)
    if not folder.is_dir() and _is_builder(name):  # which reads the working directory
        raise ValueError(
            f"`{argument}` must be a data set, got {name!r}, which is a file format; pass the "
            "folder that the files are in"
        )
    is_saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        if not is_saved:
            return datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=streaming
            )
        saved = _load_saved(folder, streaming)
    except Exception as error:  # of whatever kind: it is told
        known = []
        if split is not None and type(error) is ValueError:
            with suppress(Exception):  # then the name is what is wrong
                known = datasets.get_dataset_split_names(name, config, revision=revision)
        if known and split not in known:
            raise ValueError(
                f"`split` must be one of {', '.join(known)} for {name!r}, got {split!r} "
                f"({_told(error)})"
            ) from error
        raise ValueError(
            f"`{argument}` must be a data set on the Hub or a folder that `datasets` reads, got "
            f"{name!r}: {_told(error)}"
        ) from error
    return saved if split is None else pick(saved, split, name)[0]


def pick(
    loaded: Any,
    split: str | None,
    name: str | os.PathLike[str],
    *,
    default: str | None = None,
    splits: str = "split",
) -> tuple[Any, str]:
    """One split of what was loaded.

    Args:
        loaded: A data set, or a dict of them.
        split: Its name; ``None``: `default` where there is one of that name, or the only one.
        name: Of the data set, for errors.
        default: See `split`.
        splits: What `split` is called in errors.

    Returns:
        The data set and the name of its split, empty where it has none.

    Raises:
        ValueError: No such split, several to choose from, or a split of what has none.
    """
    found = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    only = next(iter(found)) if len(found) == 1 else None
    chosen = split if split is not None else default if default in found else only
    if chosen is None or chosen not in found:
        choices = f"one of {', '.join(found)}" if any(found) else "left out, as there are none,"
        got = "none" if split is None else repr(split)
        raise ValueError(f"`{splits}` must be {choices} for {str(name)!r}, got {got}")
    return found[chosen], chosen


def short_name(name: str | os.PathLike[str]) -> str:
    """The last part of a name, or of the path of a folder: what a task of it is called."""
    return Path(name).expanduser().resolve().name


def local_name(name: str | os.PathLike[str], argument: str) -> str:
    """`name` with a folder's `~` expanded; what looks like a folder must be one.

    Args:
        name: A folder or a name on the Hub.
        argument: What it is called in errors.

    Raises:
        ValueError: It is empty, or a path at which there is no folder.
    """
    if not isinstance(name, str | os.PathLike) or not str(name).strip():
        raise ValueError(f"`{argument}` must be a folder or a name on the Hub, got {name!r}")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or path.is_absolute() or str(name).startswith((".", "~")):
        got = "a file" if path.exists() else "which does not exist"
        raise ValueError(
            f"`{argument}` must be a folder or a name on the Hub, got {str(name)!r}, {got}"
        )
    return str(name)


def _load_saved(folder: Path, streaming: bool) -> Any:
    import datasets

    check_names(folder)
    loaded = datasets.load_from_disk(str(folder))
    if streaming:
        if isinstance(loaded, dict):
            return {name: part.to_iterable_dataset() for name, part in loaded.items()}
        return loaded.to_iterable_dataset()
    return loaded


def _is_builder(name: str) -> bool:
    return name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}") is not None


def _told(error: BaseException) -> str:
    """What an error of `datasets` says, in one line."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # which says what happened
    return " ".join(str(error).split())[:500] or type(error).__name__
