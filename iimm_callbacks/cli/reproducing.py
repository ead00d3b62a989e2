"""`iimm reproduce paper`: the paper's experiment, or a part of it, beside its published values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import OPEN_CLIP, load_model
from .measuring import check_rates
from .shell import Answer, command, folder_to_write

if TYPE_CHECKING:
    from torch import nn

    from ..trainer.paper.experiment import Part

app = typer.Typer(rich_markup_mode=None, help="Published experiments, run again.")

_LOOK_SPEED = 3.0  # images that are looked at in the time in which one is trained on


@command(app, "paper")
def paper(
    models: Annotated[list[str] | None, typer.Option(help="Repeatable [default: all four]")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Repeatable [default: all nine]")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Repeatable [default: all five]")
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Repeatable [default: 1e-2, 1e-3, 1e-4, 1e-5]")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of each run", min=1)] = 30,
    train_batch_size: Annotated[int, typer.Option(help="Of all processes together", min=1)] = 128,
    most_test: Annotated[
        int | None, typer.Option(help="Test images of a task, at most [default: all]", min=2)
    ] = None,
    mirror: Annotated[
        Path | None, typer.Option(help="Folder with folders named like the Hub's; read instead")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Such as 8h: begin what fits")] = None,
    output: Annotated[Path, typer.Option(help="Folder for outcomes and page")] = Path("iimm_paper"),
    device: Annotated[str | None, typer.Option(help="cpu, to keep off a GPU")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, sizes, hours")] = False,
    speed: Annotated[
        float, typer.Option(help="Training images a second, for --dry-run; a guess", min=0.01)
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

    if device not in (None, "cpu"):
        raise ValueError(f"`--device` must be cpu or left out, got {device!r}")
    if mirror is not None and not mirror.expanduser().is_dir():
        raise ValueError(f"`--mirror` must be a folder, got {str(mirror)!r}")
    mirror = None if mirror is None else mirror.expanduser()
    check_rates(learning_rate or [])
    part = Part(
        _some(models, published.MODELS, "--models"),
        _some(tasks, published.TASKS, "--tasks"),
        _some(methods, published.METHODS, "--methods"),
        learning_rate or list(published.RATES),
        Setting(epochs, train_batch_size, use_cpu=device == "cpu"),
        most_test,
    )
    from ..reports import paper as report

    if dry_run:
        planned = _plan(part, mirror, speed)
        return Answer(planned, report.plan(planned))
    from ..trainer.calibration.budget import seconds_of
    from ..trainer.paper.experiment import reproduce
    from ..trainer.paper.results import PREDICTORS, results

    seconds = None if budget is None else seconds_of(budget)
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
        report.write_page(data, published.CHOICES, output / "paper.html")
    return Answer(data, report.paper(data), 0 if data["runs"] else 1)


def _some(asked: Sequence[str] | None, known: dict[str, Any], argument: str) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise ValueError(f"`{argument}` must be one of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(asked or known))


def _load(key: str, mirror: Path | None) -> tuple[nn.Module, Any]:
    """A model of the paper: from the mirror, as transformers or open_clip saved it, or the Hub."""
    from ..trainer.paper.published import MODELS
    from ..trainer.paper.tasks import place_of

    about = MODELS[key]
    place = place_of(about.hub, mirror)
    name = about.source
    if place is not None:
        is_open_clip = (place / "open_clip_config.json").exists()
        name = f"{OPEN_CLIP}local-dir:{place}" if is_open_clip else str(place)
    return load_model(name, device="cpu", argument="--models")


def _plan(part: Part, mirror: Path | None, speed: float) -> dict[str, Any]:
    """What would be run, without a download; sizes are the published ones, or the mirror's."""
    from ..trainer.paper.published import MODELS, TASKS
    from ..trainer.paper.results import departures
    from ..trainer.paper.tasks import place_of, read_splits

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
