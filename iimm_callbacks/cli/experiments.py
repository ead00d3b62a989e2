"""`iimm calibrate` and `iimm reproduce`: many runs; the same command again does what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from .loading import (
    OPEN_CLIP,
    SAMPLE,
    check_data,
    check_name,
    load_model,
    load_off_target,
    load_task,
)
from .measuring import check_rates
from .outcomes import Store, store_to_write
from .shell import (
    Answer,
    Model,
    Names,
    OffTarget,
    Processor,
    check_choices,
    command,
    folder_to_write,
    seconds_of,
)

if TYPE_CHECKING:
    from torch import nn

    from ..data.tasks import Task
    from ..trainer.paper.experiment import Part

app = typer.Typer(rich_markup_mode=None, help="Published experiments, run again.")

_LOOK_SPEED = 3.0  # images that are looked at in the time in which one is trained on
_Device = Annotated[str | None, Option(help="cpu, to keep off a GPU")]
_Rates = list[float] | None


@dataclass(frozen=True)
class Learning:
    """What is learnt and how: options of `calibrate`."""

    task: Annotated[
        Names, Option(help="Data set with train and test; repeatable [default: the shipped ones]")
    ] = None
    tasks: Annotated[int, Option(help="So many are learnt, the most different", min=1)] = 4
    off_target: OffTarget = None
    split: Annotated[str | None, Option(help="Held-out images [default: test]")] = None
    template: Annotated[Names, Option(help="Prompt for --task; repeatable")] = None
    recipe: Annotated[Path | None, Option(help="YAML or JSON file of TrainingArguments")] = None
    method: Annotated[Names, Option(help="Repeatable [default: full and lora]")] = None
    learning_rate: Annotated[_Rates, Option(help="Repeatable")] = None
    steps: Annotated[int | None, Option(help="Of each run [default: 150]", min=1)] = None
    train_batch_size: Annotated[int | None, Option(help="Of each process [default: 32]", min=1)] = (
        None
    )
    script: Annotated[
        Path | None, Option(help="Your own: python SCRIPT DATA FOLDER, once a task")
    ] = None


def calibrate(
    model: Model,
    learning: Learning,
    budget: Annotated[str | None, Option(help="Such as 30m: plan what fits")] = None,
    output: Annotated[Path, Option(help="Folder for plan and run files")] = Path(
        "iimm_calibration"
    ),
    store: Store = None,
    device: _Device = None,
    processor: Processor = None,
) -> Answer:
    """Fine-tune MODEL on a few diverse tasks; save what came of it.

    The first real run then has a forecast learnt on this model and recipe. Nothing is stopped.
    Finished runs are saved at once; the same command again does those that are missing. Exit code 1
    if none finished.
    """
    from ..trainer.calibration.recipes import read_recipes

    seconds = seconds_of(budget)
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
    use_cpu = _keeps_off_a_gpu(device)
    place = store_to_write(store)
    check_name(model, "MODEL")
    from .. import sample

    names = learning.task or [f"{SAMPLE}:{name}" for name in sample.task_names()]
    check_data("--task", names)
    check_data("--off-target", learning.off_target)
    from ..reports import experiments
    from ..trainer.calibration.calibrate import calibrate as run

    output = output.expanduser()
    with folder_to_write(output, "--output"):
        loaded, reads = load_model(model, processor=processor, device="cpu")
        found = run(
            loaded,
            [_pair(name, learning) for name in names],
            recipes,
            processor=reads,
            off_target=load_off_target(learning.off_target, learning.split),
            n_tasks=learning.tasks,
            store=place,
            output=output,
            budget=seconds,
            script=learning.script,
            use_cpu=use_cpu,
        )
        data = {"model": model, "output": str(output)} | found.to_json()
        data["pictures"] = _pictures(found.run_files, output)
    return Answer(data, experiments.calibration(data), 0 if found.outcomes else 1)


def _keeps_off_a_gpu(device: str | None) -> bool:
    if device not in (None, "cpu"):
        raise ValueError(f"`--device` must be cpu or left out, got {device!r}")
    return device == "cpu"


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


@command(app, "paper")
def paper(
    models: Annotated[Names, Option(help="Repeatable [default: all four]")] = None,
    tasks: Annotated[Names, Option(help="Repeatable [default: all nine]")] = None,
    methods: Annotated[Names, Option(help="Repeatable [default: all five]")] = None,
    learning_rate: Annotated[
        _Rates, Option(help="Repeatable [default: 1e-2, 1e-3, 1e-4, 1e-5]")
    ] = None,
    epochs: Annotated[int, Option(help="Of each run", min=1)] = 30,
    train_batch_size: Annotated[int, Option(help="Of all processes together", min=1)] = 128,
    most_test: Annotated[
        int | None, Option(help="Test images of a task, at most [default: all]", min=2)
    ] = None,
    mirror: Annotated[
        Path | None, Option(help="Folder with folders named like the Hub's; read instead")
    ] = None,
    budget: Annotated[str | None, Option(help="Such as 8h: begin what fits")] = None,
    output: Annotated[Path, Option(help="Folder for outcomes and page")] = Path("iimm_paper"),
    device: _Device = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print plan, sizes, hours")] = False,
    speed: Annotated[
        float, Option(help="Training images a second, for --dry-run; a guess", min=0.01)
    ] = 400.0,
) -> Answer:
    """Repeat the experiment of arXiv 2407.15731.

    Four models, nine data sets, five methods; its values stand beside yours with intervals.
    Finished runs are saved at once; the same command again does those that are missing. Under
    `accelerate launch -m iimm_callbacks.cli` on several GPUs.
    """
    from ..trainer.paper import published
    from ..trainer.paper.experiment import Part
    from ..trainer.paper.training import Setting

    use_cpu = _keeps_off_a_gpu(device)
    if mirror is not None and not mirror.expanduser().is_dir():
        raise ValueError(f"`--mirror` must be a folder, got {str(mirror)!r}")
    mirror = None if mirror is None else mirror.expanduser()
    check_rates(learning_rate or [])
    part = Part(
        _some(models, published.MODELS, "--models"),
        _some(tasks, published.TASKS, "--tasks"),
        _some(methods, published.METHODS, "--methods"),
        learning_rate or list(published.RATES),
        Setting(epochs, train_batch_size, use_cpu=use_cpu),
        most_test,
    )
    from ..reports import experiments

    if dry_run:
        planned = _plan(part, mirror, speed)
        return Answer(planned, experiments.paper_plan(planned))
    from ..trainer.paper.experiment import reproduce
    from ..trainer.paper.results import PREDICTORS, results

    seconds = seconds_of(budget)
    output = output.expanduser()
    with folder_to_write(output, "--output"):
        found = reproduce(
            part,
            lambda key: _load(key, mirror),
            output=output,
            mirror=mirror,
            budget=seconds,
            say=lambda text: typer.echo(text, err=True),
        )
        data = results(found, part) | {
            "titles": {key: model.title for key, model in published.MODELS.items()},
            "predictors": PREDICTORS,
            "page": str(output / "paper.html"),
            "store": str(output / "outcomes.jsonl"),
        }
        experiments.write_page(data, published.CHOICES, output / "paper.html")
    return Answer(data, experiments.paper(data), 0 if data["runs"] else 1)


def _some(asked: Sequence[str] | None, known: Mapping[str, Any], argument: str) -> list[str]:
    check_choices(argument, asked or (), known)
    return list(dict.fromkeys(asked or known))


def _load(key: str, mirror: Path | None) -> tuple[nn.Module, Any]:
    """A model of the paper: from the mirror, as transformers or open_clip saved it, or the Hub."""
    from ..trainer.paper.published import MODELS, place_of

    about = MODELS[key]
    place = place_of(about.hub, mirror)
    name = about.source
    if place is not None:
        is_open_clip = (place / "open_clip_config.json").exists()
        name = f"{OPEN_CLIP}local-dir:{place}" if is_open_clip else str(place)
    return load_model(name, device="cpu", argument="--models")


def _plan(part: Part, mirror: Path | None, speed: float) -> dict[str, Any]:
    """What would be run, without a download; sizes are the published ones, or the mirror's."""
    from ..trainer.paper.published import MODELS, TASKS, place_of, read_splits
    from ..trainer.paper.results import departures

    tasks: list[dict[str, Any]] = []
    for name in part.tasks:
        about = TASKS[name]
        sizes = {"n_train": about.n_train, "n_test": about.n_test}
        place = place_of(about.hub, mirror)
        if place is not None:
            read = read_splits(name, about, mirror, part.most_test)
            n_train = len(read.train) + len(read.validation)
            sizes = {"n_train": n_train, "n_test": len(read.test)}
        row = {"name": name, "place": str(place or f"Hub: {about.hub}")}
        tasks.append(row | sizes | {"template": about.template})
    n_train = sum(row["n_train"] for row in tasks)
    n_test = sum(min(row["n_test"], part.most_test or row["n_test"]) for row in tasks)
    runs_a_task = len(part.models) * len(part.methods) * len(part.rates)
    trained = runs_a_task * part.setting.epochs * n_train
    looked = len(part.models) * (n_train + n_test) + runs_a_task * len(tasks) * n_test
    look_hours = looked / (_LOOK_SPEED * speed) / 3600
    places = [place_of(MODELS[key].hub, mirror) for key in part.models]
    return {
        "models": [
            {"key": key, "title": MODELS[key].title, "place": str(place or MODELS[key].source)}
            for key, place in zip(part.models, places, strict=True)
        ],
        "tasks": tasks,
        "methods": list(part.methods),
        "rates": list(part.rates),
        **asdict(part.setting),
        "n_runs": len(part.models) * len(part.runs()),
        "speed": speed,
        "look_hours": look_hours,
        "hours": trained / speed / 3600 + look_hours,
        "departures": departures(part),
    }
