"""Outcomes + transferability scores -> the figures of the study; `report.py` prints and draws them.

A group is the runs of one method at one level of the learning rate (or at both) and one number of
steps. Within a group the
seeds of a task are averaged first, so that n is the number of tasks: two seeds of one task are not
two observations.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from iimm_callbacks.measures.results import gain_over_zero_shot_error

METHODS = ("full", "attention", "bitfit", "lora", "clip_adapter")  # others follow
LEVELS = ("gentle", "harsh")
BOTH = "both"
TARGETS = {
    "gain over zero-shot error": lambda o: gain_over_zero_shot_error(
        o.zero_shot_accuracy, o.final_accuracy
    ),
    "gain": lambda o: o.gain,
    "mean forgetting": lambda o: o.forgetting,
}
MEASURED = {
    "IIMM": lambda o: o.iimm,
    "inter": lambda o: o.inter,
    "intra": lambda o: o.intra,
    "zero-shot error": lambda o: 1 - o.zero_shot_accuracy,
    "linear probe": lambda o: probe_gain(o),
}
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
LEAST_TASKS = 3  # a line through two points has no error to speak of
COVERAGE = 0.9


@dataclass(frozen=True)
class Group:
    """The runs of one method at one level: "gentle", "harsh", "gentle, short", "both" and so on."""

    method: str
    level: str
    rates: tuple
    runs: tuple

    def per_task(self, value):
        """Task -> mean over its runs; tasks where any of them is undefined are left out."""
        found = defaultdict(list)
        for run in self.runs:
            found[run.task].append(value(run))
        return {t: float(np.mean(v)) for t, v in sorted(found.items()) if None not in v}


@dataclass(frozen=True)
class Relation:
    """A least-squares line of a target on a predictor over n tasks, and Kendall's tau-b."""

    n: int
    r2: float
    slope: float
    intercept: float
    p: float
    tau: float


def probe_gain(outcome):
    """Accuracy of the linear probe minus zero-shot accuracy; `None` where there is no probe."""
    probe = outcome.linear_probe_accuracy
    return None if probe is None else probe - outcome.zero_shot_accuracy


def rate_of(outcome):
    return outcome.recipe.get("learning_rate", 0.0)


def seed_of(outcome):
    return outcome.recipe.get("seed", 0)


def steps_of(outcome):
    return outcome.recipe.get("steps", 0)


def groups_of(outcomes):
    """All groups: the gentle ones first, each method once, then the harsh, then both together.

    Those of fewer steps than the method's longest runs follow the longest of their rate.
    """
    longest, by_method = {}, defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        longest[outcome.method] = max(longest.get(outcome.method, 0), steps_of(outcome))
    shorter = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        is_short = steps_of(outcome) < longest[outcome.method]
        (shorter if is_short else by_method)[outcome.method][rate_of(outcome)].append(outcome)
    order = [m for m in METHODS if m in by_method] + sorted(set(by_method) - set(METHODS))
    groups = []
    for i in range(max(map(len, by_method.values()), default=0)):
        for found, note in ((by_method, ""), (shorter, ", short")):
            for method in order:
                rates = sorted(by_method[method])
                if i < len(rates) and found[method][rates[i]]:
                    level = LEVELS[i] if i < len(LEVELS) else f"level {i + 1}"
                    runs = tuple(found[method][rates[i]])
                    groups.append(Group(method, level + note, (rates[i],), runs))
    for method in order:
        if len(by_method[method]) > 1:
            per_rate = by_method[method].values()
            # A task that lacks one of the rates would be compared with others at another mix.
            tasks = set.intersection(*({o.task for o in runs} for runs in per_rate))
            runs = tuple(o for runs in per_rate for o in runs if o.task in tasks)
            groups.append(Group(method, BOTH, tuple(sorted(by_method[method])), runs))
    return groups


def predictors_of(group, scores):
    """Predictor -> task -> value before training; `scores` is name -> task -> value."""
    measured = {name: group.per_task(value) for name, value in MEASURED.items()}
    return {**measured, **scores}


def paired(x, y):
    """Two task -> value tables as arrays over the tasks they share."""
    tasks = sorted(set(x) & set(y))
    return np.array([x[t] for t in tasks]), np.array([y[t] for t in tasks])


def relation(x, y):
    """`Relation` of y on x, task -> value tables; `None` where there is no line to speak of."""
    x, y = paired(x, y)
    if len(x) < LEAST_TASKS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    line = stats.linregress(x, y)
    tau = stats.kendalltau(x, y).statistic
    return Relation(
        len(x), line.rvalue**2, line.slope, line.intercept, float(line.pvalue), float(tau)
    )


def relations_of(group, scores):
    """(target, predictor) -> `Relation` or `None`."""
    predictors = predictors_of(group, scores)
    return {
        (target, name): relation(x, group.per_task(value))
        for target, value in TARGETS.items()
        for name, x in predictors.items()
    }


def left_out_error(x, y):
    """Mean absolute error of each task's value from the line through the other tasks.

    With `x=None` from the other tasks' mean. `None` where a line has fewer than two tasks to fit.
    """
    x, y = paired(dict.fromkeys(y, 0.0) if x is None else x, y)
    if len(y) < LEAST_TASKS:
        return None
    errors = []
    for i in range(len(y)):
        others_x, others_y = np.delete(x, i), np.delete(y, i)
        forecast = others_y.mean()
        if np.ptp(others_x) > 0:  # else there is no line, and the mean is its limit
            line = stats.linregress(others_x, others_y)
            forecast = line.intercept + line.slope * x[i]
        errors.append(abs(forecast - y[i]))
    return float(np.mean(errors))


def prediction_band(x, y, grid):
    """Half width of the 90 % prediction band of the least-squares line (Student t) at `grid`."""
    n = len(x)
    slope, intercept = np.polyfit(x, y, 1)
    variance = ((y - slope * x - intercept) ** 2).sum() / (n - 2)
    spread = 1 + 1 / n + (grid - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    return stats.t.ppf((1 + COVERAGE) / 2, n - 2) * np.sqrt(variance * spread)


def seed_agreement(group, value):
    """First and second seed over the tasks: (n, correlation, mean absolute difference)."""
    seeds = sorted({seed_of(o) for o in group.runs})[:2]
    if len(seeds) < 2:
        return None
    first, second = (
        Group(group.method, group.level, group.rates, runs).per_task(value)
        for runs in (tuple(o for o in group.runs if seed_of(o) == seed) for seed in seeds)
    )
    line = relation(first, second)
    if line is None:
        return None
    x, y = paired(first, second)
    return line.n, float(np.corrcoef(x, y)[0, 1]), float(np.abs(x - y).mean())


def method_agreement(groups, value):
    """(method A, method B) -> `Relation` of B's outcomes on A's over the tasks; one level."""
    return {
        (a.method, b.method): relation(a.per_task(value), b.per_task(value))
        for a, b in combinations(groups, 2)
    }


def forgetting_so_far(group, shares=SHARES):
    """Mean forgetting over the runs at each share of the steps, and at the end; fractions."""
    curves = []
    for run in group.runs:
        looks = sorted((r["share"], r["forgetting"]) for r in run.trajectory if "forgetting" in r)
        if looks and run.forgetting is not None:
            at = np.interp(shares, *zip(*looks, strict=True))  # the default schedule looks there
            curves.append([*at, run.forgetting])
    return np.mean(curves, axis=0) if curves else None
