"""What many runs came to, a calibration's or the paper's -> tables for the terminal, and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .drawing import LIGHT, Picture, drawing, in_points, legend_above, new_figure, render, shown
from .tables import WORDS, named
from .words import duration, gained, interval, new_table, or_nothing, page, points, size

_COLOURS = ("blue", "red", "green", "ink")
_STATISTICS = {"r2": "R²", "slope": "slope", "tau": "Kendall's tau"}
_TARGETS = {"gain_over_zero_shot_error": "gain over zero-shot error", "forgetting": "forgetting"}


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
    limit = f"{size(data['limits']['max_forgetting'])} points"
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
        ends = gained(data["tried"]["gain"], data["tried"]["forgetting"])
        parts.append(f"Tried: {ends}; the run is saved.")
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


def paper(data: dict[str, Any]) -> str:
    """The published values beside what was found.

    Args:
        data: What `iimm reproduce paper --json` prints.
    """
    title = "Published values, and what was found, with 95 % intervals"
    columns = ("model", "of the gain", "published", "here", "so")
    table = new_table(title, *columns)
    for row in _claims(data):
        name = f"{row['statistic']}, {row['predictor']}"
        table.add_row(row["model"], name, row["published"], row["here"], row["status"])
    parts: list[Table | str] = [table, _summary(data), *_departures(data)]
    parts += [f"Failed: {run}: {why}" for run, why in data["failed"].items()]
    if data["n_left"]:
        parts.append(f"{data['n_left']} runs were not begun; the same command does them.")
    return page(*parts, f"Written to {data['page']}.")


def paper_plan(data: dict[str, Any]) -> str:
    """What would be run.

    Args:
        data: What `iimm reproduce paper --dry-run --json` prints.
    """
    models = new_table("Models", "model", "from")
    for row in data["models"]:
        models.add_row(row["title"], row["place"])
    columns = "task", "from", "training images", "test images", "prompt"
    tasks = new_table("Data sets", *columns, unbroken=("task",))
    for row in data["tasks"]:
        tasks.add_row(row["name"], row["place"], f"{row['n_train']:,}", f"{row['n_test']:,}",
                      row["template"])  # fmt: skip
    hours = (
        f"About {data['hours']:.3g} hours in all at {data['speed']:g} training images a second, of "
        f"them {data['look_hours']:.3g} for measuring and evaluation at three times that speed; "
        "measure yours and give it by --speed."
    )
    rates = ", ".join(f"{rate:g}" for rate in data["rates"])
    runs = (
        f"{data['n_runs']} runs: {len(data['models'])} models, {len(data['tasks'])} tasks, "
        f"{', '.join(data['methods'])}; learning rates {rates}; {data['epochs']} epochs in batches "
        f"of {data['batch_size']}."
    )
    return page(models, tasks, runs, hours, *_departures(data))


def _departures(data: Mapping[str, Any]) -> list[str]:
    found = data["departures"]
    return [f"Not the paper's experiment: {'; '.join(found)}."] if found else []


def write_page(data: dict[str, Any], choices: Sequence[str], path: Path) -> None:
    """Write the page; it has everything inside it.

    Args:
        data: What `iimm reproduce paper --json` prints.
        choices: What the paper leaves open, and what was done.
        path: Of the page.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    with drawing():
        picture = _picture(data)
    context = {
        "summary": _summary(data),
        "departures": data["departures"],
        "claims": _claims(data),
        "picture": None if picture is None else shown(picture),
        "methods": _methods(data),
        "titles": data["titles"],
        "runs": data["runs"],
        "failed": data["failed"],
        "choices": choices,
    }
    path.write_text(render("paper.html", context), encoding="utf-8")


def _summary(data: Mapping[str, Any]) -> str:
    counted = Counter(row["status"] for row in data["claims"])
    said = ", ".join(
        f"{counted[status]} {status}" for status in ("reproduced", "not reproduced", "not run")
    )
    return f"Of {len(data['claims'])} published values {said}."


def _claims(data: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "model": data["titles"][row["model"]],
            "statistic": _STATISTICS[row["statistic"]],
            "predictor": data["predictors"][row["predictor"]],
            "published": f"{row['published']:.2f}",
            "here": _interval(row),
            "n_tasks": str(row["n_tasks"]),
            "status": row["status"],
        }
        for row in data["claims"]
    ]


def _interval(row: Mapping[str, Any] | None, scale: float = 1.0) -> str:
    if row is None or row["value"] is None:
        return ""
    value, low, high = (scale * row[name] for name in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _methods(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each model, method and outcome."""
    groups: dict[tuple[str, str, str], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for cell in data["cells"]:
        group = groups.setdefault((cell["model"], cell["method"], cell["target"]), {})
        group[cell["statistic"], cell["predictor"]] = cell
    predictors = ("iimm", "zero_shot_error", "linear_probe")
    return [
        {
            "model": data["titles"][model],
            "method": method,
            "target": _TARGETS[target],
            "n_tasks": str(cells["r2", "iimm"]["n_tasks"]),
            "slope": _interval(cells["slope", "iimm"], scale=10),  # points per 0.1
        }
        | {name: _interval(cells["r2", name]) for name in predictors}
        for (model, method, target), cells in groups.items()
    ]


def _picture(data: Mapping[str, Any]) -> Picture | None:
    """Gain over zero-shot error against IIMM under the first method, a colour for each model."""
    rows = [row for row in data["runs"] if row["gain_over_zero_shot_error"] is not None]
    if not rows:
        return None
    method = rows[0]["method"]
    rows = [row for row in rows if row["method"] == method]
    figure, (axis,) = new_figure(4.2)
    told = []
    for colour, model in zip(_COLOURS, data["models"], strict=False):
        own = [row for row in rows if row["model"] == model]
        if own:
            x = [row["iimm"] for row in own]
            y = in_points([row["gain_over_zero_shot_error"] for row in own])
            axis.plot(x, y, "o", color=LIGHT[colour], label=data["titles"][model])
            told += [f"{data['titles'][model]}, {row['task']}: IIMM {row['iimm']:.3f}, "
                     f"{row['gain_over_zero_shot_error']:.2f}" for row in own]  # fmt: skip
    axis.set_xlabel("IIMM before training")
    axis.set_ylabel("gain over zero-shot error (%)")
    legend_above(axis)
    return Picture(
        "paper", f"Gain over zero-shot error against IIMM, {method} fine-tuning",
        f"Scatter plot. {'; '.join(told)}.",
        "A point is a task. The paper's claim is one rising line for each model.", figure,
    )  # fmt: skip
