"""What a calibration taught, and the recipes to choose from -> tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .tables import WORDS, named, new_table, or_nothing
from .words import duration, interval, page, points, size


def calibration(data: dict[str, Any]) -> str:
    """What a calibration taught: errors of the forecast before and now, and what to choose from.

    Args:
        data: What `iimm calibrate --json` prints.
    """
    n_runs, n_tasks = len(data["runs"]), len({run["task"] for run in data["runs"]})
    title = f"Error of forecasts before training, in points: {n_runs} runs on {n_tasks} tasks"
    errors = new_table(title, "forecast of", "method", "runs", "borrowed", "now")
    for row in data["errors"]:
        about = [WORDS[row["quantity"]], row["method"], str(row["n_runs"])]
        errors.add_row(*about, size(row["borrowed"]), size(row["own"]))
    columns = ("method", "learning rate", "steps", "tasks", "gain", "forgetting", "choice")
    recipes = new_table("What each recipe came to: means in points", *columns)
    for row in data["expected"]:
        rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
        numbers = [rate, str(row["steps"] or ""), str(row["n_tasks"])]
        ends = [or_nothing(row[name]) for name in ("gain", "forgetting")]
        recipes.add_row(row["method"], *numbers, *ends, "yes" if row["is_frontier"] else "")
    parts: list[Table | str] = [errors] if data["errors"] else []
    if data["expected"]:
        parts += [recipes, "Choice: no other recipe gains more and forgets less."]
    if data["errors"]:
        parts.append("Now: from the runs on the other tasks. Borrowed: from other models' runs.")
    parts += [f"Failed: {run}: {why}" for run, why in data["failed"].items()]
    missing = data["n_planned"] - n_runs
    if missing:
        parts.append(
            f"{missing} of {data['n_planned']} runs are missing; the same command does them."
        )
    for quantity in ("gain", "forgetting"):
        curve = [
            (row["n_tasks"], row[quantity]) for row in data["curve"] if row[quantity] is not None
        ]
        if len(curve) > 1:
            (_, last_but_one), (_, last) = curve[-2:]
            found = ", ".join(f"{size(error)} with {n}" for n, error in curve)
            parts.append(
                f"Error of the {WORDS[quantity]} by tasks on record: {found}; the last one "
                f"changed it by {points(last - last_but_one)}."
            )
    return page(*parts, *(f"Written to {path}." for path in data["pictures"]))


def plan(data: dict[str, Any]) -> str:
    """The recipes in the order in which to take them, and why.

    Args:
        data: What `iimm plan --json` prints.
    """
    limit = f"{points(data['limits']['max_forgetting']).removeprefix('+')} points"
    table = new_table(
        f"{data['task']}: most gain within {limit} of {data['limits']['limit_on']} forgetting",
        "recipe", "gain", "mean forgetting", "risk", "why",
    )  # fmt: skip
    for row in data["options"]:
        risk = row["exceed_probability"]
        cells = [interval(row["forecast"].get(q)) for q in ("gain", "forgetting")]
        name = named(row["name"], row["forecast"])
        shown = "" if risk is None else f"{risk:.2f}"
        table.add_row(name, *cells, shown, _why(row, data))
    parts: list[Table | str] = [table]
    parts.append("In points, 90 % intervals. Risk: probability of exceeding the limit.")
    if data["tried"] is not None:
        ends = [or_nothing(data["tried"][name]) for name in ("gain", "forgetting")]
        parts.append(f"Tried: gain {ends[0]}, forgetting {ends[1]} points; the run is saved.")
    best = next((row for row in data["options"] if row["name"] == data["choice"]), None)
    if best is None:
        return page(*parts, f"No choice: every recipe has a risk above {data['risk']:.2f}.")
    parts.append(f"Choose {best['name']}.")
    if not best["tried"]:
        parts.append(_surer(best["forecast"]["gain"], data["try_seconds"]))
    return page(*parts)


def _surer(gain: dict[str, float], seconds: float | None) -> str:
    width = size(gain["high"] - gain["low"])
    how = "--train TRAIN --try" if seconds is None else f"--try, about {duration(seconds)},"
    return f"To be surer: {how} runs it; a gain forecast within {width} points is observed then."


def _why(row: dict[str, Any], data: dict[str, Any]) -> str:
    if row["exceed_probability"] is None or not row["forecast"].get("gain"):
        return "no forecast"
    if not row["allowed"]:
        return f"risk above {data['risk']:.2f}"
    tried = "tried: " if row["tried"] else ""
    if row["name"] == data["choice"]:
        return f"{tried}most gain"
    return f"{tried}less gain" + (", not told apart" if row["not_told_apart"] else "")
