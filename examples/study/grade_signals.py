"""Does anything else that a look sees lower the error of the forecast of forgetting?

    python examples/study/grade_signals.py --signals signals.jsonl    # written by run.py --signals

Forecasts the mean forgetting at the end by a line on what was lost so far, alone and with one of
the `signals.py` beside it or in its place, at 2 to 30 % of the steps; each task's runs from the
runs on other tasks, all methods in one line. Prints mean absolute errors in points, and in what
share of 400 resamples of the tasks the signal was better. Expected output: SIGNALS.txt.
"""

import json
import sys
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from run import Job
from signals import NAMES
from transformers import HfArgumentParser

from iimm_callbacks import read_outcomes, sample

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)
RESAMPLES = 400


@dataclass
class Settings:
    signals: str = field(default="signals.jsonl", metadata={"help": "JSON lines of run.py"})
    outcomes: str = field(default="", metadata={"help": "JSON lines; default: the shipped ones"})


def read_signals(path):
    """`Job` -> [looks, off-target tasks, signals], as differences from the first look."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            facts, looks = json.loads(line)
            job = Job(**facts)
            rows = [[look[task] for task in look if task != job.task] for look in looks]
            found[job] = np.array(rows[0]) - np.array(rows)
    return found


def at(run, values, share):
    """Values [looks] of a run at this share of its steps, between looks a mix."""
    return float(np.interp(share, [look["share"] for look in run.trajectory], values))


def left_out_errors(x, y, tasks):
    """[n] absolute errors of a least-squares line, each task's runs from all others."""
    x = np.column_stack([np.ones(len(y)), *x])
    errors = np.empty(len(y))
    for task in set(tasks):
        own = tasks == task
        line = np.linalg.lstsq(x[~own], y[~own], rcond=None)[0]
        errors[own] = np.abs(x[own] @ line - y[own])
    return errors


def better(errors, than, tasks):
    """Share of resamples of the tasks in which the errors are smaller in the mean."""
    rng, names = np.random.default_rng(0), sorted(set(tasks))
    gains = np.array([(than - errors)[tasks == task].mean() for task in names])
    draws = rng.integers(0, len(names), (RESAMPLES, len(names)))
    return float((gains[draws].mean(1) > 0).mean())


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    outcomes = read_outcomes(settings.outcomes) if settings.outcomes else sample.load_outcomes()
    signals = read_signals(settings.signals)
    runs = [run for run in outcomes if Job.of(run) in signals]
    y = np.array([run.forgetting for run in runs])
    tasks = np.array([run.task for run in runs])
    table = Table("from", *(f"at {share:.0%}" for share in SHARES))
    rows = {"mean of the others": [], "lost so far": []}
    for share in SHARES:
        lost = [at(run, [look["forgetting"] for look in run.trajectory], share) for run in runs]
        seen = {
            name: [at(run, signals[Job.of(run)][:, :, i].mean(1), share) for run in runs]
            for i, name in enumerate(NAMES)
        }
        plain = left_out_errors([lost], y, tasks)
        rows["mean of the others"].append(f"{100 * left_out_errors([], y, tasks).mean():.2f}")
        rows["lost so far"].append(f"{100 * plain.mean():.2f}")
        for title, first in (("{} alone", []), ("lost so far and {}", [lost])):
            for name, values in seen.items():
                errors = left_out_errors([*first, values], y, tasks)
                cell = f"{100 * errors.mean():.2f} ({better(errors, plain, tasks):.0%})"
                rows.setdefault(title.format(name), []).append(cell)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    what = "error in points (better than lost so far)"
    table.title = f"Forgetting at the end of {len(runs)} runs: {what}"
    Console(width=110, color_system=None).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
