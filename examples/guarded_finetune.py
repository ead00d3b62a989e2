"""Fine-tune a CLIP-like model as a classifier with the plain Trainer, guarded against forgetting.

    python examples/guarded_finetune.py                    # the shipped sample, full fine-tuning
    python examples/guarded_finetune.py --method lora --task emoji_groups --action stop
    python examples/guarded_finetune.py --model openai/clip-vit-base-patch32 \
        --dataset ethz/food101 --test_split validation --method lora --learning_rate 1e-4
    torchrun --nproc-per-node 2 examples/guarded_finetune.py --save_steps 10
    accelerate launch --config_file examples/accelerate_configs/cpu_2.yaml \
        examples/guarded_finetune.py --save_steps 10

Offline and about a minute on two cores with the shipped sample. Prints the measure, the forecast
and the verdict before training, a line per look, and predicted against observed at the end; writes
the run file `iimm_<task>.json`, `predicted_vs_observed.png` and the tuned model to the output
folder. The forecast learns from the sample's saved runs *on its other tasks* (examples/study made
them); for your own model, from your own runs, which are saved as you go. Several processes each
embed a share of the probe; the first one prints and writes. After a kill `--resume` goes on to the
same numbers as an uninterrupted run.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, Task, sample
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.reports.figures import plot_run

LEARNING_RATE = {
    "full": 1e-4,
    "bitfit": 1e-3,
    "attention": 1e-4,
    "lora": 1e-3,
    "clip_adapter": 1e-3,
    "linear_probe": 1e-3,
}


@dataclass
class Settings:
    method: str = field(default="full", metadata={"help": ", ".join(LEARNING_RATE)})
    task: str = field(default="handwritten_digits", metadata={"help": "Shipped task to learn"})
    model: str = field(default="", metadata={"help": "Hub name or folder; default: the sample"})
    dataset: str = field(default="", metadata={"help": "Hub name or folder; default: `task`"})
    train_split: str = field(default="train", metadata={"help": "Split to train on"})
    test_split: str = field(default="test", metadata={"help": "Split to probe"})
    template: str = field(default="a photo of a {}.", metadata={"help": "Prompt for `dataset`"})
    outcomes: str = field(default="", metadata={"help": "JSON lines; default: saved runs"})
    max_forgetting: float = field(default=0.05, metadata={"help": "Limit, a fraction"})
    action: str = field(default="warn", metadata={"help": "warn or stop"})
    steps: int = field(default=100, metadata={"help": "Optimizer steps"})
    batch_size: int = field(default=32, metadata={"help": "Images per step, of each process"})
    learning_rate: float = field(default=0.0, metadata={"help": "Default: by method"})
    save_steps: int = field(default=0, metadata={"help": "Steps between checkpoints; 0: none"})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint"})
    seed: int = field(default=0, metadata={"help": "Of the training"})
    output_dir: str = field(default="output/guarded_finetune", metadata={"help": "Where to write"})
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs"})


def load_data(settings):
    """The data to train on, and the task that is probed."""
    if not settings.dataset:
        few = 32 if settings.smoke else None
        task = sample.load_task(settings.task, probe_size=few)
        return sample.load_dataset(settings.task, "train"), task
    from datasets import load_dataset

    data = load_dataset(settings.dataset)
    name = settings.dataset.split("/")[-1]
    task = Task(name, data[settings.test_split], templates=settings.template)
    return data[settings.train_split], task


def load_model(settings, task):
    """The model, prepared for the method, and its processor."""
    if settings.model:
        model = AutoModel.from_pretrained(settings.model)
        processor = AutoProcessor.from_pretrained(settings.model)
    else:
        model, processor = sample.load_model(), sample.load_processor()
    options = {
        "clip_adapter": {"processor": processor},
        "linear_probe": {"processor": processor, "task": task},
    }
    return prepare(model, settings.method, **options.get(settings.method, {})), processor


def last_complete_checkpoint(folder):
    """The newest that can be read; of one that a kill cut short the state, written last, cannot."""
    found = Path(folder).glob("checkpoint-*")
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            TrainerState.load_from_json(path / "trainer_state.json")
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def finetune(settings, outcomes):
    """One guarded run; returns the Trainer, the guard and the trained classifier."""
    checkpoint = last_complete_checkpoint(settings.output_dir)
    if checkpoint and not settings.resume:
        sys.exit(f"{checkpoint} is of another run: --resume it, or use another --output_dir")
    torch.manual_seed(settings.seed)
    train_dataset, task = load_data(settings)
    model, processor = load_model(settings, task)
    guard = IIMMCallback(
        task,
        # None: the shipped tasks, as canaries
        off_target=sample.canaries(task.name, probe_size=8) if settings.smoke else None,
        max_forgetting=settings.max_forgetting,
        action=settings.action,
        outcomes=outcomes,
        max_overhead=None,  # this run is so short that every look would be dropped
    )
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        max_steps=8 if settings.smoke else settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate or LEARNING_RATE[settings.method],
        logging_steps=50,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        # Without a GPU each process would train alone otherwise (accelerate 1.15).
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
    )
    classifier = PromptClassifier(model, task, processor)
    trainer = Trainer(
        model=classifier,
        args=arguments,
        train_dataset=train_dataset,
        data_collator=ImageCollator(processor),
        processing_class=processor,
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)  # the guard prints a line per look, that is enough
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, guard, classifier


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    outcomes = settings.outcomes or "default"
    if not settings.outcomes and not settings.model:
        # What was learnt from a task must not forecast that task.
        outcomes = [o for o in sample.load_outcomes() if o.task != settings.task]
    trainer, guard, classifier = finetune(settings, outcomes)
    folder = Path(settings.output_dir)
    if trainer.is_world_process_zero():
        plot_run(guard.record(), folder / "predicted_vs_observed.png")
        classifier.dual_encoder.save_pretrained(folder / "model")
        print(f"Written to {folder}: predicted_vs_observed.png, model")


if __name__ == "__main__":
    main(sys.argv[1:])
