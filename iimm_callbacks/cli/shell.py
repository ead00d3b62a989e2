"""A function -> a command of `iimm`: options from dataclasses, one answer, one line per error."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from ..report import page

_AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]


@dataclass(frozen=True)
class Answer:
    """What a command has to say.

    Attributes:
        data: For machines, with ``--json``; NaN and infinity become null.
        text: For people.
        exit_code: Of the process.
    """

    data: dict[str, Any]
    text: str
    exit_code: int = 0


class Commands(TyperGroup):
    """Every error is one line on stderr and exit code 1; for wrong usage click's own would be 2."""

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


def command(group: typer.Typer, name: str) -> Callable[[Callable[..., Answer]], Any]:
    """Make a function that returns an `Answer` a command.

    A parameter whose type is a dataclass becomes a set of options, one for each field. Every
    command also has ``--json`` and ``--debug``; nothing but its answer goes to stdout.

    Args:
        group: What the command belongs to.
        name: Of the command.

    Returns:
        A decorator; it returns the function as it was.
    """

    def register(function: Callable[..., Answer]) -> Any:
        sets, parameters = _options(function)

        def run(as_json: bool, debug: bool, **given: Any) -> None:
            for parameter, kind in sets.items():
                given[parameter] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            with contextlib.redirect_stdout(sys.stderr):
                answer = function(**given)
            data = json.dumps(_plain(answer.data), indent=1, allow_nan=False)
            typer.echo(data if as_json else _shown(answer.text))
            raise typer.Exit(answer.exit_code)

        # What typer reads a function's options from.
        run.__doc__ = inspect.getdoc(function)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        group.command(name)(run)
        return function

    return register


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
    options += [("as_json", _AS_JSON, False), ("debug", _DEBUG, False)]
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
    """What a terminal is shown: errors too may quote anyone's data."""
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
        return " ".join(f"{error.format_message()}{hint}".split())
    told = isinstance(error, ValueError | TypeError | OSError | ImportError) and str(error)
    return " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())
