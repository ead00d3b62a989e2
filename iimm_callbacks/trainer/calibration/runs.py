"""Model + task + recipe -> the outcome of a fine-tune under guard, by the Trainer or a script."""

from __future__ import annotations

import copy
import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ...data.tasks import TASK_PROBE_SIZE, Task
from ...data.training import SAMPLE_SIZE
from ...models.classifier import ImageCollator, PromptClassifier
from ...probing import ranks
from ...records.outcomes import OFF_TARGET_PROBE_SIZE, Outcome
from ...records.run_file import read_run
from ...records.store import read_outcomes
from ...records.verdict import WATCH
from ..callback import IIMMCallback
from .recipes import Recipe

# Shares of the steps at which a run is looked at, besides 0 and 1: fixed, so that neither the clock
# nor an interruption changes what is learnt.
LOOKS = (0.1, 0.2, 0.4)
_TIMED = 4  # steps; the first one warms up
_LAST_LINES = 5  # of a script that failed
_EVERY = 1.0  # seconds between two looks at what a script has done


Left = Callable[[], float | None]  # seconds, of the first rank; None: no limit
Tell = Callable[[float, bool], None]  # seconds that a whole run takes, and whether that is sure


class OutOfTimeError(Exception):
    """The time allowed ended in the middle of a run."""


@dataclass(frozen=True)
class Subject:
    """What is fine-tuned again and again.

    Attributes:
        model: Untouched; it is copied for each run.
        processor: As `IIMMCallback`.
        use_cpu: Whether the Trainer keeps off a GPU.
    """

    model: nn.Module
    processor: Any
    use_cpu: bool = False


class Examples(Dataset):  # type: ignore[type-arg]
    """A task's images and labels one by one, as the probe reads them."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """The image, decoded, and its class index."""
        return self.task.images([position])[0], self.task.labels([position])[0]


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


class _Deadline(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Ends training when the first rank's time is up."""

    def __init__(self, left: Left) -> None:
        self._left = left
        self.is_over = False

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        if state.global_step < state.max_steps:
            left = ranks.from_first(self._left)
            self.is_over = control.should_training_stop = left is not None and left < 0


def seconds_of_a_step(
    subject: Subject, task: Task, train: Task, recipe: Recipe, folder: Path
) -> float:
    """What an optimizer step takes, from a few of them; the model is left as it was.

    Raises:
        Exception: Training by the recipe fails.
    """
    clock = _Clock()
    steps = min(_TIMED, recipe.steps)
    with _trainer(subject, task, train, recipe, steps, folder, [clock]) as one:
        one.train()
    later = clock.seconds[1:] or clock.seconds
    return sum(later) / len(later)


def seconds_of_looks(
    task: Task, train: Task, off_target: Sequence[Task] | None, seconds: float
) -> float:
    """What all looks of a run take.

    Args:
        task: That is learnt.
        train: Its training images.
        off_target: As `IIMMCallback`.
        seconds: That a look at one image takes.
    """
    from ...sample import off_target_tasks

    others = off_target_tasks(task, off_target)
    sizes = [min(len(other), other.probe_size or OFF_TARGET_PROBE_SIZE) for other in others]
    own = min(len(task), task.probe_size or TASK_PROBE_SIZE)
    images = (len(LOOKS) + 2) * (own + sum(sizes)) + min(len(train), SAMPLE_SIZE)
    return images * seconds


def fine_tune(
    subject: Subject,
    task: Task,
    train: Task,
    off_target: Sequence[Task] | None,
    recipe: Recipe,
    steps: int,
    folder: Path,
    left: Left = lambda: None,
) -> Outcome:
    """One run under a guard that only watches. On several ranks all must call it.

    Args:
        subject: The model; it is left as it was.
        task: Held-out images of what is learnt.
        train: Its training images, with the same classes.
        off_target: As `IIMMCallback`.
        recipe: How.
        steps: How many steps.
        folder: For the run file.
        left: Seconds that are left, of the first rank; None: no limit.

    Returns:
        Its outcome; not saved yet.

    Raises:
        OutOfTimeError: No time is left before the last step.
        Exception: Training or measuring fails.
    """
    guard = IIMMCallback(
        task,
        off_target,
        max_forgetting=None,
        every=[*LOOKS, 1.0],
        outcomes=[],  # whoever calls saves it, under a name of its own
        max_overhead=None,
        train=train,
        card=False,
        strict=True,
        verbose=False,
    )
    deadline = _Deadline(left)
    with _trainer(subject, task, train, recipe, steps, folder, [guard, deadline]) as trainer:
        trainer.train()
    if deadline.is_over:
        raise OutOfTimeError
    assert guard.outcome is not None
    if steps == recipe.steps:
        return guard.outcome
    return replace(guard.outcome, recipe=guard.outcome.recipe | {"asked_steps": recipe.steps})


def _trainer(
    subject: Subject,
    task: Task,
    train: Task,
    recipe: Recipe,
    steps: int,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> AbstractContextManager[Trainer]:
    arguments = recipe.training_arguments(folder, steps, subject.use_cpu)
    set_seed(arguments.seed)
    tuned = recipe.prepare(copy.deepcopy(subject.model), subject.processor)
    return trainer_of(tuned, task, train, subject.processor, arguments, callbacks)


@contextmanager
def trainer_of(
    tuned: nn.Module,
    task: Task,
    train: Task,
    processor: Any,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[Trainer]:
    """A quiet Trainer of a model as a classifier by prompts; what it held is given back.

    Args:
        tuned: Prepared for a method; a copy, as it is trained in place.
        task: Whose classes and prompts it learns.
        train: Images and labels.
        processor: As `IIMMCallback`.
        arguments: Of the Trainer.
        callbacks: Of the Trainer, besides its own.
        optimizer: ``None``: that of `arguments`.
    """
    is_pair = isinstance(processor, tuple)  # of open_clip
    trainer = Trainer(
        model=PromptClassifier(tuned, task, processor),
        args=arguments,
        train_dataset=Examples(train),
        data_collator=ImageCollator(processor),
        processing_class=None if is_pair else processor,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    try:
        yield trainer
    finally:
        trainer.accelerator.free_memory()
        trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
        del tuned, trainer
        gc.collect()
        clear_device_cache()


def run_script(
    script: Path,
    data: Path,
    folder: Path,
    seconds: float | None = None,
    tell: Tell = lambda whole, is_sure: None,
) -> Outcome:
    """One run of a user's own training script, whose guard finds here that it only watches.

    It is called as ``python SCRIPT DATA FOLDER``; its guard must save to the default store.

    Args:
        script: The file.
        data: Folder with ``train`` and ``test``, in each a folder of images per class.
        folder: For what it writes.
        seconds: That it may take; None: no limit. Then it and what it started are killed.
        tell: Is told at each look that its run file in `folder` has how many seconds all of it will
            take, and whether two looks in training say so. What it raises ends the script.

    Raises:
        OutOfTimeError: It took longer.
        RuntimeError: It failed, with its last lines; or its guard saved no complete outcome.
    """
    store = folder / "outcomes.jsonl"
    for path in (store, *folder.glob("iimm_*.json")):  # of an earlier try
        path.unlink(missing_ok=True)
    command = [sys.executable, str(script), str(data), str(folder)]
    environment = os.environ | {"IIMM_CALLBACKS_STORE": str(store), WATCH: "1"}
    with (folder / "script.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = _wait(process, seconds, partial(_share, folder), tell)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTimeError from error
            raise
    if code:
        said = (folder / "script.log").read_text(encoding="utf-8", errors="replace")
        last = " | ".join(said.strip().splitlines()[-_LAST_LINES:]) or "it printed nothing"
        raise RuntimeError(f"{script.name} ended with exit code {code}: {last}")
    found = [o for o in read_outcomes(store) if o.complete] if store.exists() else []
    if len(found) != 1:
        raise RuntimeError(
            f"{script.name} must save the outcome of one complete run, got {len(found)}: it must "
            "make an `IIMMCallback` without `outcomes`, and train to its last step; what it "
            f"printed is in {folder / 'script.log'}"
        )
    return found[0]


def _wait(
    process: subprocess.Popen[bytes],
    seconds: float | None,
    share: Callable[[], float | None],
    tell: Tell,
) -> int:
    """Its exit code, asking all the while what share of the steps is done."""
    began = time.monotonic()
    looks: list[tuple[float, float]] = []  # share, and when
    while True:
        left = math.inf if seconds is None else seconds - (time.monotonic() - began)
        try:
            return process.wait(max(min(left, _EVERY), 0.0))
        except subprocess.TimeoutExpired:
            if left <= _EVERY:
                raise
        now, done = time.monotonic() - began, share()
        if done is not None and (not looks or done > looks[-1][0]):
            looks.append((done, now))
            (first, then), (last, _) = looks[0], looks[-1]
            if last > first:
                tell(now + (1 - last) * (now - then) / (last - first), len(looks) > 2)


def _share(folder: Path) -> float | None:
    """Of the steps that the run file in a folder has; None where there is none."""
    shares = []
    for path in folder.glob("iimm_*.json"):
        with suppress(OSError, ValueError, LookupError):
            shares.append(float(read_run(path)["looks"][-1]["share"]))
    return max(shares, default=None)
