"""Fine-tune an open_clip model as a classifier with the plain Trainer, guarded against forgetting.

    pip install open_clip_torch
    python examples/open_clip_finetune.py
    python examples/open_clip_finetune.py --model ViT-B-32 --pretrained laion2b_s34b_b79k \
        --method lora --learning_rate 1e-4

Offline and in 30 seconds on two cores without `--model`: the model is then small and has random
weights, which shows the mechanics and no meaningful numbers. It knows nothing, so nothing can be
forgotten: the off-target tasks stay at chance (forgetting 0.5 points), while the handwritten digits
go from 10 to 52 %. With `--model` (not run here, it needs the internet) any model of open_clip
takes its place. Prints the guard's tables; writes `run.json`, `trainer_state.json` (with the
losses) and the tuned weights.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
from transformers import HfArgumentParser, PrinterCallback, Trainer, TrainingArguments

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, sample
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.records.run_file import save_run

# What open_clip keeps in `model_configs/ViT-B-32.json`, smaller. The vocabulary is that of its own
# tokenizer, which comes with it.
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 96, "head_width": 24, "layers": 3},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
METHODS = "full, bitfit, attention, lora, clip_adapter or linear_probe"


@dataclass
class Settings:
    model: str = field(default="", metadata={"help": "As open_clip names it; default: a tiny one"})
    pretrained: str = field(default="", metadata={"help": "Tag or file of `model`'s weights"})
    method: str = field(default="full", metadata={"help": METHODS})
    task: str = field(default="handwritten_digits", metadata={"help": "Shipped task to learn"})
    max_forgetting: float = field(default=0.05, metadata={"help": "Limit, a fraction"})
    action: str = field(default="warn", metadata={"help": "warn or stop"})
    steps: int = field(default=200, metadata={"help": "Optimizer steps"})
    batch_size: int = field(default=32, metadata={"help": "Images per step"})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak; of the tiny model"})
    seed: int = field(default=0, metadata={"help": "Of weights and training"})
    output_dir: str = field(
        default="output/open_clip_finetune", metadata={"help": "Where to write"}
    )
    smoke: bool = field(default=False, metadata={"help": "A few steps, to see that it runs"})


def load_model(settings):
    """The model, its transforms for training and for testing, and its tokenizer."""
    if settings.model:
        parts = open_clip.create_model_and_transforms(
            settings.model, pretrained=settings.pretrained or None
        )
        return *parts, open_clip.get_tokenizer(settings.model)
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads a config from files only
        config = {"model_cfg": TINY, "preprocess_cfg": {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        parts = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        return *parts, open_clip.get_tokenizer(f"local-dir:{folder}")


def finetune(settings):
    """One guarded run; returns the guard."""
    torch.manual_seed(settings.seed)
    model, train_transform, test_transform, tokenizer = load_model(settings)
    processor = (test_transform, tokenizer)  # open_clip has no processor object: a pair is one
    task = sample.load_task(settings.task)
    options = {
        "clip_adapter": {"processor": processor},
        "linear_probe": {"processor": processor, "task": task},
    }
    model = prepare(model, settings.method, **options.get(settings.method, {}))
    guard = IIMMCallback(
        task,
        sample.canaries(settings.task),  # shipped tasks; better those that you would miss
        max_forgetting=settings.max_forgetting,
        action=settings.action,
        processor=processor,  # here, since the Trainer's `processing_class` takes no pair
        max_overhead=None,  # this run is so short that every look would be dropped
        outcomes=None,  # a toy: leave it out to save your runs and forecast from them
    )
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        max_steps=8 if settings.smoke else settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=15,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer = Trainer(
        model=PromptClassifier(model, task, processor),
        args=arguments,
        train_dataset=sample.load_dataset(settings.task, "train"),
        data_collator=ImageCollator((train_transform, tokenizer)),  # crops at random
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)  # the guard prints a line per look, that is enough
    trainer.train()
    trainer.save_state()  # trainer_state.json: the loss and every look
    trainer.save_model()  # model.safetensors: prepare a model in the same way and load it there
    return guard


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    guard = finetune(settings)
    save_run(guard.record(), Path(settings.output_dir) / "run.json")
    print(f"Written to {settings.output_dir}: run.json, trainer_state.json, model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
