"""Fine-tune the shipped sample on every shipped task with five methods, and record what came of it.

    python examples/study/run.py --output outcomes.jsonl     # 150 runs, under an hour on two cores

Every task x full, BitFit, attention-weight tuning, LoRA and CLIP-Adapter, 100 steps each: two seeds
at a gentle learning rate and one at three times that, probed on all the other tasks by the guard's
default schedule. It can be stopped and started again: runs in the file are skipped. What ships as
`sample.load_outcomes()` was made by this command; `report.py` and `grade.py` read it.
"""

import logging
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, read_outcomes, sample
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.records.ledger import Past

# Gentle and harsh: what the shipped sample bears without and with heavy losses.
LEARNING_RATES = {
    "full": (1e-4, 3e-4),
    "bitfit": (1e-3, 3e-3),
    "attention": (1e-4, 3e-4),
    "lora": (1e-3, 3e-3),
    "clip_adapter": (1e-3, 3e-3),
}
RUNS = ((0, 0), (1, 0), (0, 1))  # learning rate, seed
OFF_TARGET_IMAGES = 200  # of each task


@dataclass
class Settings:
    output: str = field(default="outcomes.jsonl", metadata={"help": "JSON-lines file to append to"})
    methods: str = field(default=",".join(LEARNING_RATES), metadata={"help": "With commas"})
    tasks: str = field(default=",".join(sample.task_names()), metadata={"help": "With commas"})
    runs: int = field(default=len(RUNS), metadata={"help": "Of each task and method"})
    steps: int = field(default=100, metadata={"help": "Optimizer steps of each run"})
    workers: int = field(default=2, metadata={"help": "Processes, one thread each"})


@cache
def training_rows(task):
    """The task's training images, preprocessed once for all runs of this process."""
    data = sample.load_dataset(task, "train")
    batch = ImageCollator(sample.load_processor())([data[i] for i in range(len(data))])
    pairs = zip(batch["pixel_values"], batch["labels"], strict=True)
    return [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]


@cache
def probe_task(name, size=None):
    return sample.load_task(name, probe_size=size)


def run(job):
    """One guarded run -> its outcome, which is then in the store."""
    task_name, method, learning_rate, seed, steps, output = job
    torch.manual_seed(seed)
    task, processor = probe_task(task_name), sample.load_processor()
    off_target = [probe_task(n, OFF_TARGET_IMAGES) for n in sample.task_names() if n != task_name]
    options = {"processor": processor} if method == "clip_adapter" else {}
    model = prepare(sample.load_model(), method, **options)
    guard = IIMMCallback(
        task,
        off_target,
        max_forgetting=None,  # it only watches
        max_overhead=None,
        outcomes=Past([], output),
        verbose=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=PromptClassifier(model, task, processor),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=32,
                learning_rate=learning_rate,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=training_rows(task_name),
            processing_class=processor,
            callbacks=[guard],
        )
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        trainer.train()
    return guard.outcome


def key(outcome):
    """What makes a run of the study: it is not done twice."""
    recipe = outcome.recipe
    return outcome.task, outcome.method, recipe["learning_rate"], recipe["seed"]


def start_worker():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    path = Path(settings.output)
    done = {key(o) for o in read_outcomes(path) if o.complete} if path.exists() else set()
    # All tasks and methods once, then again, so that a study that is cut short is of use.
    jobs = [
        (task, method, LEARNING_RATES[method][level], seed, settings.steps, str(path))
        for level, seed in RUNS[: settings.runs]
        for task in settings.tasks.split(",")
        for method in settings.methods.split(",")
    ]
    jobs = [job for job in jobs if job[:4] not in done]
    with tqdm(total=len(jobs)) as bar:
        for outcome in outcomes_of(jobs, settings.workers):
            o, rate = outcome, outcome.recipe["learning_rate"]
            bar.write(
                f"{o.task}, {o.method} {rate:g}: gain {o.gain:+.3f}, forgetting {o.forgetting:+.3f}"
            )
            bar.update()


def outcomes_of(jobs, workers):
    """Outcomes as they come. A worker that dies ends the study; what is done is saved."""
    if workers == 1:
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start_worker) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


if __name__ == "__main__":
    main(sys.argv[1:])
