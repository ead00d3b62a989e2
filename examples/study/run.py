"""Fine-tune the shipped sample on every shipped task with five methods, and record what came of it.

    python examples/study/run.py --output outcomes.jsonl

Every task x full, BitFit, attention-weight tuning, LoRA and CLIP-Adapter, two seeds each; full and
LoRA also for a third of the steps and at three times the learning rate, attention at that rate
too. Each run is probed on the canaries at 2, 5, 10, 15, 20, 30, 50, 70 and 100 % of its steps. It
can be stopped and started again: runs in the file are skipped. What ships as
`sample.load_outcomes()` was made with `--runs 5`, one seed, some 25 s a run on a free core; of
attention's second rate it has five tasks. The second seed is in `second_seed.jsonl`. `report.py`
and `grade.py` read it. `--signals` also keeps what `signals.py` sees, `--model` fine-tunes another
model, as in `second_model.jsonl`.
"""

import json
import logging
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from signals import Signals
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPModel,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from iimm_callbacks import (
    IIMMCallback,
    ImageCollator,
    PromptClassifier,
    append_outcome,
    read_outcomes,
    sample,
)
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.records.outcomes import parse_outcome

# Gentle and harsh: what the shipped sample bears without and with heavy losses.
LEARNING_RATES = {
    "full": (1e-4, 3e-4),
    "bitfit": (1e-3, 3e-3),
    "attention": (1e-4, 3e-4),
    "lora": (1e-3, 3e-3),
    "clip_adapter": (1e-3, 3e-3),
}
LONG, SHORT = 150, 50  # steps
EVERY, SOME = tuple(LEARNING_RATES), ("full", "lora")
# Learning rate, steps, seed, methods.
RUNS = (
    (0, LONG, 0, EVERY),
    (1, LONG, 0, SOME),
    (0, SHORT, 0, SOME),
    (1, SHORT, 0, SOME),
    (1, LONG, 0, ("attention",)),
    (0, LONG, 1, EVERY),
)
LOOKS = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0]
OFF_TARGET_IMAGES = 128  # of each task


@dataclass
class Settings:
    output: str = field(default="outcomes.jsonl", metadata={"help": "JSON-lines file to append to"})
    methods: str = field(default=",".join(EVERY), metadata={"help": "With commas"})
    tasks: str = field(default=",".join(sample.task_names()), metadata={"help": "With commas"})
    runs: int = field(default=len(RUNS), metadata={"help": "Of the kinds of run; the first ones"})
    scale: float = field(default=1.0, metadata={"help": "Multiplies the number of steps"})
    workers: int = field(default=2, metadata={"help": "Processes, one thread each"})
    model: str = field(default="", metadata={"help": "Folder of another model of 48 px"})
    signals: str = field(default="", metadata={"help": "JSON-lines file for what signals.py sees"})


@cache
def training_rows(task, folder):
    """The task's training images, preprocessed once for all runs of this process."""
    data = sample.load_dataset(task, "train")
    batch = ImageCollator(load_processor(folder))([data[i] for i in range(len(data))])
    pairs = zip(batch["pixel_values"], batch["labels"], strict=True)
    return [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]


@cache
def probe_task(name):
    return sample.load_task(name)


@cache
def canaries(except_for, size):
    return sample.canaries(except_for, probe_size=size)


@dataclass(frozen=True)
class Job:
    """What makes a run of the study: it is not done twice."""

    task: str
    method: str
    learning_rate: float
    steps: int
    seed: int

    @classmethod
    def of(cls, outcome):
        recipe = outcome.recipe
        return cls(
            outcome.task, outcome.method, *(recipe[k] for k in ("learning_rate", "steps", "seed"))
        )


@cache
def load_processor(folder):
    return AutoProcessor.from_pretrained(folder) if folder else sample.load_processor()


def trainer_of(job, steps, model, processor, rows, folder, guards=()):
    """The Trainer of a run, which prints nothing."""
    trainer = Trainer(
        model=PromptClassifier(model, probe_task(job.task), processor),
        args=TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=job.learning_rate,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=job.seed,
        ),
        train_dataset=rows,
        processing_class=processor,
        callbacks=[*guards],
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    return trainer


def run(job, settings):
    """One guarded run -> its outcome, which is then in the file."""
    torch.manual_seed(job.seed)
    task, processor = probe_task(job.task), load_processor(settings.model)
    off_target = canaries(job.task, OFF_TARGET_IMAGES)
    options = {"processor": processor} if job.method == "clip_adapter" else {}
    model = CLIPModel.from_pretrained(settings.model) if settings.model else sample.load_model()
    model = prepare(model, job.method, **options)
    guard = IIMMCallback(
        task,
        off_target,
        max_forgetting=None,  # it only watches
        max_overhead=None,
        every=LOOKS,
        train=sample.load_dataset(job.task, "train"),
        outcomes=[],  # learns from none; what is saved is tidied first
        verbose=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = training_rows(job.task, settings.model)
        trainer = trainer_of(job, job.steps, model, processor, rows, folder, [guard])
        with Signals(model) as signals:
            trainer.train()
    append_outcome(settings.output, tidy(guard.outcome))
    if settings.signals:
        line = json.dumps([asdict(job), signals.looks]) + "\n"
        with FileLock(f"{settings.signals}.lock"), Path(settings.signals).open("a") as file:
            file.write(line)
    return guard.outcome


def tidy(outcome):
    """The outcome as it ships: rounded, and without a word about the machine."""
    row = json.loads(json.dumps(asdict(outcome)), parse_float=lambda text: round(float(text), 6))
    name = "/".join(Path(outcome.model).parts[-2:])
    return replace(parse_outcome(row), model=name, run="", provenance={})


def start_worker():
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    path = Path(settings.output)
    done = {Job.of(o) for o in read_outcomes(path) if o.complete} if path.exists() else set()
    # One kind of run on all tasks, then the next, so that a study that is cut short is of use.
    jobs = [
        Job(task, method, LEARNING_RATES[method][rate], max(round(settings.scale * steps), 1), seed)
        for rate, steps, seed, methods in RUNS[: settings.runs]
        for task in settings.tasks.split(",")
        for method in methods
        if method in settings.methods.split(",")
    ]
    jobs = [job for job in jobs if job not in done]
    with tqdm(total=len(jobs)) as bar:
        for o in outcomes_of(jobs, settings):
            rate = o.recipe["learning_rate"]
            bar.write(
                f"{o.task}, {o.method} {rate:g}: gain {o.gain:+.3f}, forgetting {o.forgetting:+.3f}"
            )
            bar.update()


def outcomes_of(jobs, settings):
    """Outcomes as they come. A worker that dies ends the study; what is done is saved."""
    if settings.workers == 1:
        yield from (run(job, settings) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, context, start_worker) as pool:
        for future in as_completed([pool.submit(run, job, settings) for job in jobs]):
            yield future.result()


if __name__ == "__main__":
    main(sys.argv[1:])
