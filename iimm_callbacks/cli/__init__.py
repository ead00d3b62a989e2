"""The `iimm` command: measure, forecast and check a fine-tune beforehand; grade and show runs."""

import sys
from typing import Annotated

import typer

from .. import __version__
from ..trainer.calibration.recipes import METHODS
from . import experiments, finished, measuring, outcomes, planning, trying
from .shell import Commands, command

__all__ = ["METHODS", "app", "main"]

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
app.add_typer(experiments.app, name="reproduce")
for function in (
    trying.demo, trying.doctor, experiments.calibrate, planning.plan, finished.rescue,
    measuring.measure, measuring.forecast, measuring.preflight, measuring.grade, finished.report,
    finished.compare,
):  # fmt: skip
    command(app, function.__name__)(function)


def main() -> None:
    """Entry point of the `iimm` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character of a table
    app(prog_name="iimm")
