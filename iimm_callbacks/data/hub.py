"""A name on the Hub or a folder -> one split of its data; no code that comes with it is run."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..records.as_dataset import check_names


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
        split: As `datasets.load_dataset`, such as ``"test"`` or ``"test[:1000]"``. A stream of
            what is not saved has whole splits only.
        config: Of several configurations of the data set, this one.
        revision: Branch, tag or commit on the Hub; a folder has none.
        streaming: Do not download it as a whole.
        argument: What `name` is called in errors.

    Returns:
        A `datasets.Dataset` or, streaming, `datasets.IterableDataset`; without a `split` a dict of
        them, or the only one of a folder that has no splits.

    Raises:
        TypeError: `split` is of another type.
        ValueError: There is no such data set, configuration or split, it is not available
            offline, it needs code of its own, or a folder has no configurations or revisions.
    """
    import datasets

    name = local_name(name, argument)
    if not isinstance(split, str | datasets.NamedSplit | datasets.ReadInstruction | None):
        raise TypeError(
            f"`split` must be the name of one split, such as 'test' or 'test[:1000]', got "
            f"{split!r:.80} ({type(split).__name__})"
        )
    folder = Path(name)
    is_saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    _check_place(name, folder, is_saved, config, revision, argument)
    try:
        if not is_saved:
            return datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=streaming
            )
        check_names(folder)
        saved: Any = datasets.load_from_disk(name)
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
    if split is not None:
        saved = _part(saved, split, name)
    if not streaming:
        return saved
    if isinstance(saved, dict):
        return {split: part.to_iterable_dataset() for split, part in saved.items()}
    return saved.to_iterable_dataset()


def _check_place(
    name: str, folder: Path, is_saved: bool, config: str | None, revision: str | None, argument: str
) -> None:
    is_format = name.isidentifier() and find_spec(f"datasets.packaged_modules.{name}") is not None
    if is_format and not folder.is_dir():  # it would read the working directory
        raise ValueError(
            f"`{argument}` must be a data set, got {name!r}, which is a file format; pass the "
            "folder that the files are in"
        )
    if revision is not None and folder.is_dir():
        raise ValueError(
            f"`revision` must be left out for the folder {name!r}, got {revision!r}; it is of a "
            "data set on the Hub"
        )
    if config is not None and is_saved:
        raise ValueError(
            f"`config` must be left out for {name!r}, which `datasets` saved, got {config!r}; "
            "pass the folder of the one that you want"
        )


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


def _part(saved: Any, split: Any, name: str) -> Any:
    """A split of what was saved, or what `datasets.load_dataset` would read as slices of some."""
    import datasets

    spec = split.to_spec() if isinstance(split, datasets.ReadInstruction) else str(split)
    if not isinstance(saved, dict) or spec in saved:
        return pick(saved, spec, name)[0]
    try:
        wanted = datasets.ReadInstruction.from_spec(spec).to_absolute(
            {known: len(part) for known, part in saved.items()}
        )
    except ValueError as error:
        raise ValueError(
            f"`split` must be one of {', '.join(saved)} for {name!r}, got {spec!r} "
            f"({_told(error)}); a slice is written as 'test[:1000]' or 'test[:10%]'"
        ) from error
    parts = [saved[one.splitname].select(range(one.from_, one.to)) for one in wanted]
    return datasets.concatenate_datasets(parts)


def _told(error: BaseException) -> str:
    """What an error of `datasets` says, in one line."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # which says what happened
    return " ".join(str(error).split())[:500] or type(error).__name__
