"""The `iimm` command: measure, forecast and check a fine-tune beforehand; grade and show runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .. import __version__
from ..trainer.calibration.recipes import METHODS
from . import calibrating, demo, doctor, outcomes, planning, reproducing, rescuing
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
from .outcomes import Store, open_record, read_record
from .shell import Answer, Commands, LimitOn, command, folder_to_write, read_run_file

if TYPE_CHECKING:
    from ..records.forecast import Forecast

_WIDTH = 96
_SHORT = ("gain", "mean", "worst")  # of `QUANTITIES`

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


@command(app, "report")
def report(
    run: Annotated[Path, typer.Argument(help="What the guard wrote", metavar="RUN.json")],
    to: Annotated[
        Path | None, typer.Option(help="Folder [default: RUN_report]", show_default=False)
    ] = None,
    outcomes: Annotated[
        str | None,
        typer.Option(
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
    record = read_run_file(run)
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


@command(app, "compare")
def compare(
    run: Annotated[list[Path], typer.Argument(help="Two or more", metavar="RUN.json")],
    to: Annotated[Path, typer.Option(help="Picture (.png, .svg, .pdf) or page (.html)")] = Path(
        "compare.png"
    ),
) -> Answer:
    """Draw the gain of several runs against their forgetting.

    Such as those of different methods and seeds.
    """
    files = [path.expanduser() for path in run]
    if len(files) < 2:
        raise ValueError(f"`RUN.json` must be two or more to compare, got {files[0]} alone")
    records = [read_run_file(path) for path in files]
    from ..reports.compare import check_format, compare_runs
    from ..reports.words import page

    to = to.expanduser()
    check_format(to, "--to")
    with folder_to_write(to.parent, "--to"):
        data = compare_runs(records, to, names=_names(files))
    return Answer(data | {"written": str(to)}, f"{_tables(data)}\n{page(f'Written to {to}.')}")


def _names(files: Sequence[Path]) -> list[str]:
    """The paths, without what all have in common."""
    paths = [path.absolute() for path in files]
    above = os.path.commonpath([path.parent for path in paths])
    names = [path.relative_to(above) for path in paths]
    if len({name.name for name in names}) == 1 and all(len(name.parts) > 1 for name in names):
        names = [name.parent for name in names]
    return [name.with_suffix("").as_posix() if name.suffix == ".json" else name.as_posix()
            for name in names]  # fmt: skip


def _tables(data: dict[str, Any]) -> str:
    from ..reports.compare import spread
    from ..reports.facts import QUANTITIES
    from ..reports.words import level_words, page, points

    tasks = list(dict.fromkeys(row["task"] for row in data["runs"]))
    several = len(tasks) > 1
    of = "" if several else f": {tasks[0]}"
    task = ["task"] * several
    shown = _table(f"Latest look of each run{of}", "run", *task, "method", "seed", "done", *_SHORT,
                   "verdict")  # fmt: skip
    for row in data["runs"]:
        seed = "" if row["seed"] is None else str(row["seed"])
        values = ["none" if row[q] is None else points(row[q]) for q in QUANTITIES]
        about = (row["name"], *[row["task"]] * several, row["method"], seed, f"{row['share']:.0%}")
        shown.add_row(*about, *values, level_words(row["level"]))
    groups = _table(f"Mean of the complete runs{of}", *task, "method", "runs",
                    *_SHORT)  # fmt: skip
    for row in data["groups"]:
        cells = [spread(row[q]) for q in QUANTITIES]
        groups.add_row(*[row["task"]] * several, row["method"], str(row["n_runs"]), *cells)
    meaning = "Gain, mean and worst forgetting in points; in brackets from lowest to highest."
    return page(shown, groups, meaning, *data["notes"])


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, width=_WIDTH)
    for column in columns:
        words = column in ("run", "task", "method", "verdict")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table
