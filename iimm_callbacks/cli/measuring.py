"""`iimm measure`, `forecast`, `preflight` and `grade`: what is known before a run, and how well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from ..records.verdict import Limits
from ..trainer.calibration.recipes import METHODS
from .loading import SAMPLE, check_data, check_name, load_model, load_task, load_training
from .outcomes import Store, open_record, read_record
from .shell import Answer, LimitOn, MaxForgetting, Model, Names, Reading, check_choices

if TYPE_CHECKING:
    from torch import nn

    from ..data.tasks import Task
    from ..measures.results import Measurement
    from ..probing.probe import Probe
    from ..records.catalog import Catalog
    from ..records.forecast import Forecast

Confidence = Annotated[float, Option(help="Probability of exceeding to stop from")]


@dataclass(frozen=True, kw_only=True)
class Subject(Reading):
    """What is measured: the options of `measure`, `forecast`, `preflight` and `plan`."""

    model: Model
    dataset: Annotated[str, Argument(help="Hub name, folder, sample:NAME", metavar="DATASET")]
    train: Annotated[str | None, Option(help="Training data, as DATASET, for the linear probe")] = (
        None
    )

    def check_names(self) -> None:
        """Raise where there is no model or data set of these names."""
        check_name(self.model, "MODEL")
        check_data("DATASET", [self.dataset])
        check_data("--train", None if self.train is None else [self.train])


@dataclass(frozen=True)
class Plan:
    """The run that is planned, and its limit: further options of `forecast` and `preflight`."""

    learning_rate: Annotated[float | None, Option(help="Of the planned run")] = None
    steps: Annotated[int | None, Option(help="Of the planned run", min=1)] = None
    off_target: Annotated[Names, Option(help="Name of a task not to forget; repeatable")] = None
    max_forgetting: MaxForgetting = 0.05
    limit_on: LimitOn = "mean"
    confidence: Confidence = 0.8

    def __post_init__(self) -> None:
        check_rates([] if self.learning_rate is None else [self.learning_rate])
        self.limits()

    def limits(self) -> Limits:
        """The limits, checked."""
        return limits_of(self.max_forgetting, self.limit_on, self.confidence)

    def recipe(self) -> dict[str, float]:
        """What is known of the recipe."""
        given = {"learning_rate": self.learning_rate, "steps": self.steps}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Measured:
    """A model on a task, before any training.

    Attributes:
        data: What ``--json`` prints of it.
        about: What `Forecaster.predict` is told of it, without method, recipe and off-target tasks.
        measurement: The measure.
        task: Held-out images.
        model: In float32 and eval mode.
        processor: Of the model.
        train: Training images, where they are named.
        probe: Of the model on the task.
    """

    data: dict[str, Any]
    about: dict[str, Any]
    measurement: Measurement
    task: Task
    model: nn.Module
    processor: Any
    train: Task | None
    probe: Probe


def measure(subject: Subject) -> Answer:
    """Measure IIMM; no training."""
    subject.check_names()
    data = measured(subject).data
    from ..reports import tables

    return Answer(data, tables.measured(data))


def forecast(
    subject: Subject,
    plan: Plan,
    method: Annotated[
        Names, Option(help="Repeatable [default: all five]", show_default=False)
    ] = None,
    store: Store = None,
) -> Answer:
    """Measure IIMM, forecast gain and forgetting."""
    data, forecasts = _forecasts(subject, plan, method or METHODS, store)
    from ..guard.judging import recommend
    from ..reports import tables

    data |= {"recommended": recommend(forecasts, plan.limits())}
    return Answer(data, f"{tables.measured(data)}\n{tables.forecasts(data)}")


def preflight(
    subject: Subject,
    plan: Plan,
    method: Annotated[str, Option(help="Fine-tuning method, such as full")],
    require_forecast: Annotated[
        bool, Option("--require-forecast", help="Nothing to judge by is an error")
    ] = False,
    store: Store = None,
) -> Answer:
    """Exit with 0 go, 2 limit exceeded, 1 error.

    For a job queue or CI. A warning alone is a go, and so is having nothing to judge by.
    """
    data, forecasts = _forecasts(subject, plan, [method], store)
    from ..guard.judging import judge
    from ..reports import tables

    expected = forecasts[method]
    verdict = judge(expected, None, plan.limits())
    if require_forecast and (expected.base_rate or verdict.exceed_probability is None):
        why = f"borrowed: {expected.basis}" if expected.base_rate else expected.basis
        raise ValueError(
            "`--require-forecast` needs saved runs of this model to judge by, got none "
            f"({why}); add some, or leave it out"
        )
    go = verdict.level != "stop"
    data |= {"verdict": asdict(verdict), "go": go}
    text = "\n".join([tables.measured(data), tables.forecasts(data), tables.verdict(data)])
    return Answer(data, text, 0 if go else 2)


def grade(
    limit: Annotated[
        list[float] | None, Option(help="A fraction; repeatable [default: 0.02 0.03 0.05]")
    ] = None,
    limit_on: LimitOn = "mean",
    confidence: Confidence = 0.8,
    method: Annotated[Names, Option(help="Show its forecasts; repeatable [default: all]")] = None,
    store: Store = None,
) -> Answer:
    """Grade forecast and guard on the saved runs.

    Each run is replayed as if live, and forecast from the runs on other tasks.
    """
    chosen = limit or [0.02, 0.03, 0.05]
    if not all(0 < x <= 1 for x in chosen):
        raise ValueError(f"`--limit` must be a fraction in (0, 1], such as 0.05, got {chosen}")
    checked = [limits_of(x, limit_on, confidence) for x in chosen]
    path, found = read_record(store)
    if not found:
        raise ValueError(
            f"`--store` must hold outcomes to grade, got {path} without any; `iimm calibrate` "
            "makes some, and `--store sample` has those that ship"
        )
    known = sorted({"all", *(run.method for run in found)})
    check_choices("--method", method or (), known)  # before the work
    typer.echo(f"replaying {len(found)} runs", err=True)
    from ..forecasting.forecaster import Forecaster
    from ..reports import tables

    settings: dict[str, Any] = {"limit_on": checked[0].limit_on, "confidence": confidence}
    graded = Forecaster().grade(found, limits=chosen, **settings).to_json()
    shown = [row for row in graded["forecasts"] if row["method"] in (method or known)]
    data = {"store": str(path), "limit_on": limit_on} | graded | {"forecasts": shown}
    return Answer(data, tables.grades(data, method or ["all"]))


def measured(subject: Subject) -> Measured:
    """Model and data set of these names, and the measure of one on the other."""
    from ..data.training import SAMPLE_SIZE
    from ..models.wrappers import model_fingerprint
    from ..probing.learnable import TrainingSet
    from ..probing.probe import Probe

    settings = subject.of_task() | {"templates": subject.template}
    name = subject.task_name
    task, split = load_task(subject.dataset, split=subject.split, task_name=name, **settings)
    model, processor = load_model(subject.model, processor=subject.processor, device=subject.device)
    train = None
    if subject.train is not None:
        settings |= {"task_name": task.name, "probe_size": SAMPLE_SIZE}
        train = load_training(subject.train, **settings)
    probe = Probe(
        task,
        processor=processor,
        batch_size=subject.batch_size,
        train=None if train is None else TrainingSet(train),
    )
    look = probe.look(model, 0, linear_probe=True)
    learnable = look.learnable
    assert learnable is not None  # it was asked for
    accuracy = error = None
    if learnable.probe is not None:
        accuracy, error = learnable.probe.at(learnable.n_train)
    learnt = {"linear_probe_accuracy": accuracy, "linear_probe_standard_error": error}
    seen = {"task": task.name, "task_fingerprint": probe.fingerprints[task.name],
            "zero_shot_accuracy": look.accuracy(task.name)}  # fmt: skip
    fingerprint = model_fingerprint(model)
    data = {
        "model": subject.model,
        "model_fingerprint": fingerprint,
        "dataset": subject.dataset,
        "split": split,
        "templates": list(task.templates),
        "pairing": task.pairing(),
        **seen,
        **asdict(look.measurement),
        **learnt,
        "linear_probe_note": learnable.note,
    }
    about = {"model": fingerprint, "n_train": learnable.n_train, **seen, **learnt}
    return Measured(data, about, look.measurement, task, model, processor, train, probe)


def _forecasts(
    subject: Subject, plan: Plan, methods: Sequence[str], store: str | None
) -> tuple[dict[str, Any], dict[str, Forecast]]:
    """The measure with a forecast of each method from the saved runs, as data and as they are."""
    subject.check_names()
    past = open_runs(subject.model, store)
    check_methods(methods, past)
    from ..forecasting.forecaster import Forecaster

    found = measured(subject)
    about = found.about | {"recipe": plan.recipe(), "off_target": plan.off_target or ()}
    forecaster = Forecaster().fit(past.relevant(about["model"]))
    forecasts = {
        method: forecaster.predict(found.measurement, method=method, **about) for method in methods
    }
    rows = {}
    for method, expected in forecasts.items():
        predicted = expected.forgetting if plan.limit_on == "mean" else expected.worst
        above = None if predicted is None else predicted.probability_above(plan.max_forgetting)
        rows[method] = expected.to_json() | {"exceed_probability": above}
    return found.data | {"limits": asdict(plan.limits()), "forecasts": rows}, forecasts


def limits_of(max_forgetting: float, limit_on: str, confidence: float = 0.8) -> Limits:
    """The limits, checked."""
    return Limits(max_forgetting, limit_on, confidence)  # type: ignore[arg-type]  # it checks


def check_rates(rates: Sequence[float]) -> None:
    """Raise unless each is a learning rate."""
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"`--learning-rate` must be a positive number, got {rate}")


def check_methods(methods: Sequence[str], past: Catalog) -> None:
    """Raise unless each is a method of ours or of a saved run."""
    known = dict.fromkeys([*METHODS, "linear_probe", *sorted(past.methods())])
    check_choices("--method", methods, known)


def open_runs(model: str, store: str | None) -> Catalog:
    """The runs to learn from: the saved ones, and for the shipped model what ships with it."""
    path, found = open_record(store)
    if model == SAMPLE:
        from ..records.catalog import Listed
        from ..sample import load_outcomes

        shipped = load_outcomes()  # all of one model
        saved = found.relevant(shipped[0].model_fingerprint)
        found = Listed(saved + [run for run in shipped if run not in saved])  # none twice
    if not found.n_outcomes:
        typer.echo(f"no saved runs in {path}: the shipped runs of other models are used", err=True)
    return found
