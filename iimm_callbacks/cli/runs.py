"""`iimm report` and `iimm compare`: run files -> a page, or a picture of several side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .outcomes import open_record
from .shell import Answer, folder_to_write, read_run_file

_WIDTH = 96
_SHORT = ("gain", "mean", "worst")  # of `QUANTITIES`


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
