"""What a run prints: five lines before training, one line a look, where things went at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..records import keys
from .terminal import FEW
from .words import WIDTH, forecast_in, interval, level_words, page, percent, points, score_name


def preflight_lines(record: dict[str, Any], plan: str) -> str:
    """Before training: accuracy, forecasts, the task most at risk, limit and verdict, looks.

    Args:
        record: `IIMMMonitor.record`.
        plan: The looks to come, in words.

    Returns:
        Plain text, at most 96 columns.
    """
    row, forecast = record["looks"][0], record["forecast"]
    grid = Table.grid(padding=(0, 2))
    grid.width = WIDTH
    grid.add_column(no_wrap=True)
    grid.add_column()
    score = score_name(record.get("metrics", {}), record["task"], *record["off_target"])
    grid.add_row(f"  {score}", _accuracies(record, row))
    for name in ("gain", "forgetting"):
        where = " points at the end, 90 % interval; from" if name in forecast else ":"
        found = f"{interval(forecast.get(name))}{where} {_basis(forecast)}"
        grid.add_row(f"  forecast {name}", found)
    if risks := forecast.get("off_target"):
        name = next(iter(risks))
        grid.add_row("  most at risk", f"{name}: {interval(risks[name])} points lost")
    grid.add_row("  limit", _limit(record["limits"], row))
    grid.add_row("  looks", plan)
    return page(f"IIMM before training: {record['task']} ({record['method']})", grid)


def look_line(row: dict[str, Any]) -> str:
    """One look during training, on one line, in points."""
    parts = [
        f"IIMM step {row['step']} ({row['share']:.0%}): "
        f"gain {points(row[keys.observed_key('gain')])}"
    ]
    if keys.observed_key("forgetting") in row:
        parts.append(f"forgetting {points(row[keys.observed_key('forgetting')])}")
    ahead = forecast_in(row, "forgetting")
    if ahead is not None and row["share"] < 1:
        parts.append(f"forecast {interval(ahead)}")
    parts[-1] += " points"  # the unit of all before it
    if keys.EXCEED in row:
        parts.append(f"P(over limit) {row[keys.EXCEED]:.2f}")
    return page(" | ".join([*parts, level_words(row["level"])]))


def saved_lines(run_file: Path | None, store: Any) -> str:
    """Where the run went, and how to see it.

    Args:
        run_file: With all that was measured; ``None``: none was written.
        store: That the outcome was added to; ``None``: none.
    """
    outcome = "the outcome was not saved" if store is None else f"outcome in {store}"
    if run_file is None:
        return page(f"Saved: no run file; {outcome}.")
    return page(f"Saved: run file {run_file}; {outcome}.", f"Report: iimm report {run_file}")


def _basis(forecast: dict[str, Any]) -> str:
    borrowed = "runs of other models (borrowed)" if forecast["base_rate"] else ""
    return borrowed or str(forecast["basis"]).removeprefix("no forecast: ")


def _accuracies(record: dict[str, Any], row: dict[str, Any]) -> str:
    text = f"{percent(row[keys.ACCURACY])} on {record['task']}"
    before = {name: row[keys.accuracy_key(name)] for name in record["off_target"]}
    if not before:
        return f"{text}; no off-target task"
    if len(before) <= FEW:
        return f"{text}; off target: " + ", ".join(f"{n} {percent(a)}" for n, a in before.items())
    mean = percent(sum(before.values()) / len(before))
    return f"{text}; off target: {mean}, the mean of {len(before)} tasks"


def _limit(limits: dict[str, Any], row: dict[str, Any]) -> str:
    if limits["max_forgetting"] is None:
        return "none, only measuring"
    size = points(limits["max_forgetting"]).removeprefix("+")
    text = f"{size} points of {limits['limit_on']} forgetting; verdict: {level_words(row['level'])}"
    if keys.EXCEED not in row:
        return f"{text}, nothing to judge by yet"
    return f"{text}, P(over limit) {row[keys.EXCEED]:.2f}"
