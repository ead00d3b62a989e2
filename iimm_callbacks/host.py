"""What the Trainer knows and does not hand its callbacks."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


def find_trainer() -> Trainer | None:
    """The Trainer that is calling, found on the call stack: no hook is handed it."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def log(state: TrainerState, control: TrainerControl, row: dict[str, float]) -> None:
    """Put a row into the history and before all trackers: these see only what `Trainer.log` gets.

    Raises:
        Exception: What a tracker raises; the row is in the history by then.
    """
    keep = control.should_log  # `Trainer.log` clears it, and with it the Trainer's own row
    trainer = find_trainer()
    try:
        if trainer is None:
            state.log_history.append({**row, "step": state.global_step})
        else:
            trainer.log(dict(row))
    finally:
        control.should_log = keep


def can_hold_step(args: TrainingArguments) -> bool:
    """Whether taking the gradients away in `on_pre_optimizer_step` keeps the weights as they are.

    DeepSpeed steps in backward; a GradScaler that has seen no gradient refuses to step, unless
    clipping has unscaled them before.
    """
    return args.deepspeed is None and not (args.fp16 and not args.max_grad_norm)


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of mixed-precision training, else None. The Trainer autocasts `forward` only."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def recipe(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """What is worth knowing of a run's settings years later, JSON-ready."""
    return {
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning_rate": float(args.learning_rate),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "weight_decay": float(args.weight_decay),
        "steps": state.max_steps,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
    }
