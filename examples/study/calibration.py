"""What calibrating is worth: forecasts from four tasks' runs, against those borrowed, as if.

    python examples/study/calibration.py                 # a minute or two

Reads recorded runs only. The gentle runs of a model on four tasks are its calibration; those on its
other nine tasks are forecast from them and from other models' runs, and from these alone. Two test
beds: the sample, borrowing from published runs, and the second model, borrowing from the sample's
runs as well. Errors are means of absolute misses before training, in points. Expected output:
CALIBRATION.txt.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from iimm_callbacks import Forecaster, read_outcomes, sample
from iimm_callbacks.forecasting.runs import about, measured
from iimm_callbacks.sample import load_base_rates
from iimm_callbacks.trainer.calibration.calibrate import most_different

HERE = Path(__file__).parent
# Learning rates of 150 steps
GENTLE = dict.fromkeys(("lora", "bitfit", "clip_adapter"), 1e-3) | {"full": 1e-4, "attention": 1e-4}
N_TASKS = 4


@dataclass
class Settings:
    draws: int = field(default=10, metadata={"help": "Random choices of four tasks"})
    methods: str = field(default="full,lora", metadata={"help": "Of the calibration"})


def misses(asked, known):
    """[n, 2, 2] absolute miss and whether the interval held it, of gain and forgetting."""
    forecaster = Forecaster().fit(known, base_rates=False)
    rows = []
    for o in asked:
        forecast = forecaster.predict(measured(o), **about(o))
        found = [(getattr(forecast, q), getattr(o, q)) for q in ("gain", "forgetting")]
        rows.append([(abs(p.point - end), p.low <= end <= p.high) for p, end in found])
    return np.array(rows, dtype=float)


def chosen(own):
    """The tasks that `iimm calibrate` would take."""
    first = {o.task: o for o in own}
    names = sorted(first)
    rows = [(o.iimm, o.linear_probe_accuracy - o.zero_shot_accuracy, o.zero_shot_accuracy)
            for o in map(first.get, names)]  # fmt: skip
    return [names[i] for i in most_different(rows, N_TASKS)]


def compared(own, others, choices):
    """Rows (method, borrowed, calibrated) over the runs on tasks that are not chosen."""
    borrowed = dict(zip(map(id, own), misses(own, others), strict=True))
    rows = []
    for tasks in choices:
        asked = [o for o in own if o.task not in tasks]
        now = misses(asked, [*others, *(o for o in own if o.task in tasks)])
        rows += [(o.method, borrowed[id(o)], row) for o, row in zip(asked, now, strict=True)]
    return rows


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    published, second = load_base_rates(), read_outcomes(HERE / "second_model.jsonl")
    known = {o.task for o in second}  # tasks that both models have runs on
    shipped = [o for o in sample.load_outcomes() if o.task in known]
    table = Table(
        title=f"As if calibrated on {N_TASKS} of {len(known)} tasks: error on others, points"
    )
    for column in ("model", "tasks", "method", "quantity", "borrowed", "calibrated", "covered"):
        table.add_column(column, justify="right" if column[0] in "bc" else "left")
    for model, runs, others in (
        ("sample", shipped, published),
        ("second", second, [*published, *shipped]),
    ):
        own = [
            o
            for o in runs
            if o.method in settings.methods.split(",")
            and (o.recipe["steps"], o.recipe["learning_rate"]) == (150, GENTLE[o.method])
        ]
        rng, names = np.random.default_rng(0), sorted({o.task for o in own})
        draws = [list(rng.permutation(names)[:N_TASKS]) for _ in range(settings.draws)]
        for kind, choices in (("chosen", [chosen(own)]), (f"{settings.draws} draws", draws)):
            rows = compared(own, others, choices)
            for method in settings.methods.split(","):
                found = [(was, now) for name, was, now in rows if name == method]
                was, now = np.mean(found, axis=0)
                for i, quantity in enumerate(("gain", "forgetting")):
                    errors = [f"{100 * x[i, 0]:.1f}" for x in (was, now)]
                    table.add_row(model, kind, method, quantity, *errors, f"{now[i, 1]:.0%}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
