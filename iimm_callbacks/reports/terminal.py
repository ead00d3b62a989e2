"""What a run prints: five lines or a table before training, a line a look, a table at its end."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.table import Table

from ..records import keys
from .words import (
    WIDTH,
    forecast_in,
    interval,
    level_words,
    new_table,
    own_metric,
    page,
    percent,
    points,
    printable,
    score_name,
    size,
)

FEW = 4  # off-target tasks that are named
INCOMPLETE = (
    "A forecast is of a complete run, from the untouched model to the last planned step, and this "
    "one is not"
)


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
    grid.add_row("  limit", _limit_line(record["limits"], row))
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


def preflight_table(record: dict[str, Any]) -> str:
    """Before training: the measure, the forecast, the limit and the verdict.

    Args:
        record: `IIMMMonitor.record`.

    Returns:
        Plain text, at most 96 columns.
    """
    row = record["looks"][0]
    title = f"IIMM before training: {record['task']} ({record['method']})"
    table = new_table(title, "measured", "value", "meaning", unbroken=("measured", "value"))
    se = f" ± {row[keys.STANDARD_ERROR]:.3f}" if keys.STANDARD_ERROR in row else ""
    n, c = record["n_images"], record["n_classes"]
    table.add_row("IIMM", f"{row[keys.PREFIX]:.3f}{se}", f"{n} images, {c} class prompts")
    table.add_row("  inter-modal", f"{row[keys.INTER]:.3f}", "image to wrong-class text")
    table.add_row("  intra-modal", f"{row[keys.INTRA]:.3f}", "image to image")
    metrics = record.get("metrics", {})
    above = score_name(metrics, record["task"])
    table.add_row(above, percent(row[keys.ACCURACY]), record["task"])
    risks = record["forecast"].get("off_target", {})
    for name in record["off_target"]:
        score = score_name(metrics, name)
        value = percent(row[keys.accuracy_key(name)])
        risk = f", forecast drop {interval(risks[name])}" if name in risks else ""
        table.add_row("" if score == above else score, value, f"{name} (off-target){risk}")
        above = score
    if (probe := record.get("linear_probe")) is not None and probe["accuracy"] is not None:
        spread = f" ± {100 * probe['standard_error']:.1f}"
        table.add_row("linear probe", f"{percent(probe['accuracy'])}{spread}", probe["note"])
    trainable = f"{100 * record['recipe']['trainable_share']:.3g} %"
    table.add_row("trainable", trainable, f"of the parameters, method {record['method']!r}")
    forecast = record["forecast"]
    label = "borrowed forecast" if forecast["base_rate"] else "forecast"
    for name in ("gain", "forgetting"):
        meaning = "points at the end, 90 % interval" if name in forecast else ""
        table.add_row(f"{name} {label}", interval(forecast.get(name)), meaning)
    table.add_row("limit", *_limit(record))
    table.add_row("verdict", level_words(row["level"]), row["reason"])
    return page(table, *forecast_lines(forecast))


def forecast_lines(forecast: dict[str, Any]) -> list[str]:
    """What a forecast rests on and how good it was, in words.

    Args:
        forecast: `Forecast.to_json`.

    Returns:
        Lines of at most 96 columns: the basis, then each quantity.
    """
    notes = [note for note in forecast["notes"] if note not in forecast["basis"]]
    sentences = [words[:1].upper() + words[1:] for words in (forecast["basis"], *notes)]
    lines = wrap(printable(". ".join(sentences)) + ".", WIDTH)
    for name, found in forecast["evidence"].items():
        simpler = (("error_of_mean", "predicting the mean"),
                   ("error_of_zero_shot", "zero-shot error"))  # fmt: skip
        beside = [
            f"{words}: {size(found[key])}" for key, words in simpler if found[key] is not None
        ]
        also = f" ({', '.join(beside)})" if beside else ""
        unit = "model" if found.get("left_out") == "model" else "task"
        same = any(k.startswith("other runs of the same task") for k in found["predictors"])
        seen = ", with other runs of that task known" if same else ""
        text = (
            f"{name}: from {used(found['predictors']) or 'many predictors'}; leave-one-{unit}-out "
            f"error {size(found['error'])} points over {found['n_tasks']} tasks{also}{seen}; "
            f"90 % intervals covered {found['coverage']:.0%}"
        )
        lines += wrap(printable(text), WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def used(predictors: dict[str, float]) -> str:
    """The predictors with a tenth of the weight of a forecast or more; maybe none."""
    return ", ".join(f"{name} {share:.0%}" for name, share in predictors.items() if share >= 0.1)


def summary_table(record: dict[str, Any]) -> str:
    """After training: predicted against observed, and every off-target task.

    Args:
        record: `IIMMCallback.record`.

    Returns:
        Plain text, at most 96 columns.
    """
    first, last = record["looks"][0], record["looks"][-1]
    forecast = record["forecast"]
    predicted = "predicted, borrowed" if forecast["base_rate"] else "predicted before training"
    title = f"Predicted and observed: {record['task']} ({record['method']})"
    table = new_table(title, "in points", predicted, "observed", unbroken=())
    metrics = record.get("metrics", {})
    gain, own = points(last[keys.observed_key("gain")]), own_metric(metrics, record["task"])
    table.add_row(f"gain{own}", interval(forecast.get("gain")), gain)
    if record["off_target"]:
        mean = points(last[keys.observed_key("forgetting")])
        worst = points(last[keys.WORST])
        table.add_row("forgetting, mean", interval(forecast.get("forgetting")), mean)
        table.add_row("forgetting, worst", interval(forecast.get("worst")), worst)
    change = {n: [r[keys.accuracy_key(n)] for r in (first, last)] for n in record["off_target"]}
    shown = list(change)
    if len(shown) > FEW:
        shown = sorted(shown, key=lambda name: change[name][1] - change[name][0])[:FEW]
    for name in shown:
        was_and_is = " -> ".join(map(percent, change[name]))
        table.add_row(f"  {name}{own_metric(metrics, name)}", "", was_and_is)
    if n_more := len(change) - len(shown):
        table.add_row(f"  {n_more} tasks that lost less", "", "")
    notes = [f"Run: {record['ended']}."]
    if last["reason"] not in record["ended"]:
        notes = [f"{notes[0]} Last verdict: {level_words(last['level'])} ({last['reason']})."]
    if record["looks_dropped"]:
        notes.append(f"{record['looks_dropped']} looks were dropped to keep to `max_overhead`.")
    if record["failures"]:
        notes.append(f"{record['failures']} looks failed; see the warning above.")
    if not is_complete(record):
        notes = [*wrap(f"{INCOMPLETE}: the columns do not compare.", WIDTH), *notes]
    return page(table, *notes)


def is_complete(record: dict[str, Any]) -> bool:
    """Whether it is a run of which its forecasts are, see `INCOMPLETE`."""
    return bool(record["ended"] == "finished" and record["looks"][-1]["share"] >= 1)


def _limit(record: dict[str, Any]) -> tuple[str, str]:
    limits = record["limits"]
    if limits["max_forgetting"] is None:
        return "none", "only measuring"
    return (
        size(limits["max_forgetting"]),
        f"points of {limits['limit_on']} forgetting; stop from {limits['confidence']:.0%} sure",
    )


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


def _limit_line(limits: dict[str, Any], row: dict[str, Any]) -> str:
    if limits["max_forgetting"] is None:
        return "none, only measuring"
    most, level = size(limits["max_forgetting"]), level_words(row["level"])
    text = f"{most} points of {limits['limit_on']} forgetting; verdict: {level}"
    if keys.EXCEED not in row:
        return f"{text}, nothing to judge by yet"
    return f"{text}, P(over limit) {row[keys.EXCEED]:.2f}"


def __getattr__(name: str) -> Any:
    """`plot_run`, which stood here: its old import path keeps working."""
    if name != "plot_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .figures import plot_run

    return plot_run
