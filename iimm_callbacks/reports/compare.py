"""`compare_runs`: several runs side by side, methods and seeds, as gain against forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from ..records import keys
from ..records.run_file import check_run
from . import facts
from .drawing import (
    LIGHT,
    MARKS,
    SERIES,
    Picture,
    drawing,
    in_points,
    label,
    new_figure,
    render,
    save_picture,
    shown,
)
from .tables import mixed
from .terminal import is_complete
from .words import level_words, new_table, observed, page, points, standard_error, with_error

FORMATS = (".png", ".svg", ".pdf", ".html", ".htm")
_PAGES = (".html", ".htm")
_SHORT = ("gain", "mean", "worst")  # of `facts.QUANTITIES`
_FORGETTING = keys.observed_key("forgetting")
_GAIN = keys.observed_key("gain")


def compare_runs(
    records: Sequence[dict[str, Any]], path: str | Path, *, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Draw the gain of several runs against their forgetting, each from its first look to its last.

    Good runs lie high and to the left. Colour and mark tell task and method apart; a hollow mark is
    of a run that is not complete, from the untouched model to its last planned step.

    Args:
        records: `IIMMCallback.record` of each run, or what `read_run` returns.
        path: Of the picture (PNG, SVG, PDF), or of a page with it and its tables (``.html``).
        names: Of the runs, in tables; ``None``: run 1, run 2 and so on.

    Returns:
        JSON-ready data, in fractions: ``runs`` with a row for each, ``groups`` with one for each
        task and method, and ``notes`` on what does not compare. Differences within the standard
        errors and the spread of seeds rank nothing.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
        ValueError: There is no run, one that is no record, or no such format; or `names` is not as
            long as `records`.
    """
    checked = [check_run(record) for record in records]
    if not checked:
        raise ValueError("`records` must hold the record of at least one run, got none")
    names = [f"run {i + 1}" for i in range(len(checked))] if names is None else list(names)
    if len(names) != len(checked):
        raise ValueError(f"`names` must name all {len(checked)} runs, got {len(names)} names")
    path = Path(path)
    check_format(path, "path")
    data = {
        "runs": [_row(name, record) for name, record in zip(names, checked, strict=True)],
        "groups": _groups(checked),
        "notes": _notes(checked, names),
    }
    with drawing():
        picture = _picture(checked)
    if path.suffix.lower() in _PAGES:
        path.write_text(render("compare.html", _as_words(data, picture, checked)), encoding="utf-8")
    else:
        save_picture(picture, path)
    return data


def check_format(path: Path, argument: str) -> None:
    """Raise unless a comparison can be written in the format that the suffix names.

    Args:
        path: Where to write it.
        argument: What that is called in errors.

    Raises:
        ValueError: There is no such format, or `path` is a folder.
    """
    if path.suffix.lower() not in FORMATS or path.is_dir():
        got = f"{str(path)!r}, which is a folder" if path.is_dir() else repr(str(path))
        raise ValueError(f"`{argument}` must end in .png, .svg, .pdf or .html, got {got}")


def _row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    last, recipe = record["looks"][-1], record["recipe"]
    return {
        "name": name,
        **{key: record[key] for key in ("task", "method", "ended")},
        **{key: recipe.get(key) for key in ("seed", "learning_rate")},
        "step": last["step"],
        "share": last["share"],
        "complete": is_complete(record),
        **{q: observed(last, q) for q in facts.QUANTITIES},
        **{f"{q}_se": standard_error(last, q) for q in facts.QUANTITIES},
        "forecast": {q: record["forecast"].get(q) for q in facts.QUANTITIES},
        "base_rate": record["forecast"]["base_rate"],
        "level": last["level"],
    }


def _groups(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over the complete runs of each task and method."""
    groups = []
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in records):
        ends = [
            r["looks"][-1]
            for r in records
            if (r["task"], r["method"]) == (task, method) and is_complete(r)
        ]
        row: dict[str, Any] = {"task": task, "method": method, "n_runs": len(ends)}
        for q in facts.QUANTITIES:
            values = [v for end in ends if (v := observed(end, q)) is not None]
            row[q] = None
            if values:
                mean = sum(values) / len(values)
                row[q] = {"mean": mean, "low": min(values), "high": max(values)}
        groups.append(row)
    return groups


def _notes(records: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """What stands in the way of comparing these runs."""
    notes = []
    if len({r["task"] for r in records}) > 1:
        notes.append("The runs learn different tasks: gains are not of the same thing.")
    if len({str(r.get("model_fingerprint")) for r in records}) > 1:
        notes.append("The runs start from different weights.")
    if len({frozenset(r["off_target"]) for r in records if r["off_target"]}) > 1:
        notes.append("Their off-target tasks differ: mean and worst forgetting do not compare.")
    if _differ_in_images(records):
        notes.append("Images, prompts or preprocessing of a task, or its metric, differ.")
    whole = "from the untouched model to the last planned step"
    for words, whose in (
        (f"Not complete, {whole}", [not is_complete(r) for r in records]),
        ("Rescued at the end, shown as before", [mixed(r) is not None for r in records]),
        (
            "Without off-target tasks, and not in the picture",
            [not r["off_target"] for r in records],
        ),
    ):
        if any(whose):
            notes.append(f"{words}: {', '.join(compress(names, whose))}.")
    return notes


def _differ_in_images(records: Sequence[dict[str, Any]]) -> bool:
    seen: dict[str, set[str]] = {}
    for record in records:
        for task, value in record.get("fingerprints", {}).items():
            seen.setdefault(task, set()).add(value)
    return any(len(found) > 1 for found in seen.values())


def _picture(records: Sequence[dict[str, Any]]) -> Picture:
    figure, (axis,) = new_figure(4.6)
    drawn = [r for r in records if r["off_target"]]
    tasks = {r["task"] for r in drawn}
    groups = list(dict.fromkeys((r["task"], r["method"]) for r in drawn))
    for i, group in enumerate(groups):
        colour = LIGHT[SERIES[i % len(SERIES)]]
        mark = MARKS[(i + i // len(SERIES)) % len(MARKS)]  # a colour comes back with another mark
        own = [r for r in drawn if (r["task"], r["method"]) == group]
        for record in own:
            _draw_run(axis, record, colour, mark)
        words = label(group[1] if len(tasks) == 1 else ", ".join(group))
        # The number first: matplotlib leaves out what begins with an underscore.
        axis.plot([], [], mark, color=colour, label=f"{len(own)} × {words}")
    limits = {r["limits"]["max_forgetting"] for r in drawn if r["limits"]["limit_on"] == "mean"}
    limits -= {None}
    if len(limits) == 1:
        axis.axvline(100 * limits.pop(), color=LIGHT["red"], ls="-.", lw=1.3, label="limit")
    for line in (axis.axhline, axis.axvline):
        line(0, color=LIGHT["rule"], lw=1, zorder=0)
    axis.set_xlabel("mean forgetting (points)")
    axis.set_ylabel("gain (points)")
    if drawn:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.2)
    else:
        axis.text(0.5, 0.5, "no run has off-target tasks", transform=axis.transAxes, ha="center")
    ends = "; ".join(
        f"{r['method']} on {r['task']} gain {points(r['looks'][-1][_GAIN])}, forgetting "
        f"{points(r['looks'][-1][_FORGETTING])}{'' if is_complete(r) else ', not complete'}"
        for r in drawn
    )
    about = f" on {label(drawn[0]['task'])}" if len(tasks) == 1 else ""
    return Picture(
        "compare", f"Gain against forgetting{about}",
        f"Gain against mean forgetting in points, a path for each run. Latest looks: "
        f"{ends or 'none'}.",
        "Each path goes from the untouched model at 0, 0 to the run's latest look, the large mark, "
        "with its standard errors; hollow: not a complete run. High and to the left is good.",
        figure,
    )  # fmt: skip


def _draw_run(axis: Any, record: dict[str, Any], colour: str, mark: str) -> None:
    looks = record["looks"]
    x = in_points([row[_FORGETTING] for row in looks])
    y = in_points([row[_GAIN] for row in looks])
    axis.plot(x, y, "-", marker=".", ms=4, color=colour, lw=1, alpha=0.5)
    dx, dy = (in_points(standard_error(looks[-1], q) or 0.0) for q in ("forgetting", "gain"))
    face = colour if is_complete(record) else LIGHT["paper"]
    looks_like = {"fmt": mark, "ms": 8, "color": colour, "mfc": face, "mew": 1.6}
    axis.errorbar(x[-1], y[-1], dy, dx, **looks_like, elinewidth=1, zorder=4)


def _as_words(
    data: dict[str, Any], picture: Picture, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    rows = [
        row
        | {
            **{k: "" if row[k] is None else str(row[k]) for k in ("seed", "learning_rate")},
            "done": f"{row['share']:.0%}",
            **{q: with_error(record["looks"][-1], q) for q in facts.QUANTITIES},
        }
        for row, record in zip(data["runs"], records, strict=True)
    ]
    groups = [
        {"task": g["task"], "method": g["method"], "runs": str(g["n_runs"])}
        | {q: _spread(g[q]) for q in facts.QUANTITIES}
        for g in data["groups"]
    ]
    return {"rows": rows, "groups": groups, "notes": data["notes"], "picture": shown(picture)}


def _spread(found: dict[str, float] | None) -> str:
    """Mean and range of a group in points."""
    if found is None:
        return "none"
    mean, low, high = (points(found[k]) for k in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def tables(data: dict[str, Any]) -> str:
    """Every run and every group, for the terminal.

    Args:
        data: What `compare_runs` returns.
    """
    tasks = list(dict.fromkeys(row["task"] for row in data["runs"]))
    several = len(tasks) > 1
    of = "" if several else f": {tasks[0]}"
    task = ["task"] * several
    plain: dict[str, Any] = {"unbroken": (), "overflow": "fold"}
    about = ("run", *task, "method", "seed", "done")
    shown = new_table(f"Latest look of each run{of}", *about, *_SHORT, "verdict", **plain)
    for row in data["runs"]:
        seed = "" if row["seed"] is None else str(row["seed"])
        values = ["none" if row[q] is None else points(row[q]) for q in facts.QUANTITIES]
        cells = [row["name"], *[row["task"]] * several, row["method"], seed, f"{row['share']:.0%}"]
        shown.add_row(*cells, *values, level_words(row["level"]))
    title = f"Mean of the complete runs{of}"
    groups = new_table(title, *task, "method", "runs", *_SHORT, **plain)
    for row in data["groups"]:
        cells = [_spread(row[q]) for q in facts.QUANTITIES]
        groups.add_row(*[row["task"]] * several, row["method"], str(row["n_runs"]), *cells)
    meaning = "Gain, mean and worst forgetting in points; in brackets from lowest to highest."
    return page(shown, groups, meaning, *data["notes"])
