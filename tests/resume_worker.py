"""Guarded runs that are killed again and again, for `test_kill.py`: forked, since that is fast."""

import json
import logging
import os
import random
import signal
import sys
import time

import torch
from datasets import load_from_disk
from ranks_worker import wake_dropout
from transformers import CLIPModel, CLIPProcessor, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, Task

KILLS = 6
STEPS = 18


def last_checkpoint(folder):
    """The newest one that a kill did not cut short: the Trainer writes its state last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            continue
    return None


class Slow(TrainerCallback):
    """So that kills come at every step."""

    def on_step_begin(self, *args, **kwargs):
        time.sleep(0.01)


def train(data, folder, restore):
    """Start the run in this folder, or go on with it; leaves `done.pt` when it is over."""
    task = Task("colours", load_from_disk(data / "colours"), templates="a {}", probe_size=32)
    shapes = Task("shapes", load_from_disk(data / "shapes"), templates="a {}", probe_size=24)
    model = CLIPModel.from_pretrained(data / "model")
    wake_dropout(model)
    processor = CLIPProcessor.from_pretrained(data / "model")
    # Every name of the schedule: steps, epochs (of 12 steps), evaluations.
    every = {"0": 2, "1": "epoch", "2": "evaluate", "3": None}[folder.name[-1]]
    guard = IIMMCallback(
        task,
        [shapes],
        every=every,
        max_overhead=None,
        outcomes=folder / "store.jsonl",
        verbose=False,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=3,
        save_total_limit=2,
        eval_strategy="steps",  # by "epoch" no resumed run is the same, guard or not
        eval_steps=4,
        restore_callback_states_from_checkpoint=restore,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        PromptClassifier(model, task, processor),
        arguments,
        train_dataset=task.dataset,
        eval_dataset=task.dataset.select(range(10)),
        data_collator=ImageCollator(processor),
        processing_class=processor,
        callbacks=[guard, Slow()],
    )
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    result = {
        "log": trainer.state.log_history,
        "history": guard.monitor.history,
        "record": guard.record(),
        "outcome": guard.outcome,
        "weights": model.state_dict(),
    }
    torch.save(result, folder / "unfinished")
    os.replace(folder / "unfinished", folder / "done.pt")


def start(data, folder, restore):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(folder / "output.txt", "a", buffering=1) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            train(data, folder, restore)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def finish(data, folder, restore, chance, seconds):
    """Run until it is done, killing it within `seconds` of each start; the kills."""
    kills = 0
    while not (folder / "done.pt").exists():
        child = start(data, folder, restore)
        if seconds:
            time.sleep(chance.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
        elif status:
            sys.exit(f"{folder.name} failed:\n{(folder / 'output.txt').read_text()[-4000:]}")
    return kills


def main(data, seed):
    """Kill runs by SIGKILL at random moments, until there were `KILLS` kills.

    Each is resumed from its last whole checkpoint until it finishes. `data` holds model, processor
    and data; it then has a folder for each run, and a `reference` of each schedule in one piece.
    """
    chance = random.Random(seed)
    logging.getLogger("iimm_callbacks").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    kills, run = 0, 0
    seconds = 0.0
    while kills < KILLS:
        schedule = run % 4
        reference = data / f"reference-{schedule}"
        if not reference.exists():
            reference.mkdir()
            began = time.perf_counter()
            finish(data, reference, False, chance, 0)
            seconds = time.perf_counter() - began
        folder = data / f"run-{run}-restore-{run % 2}-{schedule}"
        folder.mkdir()
        kills += finish(data, folder, bool(run % 2), chance, 1.2 * seconds)
        run += 1
    (data / "kills.txt").write_text(str(kills))
