"""What the Trainer knows and does not pass to its callbacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import default_compute_objective

from ..probing.learnable import TrainingSet


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


def metric_for_best_model(args: TrainingArguments) -> str:
    """The key of the metrics that the best model is chosen by; "eval_" where there is none."""
    return f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"


def searches_by_own_objective() -> bool:
    """Whether the Trainer that is calling searches hyperparameters by an objective of the user."""
    trainer = find_trainer()
    if trainer is None or getattr(trainer, "hp_search_backend", None) is None:
        return False
    return getattr(trainer, "compute_objective", None) is not default_compute_objective


def output_dir(args: TrainingArguments) -> Path:
    """The folder of the run: within a search over hyperparameters, that of the trial."""
    trainer = find_trainer()
    if trainer is None or getattr(trainer, "hp_search_backend", None) is None:
        return Path(args.output_dir)
    return Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))


def check_alone(callback: TrainerCallback) -> None:
    """Raise where the Trainer has another callback of the same class: their keys are the same.

    Raises:
        ValueError: It has.
    """
    trainer = find_trainer()
    callbacks = trainer.callback_handler.callbacks if trainer else []
    guards = [other for other in callbacks if type(other) is type(callback)]
    if len(guards) > 1:
        raise ValueError(
            f"a Trainer must have one {type(callback).__name__}, got {len(guards)}: they log under "
            "the same keys; give one of them the other tasks as `off_target`"
        )


def first_in_line(callback: TrainerCallback) -> Callable[[], None]:
    """Let a callback have the hooks before all others, from the next one on.

    Trackers come before a user's callbacks and end their runs in `on_train_end`; of a row that is
    logged after that MLflow and Trackio make a run of its own, and TensorBoard a second file.

    Args:
        callback: One of the Trainer's; of another, or where no Trainer is calling, nothing changes.

    Returns:
        A function that puts the callback back in its place.
    """
    trainer = find_trainer()
    if trainer is None or callback not in trainer.callback_handler.callbacks:
        return lambda: None
    handler = trainer.callback_handler
    place = handler.callbacks.index(callback)

    def move(to: int) -> None:
        others = [other for other in handler.callbacks if other is not callback]
        if len(others) == len(handler.callbacks):
            return  # it was taken away in between
        # A new list: the hook that is running goes through the old one, and skips none.
        handler.callbacks = [*others[:to], callback, *others[to:]]

    move(0)
    return lambda: move(place)


class HeldStep:
    """A step that the Trainer takes after it was told to stop, and that must change nothing.

    Its gradients are taken away in `on_pre_optimizer_step`; what the forward pass changed in the
    model's buffers, such as the statistics of batch norms, is put back here.

    Args:
        state: Before the step.
        model: Before the step.

    Attributes:
        step: Steps done before it.
    """

    def __init__(self, state: TrainerState, model: nn.Module) -> None:
        self.step = int(state.global_step)
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the buffers back."""
        for buffer, before in self._buffers:
            buffer.copy_(before)


def can_hold_step(args: TrainingArguments) -> bool:
    """Whether taking the gradients away in `on_pre_optimizer_step` keeps the weights as they are.

    DeepSpeed steps in backward, and so do layerwise optimizers and LOMO; a GradScaler that has seen
    no gradient refuses to step, unless clipping has unscaled them before.
    """
    optimizer = _name(args.optim)
    in_backward = args.deepspeed is not None or "layerwise" in optimizer or "lomo" in optimizer
    return not in_backward and not (args.fp16 and not args.max_grad_norm)


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of mixed-precision training, else None. The Trainer autocasts `forward` only."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def recipe(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The settings of a run to save, JSON-ready."""
    # `auto_find_batch_size` may have come to another one than was asked for.
    batch_size = getattr(state, "train_batch_size", None) or args.train_batch_size
    return {
        "optimizer": _name(args.optim),
        "learning_rate": float(args.learning_rate),
        "schedule": _name(args.lr_scheduler_type),
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "weight_decay": float(args.weight_decay),
        "steps": state.max_steps,
        "batch_size": batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
    }


def training_set(loader: Any) -> TrainingSet | None:
    """The data set behind the Trainer's data loader, as the guard finds it; None without one."""
    data = getattr(loader, "dataset", None)
    return None if data is None else TrainingSet(data, given=False)


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))
