"""The paper's experiment again -> tables for the terminal, and one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .drawing import (
    LIGHT,
    Picture,
    drawing,
    in_points,
    legend_above,
    new_figure,
    render,
    require_matplotlib,
)
from .drawing import shown as as_shown
from .tables import new_table, or_nothing
from .words import page, percent

_COLOURS = ("blue", "red", "green", "ink")
_STATISTICS = {"r2": "R²", "slope": "slope", "tau": "Kendall's tau"}
_TARGETS = {"gain_over_zero_shot_error": "gain over zero-shot error", "forgetting": "forgetting"}


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
    parts: list[Table | str] = [table, _summary(data)]
    if data["departures"]:
        parts.append(f"Not the paper's experiment: {'; '.join(data['departures'])}.")
    parts += [f"Failed: {run}: {why}" for run, why in data["failed"].items()]
    if data["n_left"]:
        parts.append(f"{data['n_left']} runs were not begun; the same command does them.")
    return page(*parts, f"Written to {data['page']}.")


def plan(data: dict[str, Any]) -> str:
    """What would be run.

    Args:
        data: What `iimm reproduce paper --dry-run --json` prints.
    """
    models = new_table("Models", "model", "from")
    for row in data["models"]:
        models.add_row(row["title"], row["place"])
    columns = "task", "from", "training images", "test images", "prompt"
    tasks = new_table("Data sets", *columns, whole="task")
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
    parts: list[Table | str] = [models, tasks, runs, hours]
    if data["departures"]:
        parts.append(f"Not the paper's experiment: {'; '.join(data['departures'])}.")
    return page(*parts)


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
    require_matplotlib()
    with drawing():
        picture = _picture(data)
    context = {
        "summary": _summary(data),
        "departures": data["departures"],
        "claims": _claims(data),
        "picture": None if picture is None else as_shown(picture),
        "methods": _methods(data),
        "runs": [_run(data, row) for row in data["runs"]],
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
    shown = ("iimm", "zero_shot_error", "linear_probe")
    return [
        {
            "model": data["titles"][model],
            "method": method,
            "target": _TARGETS[target],
            "n_tasks": str(cells["r2", "iimm"]["n_tasks"]),
            "slope": _interval(cells["slope", "iimm"], scale=10),  # points per 0.1
        }
        | {name: _interval(cells["r2", name]) for name in shown}
        for (model, method, target), cells in groups.items()
    ]


def _run(data: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    gain = row["gain_over_zero_shot_error"]
    return {
        "model": data["titles"][row["model"]],
        "task": row["task"],
        "method": row["method"],
        "iimm": f"{row['iimm']:.3f}",
        "zero_shot": percent(row["zero_shot_accuracy"]),
        "linear_probe": percent(row["linear_probe_accuracy"]),
        "final": percent(row["final_accuracy"]),
        "gain": "near the ceiling" if gain is None else f"{gain:.2f}",
        "forgetting": or_nothing(row["forgetting"]),
        "worst": or_nothing(row["worst"]),
        "learning_rate": f"{row['learning_rate']:g}",
        "best_epoch": str(row["best_epoch"]),
    }


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
