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

from ..guard.schedule import Every, waits_for_end
from ..monitor.telling import no_look
from ..probing import ranks
from ..probing.learnable import TrainingSet
from ..records import keys
from ..records.log import get_logger
from ..records.verdict import Limits

logger = get_logger(__name__)


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


def warn_of_direction(args: TrainingArguments) -> None:
    """Warn where the best model would be the one that forgot most.

    transformers takes the larger number for the better one, unless its name ends with "loss".
    """
    key = metric_for_best_model(args)
    if args.greater_is_better and key.startswith((f"{keys.PREFIX}_forgetting", keys.EXCEED)):
        logger.warning(
            "`metric_for_best_model=%r` picks the checkpoint where it is largest, the one that "
            "forgot most: give `greater_is_better=False`, got True",
            args.metric_for_best_model,
        )


def warn_of_no_look(
    args: TrainingArguments, state: TrainerState, every: Every, limits: Limits
) -> None:
    """Warn where a run with a limit will be looked at only when it ends."""
    strategy, several = _name(args.eval_strategy), state.num_train_epochs > 1
    evaluates = several if strategy == "epoch" else state.eval_steps < state.max_steps
    evaluates &= strategy != "no"
    if every == "evaluate":
        looks, why = evaluates, f"`eval_strategy` is {strategy!r}"
    elif every == "epoch":
        looks, why = several, "there is one epoch"
    else:
        looks, why = not waits_for_end(every, state.max_steps), ""
    looks |= evaluates and metric_for_best_model(args).startswith(keys.PREFIX)
    if not looks and state.max_steps > 1 and limits.max_forgetting is not None:
        logger.warning(no_look(every, state.max_steps, why))


def comes_and_goes(key: str) -> bool:
    """Whether a number of ours is there at some looks only: a forecast and what rests on it."""
    forecasts = [*keys.forecast_keys("gain"), *keys.forecast_keys("forgetting")]
    return key in {keys.EXCEED, keys.STANDARD_ERROR, *forecasts}


def best_step(state: TrainerState) -> int | None:
    """The step of the best checkpoint; None where its name does not tell, or ranks have others.

    All ranks call it.
    """
    best = Path(state.best_model_checkpoint or "").name.rpartition("-")[2]
    step, what = int(best) if best.isdecimal() else -1, "which checkpoint is the best"
    if ranks.any_rank(step != ranks.least(step, what), what):
        if state.is_world_process_zero:
            logger.warning(
                "`load_best_model_at_end` has put parts of different checkpoints together: this "
                "rank loaded %r, another rank another one. Under FSDP with "
                "`state_dict_type='SHARDED_STATE_DICT'` the Trainer looks for a checkpoint before "
                "it is written. Load the best one yourself, or use 'FULL_STATE_DICT'",
                state.best_model_checkpoint,
            )
        return None
    return step if step >= 0 else None


def searches_by_own_objective() -> bool:
    """Whether the Trainer that is calling searches hyperparameters by an objective of the user."""
    trainer = _searching()
    return trainer is not None and trainer.compute_objective is not default_compute_objective


def output_dir(args: TrainingArguments) -> Path:
    """The folder of the run: within a search over hyperparameters, that of the trial."""
    trainer = _searching()
    return Path(args.output_dir if trainer is None else trainer._get_output_dir(trainer._trial))


def _searching() -> Any:
    """The Trainer that is calling, where it searches hyperparameters; else None."""
    trainer = find_trainer()
    return None if trainer is None or trainer.hp_search_backend is None else trainer


def check_alone(kind: type[TrainerCallback]) -> None:
    """Raise where the Trainer has two callbacks of a class or its subclasses: their keys are equal.

    Raises:
        ValueError: It has.
    """
    trainer = find_trainer()
    callbacks = trainer.callback_handler.callbacks if trainer else []
    guards = [callback for callback in callbacks if isinstance(callback, kind)]
    if len(guards) > 1:
        raise ValueError(
            f"a Trainer must have one {kind.__name__}, got {len(guards)}: they log under "
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
    def leave_nothing(self, control: TrainerControl) -> None:
        """Put the buffers back, and let nothing be saved, evaluated or logged.

        Call it at the end of the step and of the epoch: where gradients are accumulated, the
        Trainer leaves after a part of the step, which has no end.
        """
        for buffer, before in self._buffers:
            buffer.copy_(before)
        control.should_save = control.should_evaluate = control.should_log = False


def check_can_hold(args: TrainingArguments, stop_reason: str) -> None:
    """Raise unless taking gradients away in `on_pre_optimizer_step` leaves the weights as they are.

    DeepSpeed steps in backward, and so do layerwise optimizers and LOMO; a GradScaler that has seen
    no gradient refuses to step, unless clipping has unscaled them before.

    Raises:
        RuntimeError: It does not; `stop_reason` says why the run was to stop.
    """
    optimizer = _name(args.optim)
    in_backward = args.deepspeed is not None or "layerwise" in optimizer or "lomo" in optimizer
    if in_backward or (args.fp16 and not args.max_grad_norm):
        raise RuntimeError(
            f"{stop_reason}. It ends with this error because DeepSpeed, optimizers that step in "
            "backward, and fp16 without gradient clipping cannot be stopped otherwise before the "
            "first step"
        )


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype of mixed-precision training, else None. The Trainer autocasts `forward` only."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else None


def recipe(args: TrainingArguments, state: TrainerState, optimizer: Any = None) -> dict[str, Any]:
    """The settings of a run to save, JSON-ready.

    Args:
        args: The Trainer's.
        state: The Trainer's.
        optimizer: That steps; it may be the user's own, to which `args` do not apply.
    """
    # `auto_find_batch_size` may have come to another one than was asked for.
    batch_size = state.train_batch_size or args.train_batch_size
    return {
        "optimizer": _optimizer_name(args, optimizer),
        "learning_rate": _learning_rate(args, optimizer),
        "schedule": _name(args.lr_scheduler_type),
        "warmup_steps": args.get_warmup_steps(state.max_steps),
        "weight_decay": float(args.weight_decay),
        "steps": state.max_steps,
        "batch_size": batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
    }


def _optimizer_name(args: TrainingArguments, optimizer: Any) -> str:
    """As in `args`; of an optimizer that these do not make, its class."""
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
    try:
        asked = Trainer.get_optimizer_cls_and_kwargs(args)[0]
    except Exception:  # it needs the model, or a library that is not there
        asked = None
    known = isinstance(asked, type) and issubclass(kind, torch.optim.Optimizer)
    own = known and kind is not asked and not _steps_by_layer(args)
    return kind.__name__ if own else _name(args.optim)


def _learning_rate(args: TrainingArguments, optimizer: Any) -> float:
    """The largest of the optimizer's, before any schedule; as in `args` where it has none."""
    groups = [] if _steps_by_layer(args) else getattr(optimizer, "param_groups", [])
    rates = [group.get("initial_lr", group.get("lr")) for group in groups]
    known = [float(rate) for rate in rates if rate is not None]
    return max(known, default=float(args.learning_rate))


def _steps_by_layer(args: TrainingArguments) -> bool:
    """Whether each layer has an optimizer of its own, and hooks are handed a dummy."""
    return "layerwise" in _name(args.optim)


def training_loss(state: TrainerState, step: int) -> float | None:
    """The latest that was logged before this step; None where there is none.

    This step's own is logged after the look, but is there already where a run is resumed.
    """
    losses = [r["loss"] for r in state.log_history if "loss" in r and r["step"] < step]
    return losses[-1] if losses else None


def check_same_epochs(every: Every, loader: Any) -> None:
    """Raise where looks at the end of an epoch would come at other steps on each rank.

    Args:
        every: When looks are taken.
        loader: Of this rank; one that does not know its length is taken to be as long on all.

    Raises:
        ValueError: Epochs are of other lengths, as uneven ones are without ``even_batches``.
    """
    if every != "epoch":
        return
    try:
        n = len(loader)
    except TypeError:
        n = 0
    least, most = (sign * ranks.least(sign * n, "the length of an epoch") for sign in (1, -1))
    if least != most:
        raise ValueError(
            "`every` must be steps or a share of them where ranks have epochs of other lengths, "
            f"got 'epoch' with {least:.0f} to {most:.0f} batches; or set `even_batches` to True"
        )


def training_set(loader: Any) -> TrainingSet | None:
    """The data set behind the Trainer's data loader, as the guard finds it; None without one."""
    data = getattr(loader, "dataset", None)
    return None if data is None else TrainingSet(data, given=False)


def _name(choice: Any) -> str:
    return str(getattr(choice, "value", choice))
