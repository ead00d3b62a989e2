"""The `iimm` command: measure, forecast and check a fine-tune beforehand; keep and grade runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..trainer.calibration.recipes import METHODS
from . import calibrating, demo, doctor, outcomes, planning, reproducing, rescuing, runs
from .measuring import (
    Confidence,
    Plan,
    Subject,
    check_methods,
    check_names,
    limits_of,
    measure,
    open_runs,
)
from .outcomes import Store, read_record
from .shell import Answer, Commands, LimitOn, command

if TYPE_CHECKING:
    from ..records.forecast import Forecast

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
    """Know before you fine-tune what a CLIP-like model gains and forgets."""
    if version:
        typer.echo(__version__)
        raise typer.Exit()


app.add_typer(outcomes.app, name="outcomes")
app.add_typer(reproducing.app, name="reproduce")

command(app, "demo")(demo.demo)
command(app, "doctor")(doctor.doctor)

command(app, "calibrate")(calibrating.calibrate)
command(app, "plan")(planning.plan)
command(app, "rescue")(rescuing.rescue)


def main() -> None:
    """Entry point of the `iimm` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character of a table
    app(prog_name="iimm")


@command(app, "measure")
def measure_only(subject: Subject) -> Answer:
    """Measure IIMM; no training."""
    check_names(subject)
    data = measure(subject).data
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
    data, forecasts = _measure(subject, plan, method or METHODS, store)
    from ..guard.judging import recommend
    from ..reports import tables

    data |= {"recommended": recommend(forecasts, plan.limits())}
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
    data, forecasts = _measure(subject, plan, [method], store)
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
    for name in method or ():  # before the work
        if name not in known:
            raise ValueError(f"`--method` must be one of {', '.join(known)}, got {name!r}")
    typer.echo(f"replaying {len(found)} runs", err=True)
    from ..forecasting.forecaster import Forecaster
    from ..reports import tables

    graded = (
        Forecaster()
        .grade(found, limits=chosen, limit_on=checked[0].limit_on, confidence=confidence)
        .to_json()
    )
    shown = [row for row in graded["forecasts"] if row["method"] in (method or known)]
    data = {"store": str(path), "limit_on": limit_on} | graded | {"forecasts": shown}
    return Answer(data, tables.grades(data, method or ["all"]))


command(app, "report")(runs.report)
command(app, "compare")(runs.compare)


def _measure(
    subject: Subject, plan: Plan, methods: Sequence[str], store: str | None
) -> tuple[dict[str, Any], dict[str, Forecast]]:
    """The measure with a forecast of each method from the saved runs, as data and as they are."""
    check_names(subject)
    past = open_runs(subject.model, store)
    check_methods(methods, past)
    from ..forecasting.forecaster import Forecaster

    found = measure(subject)
    about = found.about | {"recipe": plan.recipe(), "off_target": plan.off_target or ()}
    forecaster = Forecaster().fit(past.relevant(about["model"]))
    forecasts = {
        method: forecaster.predict(found.measurement, method=method, **about) for method in methods
    }
    rows = {method: _row(expected, plan) for method, expected in forecasts.items()}
    return found.data | {"limits": asdict(plan.limits()), "forecasts": rows}, forecasts


def _row(expected: Forecast, plan: Plan) -> dict[str, Any]:
    predicted = expected.forgetting if plan.limit_on == "mean" else expected.worst
    above = None if predicted is None else predicted.probability_above(plan.max_forgetting)
    return expected.to_json() | {"exceed_probability": above}
