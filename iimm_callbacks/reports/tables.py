"""A run, its rescue, forecasts and grades -> tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .terminal import forecast_lines, used
from .words import interval, level_words, new_table, or_nothing, page, percent, points, size

WORDS = {"gain": "gain", "forgetting": "mean forgetting", "worst": "worst forgetting"}


def measured(data: dict[str, Any]) -> str:
    """The measure with both terms, and zero-shot accuracy.

    Args:
        data: What `iimm measure --json` prints.

    Returns:
        Plain text, at most 96 columns; as of all functions here.
    """
    table = new_table(f"IIMM: {data['task']} ({data['model']})", "measured", "value", "meaning")
    error = data["standard_error"]
    spread = "" if error is None or error != error else f" ± {error:.3f}"
    images = f"{data['n_images']} images, {data['n_classes']} class prompts"
    table.add_row("IIMM", f"{data['iimm']:.3f}{spread}", images)
    table.add_row("  inter-modal", f"{data['inter']:.3f}", "image to wrong-class text")
    table.add_row("  intra-modal", f"{data['intra']:.3f}", "image to image")
    split = f", split {data['split']}" if data["split"] else ""
    accuracy = percent(data["zero_shot_accuracy"])
    table.add_row("zero-shot accuracy", accuracy, f"{data['dataset']}{split}")
    probe = data["linear_probe_accuracy"]
    spread = "" if probe is None else f" ± {100 * data['linear_probe_standard_error']:.1f}"
    value = "none" if probe is None else percent(probe)
    table.add_row("linear probe", f"{value}{spread}", data["linear_probe_note"])
    return page(table, data["pairing"])


def forecasts(data: dict[str, Any]) -> str:
    """The methods side by side, what each forecast rests on, and which to choose.

    Args:
        data: What `iimm forecast --json` prints, or `iimm preflight --json`.
    """
    rows, limits = data["forecasts"], data["limits"]
    names = {method: named(method, row) for method, row in rows.items()}
    limit = f"{size(limits['max_forgetting'])} points"
    table = new_table("Forecast in points, 90 % interval", "method", *WORDS.values(), "P(exceed)")
    for method, row in rows.items():
        above = row["exceed_probability"]
        cells = [interval(row.get(q)) for q in WORDS]
        table.add_row(names[method], *cells, "" if above is None else f"{above:.2f}")
    parts: list[Table | str] = [table]
    parts.append(f"P(exceed): of {limits['limit_on']} forgetting above {limit}.")
    if len(rows) == 1:
        return page(*parts, *(line for row in rows.values() for line in forecast_lines(row)))
    if any(row["evidence"] for row in rows.values()):
        parts.append(_evidence(rows, names))
        parts.append(
            "Of: gain, mean or worst forgetting. Plain mean, zero-shot: errors of simpler ones. "
            "In 90 %: outcomes inside the interval. Predictors: their weights in the forecast."
        )
    return page(*parts, *_words(rows, names), _choice(data, names, limit))


def verdict(data: dict[str, Any]) -> str:
    """The verdict of `iimm preflight` in a line.

    Args:
        data: What `iimm preflight --json` prints.
    """
    found = data["verdict"]
    go = "go" if data["go"] else "no go"
    if found["exceed_probability"] is None:
        (row,) = data["forecasts"].values()
        return page(f"Verdict: {go}, as there is nothing to judge by ({row['basis']}).")
    return page(f"Verdict: {go} ({level_words(found['level'])}): {found['reason']}.")


def outcomes(data: dict[str, Any]) -> str:
    """The saved runs.

    Args:
        data: What `iimm outcomes list --json` prints.
    """
    columns = ("model", "method", "task", "zero-shot", "gain", "mean", "worst", "ended")
    rows, pages = data["outcomes"], data["n_pages"]
    title = f"{data['n_found']} of {data['n_outcomes']} runs in {data['store']}"
    table = new_table(title, *columns)
    for row in rows:
        numbers = [or_nothing(row[q]) for q in WORDS]
        ended = row["ended"] if row["complete"] else f"incomplete: {row['ended']}"
        about = [row[name] for name in ("model", "method", "task")]
        table.add_row(*about, percent(row["zero_shot_accuracy"]), *numbers, ended)
    part = f" Page {data['page']} of {pages}: the last has the oldest." if pages > 1 else ""
    return page(table, f"Gain, mean and worst forgetting in points.{part}")


def grades(data: dict[str, Any], methods: Sequence[str]) -> str:
    """How good forecast and guard were on the saved runs.

    Args:
        data: What `iimm grade --json` prints.
        methods: Whose forecasts are shown.
    """
    table = new_table(
        f"Forecasts of {data['n_runs']} replayed runs, their task left out: mean error in points",
        "forecast of", "method", "steps", "runs", "error", "plain mean", "zero-shot", "in 90 %",
    )  # fmt: skip
    for quantity, words in WORDS.items():
        for row in data["forecasts"]:
            if row["quantity"] == quantity and row["method"] in methods:
                errors = [size(row[k]) for k in ("error", "error_of_mean", "error_of_zero_shot")]
                about = [words, row["method"], f"{row['share']:.0%}", str(row["n_runs"])]
                table.add_row(*about, *errors, f"{row['coverage']:.0%}")
        table.add_section()
    guard = new_table(
        f"Guard on {data['limit_on']} forgetting: what happened to the runs, in points",
        "limit", "policy", "over, stopped", "under, stopped", "kept to limit", "over by", "gain",
        "best gain", unbroken=("policy",),
    )  # fmt: skip
    last = None
    for row in data["guard"]:
        if last not in (None, row["limit"]):
            guard.add_section()
        last = row["limit"]
        under = row["n_runs"] - row["n_over"]
        kept = "" if row["kept_to_limit"] is None else f"{row['kept_to_limit']:.0%}"
        guard.add_row(
            size(row["limit"]),
            row["policy"],
            f"{row['stopped_of_over']}/{row['n_over']}",
            f"{row['stopped_of_under']}/{under}",
            kept,
            size(row["over_by"]),
            points(row["gain"]),
            points(row["gain_of_oracle"]),
        )
    left = f"{data['n_left_out']} runs could not be replayed."
    return page(
        table,
        "Error: of the forecast at this share of the steps. Plain mean, zero-shot:",
        "of simpler ones. In 90 %: outcomes inside the interval.",
        guard,
        "Over, under: of the runs that would end over or under the limit, those that were stopped.",
        "Kept to limit: of the stopped runs, those at most half a point and their noise over it.",
        "Over by: mean excess of the stopped runs. Gain: mean of all runs, stopped or not.",
        "Oracle, best gain: stopped at the last look within the limit, known from the whole run.",
        *[left] * (data["n_left_out"] > 0),
    )


def _evidence(rows: dict[str, Any], names: dict[str, str]) -> Table:
    title = "What they rest on: mean error in points, task left out (borrowed: model)"
    table = new_table(title, "method", "of")
    for column in ("error", "plain mean", "zero- shot", "in 90 %", "runs/ tasks"):
        table.add_column(column, justify="right", min_width=5, max_width=5)
    table.add_column("predictors", ratio=1)
    for method, row in rows.items():
        for quantity, found in row["evidence"].items():
            errors = [size(found[k]) for k in ("error", "error_of_mean", "error_of_zero_shot")]
            what = quantity if quantity != "forgetting" else "mean"
            rests = f"{found['n_runs']}/{found['n_tasks']}"
            covered = f"{found['coverage']:.0%}"
            table.add_row(names[method], what, *errors, covered, rests, used(found["predictors"]))
        table.add_section()
    return table


def _words(rows: dict[str, Any], names: dict[str, str]) -> list[str]:
    """Basis and notes, once where several methods have the same."""
    said: dict[str, list[str]] = {}
    for method, row in rows.items():
        for words in (row["basis"], *row["notes"]):
            said.setdefault(words, []).append(names[method])
    return [
        f"{'all' if len(whose) == len(rows) > 1 else ', '.join(whose)}: {words}."
        for words, whose in said.items()
    ]


def _choice(data: dict[str, Any], names: dict[str, str], limit: str) -> str:
    best = data["recommended"]
    if best is not None:
        return (
            f"Choose {names[best]}: of the methods that likely stay within {limit} of "
            f"{data['limits']['limit_on']} forgetting it has the highest gain forecast."
        )
    if not any(row.get("gain") for row in data["forecasts"].values()):
        return "No choice: there is no forecast of gain."
    return f"No choice: no method likely stays within {limit}."


def named(method: str, row: dict[str, Any]) -> str:
    """A method, marked where its forecast is borrowed."""
    return f"{method} (borrowed)" if row["base_rate"] else method


def rescue_table(rescue: dict[str, Any], task: str, score: str = "accuracy") -> str:
    """The curve from untouched to fine-tuned, what was chosen, and what that is worth.

    Args:
        rescue: `Rescue.to_json`; of ``applied`` None nothing is said.
        task: Name of the task that was learnt.
        score: What stands in for accuracy there.

    Returns:
        Plain text, at most 96 columns; points, with standard errors.
    """
    title = f"Rescue: {task}, untouched (α 0) to fine-tuned (α 1)"
    columns = ("α", score, "gain", "forgot, mean", "forgot, worst", "worst task", "")
    table = new_table(title, *columns, unbroken=columns)
    *mixes, held_out = curve(rescue)
    for cells in mixes:
        table.add_row(*cells)
    table.add_section()
    table.add_row(*held_out)
    became = {True: " The model is this mix now.", False: " The model was left as it was."}
    chosen, meaning, *notes = explained(rescue)
    chosen += became.get(rescue["applied"], "")
    return page(table, chosen, f"In points, ± standard error. {meaning}", *notes)


def curve(rescue: dict[str, Any]) -> list[list[str]]:
    """The cells of each mix and, last, of the held-out choice: α, score, gain and so on, a note.

    Args:
        rescue: `Rescue.to_json`.
    """
    mixes = [_cells(m, "chosen" if m["alpha"] == rescue["alpha"] else "") for m in rescue["mixes"]]
    return [*mixes, _cells(rescue["held_out"], "held out")]


def explained(rescue: dict[str, Any]) -> list[str]:
    """What was chosen and why, what "held out" means, and the notes, in sentences.

    Args:
        rescue: `Rescue.to_json`.
    """
    return [
        f"Chosen: α = {rescue['alpha']:.3g}, as {rescue['reason']}.",
        "Held out: what choosing like this gave on images that had no part in the choice.",
        *(f"Note: {note}." for note in rescue["notes"]),
    ]


def mixed(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rescue that a run's model was left with; None where it is the fine-tuned one.

    Args:
        record: `IIMMCallback.record`.
    """
    rescue: dict[str, Any] | None = record.get("rescue")
    return rescue if rescue and rescue["applied"] and rescue["alpha"] < 1 else None


def _cells(mix: dict[str, Any], mark: str) -> list[str]:
    said = [*([] if mix["inside"] else ["over"]), *([mark] if mark else [])]
    return [
        f"{mix['alpha']:.2f}",
        percent(mix["accuracy"]),
        *(
            f"{points(mix[key])} ± {size(mix[f'{key}_se'])}"
            for key in ("gain", "forgetting", "worst")
        ),
        mix["worst_task"],
        ", ".join(said),
    ]
