"""`iimm rescue`: a fine-tuned model on disk -> its best mix with the base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import OPEN_CLIP, SAMPLE, check_name, first_line, load_model, load_task, task_name_of
from .shell import Answer, LimitOn, Reading, folder_to_write

if TYPE_CHECKING:
    from torch import nn

    from ..data.tasks import Task

_NAMES = "Hub name, folder, sample, open_clip:NAME:TAG"


def rescue(
    base: Annotated[str, typer.Argument(help=f"Untouched: {_NAMES}", metavar="BASE")],
    tuned: Annotated[
        str,
        typer.Argument(
            help="Fine-tuned: as BASE, a folder of peft or a Trainer, .safetensors",
            metavar="TUNED",
        ),
    ],
    dataset: Annotated[str, typer.Argument(help="Learnt: Hub name, folder, sample:NAME")],
    reading: Reading,
    off_target: Annotated[
        list[str] | None,
        typer.Option(help="Not to forget, as DATASET; repeatable [default: shipped tasks]"),
    ] = None,
    max_forgetting: Annotated[float, typer.Option(help="Limit, a fraction")] = 0.05,
    limit_on: LimitOn = "mean",
    to: Annotated[
        Path | None, typer.Option(help="Folder for the mix [default: measure only]")
    ] = None,
) -> Answer:
    """Mix base and fine-tuned weights; save the best mix.

    That is the one with the most gain within the limit. Exit code 0, or 2 where none gains anything
    within it; then nothing is saved. --template is for DATASET; it and the off-target data sets are
    read from --split.
    """
    from ..records.verdict import Limits

    limits = Limits(max_forgetting, limit_on)  # type: ignore[arg-type]  # it checks
    to = _empty_folder(to)
    check_name(base, "BASE")
    if Path(tuned).suffix == ".safetensors":  # weights
        if not Path(tuned).expanduser().is_file():
            raise ValueError(f"`TUNED` must be a file that exists, got {tuned!r}; check its path")
    elif not Path(tuned).expanduser().is_file():
        check_name(tuned, "TUNED")
    check_name(dataset, "DATASET", is_model=False)
    for name in off_target or ():
        check_name(name, "--off-target", is_model=False)
    from ..records.run_file import save_run
    from ..reports.tables import rescue_table
    from ..rescue.sweep import rescue as rescue_model

    with nullcontext() if to is None else folder_to_write(to, "--to"):
        others = None if off_target is None else _off_target(off_target, dataset, reading)
        model, untouched, processor, save = _load(base, tuned, reading)
        task = _task(dataset, reading, templates=reading.template, task_name=reading.task_name)
        found = rescue_model(
            model, untouched, task, others, limits,
            processor=processor, batch_size=reading.batch_size,
        )  # fmt: skip
        data = {"base": base, "tuned": tuned, "dataset": dataset, "to": None} | found.to_json()
        text = rescue_table(data | {"applied": None}, dataset)
        if to is not None and found.alpha > 0:
            save(to)
            data["to"] = str(to)
            save_run(json.loads(json.dumps(data)), to / "rescue.json")
            text += f"\nSaved to {to}, with the curve in rescue.json."
    return Answer(data, text, 0 if found.alpha > 0 else 2)


def _empty_folder(to: Path | None) -> Path | None:
    if to is None:
        return None
    to = to.expanduser()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"`--to` must be a folder that is empty or new, got {str(to)!r}")
    return to


def _off_target(off_target: Sequence[str], dataset: str, reading: Reading) -> list[Task]:
    """The tasks, named by the last part of a path, or by two where others have that name too."""
    learnt = reading.task_name or task_name_of(dataset)
    short = [learnt, *map(task_name_of, off_target)]
    names = [
        _long_name(name) if short.count(own) > 1 else own
        for name, own in zip(off_target, short[1:], strict=True)
    ]
    for name, own in zip(off_target, names, strict=True):
        if [learnt, *names].count(own) > 1 or _place(name) == _place(dataset):
            raise ValueError(
                "`--off-target` must be data sets with names of their own, other than that of "
                f"`DATASET`, got {name!r} ({own!r}) more than once; give it once, or rename its "
                "folder"
            )
    return [
        _task(name, reading, task_name=own, argument="--off-target")
        for name, own in zip(off_target, names, strict=True)
    ]


def _long_name(name: str) -> str:
    """The last two parts of a path or a name on the Hub."""
    return "/".join(_place(name).parts[-2:])


def _place(name: str) -> Path:
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() else path


_Loaded = tuple[Any, "nn.Module | None", Any, Callable[[Path], None]]


def _load(base: str, tuned: str, reading: Reading) -> _Loaded:
    """The fine-tuned model, the untouched one unless it is in there, the processor, and a saver."""
    from ..rescue.counterparts import save_weights

    path = Path(tuned).expanduser()
    load_base = partial(
        load_model, base, processor=reading.processor, device=reading.device, argument="BASE"
    )
    untouched, processor = load_base()
    if (path / "adapter_config.json").exists():
        adapted = _with_adapter(untouched, path)
        return adapted, None, processor, adapted.save_pretrained
    model: Any
    weights = path / "model.safetensors" if path.is_dir() else path
    if weights.is_file() and not (path / "config.json").exists():
        model, _ = load_base()
        _fill(model, weights, tuned)
    else:
        if (path / "head.safetensors").exists():
            raise ValueError(
                f"`TUNED` must be a whole model or an adapter of peft, got {tuned!r} with the head "
                "of a CLIP-Adapter or linear probe, which does not tell its residual ratio; call "
                "`iimm_callbacks.rescue.sweep.rescue` on the model"
            )
        brings_its_own = base.startswith(OPEN_CLIP) or tuned.startswith(OPEN_CLIP)
        whose = reading.processor or (None if brings_its_own else _folder(base))
        model, _ = load_model(tuned, processor=whose, device=reading.device, argument="TUNED")
    untouched.cpu()  # the device holds one model

    def save(folder: Path) -> None:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        else:
            save_weights(model.state_dict(), folder / "model.safetensors")

    return model, untouched, processor, save


def _with_adapter(model: nn.Module, folder: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(
            f"`TUNED` {str(folder)!r} needs peft: pip install 'iimm_callbacks[peft]'"
        ) from error
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`TUNED` must be an adapter of `BASE`, got {str(folder)!r}: {first_line(error)}"
        ) from error


def _fill(model: nn.Module, path: Path, tuned: str) -> None:
    """Load a file of weights into the model; weights that it lacks were not tuned."""
    from ..models.wrappers import core_of
    from ..rescue.counterparts import Kept, counterparts, state_of

    core = core_of(model)
    model.requires_grad_(False)
    try:
        from safetensors.torch import load_file

        for own, value in counterparts(core, Kept(state_of(load_file(path), core))):
            own.copy_(value)
    except Exception as error:  # of whatever kind: it is told
        raise ValueError(
            f"`TUNED` must hold weights of `BASE` and no others, got {tuned!r}: {error}"
        ) from error


def _folder(name: str) -> str:
    if name != SAMPLE:
        return name
    from ..sample import model_path

    return str(model_path())


def _task(name: str, reading: Reading, **settings: Any) -> Task:
    return load_task(name, split=reading.split, **reading.of_task(), **settings)[0]
