"""What is measured, and the run that is planned: shared by `measure`, `forecast` and `plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..trainer.calibration.recipes import METHODS
from .loading import SAMPLE, check_name, load_model, load_task, load_training
from .outcomes import open_record
from .shell import LimitOn, Reading

if TYPE_CHECKING:
    from torch import nn

    from ..data.tasks import Task
    from ..measures.results import Measurement
    from ..probing.probe import Probe
    from ..records.catalog import Catalog
    from ..records.verdict import Limits

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
class Opened:
    """What the names of a `Subject` stand for.

    Attributes:
        task: Held-out images.
        split: Of the data set; empty where it has none.
        model: In float32 and eval mode.
        processor: Of the model.
        train: Training images, where they are named.
        probe: Of the model on the task.
    """

    task: Task
    split: str | None
    model: nn.Module
    processor: Any
    train: Task | None
    probe: Probe


@dataclass(frozen=True)
class Measured:
    """A model on a task, before any training.

    Attributes:
        data: What ``--json`` prints of it.
        about: What `Forecaster.predict` is told of it, without method, recipe and off-target tasks.
        measurement: The measure.
        opened: Model and task.
    """

    data: dict[str, Any]
    about: dict[str, Any]
    measurement: Measurement
    opened: Opened


def measure(subject: Subject) -> Measured:
    """Model and data set of these names, and the measure of one on the other."""
    from ..models.wrappers import model_fingerprint

    opened = _open(subject)
    probe, task, model = opened.probe, opened.task, opened.model
    look = probe.look(model, 0, linear_probe=True)
    learnable = look.learnable
    assert learnable is not None  # it was asked for
    accuracy = error = None
    if learnable.probe is not None:
        accuracy, error = learnable.probe.at(learnable.n_train)
    learnt = {"linear_probe_accuracy": accuracy, "linear_probe_standard_error": error}
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
        "split": opened.split,
        "templates": list(task.templates),
        "pairing": task.pairing(),
        **{name: about[name] for name in ("task", "task_fingerprint", "zero_shot_accuracy")},
        **asdict(look.measurement),
        **learnt,
        "linear_probe_note": learnable.note,
    }
    about |= learnt | {"n_train": learnable.n_train}
    return Measured(data, about, look.measurement, opened)


def check_names(subject: Subject) -> None:
    """Raise where there is no model or data set of these names."""
    check_name(subject.model, "MODEL")
    check_name(subject.dataset, "DATASET", is_model=False)
    if subject.train is not None:
        check_name(subject.train, "--train", is_model=False)


def _open(subject: Subject) -> Opened:
    """The task and its split, the model, and the probe of one on the other."""
    from ..data.training import SAMPLE_SIZE
    from ..probing.learnable import TrainingSet
    from ..probing.probe import Probe

    task, split = load_task(
        subject.dataset,
        split=subject.split,
        task_name=subject.task_name,
        templates=subject.template,
        **subject.of_task(),
    )
    model, processor = load_model(subject.model, processor=subject.processor, device=subject.device)
    train = None
    if subject.train is not None:
        settings = subject.of_task() | {"probe_size": SAMPLE_SIZE, "templates": subject.template}
        train = load_training(subject.train, task_name=task.name, **settings)
    probe = Probe(
        task,
        processor=processor,
        batch_size=subject.batch_size,
        train=None if train is None else TrainingSet(train),
    )
    return Opened(task, split, model, processor, train, probe)


def limits_of(max_forgetting: float, limit_on: str, confidence: float) -> Limits:
    """The limits, checked."""
    from ..records.verdict import Limits

    return Limits(max_forgetting, limit_on, confidence)  # type: ignore[arg-type]  # it checks


def check_rates(rates: Sequence[float]) -> None:
    """Raise unless each is a learning rate."""
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"`--learning-rate` must be a positive number, got {rate}")


def check_methods(methods: Sequence[str], past: Catalog) -> None:
    """Raise unless each is a method of ours or of a saved run."""
    known = dict.fromkeys([*METHODS, "linear_probe", *sorted(past.methods())])
    for method in methods:
        if method not in known:
            raise ValueError(f"`--method` must be one of {', '.join(known)}, got {method!r}")


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
