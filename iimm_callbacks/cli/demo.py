"""`iimm demo`: the README's guarded fine-tune, on what ships with the package."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shell import Answer, folder_to_write, no_bars_in_a_log

if TYPE_CHECKING:
    from transformers import Trainer

    from ..records.outcomes import Outcome
    from ..trainer.callback import IIMMCallback

_TASK = "handwritten_digits"


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write to")] = Path("iimm_demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps", min=1)] = 100,
) -> Answer:
    """Fine-tune the shipped sample under guard: see it work.

    A small CLIP learns handwritten digits, offline, in under a minute; the guard stops it once it
    is likely to forget more than 3 points of letters and emoji. The run is not saved among yours.
    """
    from ..records.run_file import file_name

    started = time.perf_counter()
    folder = output.expanduser()
    with folder_to_write(folder, "--output"):
        guard, outcomes = _guard()
        _trainer(guard, folder, steps).train()
        record = guard.record()
        written, told = _report(record, folder, outcomes)
    seconds = time.perf_counter() - started
    data = {
        "output": str(folder),
        "run_file": str(folder / file_name(record["task"])),
        "report": None if written is None else str(written),
        "seconds": seconds,
        "record": record,
    }
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = [
        f"Written to {folder}: {', '.join(files)}",
        told,
        f"It took {seconds:.0f} seconds. With your own data: iimm forecast --help.",
    ]
    return Answer(data, "\n".join(line for line in lines if line))


def sample_outcomes() -> list[Outcome]:
    """The shipped runs on other tasks: a task's own runs must not forecast it."""
    from .. import sample

    return [run for run in sample.load_outcomes() if run.task != _TASK]


def _guard() -> tuple[IIMMCallback, list[Outcome]]:
    """The guard, and the runs that it learns from."""
    from .. import sample
    from ..data.tasks import Task
    from ..trainer.callback import IIMMCallback

    letters, emoji = sample.load_dataset("printed_letters"), sample.load_dataset("emoji_groups")
    outcomes = sample_outcomes()
    guard = IIMMCallback(
        Task("digits", sample.load_dataset(_TASK), templates="the number {}"),
        [Task("letters", letters, templates="the letter {}"), Task("emoji", emoji)],
        max_forgetting=0.03,
        action="stop",
        max_overhead=None,  # so short a run would drop its looks to keep to the default
        outcomes=outcomes,
    )
    return guard, outcomes


def _trainer(guard: IIMMCallback, folder: Path, steps: int) -> Trainer:
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from .. import sample
    from ..models.classifier import ImageCollator, PromptClassifier

    no_bars_in_a_log()
    set_seed(0)
    model, processor = sample.load_model(), sample.load_processor()
    trainer = Trainer(
        model=PromptClassifier(model, guard.task, processor),
        args=TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=sample.load_dataset(_TASK, "train"),
        data_collator=ImageCollator(processor),
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _report(
    record: dict[str, Any], folder: Path, outcomes: list[Outcome]
) -> tuple[Path | None, str]:
    """The page; without matplotlib none, and why."""
    from ..reports.page import write_report

    try:
        return write_report(record, folder, outcomes), ""
    except ImportError as error:
        return None, f"No report was written: {error}"
