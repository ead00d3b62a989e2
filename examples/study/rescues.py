"""What is a rescue worth, on the recorded runs that forgot more than 5 points?

    OMP_NUM_THREADS=1 python examples/study/rescues.py    # 20 minutes on one core

Fine-tunes the shipped model again as the recorded runs of 150 steps did (full and LoRA), where
their mean forgetting was over the limit, and rescues each: `rescue.sweep.rescue` on the probe's
images. "Held out": what choosing in this way is worth on images that had no part in it
(`Rescue.held_out`). Points; standard errors are 2 to 3 of a gain and 1 to 2 of a mean. Expected
output: RESCUES.txt, there without `symbol_counts`.

*Not* a promise for another model: mixing needs a way between the two sets of weights along which
accuracy does not break down.
"""

import logging
import sys
import tempfile
from dataclasses import dataclass, field

import numpy as np
import run as study
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import HfArgumentParser

from iimm_callbacks import sample
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.records.verdict import Limits
from iimm_callbacks.rescue.sweep import rescue

LIMIT = 0.05  # mean forgetting


@dataclass
class Settings:
    tasks: list[str] = field(default_factory=sample.task_names, metadata={"help": "Shipped tasks"})
    steps: int = field(default=study.LONG, metadata={"help": "Of each run"})


def over_the_limit(settings):
    """The recorded runs to do again."""
    return [
        study.Job.of(o)
        for o in sample.load_outcomes()
        if o.task in settings.tasks
        and o.method in study.SOME
        and o.recipe["steps"] == study.LONG
        and o.forgetting > LIMIT
    ]


def fine_tuned(job, steps):
    """The shipped model as this run leaves it."""
    torch.manual_seed(job.seed)
    processor, rows = sample.load_processor(), study.training_rows(job.task, "")
    model = prepare(sample.load_model(), job.method)
    with tempfile.TemporaryDirectory() as folder:
        study.trainer_of(job, steps, model, processor, rows, folder).train()
    return model


def rescued(job, settings):
    model = fine_tuned(job, settings.steps)
    others = study.canaries(job.task, study.OFF_TARGET_IMAGES)
    return rescue(
        model, sample.load_model(), study.probe_task(job.task), others, Limits(LIMIT),
        processor=sample.load_processor(), progress=False,
    )  # fmt: skip


def tabulate(settings):
    """A row for each run, and their means."""
    columns = ("task", "method", "rate", "fine-tuned", "rescued", "mix", "held out", "mean mix")
    table = Table(*columns, title="Gain / mean forgetting / worst task, points")
    rows = []
    for job in tqdm(over_the_limit(settings)):
        found = rescued(job, settings)
        three = [
            [100 * getattr(mix, name) for name in ("gain", "forgetting", "worst")]
            for mix in (found.mixes[-1], found.chosen, found.held_out)
        ]
        rows.append(three)
        cells = [" / ".join(f"{value:.1f}" for value in values) for values in three]
        mixes = (f"{found.alpha:.1f}", f"{found.held_out.alpha:.2f}")
        about = (job.task, job.method, f"{job.learning_rate:g}")
        table.add_row(*about, cells[0], cells[1], mixes[0], cells[2], mixes[1])
    means = [" / ".join(f"{value:.1f}" for value in values) for values in np.mean(rows, axis=0)]
    table.add_section()
    table.add_row(f"mean of {len(rows)}", "", "", means[0], means[1], "", means[2], "")
    over = sum(held[1] > 100 * LIMIT for _, _, held in rows)
    return table, f"On held-out images {over} of {len(rows)} are over the limit of 5 points."


def main(arguments=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(arguments)
    table, words = tabulate(settings)
    console = Console(width=140, color_system=None)
    console.print(table)
    console.print(words)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main(sys.argv[1:])
