"""What every rank of `test_ranks.py` runs: all scenarios in one launch, since a launch is slow."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from datasets import load_from_disk
from forked import on_ranks
from torch import distributed
from transformers import CLIPModel, CLIPProcessor, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, Task
from iimm_callbacks.monitor import monitor
from iimm_callbacks.probing.probe import Probe


class ForgetsAtStep4(Probe):
    """All images of the off-target task right before step 4, none from there on."""

    def look(self, model, step, autocast_dtype=None, **settings):
        seen = super().look(model, step, autocast_dtype, **settings)
        right = np.full(len(seen.correct["shapes"]), step < 4)
        return replace(seen, correct=seen.correct | {"shapes": right})


class FailsOnRank1(Probe):
    """Cannot look at steps 2 and 6, the last one, on one rank."""

    def look(self, model, step, autocast_dtype=None, **settings):
        self.fails = step in (2, 6) and distributed.get_rank() == 1
        return super().look(model, step, autocast_dtype, **settings)

    def _show(self, *arguments):
        if self.fails:
            raise OSError("disk on fire")
        return super()._show(*arguments)


class SlowClockOnRank1(Probe):
    """One rank takes its looks for far slower than the other does."""

    def look(self, model, step, autocast_dtype=None, **settings):
        seen = super().look(model, step, autocast_dtype, **settings)
        return replace(seen, runtime=1e6 if distributed.get_rank() == 1 else 0.0)


def stop_if_rank_1(verdict):
    return distributed.get_rank() == 1


def raise_on_rank_1(verdict):
    if distributed.get_rank() == 1:
        raise OSError("the pager is down")


def base_model_but_on_rank_1(folder):
    if distributed.get_rank() == 1:
        raise OSError("the network is down")
    return CLIPModel.from_pretrained(folder / "model")


def wake_dropout(model):
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3


SGD = {"optim": "sgd", "learning_rate": 0.1}
BUSY = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "eval_strategy": "epoch"}
# Several ranks on a CPU cannot resume the optimizer with transformers 4.
MODEL_ONLY = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
STREAM = {"accelerator_config": {"dispatch_batches": False, "even_batches": True}}
DISPATCHED = {"accelerator_config": {"dispatch_batches": True}}
SPLIT = {"accelerator_config": {"split_batches": True}}
UNEVEN = {"accelerator_config": {"even_batches": False}}
# name -> (settings of the guard, its probe, arguments of the Trainer); None: no guard
SCENARIOS = {
    "plain": (None, Probe, BUSY),
    "guarded": ({"every": 2}, Probe, BUSY),
    "stop": ({"every": 2, "action": "stop"}, ForgetsAtStep4, {}),
    "stop-by-one": ({"every": 4, "action": stop_if_rank_1}, Probe, {}),
    "clock": ({"every": 1, "max_overhead": 0.05, "max_forgetting": None}, SlowClockOnRank1, {}),
    "failing": ({"every": 2}, FailsOnRank1, {}),
    "raising": ({"every": 2, "action": raise_on_rank_1}, Probe, {}),
    "unguarded": (None, Probe, MODEL_ONLY),
    "no-base": ({"base_model": base_model_but_on_rank_1}, Probe, {}),  # goes on from unguarded
    "stream": ({"every": 2}, Probe, STREAM),
    "dispatched": ({"every": 2}, Probe, DISPATCHED),
    "split": ({"every": 2}, Probe, SPLIT),
    "uneven": ({"every": 2}, Probe, UNEVEN),
    "saved": ({"every": 2}, Probe, MODEL_ONLY),
    "resumed-alone": ({"every": 2}, Probe, {}),  # goes on from saved, for one process
    "batch-of-4": (None, Probe, SGD | {"per_device_train_batch_size": 4}),
    "batch-of-8": (None, Probe, SGD | {"per_device_train_batch_size": 8}),  # for one process
}


def train(folder, scenario, output):
    """One scenario on this rank: its final weights, and what was logged, looked at and decided."""
    settings, probe, arguments = SCENARIOS[scenario]
    task = Task("colours", load_from_disk(folder / "colours"), templates="a {}", probe_size=32)
    shapes = Task("shapes", load_from_disk(folder / "shapes"), templates="a {}", probe_size=24)
    model = CLIPModel.from_pretrained(folder / "model")
    if arguments is BUSY:
        wake_dropout(model)
    processor = CLIPProcessor.from_pretrained(folder / "model")
    callbacks = []
    if settings is not None:
        store = output / "store.jsonl"
        settings = {"max_overhead": None, "verbose": False, "outcomes": store} | settings
        if base_model := settings.get("base_model"):
            settings["base_model"] = partial(base_model, folder)
        callbacks = [IIMMCallback(task, [shapes], **settings)]
        monitor.Probe = probe
    arguments = {
        "output_dir": str(output),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
    } | arguments
    data = task.dataset
    if "accelerator_config" in arguments:  # 20 rows: the last batch of an epoch is uneven
        data = data.select(range(20))
        if "dispatch_batches" in arguments["accelerator_config"]:
            data = data.to_iterable_dataset(num_shards=2)
    trainer = Trainer(
        PromptClassifier(model, task, processor),
        TrainingArguments(**arguments),
        train_dataset=data,
        eval_dataset=task.dataset.select(range(10)),
        data_collator=ImageCollator(processor),
        processing_class=processor,
        callbacks=callbacks,
    )
    resumed = {
        "no-base": str(folder / "out-unguarded-0" / "checkpoint-3"),
        "resumed-alone": str(folder / "out-saved-0" / "checkpoint-3"),
    }
    trainer.train(resume_from_checkpoint=resumed.get(scenario))
    guard = callbacks[0] if callbacks and callbacks[0].monitor else None  # it may be off
    return {
        "weights": model.state_dict(),
        "log": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "world_size": trainer.args.world_size,
        "ended": guard.outcome.ended if guard else "",
        "history": [row["step"] for row in guard.monitor.history] if guard else [],
        "rows": guard.monitor.history if guard else [],
        "optimizer": trainer.optimizer.state_dict(),
        "dropped": guard.record()["looks_dropped"] if guard else 0,
        "files": sorted(p.name for p in output.glob("*.json*") if p.suffix != ".lock"),
    }


def main(folder, names):
    """All scenarios that are named, on both ranks.

    `folder` holds the model, the processor and the data; each rank leaves `<scenario>-<rank>.pt`
    there.
    """
    logging.getLogger("iimm_callbacks").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()

    def run(rank):
        for name in names:
            result = train(folder, name, folder / f"out-{name}-{rank}")
            torch.save(result, folder / f"{name}-{rank}.pt")

    on_ranks(2, run, seconds=20)
