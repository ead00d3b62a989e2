"""What every rank of `test_sharded.py` runs: weights or optimizer spread over ranks, on CPUs."""

from functools import partial
from itertools import chain, count, islice, repeat

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from forked import on_ranks
from torch import distributed
from transformers import CLIPModel, CLIPProcessor, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from iimm_callbacks import IIMMCallback, IIMMMonitor, ImageCollator, PromptClassifier, Task
from iimm_callbacks.models.sharded import full_parameters
from iimm_callbacks.models.tuning import prepare

LAYER = "CLIPEncoderLayer"
SAVED = {"save_strategy": "steps", "save_steps": 3}
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [LAYER]}}
OPTIONS = [
    {"reshard_after_forward": False},
    {"activation_checkpointing": True},
    {"offload_params": True},
    {"cpu_ram_efficient_loading": True},
]
LOADING = {
    "uneven": {"even_batches": False},
    "evened": {"even_batches": True},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
    "dispatched-split": {"dispatch_batches": True, "split_batches": True},
}
FSDP1 = {"fsdp_config": FSDP["fsdp_config"] | {"version": 1, "sync_module_states": False}}


def zero(stage):
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 8}
    return {"deepspeed": config | {"zero_allow_untested_optimizer": True}}


def with_fsdp_on_cpus():
    """accelerate leaves FSDP out where no accelerator is; its FSDP itself needs none."""
    own = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **more):
        own(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if plugin := fsdp_plugin or self.__dict__.get("fsdp_plugin"):
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            self.device = torch.device("cpu")

    AcceleratorState.__init__ = init


def parts(folder, output):
    """Model, processor, and the two tasks; settings of a guard."""
    task = Task("colours", load_from_disk(folder / "colours"), templates="a {}", probe_size=32)
    shapes = Task("shapes", load_from_disk(folder / "shapes"), templates="a {}", probe_size=24)
    model = CLIPModel.from_pretrained(folder / "model")
    # FSDP 2 and DeepSpeed take no parameter without a dimension, guarded or not.
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach()[None])
    processor = CLIPProcessor.from_pretrained(folder / "model")
    store = output / "store.jsonl"
    settings = {"every": 2, "max_overhead": None, "verbose": False, "outcomes": store}
    return model, processor, task, shapes, settings


def at_its_second_call(verdict, calls=count(1)):  # noqa: B008
    return next(calls) == 2


def weights_of(model):
    """All of them, put together; all ranks at once."""
    return {name: whole.detach().clone() for name, _, whole in full_parameters(model)}


def frozen_text(model):
    model.text_model.requires_grad_(False)
    return model


def empty_but_on_first(model):
    """As `from_pretrained` leaves it where the first rank alone reads the file."""
    if distributed.get_rank():
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    return model


def train(folder, output, more, guarded=True, resume=None, change=None, rows=96, **settings):
    model, processor, task, shapes, own = parts(folder, output)
    model = change(model) if change else model
    guard = IIMMCallback(task, [shapes], **own | settings) if guarded else None
    arguments = {
        "output_dir": str(output), "max_steps": 6, "per_device_train_batch_size": 8,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(
        PromptClassifier(model, task, processor),
        TrainingArguments(**arguments | more),
        train_dataset=task.dataset.select(range(rows)),
        data_collator=ImageCollator(processor),
        callbacks=[guard] if guard else [],
    )
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    except ValueError as refused:
        error = str(refused)
    wrapped = trainer.model_wrapped
    return {
        "error": error,
        "wrapper": type(wrapped).__name__,
        "weights": {} if error else weights_of(wrapped),
        "rows": guard.monitor.history if guard and guard.monitor else [],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "ended": guard.outcome.ended if guard and guard.outcome else "",
        "run": guard.outcome.run if guard and guard.outcome else "",
    }


def loop(folder, output, guarded=True, resume=None, fsdp=True):
    """One's own loop with accelerate, saved after three steps."""
    model, processor, task, shapes, settings = parts(folder, output)
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[LAYER], state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin if fsdp else None)
    net = PromptClassifier(model, task, processor)
    loader = torch.utils.data.DataLoader(task.dataset, 8, collate_fn=ImageCollator(processor))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    monitor = IIMMMonitor(task, [shapes], **settings) if guarded else None
    first = 1
    if monitor:
        accelerator.register_for_checkpointing(monitor)
    if resume:
        accelerator.load_state(str(folder / resume))
        first = 4
    batches = list(islice(chain.from_iterable(repeat(loader)), 6))
    if monitor:
        monitor.begin(net, recipe={"learning_rate": 1e-3, "steps": 6})
    losses = []
    for step in range(first, 7):
        loss = net(**batches[step - 1])["loss"]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        if monitor:
            monitor.step(step)
        if step == 3 and not resume:
            accelerator.save_state(str(output / "saved"))
    outcome = monitor.end() if monitor else None
    return {
        "error": None,
        "wrapper": type(net).__name__,
        "weights": weights_of(net),
        "rows": monitor.history if monitor else [],
        "losses": losses,
        "ended": outcome.ended if outcome else "",
        "run": outcome.run if outcome else "",
    }


# name -> what runs; one that resumes goes on from the one before
SCENARIOS = {
    "ddp": partial(train, more=SAVED),
    "ddp-resumed": partial(train, more={}, resume="out-ddp/checkpoint-3"),
    "ddp-loop": partial(loop, fsdp=False),
    "ddp-loop-resumed": partial(loop, fsdp=False, resume="out-ddp-loop/saved"),
    "fsdp-plain": partial(train, more=FSDP, guarded=False),
    "fsdp": partial(train, more=FSDP | SAVED),
    "fsdp-resumed": partial(train, more=FSDP, resume="out-fsdp/checkpoint-3"),
    "fsdp-stopped": partial(train, more=FSDP, action=at_its_second_call),
    "fsdp-rescue": partial(train, more=FSDP, action="rescue"),
    "fsdp1": partial(train, more=FSDP | FSDP1),
    **{
        f"fsdp-{next(iter(option))}": partial(
            train,
            more=FSDP | {"fsdp_config": FSDP["fsdp_config"] | option},
            change=empty_but_on_first if "cpu_ram_efficient_loading" in option else None,
        )
        for option in OPTIONS
    },
    **{  # 37 rows in batches of 8: five, the last one of 5, so that one rank has one more
        name: partial(train, more={"accelerator_config": loading}, rows=37)
        for name, loading in LOADING.items()
    },
    "uneven-epochs": partial(
        train, more={"accelerator_config": LOADING["uneven"]}, rows=37, every="epoch"
    ),
    "fsdp-accumulating": partial(train, more=FSDP | {"gradient_accumulation_steps": 2}),
    "fsdp-bf16": partial(train, more=FSDP | {"bf16": True}),
    "fsdp-frozen": partial(train, more=FSDP, change=frozen_text),
    "fsdp-lora": partial(train, more=FSDP, change=partial(prepare, method="lora", rank=2)),
    "loop-plain": partial(loop, guarded=False),
    "loop": loop,
    "loop-resumed": partial(loop, resume="out-loop/saved"),
    **{
        f"zero{stage}{kind}": partial(train, more=zero(stage) | SAVED, **more)
        for stage in (1, 2)
        for kind, more in {
            "-plain": {"guarded": False},
            "": {},
            "-resumed": {"resume": f"out-zero{stage}/checkpoint-3"},
        }.items()
    },
    "zero3": partial(train, more=zero(3)),
}


def main(folder, n_ranks, names):
    """All scenarios that are named, on all ranks.

    `folder` is as for `ranks_worker.py`; each rank leaves `<scenario>-<rank>.pt` there.
    """
    transformers_logging.set_verbosity_error()

    def run(rank):
        with_fsdp_on_cpus()
        for name in names:
            result = SCENARIOS[name](folder, folder / f"out-{name.removesuffix('-resumed')}")
            torch.save(result, folder / f"{name}-{rank}.pt")

    on_ranks(n_ranks, run, seconds=60)
