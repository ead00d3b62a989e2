"""Grade forecast and guard on recorded runs, each forecast without its own task, against the aims.

    python examples/study/grade.py                       # the shipped outcomes, some five minutes
    python examples/study/grade.py --outcomes my.jsonl

Prints what `iimm grade` prints in short, beside the aims that this project has set itself, and
whether each was met. Ends with exit code 0 either way: a missed aim is a result. Expected output:
GRADES.txt.

The first runs of a model are graded with its world left out: no outcome of the sample saved nor
in the prior; for a published pair, its task left out of all three models. `second_model.jsonl` has
runs of another small CLIP (see README.md): the model is left out, both ways.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from iimm_callbacks import Forecaster, Limits, Measurement, Outcome, read_outcomes, sample
from iimm_callbacks.forecasting.grading import SHARES, replay_one
from iimm_callbacks.forecasting.runs import about, measured
from iimm_callbacks.sample import load_base_rates
from iimm_callbacks.trainer.calibration.learnt import Option, choice

TASKS = (0, 1, 2, 3, 5)  # with saved runs, and all others
DRAWS = 2  # of which tasks these are
# Share of the steps -> of the plain mean's error
DURING = {
    "forgetting": {0.1: 0.75, 0.2: 0.6, 0.3: 0.5},
    "worst": {0.1: 0.9, 0.2: 0.75, 0.3: 0.65},
}
FIRST, LATER = 0.45, 0.40  # of the plain mean's error: no run of the model saved, and all others


MODEL_OUT = {"gain": {0.0: 0.5}, "forgetting": {0.1: 0.85, 0.2: 0.75, 0.3: 0.7}}
LIMITS, NOISE = (0.02, 0.03, 0.05), 1.645  # standard errors: one-sided 95 %
HERE = Path(__file__).parent


@dataclass
class Settings:
    outcomes: str = field(default="", metadata={"help": "JSON lines; default: the shipped ones"})
    more: str = field(default="", metadata={"help": "More runs of that model, as JSON lines"})
    second: str = field(
        default=str(HERE / "second_model.jsonl"), metadata={"help": "Runs of another model"}
    )
    draws: int = field(default=200, metadata={"help": "Simulated records"})


@dataclass
class Row:
    aim: str
    found: str
    met: bool


def simulated(rng, n, related):
    """A record of n tasks whose gain over zero-shot error and forgetting go with IIMM, or nothing.

    Gain over zero-shot error then has R² 0.9.
    """
    iimm = rng.uniform(0.1, 0.6, n)
    inter = iimm + rng.normal(0, 0.08, n)
    zero_shot = rng.uniform(0.2, 0.8, n)
    line = 0.2 + 1.2 * (iimm - 0.35)
    spread = 1.2 * 0.5 / math.sqrt(12)  # standard deviation of the line's values
    over_error = line + rng.normal(0, spread * math.sqrt(0.1 / 0.9), n)
    gain = over_error * (1 - zero_shot) if related else rng.normal(0.15, 0.08, n)
    drop = (0.2 * (iimm - 0.2) if related else 0.05) + rng.normal(0, 0.01 if related else 0.03, n)
    after = np.clip(zero_shot + gain, 0, 1)
    return [
        Outcome(
            model="simulated",
            model_fingerprint="1f",
            method="full",
            task=f"task {i}",
            task_fingerprint="",
            iimm=float(iimm[i]),
            inter=float(inter[i]),
            intra=float(2 * iimm[i] - inter[i]),
            standard_error=0.01,
            n_images=512,
            n_classes=10,
            zero_shot_accuracy=float(zero_shot[i]),
            final_accuracy=float(after[i]),
            off_target_before={"other": 0.5},
            off_target_after={"other": float(0.5 - drop[i])},
        )
        for i in range(n)
    ]


def simulate(draws):
    """Mean absolute errors of forecast, least-squares line on IIMM, and mean; gain, then drop."""
    rng = np.random.default_rng(0)
    rows = []
    for related in (True, False):
        errors = {"gain": [], "forgetting": []}
        for _ in range(draws):
            known, new = simulated(rng, 9, related), simulated(rng, 5, related)
            forecaster = Forecaster().fit(known)
            x = [o.iimm for o in known]
            over_error = np.polyfit(x, [o.gain / (1 - o.zero_shot_accuracy) for o in known], 1)
            drop = np.polyfit(x, [o.forgetting for o in known], 1)
            for o in new:
                measure = Measurement(o.iimm, o.inter, o.intra, 0.01, 512, 10)
                forecast = forecaster.predict(
                    measure, method="full", zero_shot_accuracy=o.zero_shot_accuracy, model="1f"
                )
                for name, line in (
                    ("gain", np.polyval(over_error, o.iimm) * (1 - o.zero_shot_accuracy)),
                    ("forgetting", np.polyval(drop, o.iimm)),
                ):
                    end, mean = getattr(o, name), np.mean([getattr(k, name) for k in known])
                    point = getattr(forecast, name).point
                    errors[name].append([abs(point - end), abs(line - end), abs(mean - end)])
        for name, found in errors.items():
            ours, line, mean = np.mean(found, axis=0)
            if related:
                aim, ratio, bound = "1.20 of the least-squares line's", ours / line, 1.2
            else:
                aim, ratio, bound = "1.05 of the plain mean's", ours / mean, 1.05
            kind = "R² 0.9 of IIMM, nine tasks" if related else "no relation, nine tasks"
            what = f"simulated, {kind}: {name} error ≤ {aim}"
            rows.append(Row(what, f"{ratio:.2f}", ratio <= bound))
    return rows


def forecast_rows(grade):
    rows = []
    found = {(r.quantity, r.method, r.share): r for r in grade.forecasts}
    methods = sorted({r.method for r in grade.forecasts} - {"all"})
    for quantity in ("gain", "forgetting"):
        for method in ["all", *methods]:
            r = found[quantity, method, 0.0]
            ratio = r.error / min(r.error_of_mean, r.error_of_zero_shot)
            rows.append(
                Row(
                    f"before training, {quantity}, {method}: error ≤ 1.05 of the better of plain "
                    f"mean ({100 * r.error_of_mean:.2f}) and zero-shot error "
                    f"({100 * r.error_of_zero_shot:.2f})",
                    f"{ratio:.2f} ({100 * r.error:.2f} points)",
                    ratio <= 1.05,
                )
            )
    for quantity in ("gain", "forgetting", "worst"):
        for share in SHARES:
            r = found[quantity, "all", share]
            rows.append(
                Row(
                    f"{quantity} at {share:.0%}: 90 % intervals cover 85 to 95 %",
                    f"{r.coverage:.1%} of {r.n_runs}",
                    0.85 <= r.coverage <= 0.95,
                )
            )
        for method in methods:
            held = [found[quantity, method, share].coverage for share in SHARES]
            rows.append(
                Row(
                    f"{quantity}, {method}: they cover 85 to 95 % at every look",
                    f"{min(held):.0%} to {max(held):.0%}",
                    0.85 <= min(held) and max(held) <= 0.95,
                )
            )
    for quantity, bounds in DURING.items():
        for share, bound in bounds.items():
            r = found[quantity, "all", share]
            ratio = r.error / r.error_of_mean
            rows.append(
                Row(
                    f"{quantity} at {share:.0%}: error ≤ {bound} of the plain mean's",
                    f"{ratio:.2f} ({100 * r.error:.2f} of {100 * r.error_of_mean:.2f} points)",
                    ratio <= bound,
                )
            )
    return rows


def predict(forecaster, o):
    return forecaster.predict(measured(o), **about(o))


def simple_rules(o, known, quantity, base_rates):
    """What one would say without a forecaster, by name: NaN where that rule has nothing to say."""
    own = [getattr(k, quantity) for k in known if k.method == o.method]
    rules = {"mean of own runs": np.mean(own) if own else math.nan}
    same = [k for k in known if k.method == o.method]
    errors = [1 - k.zero_shot_accuracy for k in same]
    if len({k.task for k in same}) > 2 and np.ptp(errors) > 0:
        line = np.polyfit(errors, own, 1)
        rules["line in zero-shot error"] = np.polyval(line, 1 - o.zero_shot_accuracy)
    published = [getattr(b, quantity) for b in base_rates if b.method == o.method]
    found = [value for value in published if value is not None]
    rules["published mean"] = np.mean(found) if found else math.nan
    if quantity == "gain":
        rules["linear probe"] = o.linear_probe_accuracy - o.zero_shot_accuracy
    return rules


def curve(outcomes):
    """[(saved tasks, quantity) -> (errors, inside, half widths, rules' errors, outcomes)]."""
    rng = np.random.default_rng(0)
    names, base_rates = sorted({o.task for o in outcomes}), load_base_rates()
    found = {}
    for n_known in (*TASKS, len(names) - 1):
        for _ in range(1 if n_known in (0, len(names) - 1) else DRAWS):
            for task in names:
                others = set(rng.permutation([n for n in names if n != task])[:n_known])
                known = [o for o in outcomes if o.task in others]
                forecaster = Forecaster().fit(known)
                for o in outcomes:
                    if o.task != task:
                        continue
                    forecast = predict(forecaster, o)
                    for quantity in ("gain", "forgetting"):
                        p, end = getattr(forecast, quantity), getattr(o, quantity)
                        rules = simple_rules(o, known, quantity, base_rates)
                        found.setdefault((n_known, quantity), []).append(
                            (abs(p.point - end), p.low <= end <= p.high, (p.high - p.low) / 2,
                             {name: abs(value - end) for name, value in rules.items()}, o, p)
                        )  # fmt: skip
    return found


def curve_rows(found):
    rows = []
    for (n_known, quantity), graded in found.items():
        error = np.mean([g[0] for g in graded])
        rules = {}
        for name in sorted({name for g in graded for name in g[3]}):
            values = [g[3].get(name, math.nan) for g in graded]
            if not np.isnan(values).any():  # a rule that always has something to say
                rules[name] = np.mean(values)
        what = f"{n_known} tasks with saved runs, {quantity}"
        if rules:
            best = min(rules, key=rules.get)
            rows.append(
                Row(
                    f"{what}: error no worse than the best simple rule ({best}, "
                    f"{100 * rules[best]:.2f})",
                    f"{100 * error:.2f} points",
                    error <= rules[best] + 5e-5,
                )
            )
        held = np.mean([g[1] for g in graded])
        width = 100 * np.mean([g[2] for g in graded])
        found_ = f"{held:.1%}, ±{width:.1f} points"
        rows.append(Row(f"{what}: 90 % intervals cover ≥ 85 %", found_, held >= 0.85))
    return rows


def first_rows(found, n_tasks):
    rows = []
    most = n_tasks - 1
    plain = np.mean([g[3]["mean of own runs"] for g in found[most, "gain"]])
    for n_known, aim in ((0, FIRST), (most, LATER)):
        graded = found[n_known, "gain"]
        error = np.mean([g[0] for g in graded])
        saved = "none of the sample's saved nor in the prior" if n_known == 0 else f"{most} tasks"
        rows.append(
            Row(
                f"gain, all methods, {saved}: error ≤ {aim} of the plain mean's",
                f"{error / plain:.2f} ({100 * error:.2f} of {100 * plain:.2f} points)",
                error <= aim * plain,
            )
        )
        for method in ("full", "lora", "attention"):
            pairs = [(g[5].point, g[4].gain) for g in graded if g[4].method == method]
            r2 = np.corrcoef(*zip(*pairs, strict=True))[0, 1] ** 2
            rows.append(Row(f"gain, {method}, {saved}: R² ≥ 0.85", f"{r2:.2f}", r2 >= 0.85))
    job = [g for g in found[most, "gain"] if g[4].task == "handwritten_digits"
           and g[4].method == "full" and g[4].recipe["learning_rate"] == 1e-4]  # fmt: skip
    for _, inside, half, _, o, p in job[:1]:
        text = f"{100 * p.point:+.1f} ± {100 * half:.1f}, observed {100 * o.gain:+.1f}"
        rows.append(Row("the main job: observed gain inside an interval within ±8 points", text,
                        inside and half < 0.08))  # fmt: skip
    return rows


def model_out_rows(asked, known):
    """Runs of one model, forecast look by look from those of another and published ones."""
    forecaster, found = Forecaster().fit(known), {}
    for o in asked:
        replay = replay_one(o, forecaster, [k for k in asked if k.task != o.task])
        for quantity, aims in MODEL_OUT.items():
            mean, _ = replay.plain[quantity]
            for share in aims:
                at = next(i for i, s in enumerate(replay.shares) if abs(s - share) < 0.01)
                p, end = getattr(replay.forecasts[at], quantity), getattr(o, quantity)
                inside = p.low <= end <= p.high
                found.setdefault((quantity, share), []).append(
                    (abs(p.point - end), abs(mean - end), inside)
                )
    rows = []
    for (quantity, share), values in found.items():
        error, plain, held = np.mean(values, axis=0)
        aim = MODEL_OUT[quantity][share]
        what = f"{asked[0].model} from {known[0].model}, {quantity} at {share:.0%}"
        text = f"{error / plain:.2f} ({100 * error:.2f} of {100 * plain:.2f} points)"
        rows.append(Row(f"{what}: error ≤ {aim} of the plain mean's", text, error <= aim * plain))
        rows.append(Row(f"{what}: 90 % intervals cover ≥ 85 %", f"{held:.1%}", held >= 0.85))
    return rows


def plan_rows(outcomes):
    """What `iimm plan` would have chosen for each task, its own runs left out, by limit."""
    found = {}
    for task in sorted({o.task for o in outcomes}):
        forecaster = Forecaster().fit([o for o in outcomes if o.task != task])
        runs = [o for o in outcomes if o.task == task]
        options = [
            Option(o.method, {"run": i}, 0, predict(forecaster, o)) for i, o in enumerate(runs)
        ]
        for limit in LIMITS:
            chosen = choice(options, Limits(limit))
            o = None if chosen is None else runs[chosen.recipe["run"]]
            best = max((x.gain for x in runs if x.forgetting <= limit), default=0.0)
            noise = 0.0 if o is None else NOISE * o.trajectory[-1].get("forgetting_se", 0.0)
            over = o is not None and o.forgetting > limit + noise
            found.setdefault(limit, []).append((0.0 if o is None else o.gain, best, over))
    rows = []
    for limit, values in found.items():
        gain, best, over = np.mean(values, axis=0)
        what = f"iimm plan, limit {100 * limit:.0f} points"
        text = f"{gain / best:.2f} ({100 * gain:.1f} of {100 * best:.1f} points)"
        rows.append(Row(f"{what}: gain ≥ 0.9 of the best within it", text, gain >= 0.9 * best))
        text = f"{over:.0%} of {len(values)} tasks"
        rows.append(Row(f"{what}: over it beyond noise in ≤ 5 %", text, over <= 0.05))
    return rows


def published_rows():
    pairs = [o for o in load_base_rates() if o.linear_probe_accuracy and o.method == "full"]
    errors, held = [], []
    for o in pairs:
        known = [k for k in pairs if k.task != o.task]
        p = predict(Forecaster().fit(known, base_rates=False), o).gain
        if p is None:  # zero-shot accuracy near 1
            continue
        errors.append(abs(p.point - o.gain))
        held.append(p.low <= o.gain <= p.high)
    error = 100 * np.mean(errors)
    return [
        Row(f"{len(errors)} published pairs, the task left out of all models: gain error ≤ 4.0",
            f"{error:.2f} (median {100 * np.median(errors):.2f})", error <= 4.0),
        Row("and 90 % intervals cover ≥ 85 %", f"{np.mean(held):.1%}", np.mean(held) >= 0.85),
    ]  # fmt: skip


def guard_rows(grade):
    rows = []
    by_policy = {(r.limit, r.policy): r for r in grade.guard}
    for r in grade.guard:
        if r.policy != "guard":
            continue
        simple = by_policy[r.limit, "stop when observed exceeds"]
        limit = f"limit {100 * r.limit:.0f} points"
        under = r.n_runs - r.n_over
        needless, by_simple = (x.stopped_of_under / max(under, 1) for x in (r, simple))
        gain, kept_by_simple = (x.gain / r.gain_of_oracle for x in (r, simple))
        rows += [
            Row(
                f"{limit}: ≥ 95 % of stopped runs end at most half a point and noise over it",
                f"{r.kept_to_limit:.1%} of {r.stopped_of_over + r.stopped_of_under}",
                r.kept_to_limit >= 0.95,
            ),
            Row(
                f"{limit}: ≤ 5 % of the runs that would have stayed under it are stopped",
                f"{needless:.1%} of {under}",
                needless <= 0.05,
            ),
            Row(
                f"{limit}: ≥ 90 % of the oracle's gain is kept",
                f"{gain:.0%} ({100 * r.gain:.2f} of {100 * r.gain_of_oracle:.2f} points)",
                gain >= 0.9,
            ),
            Row(
                f"{limit}: no worse in all three than stopping when observed exceeds",
                f"{simple.kept_to_limit:.1%}, {by_simple:.1%}, {kept_by_simple:.0%}",
                r.kept_to_limit >= simple.kept_to_limit
                and needless <= by_simple
                and r.gain >= simple.gain,
            ),
        ]
    return rows


def guard_table(grade):
    table = Table(title="Guard and other policies")
    for column in ("limit", "policy", "end over", "of them stopped", "stopped needlessly",
                   "never began", "kept to limit", "over by", "gain kept"):  # fmt: skip
        table.add_column(column, justify="left" if column == "policy" else "right")
    for r in grade.guard:
        kept = "-" if math.isnan(r.kept_to_limit) else f"{r.kept_to_limit:.0%}"
        table.add_row(
            f"{100 * r.limit:.0f}",
            r.policy,
            f"{r.n_over} of {r.n_runs}",
            str(r.stopped_of_over),
            str(r.stopped_of_under),
            str(r.never_began),
            kept,
            f"{100 * r.over_by:.2f}",
            f"{100 * r.gain:+.2f}",
        )
    return table


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    outcomes = read_outcomes(settings.outcomes) if settings.outcomes else sample.load_outcomes()
    outcomes += read_outcomes(settings.more) if settings.more else []
    grade = Forecaster().grade(outcomes)
    rows = forecast_rows(grade) + simulate(settings.draws) + guard_rows(grade)
    if not settings.outcomes:
        found = curve(outcomes)
        n_tasks = len({o.task for o in outcomes})
        rows = [*first_rows(found, n_tasks), *published_rows(), *curve_rows(found), *rows]
        second = read_outcomes(settings.second)
        rows += model_out_rows(second, outcomes) + model_out_rows(outcomes, second)
        rows += plan_rows(outcomes)
    console = Console(width=120)
    table = Table(title=f"Aims, on {grade.n_runs} runs, each forecast without its task")
    for column in ("aim", "found", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(row.aim, row.found, "met" if row.met else "MISSED")
    console.print(table)
    console.print(guard_table(grade))
    console.print(f"{sum(row.met for row in rows)} of {len(rows)} aims met.")


if __name__ == "__main__":
    main(sys.argv[1:])
