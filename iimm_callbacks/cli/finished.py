"""`iimm report`, `compare` and `rescue`: what becomes of a run that is over."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..records.verdict import Limits
from .loading import (
    OPEN_CLIP,
    SAMPLE,
    check_data,
    check_name,
    first_line,
    load_model,
    load_task,
    task_name_of,
)
from .outcomes import open_record
from .shell import Answer, LimitOn, MaxForgetting, OffTarget, Reading, folder_to_write

if TYPE_CHECKING:
    from torch import nn

    from ..data.tasks import Task

_NAMES = "Hub name, folder, sample, open_clip:NAME:TAG"


def report(
    run: Annotated[Path, Argument(help="What the guard wrote", metavar="RUN.json")],
    to: Annotated[
        Path | None, Option(help="Folder [default: RUN_report]", show_default=False)
    ] = None,
    outcomes: Annotated[
        str | None,
        Option(
            "--outcomes",
            "--store",
            help="Past runs to show it among, or sample [default: the user's]",
            show_default=False,
        ),
    ] = None,
) -> Answer:
    """Write a run's page, with its pictures.

    For a run in any state. The page, report.html, needs nothing beside it.
    """
    run = run.expanduser()
    record = _read_run(run)
    from ..records.catalog import of_model

    where, known = open_record(outcomes, "--outcomes")
    found = of_model(known, record)
    from ..reports.page import PICTURES, past_runs, write_report
    from ..reports.terminal import summary_table
    from ..reports.words import page

    folder = run.with_name(f"{run.stem}_report") if to is None else to.expanduser()
    with folder_to_write(folder, "--to"):
        written = write_report(record, folder, found)
    past = len(past_runs(record, found))
    files = [folder / f"{name}.png" for name in PICTURES]
    pictures = [str(path) for path in files if path.exists()]
    data = {"page": str(written), "pictures": pictures, "store": str(where), "n_past": past}
    among = f"Shown among {past} past runs of its model, of {known.n_outcomes} in {where}."
    shown = [summary_table(record), *_rescued(record), page(among, f"Written to {written}.")]
    return Answer(data, "\n".join(shown))


def _rescued(record: dict[str, Any]) -> list[str]:
    """The curve of a rescued run, whose looks were before that; nothing for others."""
    from ..reports.tables import mixed, rescue_table

    rescue = record.get("rescue")
    if rescue is None:
        return []
    metric = record.get("metrics", {}).get(record["task"], "accuracy")
    before = "What was observed, above, is of the fine-tuned model before the rescue."
    return [rescue_table(rescue, record["task"], metric), *[before] * (mixed(record) is not None)]


def compare(
    run: Annotated[list[Path], Argument(help="Two or more", metavar="RUN.json")],
    to: Annotated[Path, Option(help="Picture (.png, .svg, .pdf) or page (.html)")] = Path(
        "compare.png"
    ),
) -> Answer:
    """Draw the gain of several runs against their forgetting.

    Such as those of different methods and seeds.
    """
    files = [path.expanduser() for path in run]
    if len(files) < 2:
        raise ValueError(f"`RUN.json` must be two or more to compare, got {files[0]} alone")
    records = [_read_run(path) for path in files]
    from ..reports.compare import check_format, compare_runs, tables
    from ..reports.words import page

    to = to.expanduser()
    check_format(to, "--to")
    with folder_to_write(to.parent, "--to"):
        data = compare_runs(records, to, names=_names(files))
    return Answer(data | {"written": str(to)}, f"{tables(data)}\n{page(f'Written to {to}.')}")


def _names(files: Sequence[Path]) -> list[str]:
    """The paths, without what all have in common."""
    paths = [path.absolute() for path in files]
    above = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(above) for path in paths]
    if len({name.name for name in names}) == 1 and all(len(name.parts) > 1 for name in names):
        names = [name.parent for name in names]
    return [name.with_suffix("").as_posix() if name.suffix == ".json" else name.as_posix()
            for name in names]  # fmt: skip


def _read_run(path: Path) -> dict[str, Any]:
    """The record in the run file of this name, its ``~`` expanded."""
    from ..records.run_file import read_run

    try:
        return read_run(path)
    except OSError as error:
        raise ValueError(
            f"`RUN.json` must be a run file, as the guard writes one for each run, got "
            f"{str(path)!r} ({error.strerror or error}); name one of those"
        ) from error


def rescue(
    base: Annotated[str, Argument(help=f"Untouched: {_NAMES}", metavar="BASE")],
    tuned: Annotated[
        str,
        Argument(
            help="Fine-tuned: as BASE, a folder of peft or a Trainer, .safetensors",
            metavar="TUNED",
        ),
    ],
    dataset: Annotated[str, Argument(help="Learnt: Hub name, folder, sample:NAME")],
    reading: Reading,
    off_target: OffTarget = None,
    max_forgetting: MaxForgetting = 0.05,
    limit_on: LimitOn = "mean",
    to: Annotated[Path | None, Option(help="Folder for the mix [default: measure only]")] = None,
) -> Answer:
    """Mix base and fine-tuned weights; save the best mix.

    That is the one with the most gain within the limit. Exit code 0, or 2 where none gains anything
    within it; then nothing is saved. --template is for DATASET; it and the off-target data sets are
    read from --split.
    """
    limits = Limits(max_forgetting, limit_on)  # type: ignore[arg-type]  # it checks
    to = None if to is None else to.expanduser()
    if to is not None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"`--to` must be a folder that is empty or new, got {str(to)!r}")
    check_name(base, "BASE")
    is_file = Path(tuned).expanduser().is_file()
    if Path(tuned).suffix == ".safetensors" and not is_file:
        raise ValueError(f"`TUNED` must be a file that exists, got {tuned!r}; check its path")
    if not is_file:
        check_name(tuned, "TUNED")
    check_data("DATASET", [dataset])
    check_data("--off-target", off_target)
    from ..records.run_file import save_run
    from ..reports.tables import rescue_table
    from ..rescue.sweep import rescue as rescue_model

    with nullcontext() if to is None else folder_to_write(to, "--to"):
        others = None if off_target is None else _off_target(off_target, dataset, reading)
        model, untouched, processor = _load(base, tuned, reading)
        task = _task(dataset, reading, templates=reading.template, task_name=reading.task_name)
        found = rescue_model(
            model, untouched, task, others, limits,
            processor=processor, batch_size=reading.batch_size,
        )  # fmt: skip
        data = {"base": base, "tuned": tuned, "dataset": dataset, "to": None} | found.to_json()
        text = rescue_table(data | {"applied": None}, dataset)
        if to is not None and found.alpha > 0:
            _save(model, None if untouched is None else processor, to)
            data["to"] = str(to)
            save_run(json.loads(json.dumps(data)), to / "rescue.json")
            text += f"\nSaved to {to}, with the curve in rescue.json."
    return Answer(data, text, 0 if found.alpha > 0 else 2)


def _off_target(off_target: Sequence[str], dataset: str, reading: Reading) -> list[Task]:
    """The tasks, named by the last part of a path, or by two where others have that name too."""
    learnt = reading.task_name or task_name_of(dataset)
    short = [learnt, *map(task_name_of, off_target)]
    names = [
        "/".join(_place(name).parts[-2:]) if short.count(own) > 1 else own
        for name, own in zip(off_target, short[1:], strict=True)
    ]
    pairs = list(zip(off_target, names, strict=True))
    for name, own in pairs:
        if [learnt, *names].count(own) > 1 or _place(name) == _place(dataset):
            raise ValueError(
                "`--off-target` must be data sets with names of their own, other than that of "
                f"`DATASET`, got {name!r} ({own!r}) more than once; give it once, or rename its "
                "folder"
            )
    return [_task(name, reading, task_name=own, argument="--off-target") for name, own in pairs]


def _place(name: str) -> Path:
    path = Path(name).expanduser()
    return path.resolve() if path.is_dir() else path


def _task(name: str, reading: Reading, **settings: Any) -> Task:
    return load_task(name, split=reading.split, **reading.of_task(), **settings)[0]


def _load(base: str, tuned: str, reading: Reading) -> tuple[Any, nn.Module | None, Any]:
    """The fine-tuned model, the untouched one unless it is in there, and the processor."""
    from ..sample import model_path

    path = Path(tuned).expanduser()
    of_base: dict[str, Any] = {"processor": reading.processor, "device": reading.device}
    untouched, processor = load_model(base, argument="BASE", **of_base)
    if (path / "adapter_config.json").exists():
        return _with_adapter(untouched, path), None, processor
    weights = path / "model.safetensors" if path.is_dir() else path
    if weights.is_file() and not (path / "config.json").exists():
        model, _ = load_model(base, argument="BASE", **of_base)
        _fill(model, weights, tuned)
    else:
        if (path / "head.safetensors").exists():
            raise ValueError(
                f"`TUNED` must be a whole model or an adapter of peft, got {tuned!r} with the head "
                "of a CLIP-Adapter or linear probe, which does not tell its residual ratio; call "
                "`iimm_callbacks.rescue.sweep.rescue` on the model"
            )
        brings_its_own = base.startswith(OPEN_CLIP) or tuned.startswith(OPEN_CLIP)
        if not reading.processor and not brings_its_own:
            of_base["processor"] = str(model_path()) if base == SAMPLE else base
        model, _ = load_model(tuned, argument="TUNED", **of_base)
    untouched.cpu()  # the device holds one model
    return model, untouched, processor


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


def _save(model: Any, processor: Any, folder: Path) -> None:
    """Model and processor, which may be None, as they were read."""
    from ..rescue.counterparts import save_weights

    if not hasattr(model, "save_pretrained"):  # of open_clip
        save_weights(model.state_dict(), folder / "model.safetensors")
        return
    for part in (model, processor):
        if part is not None:
            part.save_pretrained(folder)
