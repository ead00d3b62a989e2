"""Fine-tune a CLIP-like model in a plain accelerate loop, guarded against forgetting.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --save_steps 10
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --save_steps 10 --resume  # after a kill
    accelerate launch --config_file examples/accelerate_configs/cpu_2.yaml \
        examples/accelerate_loop.py --max_forgetting 0.03

Offline and in 40 seconds of one core, or of two with half of the work each. All of these are one
and the same run, but for the last, which is stopped at step 30, in both processes:

    Processes: 2, on cpu:0
    ...
    IIMM step 20 (20%): 0.448 | gain +13.0 | forgetting +2.3 | ... 0.70 | warn | loss 1.27
    IIMM step 30 (30%): 0.386 | gain +18.7 | forgetting +4.3 | ... 0.92 | stop | loss 0.90

The others go on to a gain of 24.0 and a forgetting of 5.6 points, and a loss of 0.53. The first
process writes `run.json`, `model` and `tracker`, for `tensorboard --logdir`. GPUs, FSDP and
DeepSpeed: see accelerate_configs; they were not run here.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, HfArgumentParser, get_linear_schedule_with_warmup

from iimm_callbacks import IIMMMonitor, ImageCollator, PromptClassifier, sample


@dataclass
class Settings:
    task: str = field(default="handwritten_digits", metadata={"help": "Shipped task to learn"})
    model: str = field(default="", metadata={"help": "Hub name or folder; default: the sample"})
    max_forgetting: float = field(default=0.05, metadata={"help": "Limit, a fraction"})
    steps: int = field(default=100, metadata={"help": "Optimizer steps"})
    batch_size: int = field(default=32, metadata={"help": "Images per step, of all processes"})
    learning_rate: float = field(default=1e-4, metadata={"help": "At first; falls to 0"})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0: none"})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint"})
    tracker: str = field(default="tensorboard", metadata={"help": "If installed; or wandb, ..."})
    seed: int = field(default=0, metadata={"help": "Of the training"})
    output_dir: str = field(default="output/accelerate_loop", metadata={"help": "Where to write"})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs"})

    def __post_init__(self):
        self.steps = 8 if self.smoke else self.steps
        self.checkpoints = Path(self.output_dir) / "checkpoints"


def load(accelerator, settings):
    """The model to be trained, its processor, and the guard of the run."""
    if settings.model:
        model = AutoModel.from_pretrained(settings.model)
        processor = AutoProcessor.from_pretrained(settings.model)
    else:
        model, processor = sample.load_model(), sample.load_processor()
    few = 32 if settings.smoke else None
    task = sample.load_task(settings.task, probe_size=few)
    dtypes, runs = {"bf16": torch.bfloat16, "fp16": torch.float16}, sample.load_outcomes()
    monitor = IIMMMonitor(
        task,
        sample.canaries(settings.task, probe_size=8 if settings.smoke else None),
        settings.max_forgetting,
        # What was learnt from a task must not forecast that task.
        outcomes="default" if settings.model else [o for o in runs if o.task != settings.task],
        run_file=Path(settings.output_dir) / "run.json",  # the first process writes it
        processor=processor,
        autocast_dtype=dtypes.get(accelerator.mixed_precision),
        max_overhead=None,  # this run is so short that every look would be dropped
    )
    return PromptClassifier(model, task, processor).train(), processor, monitor


def complete_checkpoints(settings):
    """The newest comes last; one that is being written has another name."""
    found = settings.checkpoints.glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(accelerator, settings, step):
    """A kill at any time leaves the one before or this one."""
    older = complete_checkpoints(settings)
    accelerator.save_state(str(settings.checkpoints / "unfinished"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(settings.checkpoints / "unfinished", settings.checkpoints / f"step-{step}")
        for path in older:
            shutil.rmtree(path)


def finetune(accelerator, settings):
    """One guarded run; returns the monitor."""
    set_seed(settings.seed)
    classifier, processor, monitor = load(accelerator, settings)
    loader = DataLoader(
        sample.load_dataset(settings.task, "train"),
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=ImageCollator(processor),
        generator=torch.Generator(),  # else a resumed run would draw other dropout
    )
    optimizer = torch.optim.AdamW(classifier.parameters(), settings.learning_rate, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.steps)
    # The monitor is shown what `prepare` returns. It looks through DDP and calls only what is
    # inside, so that no process waits for another's forward pass. FSDP's wrapper it needs, to put
    # the weights together; `unwrap_model` would take it away.
    model, optimizer, loader, schedule = accelerator.prepare(
        classifier, optimizer, loader, schedule
    )
    accelerator.register_for_checkpointing(monitor)
    step = 0
    if settings.resume and (found := complete_checkpoints(settings)):
        accelerator.load_state(str(found[-1]))  # before `begin`, which then measures nothing
        step = int(found[-1].name.removeprefix("step-"))
    recipe = {"optimizer": "adamw", "schedule": "linear", "batch_size": settings.batch_size}
    recipe |= {"learning_rate": settings.learning_rate, "steps": settings.steps}
    verdict = monitor.begin(model, recipe=recipe)
    if step == 0:
        accelerator.log(monitor.row(), step=0)
    while step < settings.steps and verdict.level != "stop":
        epoch, done = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, done):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            looked = monitor.step(step)  # None where no look was due; it prints a line
            if looked is not None:
                verdict = looked
                mean = accelerator.reduce(loss.detach(), "mean").item()
                accelerator.log({"loss": mean, **monitor.row()}, step=step)
            if step == settings.steps or verdict.level == "stop":  # the same for all processes
                break
            if settings.save_steps and step % settings.save_steps == 0:  # after the look
                save_checkpoint(accelerator, settings, step)
    stopped = f"stopped at step {step}: {verdict.reason}" if step < settings.steps else ""
    monitor.end(ended=stopped)
    weights = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).dual_encoder.save_pretrained(
        Path(settings.output_dir) / "model",
        is_main_process=accelerator.is_main_process,
        state_dict={k.removeprefix("dual_encoder."): v for k, v in weights.items()},
    )
    return monitor


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    if complete_checkpoints(settings) and not settings.resume:
        sys.exit(f"{settings.checkpoints} are of another run: --resume it, or use --output_dir")
    accelerator = Accelerator(
        # Without a GPU each process would train alone otherwise (accelerate 1.15).
        cpu=not torch.accelerator.is_available(),
        log_with=settings.tracker,
        project_dir=settings.output_dir,
        # Each batch is split among the processes: the same run, however many there are.
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    accelerator.print(f"Processes: {accelerator.num_processes}, on {accelerator.device}")
    if accelerator.is_main_process:  # what a kill left
        shutil.rmtree(settings.checkpoints / "unfinished", ignore_errors=True)
    accelerator.init_trackers("tracker")
    monitor = finetune(accelerator, settings)
    accelerator.print(f"Written to {settings.output_dir}: run.json, model, tracker")
    accelerator.end_training()
    return monitor


if __name__ == "__main__":
    main(sys.argv[1:])
