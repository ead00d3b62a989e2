"""`iimm calibrate`: a new model -> a forecast learnt on it, in one command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import SAMPLE, check_name, load_model, load_task
from .outcomes import Store, store_to_write
from .shell import Answer, folder_to_write

if TYPE_CHECKING:
    from ..data.tasks import Task


@dataclass(frozen=True)
class Learning:
    """What is learnt and how: options of `calibrate`."""

    task: Annotated[
        list[str] | None,
        typer.Option(help="Data set with train and test; repeatable [default: the shipped ones]"),
    ] = None
    tasks: Annotated[int, typer.Option(help="So many are learnt, the most different", min=1)] = 4
    off_target: Annotated[
        list[str] | None,
        typer.Option(help="Not to forget, as DATASET; repeatable [default: shipped tasks]"),
    ] = None
    split: Annotated[str | None, typer.Option(help="Held-out images [default: test]")] = None
    template: Annotated[list[str] | None, typer.Option(help="Prompt for --task; repeatable")] = None
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON file of TrainingArguments")] = (
        None
    )
    method: Annotated[
        list[str] | None, typer.Option(help="Repeatable [default: full and lora]")
    ] = None
    learning_rate: Annotated[list[float] | None, typer.Option(help="Repeatable")] = None
    steps: Annotated[int | None, typer.Option(help="Of each run [default: 150]", min=1)] = None
    train_batch_size: Annotated[
        int | None, typer.Option(help="Of each process [default: 32]", min=1)
    ] = None
    script: Annotated[
        Path | None, typer.Option(help="Your own: python SCRIPT DATA FOLDER, once a task")
    ] = None


def calibrate(
    model: Annotated[
        str, typer.Argument(help="Hub name, folder, sample, open_clip:NAME:TAG", metavar="MODEL")
    ],
    learning: Learning,
    budget: Annotated[str | None, typer.Option(help="Such as 30m: plan what fits")] = None,
    output: Annotated[Path, typer.Option(help="Folder for plan and run files")] = Path(
        "iimm_calibration"
    ),
    store: Store = None,
    device: Annotated[str | None, typer.Option(help="cpu, to keep off a GPU")] = None,
    processor: Annotated[
        str | None, typer.Option(help="Hub name or folder, where MODEL has none")
    ] = None,
) -> Answer:
    """Fine-tune MODEL on a few diverse tasks; save what came of it.

    The first real run then has a forecast learnt on this model and recipe. Nothing is stopped.
    Finished runs are saved at once; the same command again does those that are missing. Exit code 1
    if none finished.
    """
    from ..trainer.calibration.budget import seconds_of
    from ..trainer.calibration.recipes import read_recipes

    seconds = None if budget is None else seconds_of(budget)
    if learning.script is not None:
        for name in ("recipe", "method", "learning_rate", "steps", "train_batch_size"):
            if getattr(learning, name) is not None:
                raise ValueError(f"`{name}` must be left out with `--script`, which has its own")
    recipes = [] if learning.script is not None else read_recipes(
        learning.recipe,
        methods=learning.method or ([] if learning.recipe else ["full", "lora"]),
        rates=learning.learning_rate or [],
        max_steps=learning.steps,
        per_device_train_batch_size=learning.train_batch_size,
    )  # fmt: skip
    if device not in (None, "cpu"):
        raise ValueError(f"`--device` must be cpu or left out, got {device!r}")
    place = store_to_write(store)
    check_name(model, "MODEL")
    names = learning.task or _shipped()
    for argument, some in (("--task", names), ("--off-target", learning.off_target or ())):
        for name in some:
            check_name(name, argument, is_model=False)
    from ..reports import calibrated
    from ..trainer.calibration.calibrate import calibrate as run

    output = output.expanduser()
    with folder_to_write(output, "--output"):
        loaded, reads = load_model(model, processor=processor, device="cpu")
        found = run(
            loaded,
            [_pair(name, learning) for name in names],
            recipes,
            processor=reads,
            off_target=off_target_of(learning.off_target, learning.split),
            n_tasks=learning.tasks,
            store=place,
            output=output,
            budget=seconds,
            script=learning.script,
            use_cpu=device == "cpu",
        )
        data = {"model": model, "output": str(output)} | found.to_json()
        data["pictures"] = _pictures(found.run_files, output)
    return Answer(data, calibrated.calibration(data), 0 if found.outcomes else 1)


def _shipped() -> list[str]:
    from .. import sample

    return [f"{SAMPLE}:{name}" for name in sample.task_names()]


def _pair(name: str, learning: Learning) -> tuple[Task, Task]:
    """Held-out and training images of a data set."""
    settings: dict[str, Any] = {"templates": learning.template, "argument": "--task"}
    task, split = load_task(name, split=learning.split, **settings)
    if split == "train":
        raise ValueError(
            f"`--task` must have held-out images apart from the split train, got {name!r}; name "
            "them by `--split`"
        )
    return task, load_task(name, split="train", **settings)[0]


def off_target_of(names: Sequence[str] | None, split: str | None) -> list[Task] | None:
    """The off-target tasks of these names; ``None``: the shipped ones."""
    if names is None:
        return None
    return [load_task(name, split=split, argument="--off-target")[0] for name in names]


def _pictures(run_files: Sequence[Path], output: Path) -> list[str]:
    """Gain against forgetting of all runs, as a picture and a page; none of a single run."""
    from ..records.run_file import read_run
    from ..reports.compare import compare_runs

    if len(run_files) < 2:
        return []
    records = [read_run(path) for path in run_files]
    names = [path.parent.name for path in run_files]
    written = [output / "compare.png", output / "compare.html"]
    for path in written:
        compare_runs(records, path, names=names)
    return [str(path) for path in written]
