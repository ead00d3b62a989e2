"""A run's record -> the words and tables of its page: fractions in, points and percent out."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

from ..records import keys
from .figures import total_steps
from .tables import curve, explained, mixed
from .terminal import is_complete
from .words import (
    forecast_in,
    interval,
    observed,
    own_metric,
    percent,
    points,
    score_name,
    size,
    with_error,
)

QUANTITIES = {"gain": "gain", "forgetting": "forgetting, mean", "worst": "forgetting, worst task"}
_LEAST_SHARE = 0.05  # of a predictor that is named
_LATEST = 2**35  # seconds; what is later is no time


def state(record: dict[str, Any]) -> str:
    """How far the run came, and why not farther."""
    last, total = record["looks"][-1], total_steps(record)
    steps = f"{last['step']} of {total}" if total else str(last["step"])
    when = f"latest look after {steps} steps ({last['share']:.0%} done)"
    if record["ended"] == "running":
        return f"still running when this was written; {when}"
    return f"{record['ended']}; {when}"


def title(record: dict[str, Any]) -> str:
    """What happened, in one line."""
    last, limits = record["looks"][-1], record["limits"]
    gain = last[keys.observed_key("gain")]
    verb = "gained" if gain >= 0 else "lost"
    text = f"{record['task']}: {verb} {100 * abs(gain):.1f} points"
    mean = observed(last, "forgetting")
    if mean is None:
        return text
    text += f", forgot {size(mean)}"
    limit = limits["max_forgetting"]
    if limit is None:
        return text
    value = mean if limits["limit_on"] == "mean" else last[keys.WORST]
    worst = "" if limits["limit_on"] == "mean" else f" ({points(value)} on the worst task)"
    return f"{text}{worst}, {'over' if value > limit else 'within'} the limit of {100 * limit:.3g}"


def headline(record: dict[str, Any]) -> list[dict[str, str]]:
    """The few numbers to see first: each a name, a value and a note."""
    borrowed = record["forecast"]["base_rate"]
    label = "borrowed forecast" if borrowed else "forecast before training"
    found = [
        {"name": r["name"], "value": r["observed"], "note": f"{label}: {r['predicted']}"}
        for r in predicted_and_observed(record)
    ]
    if not record["off_target"]:
        note = "no off-target task was given, so it was not measured"
        found.append({"name": "forgetting", "value": "none", "note": note})
    return found


def predicted_and_observed(record: dict[str, Any]) -> list[dict[str, str]]:
    """One row per quantity: forecast before training, observed, and how they agree."""
    forecast, last = record["forecast"], record["looks"][-1]
    rows = []
    for name, words in QUANTITIES.items():
        value, predicted = observed(last, name), forecast.get(name)
        if value is None:
            continue
        row = {"name": words, "predicted": interval(predicted), "observed": with_error(last, name)}
        rows.append(row | {"agree": _agree(record, predicted, value)})
    return rows


def _agree(record: dict[str, Any], predicted: dict[str, float] | None, value: float) -> str:
    if predicted is None:
        return "nothing was forecast"
    if not is_complete(record):
        return "does not compare: this run is not complete"
    if predicted["low"] <= value <= predicted["high"]:
        return "inside the interval"
    side, edge = ("above", "high") if value > predicted["high"] else ("below", "low")
    return f"outside: {100 * abs(value - predicted[edge]):.1f} points {side} the interval"


def off_target(record: dict[str, Any]) -> list[dict[str, str]]:
    """One row per off-target task, the largest drop first; its forecast where there is any."""
    limit, metrics = record["limits"]["max_forgetting"], record.get("metrics", {})
    risks = record["forecast"].get("off_target", {})
    return [
        {
            "name": f"{name}{own_metric(metrics, name)}",
            "before": percent(before), "after": percent(after), "drop": points(before - after),
            "forecast": interval(risks.get(name)) if risks else "",
            "over": "" if limit is None else "yes" if before - after > limit else "no",
        }
        for name, before, after in sorted(_accuracies(record), key=lambda row: row[2] - row[1])
    ]  # fmt: skip


def tasks_over(record: dict[str, Any]) -> str:
    """How many off-target tasks lost more than the limit, which a mean would hide."""
    limits = record["limits"]
    if limits["max_forgetting"] is None:
        return ""
    drops = [before - after for _, before, after in _accuracies(record)]
    over = sum(drop > limits["max_forgetting"] for drop in drops)
    limit = f"{100 * limits['max_forgetting']:.1f} points"
    return (
        f"{over} of {len(drops)} off-target tasks have lost more than {limit}; the limit of "
        f"{limit} is on the {limits['limit_on']} of them."
    )


def _accuracies(record: dict[str, Any]) -> list[tuple[str, float, float]]:
    first, last = record["looks"][0], record["looks"][-1]
    return [
        (name, first[keys.accuracy_key(name)], last[keys.accuracy_key(name)])
        for name in record["off_target"]
    ]


def measure(record: dict[str, Any]) -> list[dict[str, str]]:
    """IIMM and its terms before training and at the latest look."""
    first, last = record["looks"][0], record["looks"][-1]
    rows = []
    for key, name, meaning in (
        (keys.PREFIX, "IIMM", "mean of the two terms"),
        (keys.INTER, "inter-modal", "cosine of each image with the texts of the wrong classes"),
        (keys.INTRA, "intra-modal", "cosine of each image with all other images"),
    ):
        before, now = (
            f"{row[key]:.3f}"
            + (f" ± {row[keys.STANDARD_ERROR]:.3f}"
               if key == keys.PREFIX and keys.STANDARD_ERROR in row else "")
            for row in (first, last)
        )  # fmt: skip
        rows.append({"name": name, "before": before, "now": now, "meaning": meaning})
    accuracies = (percent(row[keys.ACCURACY]) for row in (first, last))
    row = dict(zip(("before", "now"), accuracies, strict=True))
    score = score_name(record.get("metrics", {}), record["task"])
    return [*rows, {"name": score, "meaning": "on the task being learnt", **row}]


def grade(record: dict[str, Any]) -> list[dict[str, str]]:
    """One row per forecast quantity: its errors on the saved runs, and by what it was made."""
    rows = []
    for name, found in record["forecast"]["evidence"].items():
        used = {k: v for k, v in found["predictors"].items() if v >= _LEAST_SHARE}
        rest = sum(found["predictors"].values()) - sum(used.values())
        shares = [f"{k} {v:.0%}" for k, v in sorted(used.items(), key=lambda pair: -pair[1])]
        shares += [f"others {rest:.0%}"] * (rest >= 0.005)
        by_iimm = sum(v for k, v in found["predictors"].items() if "IIMM" in k)
        rows.append(
            {
                "name": QUANTITIES.get(name, name),
                "error": size(found["error"]) or "none",
                "mean": size(found["error_of_mean"]) or "none",
                "zero_shot": size(found["error_of_zero_shot"]) or "none",
                "verdict": _against(found),
                "held": f"{found['coverage']:.0%}",
                "on": f"{found.get('n_runs', '?')} runs, {found['n_tasks']} tasks",
                "iimm": f"{by_iimm:.0%}",
                "by": ", ".join(shares),
            }
        )
    return rows


def left_out(record: dict[str, Any]) -> str:
    """How these errors were measured."""
    found = record["forecast"]["evidence"].values()
    units = {"model" if row.get("left_out") == "model" else "task" for row in found}
    return " and ".join(f"leave-one-{unit}-out" for unit in sorted(units))


def _against(found: dict[str, Any]) -> str:
    said = []
    for key, words in (("error_of_mean", "plain mean"), ("error_of_zero_shot", "zero-shot error")):
        if found[key] is not None:
            by = round(100 * (found[key] - found["error"]), 1)
            how = f"{by} better" if by > 0 else f"{-by} worse" if by < 0 else "no better"
            said.append(f"{how} than the {words}" if by else f"no better than the {words}")
    return "; ".join(said) or "nothing to compare with"


def history(record: dict[str, Any]) -> list[dict[str, str]]:
    """One row per look: what was observed, forecast and said."""
    return [
        {
            "step": str(row["step"]),
            "done": f"{row['share']:.0%}",
            "iimm": f"{row[keys.PREFIX]:.3f}",
            **{name: with_error(row, name) for name in QUANTITIES},
            **{f"{n}_forecast": interval(forecast_in(row, n)) for n in ("gain", "forgetting")},
            "exceed": f"{row[keys.EXCEED]:.2f}" if keys.EXCEED in row else "none",
            "level": row["level"],
        }
        for row in record["looks"]
    ]


def turns(record: dict[str, Any]) -> list[dict[str, str]]:
    """The looks at which the verdict changed, the first and the latest included."""
    found, before = [], ""
    looks = record["looks"]
    for position, row in enumerate(looks):
        if row["level"] != before or position == len(looks) - 1:
            found.append({"step": str(row["step"]), "level": row["level"], "reason": row["reason"]})
        before = row["level"]
    return found


def rescue(record: dict[str, Any]) -> dict[str, Any] | None:
    """What happened to the model at the end, and the curve; None for a run that was not rescued."""
    found = record.get("rescue")
    if found is None:
        return None
    became = "The model is as it was fine-tuned, and so is all on this page."
    if mixed(record) is not None:
        share = found["alpha"]
        mix = f"a mix of {share:.3g} fine-tuned and {1 - share:.3g} untouched"
        became = (
            f"The model is {mix if share else 'the untouched one again'} now. All else on this "
            "page is of the fine-tuned model before that."
        )
    return {"became": became, "rows": curve(found), "explained": explained(found)}


def recipe(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Everything that distinguishes this run from another: name and value."""
    limits = record["limits"]
    limit = "none: only measuring"
    if limits["max_forgetting"] is not None:
        limit = (
            f"{100 * limits['max_forgetting']:.1f} points of {limits['limit_on']} forgetting; may "
            f"stop from {limits['confidence']:.0%} sure"
        )
    rows = [
        ("method", record["method"]),
        ("trainable", f"{100 * record['recipe']['trainable_share']:.3g} % of the parameters"),
        *((k, _plain(v)) for k, v in record["recipe"].items() if k != "trainable_share"),
        ("limit", limit),
        ("probe of the task", f"{record['n_images']} images, {record['n_classes']} texts"),
        ("looks", f"{len(record['looks'])} taken, {record['looks_dropped']} dropped to keep to the "
                  f"overhead allowed, {record['failures']} failed"),
    ]  # fmt: skip
    named = (("model", "model"), ("model_fingerprint", "fingerprint of the untouched model"),
             ("run", "run"), ("versions", "versions"))  # fmt: skip
    rows += [(words, _plain(record[key])) for key, words in named if record.get(key)]
    prints = record.get("fingerprints", {})
    rows += [(f"fingerprint of {name}", value) for name, value in prints.items()]
    times = {"first look": _time(record["looks"][0]), "latest look": _time(record["looks"][-1])}
    return [*rows, *((words, time) for words, time in times.items() if time)]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _time(row: dict[str, Any]) -> str:
    seconds = row.get("time")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return ""
    if not 0 <= seconds < _LATEST:
        return ""
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
