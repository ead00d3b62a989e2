"""A function -> a command of `iimm`: options from dataclasses, one answer, one line per error."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

_AS_JSON = Annotated[bool, Option("--json", help="Print JSON, and nothing else")]
_QUIET = Annotated[bool, Option("--quiet", help="Show no progress")]
_DEBUG = Annotated[bool, Option("--debug", help="Show the traceback of an error")]
_UNITS = {"s": 1, "m": 60, "h": 3600}
_GROUPS = {  # of options in the help; any other is of the output
    "Data": "split template image_column label_column task_name probe_size seed train off_target"
    " processor device batch_size model models task tasks mirror most_test",
    "Recipe": "method methods learning_rate steps epochs recipe train_batch_size script budget",
    "Limit": "max_forgetting limit_on confidence require_forecast limit",
}


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
        data: For machines, with ``--json``; NaN and infinity become null.
        text: For people.
        exit_code: Of the process.
    """

    data: dict[str, Any]
    text: str
    exit_code: int = 0


class Grouped(TyperCommand):
    """A command whose help has its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the groups in their order."""
        groups = {name: names.split() for name, names in _GROUPS.items()}
        found: dict[str, list[Any]] = {name: [] for name in ("Arguments", *groups, "Output")}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                homes = (name for name, names in groups.items() if parameter.name in names)
                is_argument = parameter.param_type_name == "argument"
                found["Arguments" if is_argument else next(homes, "Output")].append(record)
        for name, records in found.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class _NoTerminal:
    """A stream that is no terminal, so that no library shows a progress bar on it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Never."""
        return False


class Commands(TyperGroup):
    """Every error is one line on stderr and exit code 1; for wrong usage click's own would be 2."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Typer's own, its second option for completion left out of the help."""
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if parameter.name == "show_completion":
                parameter.hidden = True
        return parameters

    def main(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:
        """Run one command and exit."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        settings["standalone_mode"] = False
        try:
            code = super().main(args, *others, **settings)
        except (Exception, typer.Abort) as error:
            if "--debug" in args:
                typer.echo(_shown(traceback.format_exc()), err=True, nl=False)
            typer.echo(_shown(f"iimm: error: {_one_line(error)}"), err=True)
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


def no_bars_in_a_log() -> None:
    """Switch off the progress bars of libraries, unless stderr is a terminal."""
    if sys.stderr.isatty():
        return
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def command(group: typer.Typer, name: str) -> Callable[[Callable[..., Answer]], Any]:
    """Make a function that returns an `Answer` a command.

    A parameter whose type is a dataclass becomes a set of options, one for each field. Every
    command also has ``--json``, ``--quiet`` and ``--debug``; nothing but its answer goes to stdout.

    Args:
        group: What the command belongs to.
        name: Of the command.

    Returns:
        A decorator; it returns the function as it was.
    """

    def register(function: Callable[..., Answer]) -> Any:
        sets, parameters = _options(function)

        def run(as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
            err = _NoTerminal(sys.stderr) if as_json or quiet else sys.stderr
            with _naming(parameters):
                for parameter, kind in sets.items():
                    given[parameter] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
                with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
                    answer = function(**given)
            data = json.dumps(_plain(answer.data), indent=1, allow_nan=False)
            if os.environ.get("RANK", "0") == "0":  # of several ranks one answers
                typer.echo(data if as_json else _shown(answer.text))
            raise typer.Exit(answer.exit_code)

        # What typer reads a function's options from.
        run.__doc__ = inspect.getdoc(function)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        group.command(name, cls=Grouped)(run)
        return function

    return register


@contextmanager
def _naming(parameters: Sequence[inspect.Parameter]) -> Iterator[None]:
    """Errors of a setting name the option that it comes from: `probe_size` is `--probe-size`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if error.args and isinstance(text := error.args[0], str):
            for p in parameters:
                if not any(isinstance(m, ArgumentInfo) for m in p.annotation.__metadata__):
                    text = text.replace(f"`{p.name}`", f"`--{p.name.replace('_', '-')}`")
            error.args = (text, *error.args[1:])
        raise


def _options(function: Callable[..., Any]) -> tuple[dict[str, Any], list[inspect.Parameter]]:
    """Parameter -> its dataclass; and all options."""
    sets: dict[str, Any] = {}
    options: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            sets[name] = hints[name]
            inner = get_type_hints(hints[name], include_extras=True)
            options += [(f.name, inner[f.name], f.default) for f in fields(hints[name])]
        else:
            options.append((name, hints[name], parameter.default))
    options += [("as_json", _AS_JSON, False), ("quiet", _QUIET, False), ("debug", _DEBUG, False)]
    empty = inspect.Parameter.empty
    return sets, [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=kind,
            default=empty if default is MISSING else default,
        )
        for name, kind, default in options
    ]


def _shown(text: str) -> str:
    """Text that is safe for a terminal: errors may quote anyone's data."""
    from ..reports.words import page

    return page(*text.split("\n"))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: BaseException) -> str:
    if isinstance(error, typer.Abort):
        return "aborted"
    if hasattr(error, "format_message"):  # click's own, about how the command was called
        context = getattr(error, "ctx", None)
        hint = f" See '{context.command_path} --help'." if context else ""
        return " ".join(f"{error.format_message().rstrip('.')}.{hint}".split())
    told = isinstance(error, ValueError | TypeError | OSError | ImportError) and str(error)
    return " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())


@contextmanager
def folder_to_write(folder: Path, argument: str) -> Iterator[None]:
    """Make a folder and test it before the work; it is removed if it stays empty.

    Args:
        folder: Which, its ``~`` expanded; it may be there.
        argument: Which of the command's arguments asks for it, for errors.

    Raises:
        ValueError: It cannot be made or written to.
    """
    made: list[Path] = []
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"`{argument}` needs a folder that can be written to, got {str(folder)!r} "
                f"({error.strerror or error}); name another"
            ) from error
        yield
    finally:
        with suppress(OSError):  # of the first that holds something
            for path in made:
                path.rmdir()


def check_choices(argument: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise unless each that is given is known; the error names the argument."""
    for name in given:
        if name not in known:
            raise ValueError(f"`{argument}` must be one of {', '.join(known)}, got {name!r}")


def seconds_of(text: str | None) -> float | None:
    """Seconds in words such as 90s, 30m or 1h30m; None of None.

    Raises:
        ValueError: There is no time in it.

    Example:
        >>> seconds_of("1h30m"), seconds_of("45s"), seconds_of("2.5m")
        (5400.0, 45.0, 150.0)
    """
    if text is None:
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or total <= 0:
        raise ValueError(f"`--budget` must be a time such as 90s, 30m or 1h30m, got {text!r}")
    return total


# Options and arguments of several commands.
Names = list[str] | None
Model = Annotated[
    str, Argument(help="Hub name, folder, sample, open_clip:NAME:TAG", metavar="MODEL")
]
Processor = Annotated[str | None, Option(help="Hub name or folder, where MODEL has none")]
OffTarget = Annotated[
    Names, Option(help="Not to forget, as DATASET; repeatable [default: shipped tasks]")
]
MaxForgetting = Annotated[float, Option(help="Limit, a fraction")]
LimitOn = Annotated[str, Option(help="'mean' of the off-target tasks, or the 'worst'")]
_Column = Annotated[str | None, Option(help="Where there is a choice")]


@dataclass(frozen=True)
class Reading:
    """How a data set and a model are read."""

    split: Annotated[str | None, Option(help="Default: test, or the only one")] = None
    template: Annotated[Names, Option(help="Prompt; repeatable [default: a photo of a {}.]")] = None
    image_column: _Column = None
    label_column: _Column = None
    task_name: Annotated[str | None, Option(help="Name of the task, as in past runs")] = None
    probe_size: Annotated[int | None, Option(help="Images, at most [default: 512]")] = None
    batch_size: Annotated[int, Option(help="Images in a forward pass", min=1)] = 64
    device: Annotated[str | None, Option(help="Default: cuda if there is one")] = None
    processor: Processor = None
    seed: Annotated[int, Option(help="Of the choice of images", min=0)] = 0

    def of_task(self) -> dict[str, Any]:
        """The settings that a task of any of the command's data sets has."""
        names = ("image_column", "label_column", "probe_size", "seed")
        return {name: getattr(self, name) for name in names}
