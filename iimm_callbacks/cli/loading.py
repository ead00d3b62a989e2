"""Names on the command line -> models, processors, tasks and outcomes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .shell import no_bars_in_a_log

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.tasks import Task
    from ..records.outcomes import Outcome

SAMPLE = "sample"
_SHIPPED = f"{SAMPLE}:"
OPEN_CLIP = "open_clip:"
_PATIENCE = 5.0  # seconds to wait for the Hub
_IN_ONE_PIECE = ("hf-hub:", "local-dir:")  # open_clip's own prefixes, which hold a colon


def check_name(name: str, argument: str, *, is_model: bool = True) -> None:
    """Raise where there is no model or data set of this name; imports nothing large.

    The Hub is asked once, for seconds and not for a minute: where it cannot be reached, this
    process goes on with what it has kept.

    Args:
        name: As `load_model`, or as `load_task`.
        argument: What it is called in errors.
        is_model: Or a data set.

    Raises:
        ValueError: There is none.
    """
    from ..data import hub

    if name.startswith(_SHIPPED) and not is_model:
        from .. import sample

        if name.removeprefix(_SHIPPED) not in sample.task_names():
            choices = ", ".join(sample.task_names())
            raise ValueError(f"`{argument}` must be {_SHIPPED} and one of {choices}, got {name!r}")
    elif not (is_model and (name == SAMPLE or name.startswith(OPEN_CLIP))):
        place = hub.local_name(name, argument)
        if not Path(place).is_dir():
            _ask_hub(place if is_model else place.partition(":")[0], argument, is_model)


def check_data(argument: str, names: Iterable[str] | None) -> None:
    """`check_name` of each of these data sets."""
    for name in names or ():
        check_name(name, argument, is_model=False)


def _ask_hub(name: str, argument: str, is_model: bool) -> None:
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().repo_info(name, repo_type="model" if is_model else "dataset", timeout=_PATIENCE)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"`{argument}` must be a folder or a name on the Hub, got {name!r}, which the Hub does "
            "not have, or only for those who log in; check its spelling"
        ) from error
    except Exception:  # of the network, of whatever kind: what was downloaded can be read offline
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported after this


def load_model(
    name: str,
    *,
    processor: str | None = None,
    device: str | None = None,
    argument: str = "MODEL",
) -> tuple[nn.Module, Any]:
    """The model of this name and its processor, in float32 and eval mode.

    Args:
        name: A Hub name or local folder that transformers reads, ``"sample"`` for the shipped
            model, or ``"open_clip:NAME:PRETRAINED"`` (``"open_clip:hf-hub:..."`` as well).
        processor: Hub name or folder of the processor; ``None``: where the model is.
        device: Of the model; ``None``: cuda where there is one, else cpu.
        argument: What `name` is called in errors.

    Returns:
        ``(model, processor)``; for open_clip the processor is the pair (transform, tokenizer).

    Raises:
        ValueError: There is no such model, processor or device, or the checkpoint lacks weights,
            which would stay random.
        ImportError: open_clip is asked for and not installed.
    """
    no_bars_in_a_log()
    from ..data import hub

    at = _device(device)
    if name == SAMPLE:
        from .. import sample

        model: Any = sample.load_model()
        found = sample.load_processor() if processor is None else _load_processor(processor)
    elif name.startswith(OPEN_CLIP):
        if processor is not None:
            raise ValueError(
                f"`--processor` must be left out for {name!r}, got {processor!r}: open_clip models "
                "bring their own"
            )
        model, found = _load_open_clip(name.removeprefix(OPEN_CLIP), argument)
    else:
        model = _load_transformers(hub.local_name(name, argument), argument)
        found = _load_processor(hub.local_name(processor or name, "--processor"))
    return model.float().eval().to(at), found


def load_task(
    name: str,
    *,
    split: str | None = None,
    task_name: str | None = None,
    templates: Sequence[str] | None = None,
    argument: str = "DATASET",
    **settings: Any,
) -> tuple[Task, str]:
    """The task in the data set of this name.

    Args:
        name: A Hub name (``"NAME:CONFIG"`` for one of its configurations), a local folder written
            by `Dataset.save_to_disk`, one with a folder of images per class (or per split with
            those in it), another that `datasets.load_dataset` reads, or ``"sample:NAME"`` for a
            shipped task.
        split: Of the data set; ``None``: "test", or the only one.
        task_name: Name of the task; ``None``: the last part of `name`.
        templates: Prompt templates; ``None``: those of a shipped task, else as `Task`.
        argument: What `name` is called in errors.
        settings: Further settings of `Task`.

    Returns:
        The task, and the split it is of (empty where the data set has none).

    Raises:
        ValueError: There is no such data set or split, or no task can be made of it.
        TypeError: As `Task`.
    """
    no_bars_in_a_log()
    from ..data import hub
    from ..data.sources import has_class_folders
    from ..data.tasks import Task

    own = task_name_of(name)
    if name.startswith(_SHIPPED):
        from .. import sample

        check_data(argument, [name])
        split = split or "test"
        dataset: Any = sample.load_dataset(own, split)
        templates = templates or sample.templates(own)
    else:
        settings["templates"] = templates or None
        own = task_name or own
        path = Path(name).expanduser()
        if has_class_folders(path):
            hub.pick(path, split, name, splits="--split")
            return Task.from_folder(path, name=own, **settings), ""
        if has_class_folders(path / (split or "test")):
            path = path / (split or "test")
            return Task.from_folder(path, name=own, **settings), path.name
        dataset, split = hub.pick(
            _load_dataset(name, argument), split, name, default="test", splits="--split"
        )
        return Task(own, dataset, **settings), split
    return Task(task_name or own, dataset, templates=templates or None, **settings), split


def load_training(name: str, **settings: Any) -> Task:
    """The task in a training set of this name: its split "train", or its only one.

    Args:
        name: As in `load_task`.
        settings: As `load_task`, without a split.

    Raises:
        ValueError: As `load_task`; the error names ``--train``.
    """
    try:
        return load_task(name, split="train", argument="--train", **settings)[0]
    except ValueError:
        if name.startswith(_SHIPPED):
            raise
        return load_task(name, argument="--train", **settings)[0]


def load_off_target(names: Sequence[str] | None, split: str | None) -> list[Task] | None:
    """The off-target tasks of these names; ``None``: the shipped ones."""
    if names is None:
        return None
    return [load_task(name, split=split, argument="--off-target")[0] for name in names]


def load_recorded(source: str) -> list[Outcome]:
    """The outcomes in a JSON-lines file, a folder of `save_to_disk` or a data set on the Hub.

    Args:
        source: Path, address or Hub name.

    Raises:
        ValueError: There is no such thing, or it holds no outcomes.
    """
    from ..records.as_dataset import from_dataset
    from ..records.objects import Address, as_store
    from ..records.store import read_outcomes

    store, path = as_store(source), Path(source).expanduser()
    if isinstance(store, Address) or path.is_file():
        return read_outcomes(store)
    if path.is_dir() and not (path / "dataset_dict.json").exists():
        return read_outcomes(path)
    loaded = _load_dataset(source, "SOURCE")
    splits = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    for split in splits:
        if "schema_version" not in split.column_names:
            raise ValueError(
                f"`SOURCE` must hold outcomes, got {source!r} with columns {split.column_names}; "
                "share saved runs with `iimm outcomes export`"
            )
    return [outcome for split in splits for outcome in from_dataset(split)]


def task_name_of(name: str) -> str:
    """What the task in the data set of this name is called, unless it is named."""
    from ..data import hub

    if name.startswith(_SHIPPED):
        return name.removeprefix(_SHIPPED)
    return hub.short_name(name).partition(":")[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _device(device: str | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"`--device` must be one that torch has here, such as 'cpu', got {device!r} "
            f"({first_line(error)})"
        ) from error
    return torch.device(device)


def _load_transformers(name: str, argument: str) -> Any:
    from ..models.untouched import check_complete, load_pretrained

    try:
        model, missing = load_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"`{argument}` must be a Hub name or folder that transformers reads, 'sample' or "
            f"'open_clip:NAME:PRETRAINED', got {name!r}: {first_line(error)}"
        ) from error
    check_complete(name, model, missing, argument)
    return model


def _load_processor(name: str) -> Any:
    from transformers import AutoProcessor

    from ..models.processors import is_complete

    try:
        processor = AutoProcessor.from_pretrained(name)
        problem = f"{type(processor).__name__} only"
    except Exception as error:  # of whatever kind: it is told
        processor, problem = None, first_line(error)
    if not is_complete(processor):
        raise ValueError(
            "`--processor` must be a Hub name or folder with an image processor and a tokenizer, "
            f"got {name!r}: {problem}"
        )
    return processor


def _load_open_clip(name: str, argument: str) -> tuple[Any, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"`{argument}` {OPEN_CLIP + name!r} needs open_clip: pip install "
            "'iimm_callbacks[open-clip]'"
        ) from error
    whole = name.startswith(_IN_ONE_PIECE)
    architecture, _, pretrained = (name, "", "") if whole else name.partition(":")
    if not whole and not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none known"
        raise ValueError(
            f"`{argument}` {OPEN_CLIP + name!r} must name its weights, "
            f"{OPEN_CLIP}{architecture}:TAG; without them it is random. Tags of "
            f"{architecture!r}: {tags}"
        )
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            architecture,
            pretrained=pretrained or None,
            require_pretrained=True,  # else a folder without weights gives random ones
        )
        return model, (transform, open_clip.get_tokenizer(architecture))
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}` must be 'open_clip:NAME:PRETRAINED' as open_clip knows them, got "
            f"{OPEN_CLIP + name!r}: {first_line(error)}"
        ) from error


def _load_dataset(name: str, argument: str) -> Any:
    """The data set, or a dict of splits."""
    from ..data import hub

    is_folder = Path(name).expanduser().is_dir()
    repository, _, config = (name, "", "") if is_folder else name.partition(":")
    return hub.load(repository, config=config or None, argument=argument)
