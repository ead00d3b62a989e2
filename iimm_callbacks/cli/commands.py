"""The `iimm` command: measure, forecast and check a fine-tune beforehand; keep and grade runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from . import calibrating, demo, doctor, outcomes, rescuing, runs
from .loading import SAMPLE, check_name, load_model, load_task, load_training
from .outcomes import Store, read_record
from .shell import Answer, Commands, LimitOn, Reading, command

if TYPE_CHECKING:
    from ..data.tasks import Task
    from ..probing.probe import Probe
    from ..records.forecast import Forecast
    from ..records.outcomes import Outcome
    from ..records.verdict import Limits

METHODS = ("full", "bitfit", "attention", "lora", "clip_adapter")

app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the boxes of its help do not fit a screen
    invoke_without_command=True,
)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False,
) -> None:
    """Know before you fine-tune a CLIP-like model what it gains and what it forgets."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


app.add_typer(outcomes.app, name="outcomes")

command(app, "demo")(demo.demo)
command(app, "doctor")(doctor.doctor)

command(app, "calibrate")(calibrating.calibrate)
command(app, "rescue")(rescuing.rescue)

Confidence = Annotated[float, typer.Option(help="Probability of exceeding to stop from")]


@dataclass(frozen=True, kw_only=True)
class Subject(Reading):
    """What is measured: the options of `measure`, `forecast` and `preflight`."""

    model: Annotated[
        str,
        typer.Argument(help="Hub name, folder, sample, open_clip:NAME:TAG", metavar="MODEL"),
    ]
    dataset: Annotated[str, typer.Argument(help="Hub name, folder, sample:NAME", metavar="DATASET")]
    train: Annotated[
        str | None,
        typer.Option(help="Training data, as DATASET, for the linear probe"),
    ] = None


@dataclass(frozen=True)
class Plan:
    """The run that is planned, and its limit: further options of `forecast` and `preflight`."""

    learning_rate: Annotated[float | None, typer.Option(help="Of the planned run")] = None
    steps: Annotated[int | None, typer.Option(help="Of the planned run", min=1)] = None
    off_target: Annotated[
        list[str] | None, typer.Option(help="Name of a task not to forget; repeatable")
    ] = None
    max_forgetting: Annotated[float, typer.Option(help="Limit, a fraction")] = 0.05
    limit_on: LimitOn = "mean"
    confidence: Confidence = 0.8

    def __post_init__(self) -> None:
        rate = self.learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"`--learning-rate` must be a positive number, got {rate}")
        self.limits()

    def limits(self) -> Limits:
        """The limits, checked."""
        return _limits(self.max_forgetting, self.limit_on, self.confidence)

    def recipe(self) -> dict[str, float]:
        """What is known of the recipe."""
        given = {"learning_rate": self.learning_rate, "steps": self.steps}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class _Measured:
    data: dict[str, Any]
    forecasts: dict[str, Forecast]


def main() -> None:
    """Entry point of the `iimm` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character of a table
    app(prog_name="iimm")


@command(app, "measure")
def measure(subject: Subject) -> Answer:
    """Measure IIMM; no training."""
    data = _measure(subject).data
    from ..reports import tables

    return Answer(data, tables.measured(data))


@command(app, "forecast")
def forecast(
    subject: Subject,
    plan: Plan,
    method: Annotated[
        list[str] | None, typer.Option(help="Repeatable [default: all five]", show_default=False)
    ] = None,
    store: Store = None,
) -> Answer:
    """Measure IIMM, forecast gain and forgetting."""
    measured = _measure(subject, plan, method or METHODS, store)
    from ..guard.judging import recommend
    from ..reports import tables

    data = measured.data | {"recommended": recommend(measured.forecasts, plan.limits())}
    return Answer(data, f"{tables.measured(data)}\n{tables.forecasts(data)}")


@command(app, "preflight")
def preflight(
    subject: Subject,
    plan: Plan,
    method: Annotated[str, typer.Option(help="Fine-tuning method, such as full")],
    require_forecast: Annotated[
        bool, typer.Option("--require-forecast", help="Nothing to judge by is an error")
    ] = False,
    store: Store = None,
) -> Answer:
    """Exit with 0 go, 2 limit exceeded, 1 error.

    For a job queue or CI. A warning alone is a go, and so is having nothing to judge by.
    """
    measured = _measure(subject, plan, [method], store)
    from ..guard.judging import judge
    from ..reports import tables

    expected = measured.forecasts[method]
    verdict = judge(expected, None, plan.limits())
    if require_forecast and (expected.base_rate or verdict.exceed_probability is None):
        why = f"borrowed: {expected.basis}" if expected.base_rate else expected.basis
        raise ValueError(
            "`--require-forecast` needs saved runs of this model to judge by, got none "
            f"({why}); add some, or leave it out"
        )
    go = verdict.level != "stop"
    data = measured.data | {"verdict": asdict(verdict), "go": go}
    text = "\n".join([tables.measured(data), tables.forecasts(data), tables.verdict(data)])
    return Answer(data, text, 0 if go else 2)


@command(app, "grade")
def grade(
    limit: Annotated[
        list[float] | None, typer.Option(help="A fraction; repeatable [default: 0.02 0.03 0.05]")
    ] = None,
    limit_on: LimitOn = "mean",
    confidence: Confidence = 0.8,
    method: Annotated[
        list[str] | None, typer.Option(help="Show its forecasts; repeatable [default: all]")
    ] = None,
    store: Store = None,
) -> Answer:
    """Grade forecast and guard on the saved runs.

    Each run is replayed as if live, and forecast from the runs on other tasks.
    """
    chosen = limit or [0.02, 0.03, 0.05]
    checked = [_limits(x, limit_on, confidence) for x in chosen]
    path, found = read_record(store)
    if not found:
        raise ValueError(f"`--store` must hold outcomes to grade, got {path} without any")
    typer.echo(f"replaying {len(found)} runs", err=True)
    from ..forecasting.forecaster import Forecaster
    from ..reports import tables

    graded = (
        Forecaster()
        .grade(found, limits=chosen, limit_on=checked[0].limit_on, confidence=confidence)
        .to_json()
    )
    known = sorted({row["method"] for row in graded["forecasts"]})
    for name in method or ():
        if name not in known:
            raise ValueError(f"`--method` must be one of {', '.join(known)}, got {name!r}")
    shown = [row for row in graded["forecasts"] if row["method"] in (method or known)]
    data = {"store": str(path), "limit_on": limit_on} | graded | {"forecasts": shown}
    return Answer(data, tables.grades(data, method or ["all"]))


command(app, "report")(runs.report)
command(app, "compare")(runs.compare)


def _measure(
    subject: Subject,
    plan: Plan | None = None,
    methods: Sequence[str] = (),
    store: Path | None = None,
) -> _Measured:
    """The measure; with a plan, and the forecast of each method from the saved runs."""
    _check_names(subject)
    record = [] if plan is None else _record(subject, store)
    _check_methods(methods, record)
    from ..forecasting.forecaster import Forecaster
    from ..models.wrappers import model_fingerprint

    task, split, model, probe = _open(subject)
    look = probe.look(model, 0, linear_probe=True)
    learnable = look.learnable
    assert learnable is not None  # it was asked for
    accuracy = error = None
    if learnable.probe is not None:
        accuracy, error = learnable.probe.at(learnable.n_train)
    about: dict[str, Any] = {
        "zero_shot_accuracy": look.accuracy(task.name),
        "model": model_fingerprint(model),
        "task": task.name,
        "task_fingerprint": probe.fingerprints[task.name],
    }
    data = {
        "model": subject.model,
        "model_fingerprint": about["model"],
        "dataset": subject.dataset,
        "split": split,
        "templates": list(task.templates),
        "pairing": task.pairing(),
        **{name: about[name] for name in ("task", "task_fingerprint", "zero_shot_accuracy")},
        **asdict(look.measurement),
        "linear_probe_accuracy": accuracy,
        "linear_probe_standard_error": error,
        "linear_probe_note": learnable.note,
    }
    if plan is None:
        return _Measured(data, {})
    about |= {"linear_probe_accuracy": accuracy, "linear_probe_standard_error": error}
    about |= {"n_train": learnable.n_train}
    about |= {"recipe": plan.recipe(), "off_target": plan.off_target or ()}
    forecaster = Forecaster().fit(record)
    forecasts = {
        method: forecaster.predict(look.measurement, method=method, **about) for method in methods
    }
    rows = {method: _row(expected, plan) for method, expected in forecasts.items()}
    return _Measured(data | {"limits": asdict(plan.limits()), "forecasts": rows}, forecasts)


def _check_names(subject: Subject) -> None:
    check_name(subject.model, "MODEL")
    check_name(subject.dataset, "DATASET", is_model=False)
    if subject.train is not None:
        check_name(subject.train, "--train", is_model=False)


def _open(subject: Subject) -> tuple[Task, str | None, Any, Probe]:
    """The task and its split, the model, and the probe of one on the other."""
    from ..data.training import SAMPLE_SIZE
    from ..probing.learnable import TrainingSet
    from ..probing.probe import Probe

    task, split = load_task(
        subject.dataset,
        split=subject.split,
        task_name=subject.task_name,
        templates=subject.template,
        image_column=subject.image_column,
        label_column=subject.label_column,
        probe_size=subject.probe_size,
        seed=subject.seed,
    )
    model, processor = load_model(subject.model, processor=subject.processor, device=subject.device)
    train = None
    if subject.train is not None:
        train = load_training(
            subject.train,
            task_name=task.name,
            templates=subject.template,
            image_column=subject.image_column,
            label_column=subject.label_column,
            probe_size=SAMPLE_SIZE,
            seed=subject.seed,
        )
    probe = Probe(
        task,
        processor=processor,
        batch_size=subject.batch_size,
        train=None if train is None else TrainingSet(train),
    )
    return task, split, model, probe


def _row(expected: Forecast, plan: Plan) -> dict[str, Any]:
    predicted = expected.forgetting if plan.limit_on == "mean" else expected.worst
    above = None if predicted is None else predicted.probability_above(plan.max_forgetting)
    return expected.to_json() | {"exceed_probability": above}


def _limits(max_forgetting: float, limit_on: str, confidence: float) -> Limits:
    from ..records.verdict import Limits

    return Limits(max_forgetting, limit_on, confidence)  # type: ignore[arg-type]  # it checks


def _check_methods(methods: Sequence[str], record: Sequence[Outcome]) -> None:
    known = dict.fromkeys([*METHODS, "linear_probe", *sorted({o.method for o in record})])
    for method in methods:
        if method not in known:
            raise ValueError(f"`--method` must be one of {', '.join(known)}, got {method!r}")


def _record(subject: Subject, store: Path | None) -> list[Outcome]:
    """The runs to learn from: the saved ones, and for the shipped model what ships with it."""
    path, found = read_record(store)
    if subject.model == SAMPLE:
        from ..sample import load_outcomes

        found = found + load_outcomes()
    if not found:
        typer.echo(f"no saved runs in {path}: published averages are used", err=True)
    return found
