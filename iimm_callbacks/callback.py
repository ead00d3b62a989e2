"""`IIMMCallback(TrainerCallback)`: hooks, logs and control around an `IIMMMonitor`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import host, keys, report
from .encoders import EncodePair
from .guard import Limits, Verdict
from .monitor import IIMMMonitor
from .outcomes import Outcome
from .schedule import Budget, Every, check_every, is_due, next_share
from .store import as_outcomes
from .tasks import Task, check_tasks
from .wrappers import zero_shot_twin

logger = logging.getLogger(__name__)

Action = Literal["warn", "stop"] | Callable[[Verdict], Any]


class IIMMCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Measures IIMM before and during training, forecasts, and guards against forgetting.

    `Trainer(..., callbacks=[IIMMCallback(task=..., off_target=...)])` is all; weights, losses and
    random streams stay those of a run without it. Logged through the Trainer, as fractions:

    ======================================  ====================================================
    key                                     meaning
    ======================================  ====================================================
    eval_iimm                               IIMM of the task, now
    eval_iimm_inter                         image to wrong-class text term
    eval_iimm_intra                         image to image term
    eval_iimm_se                            standard error of eval_iimm
    eval_iimm_accuracy                      zero-shot accuracy on the task
    eval_iimm_gain_observed                 accuracy on the task, minus that before training
    eval_iimm_gain_forecast                 final gain, forecast; also ..._low, ..._high (90 %)
    eval_iimm_forgetting_observed           mean drop of off-target accuracy; positive is loss
    eval_iimm_forgetting_worst              drop of the worst off-target task
    eval_iimm_forgetting_forecast           final mean drop, forecast; also ..._low, ..._high
    eval_iimm_exceed_probability            probability of exceeding the limit
    eval_iimm_runtime                       seconds that the look took
    eval_iimm_<off-target task>_accuracy    zero-shot accuracy on that task
    ======================================  ====================================================

    A number that there is none of (no forecast, no off-target task, no limit) is not logged.

    Args:
        task: What is being learnt.
        off_target: What must not be forgotten. ``None``: the shipped sample tasks, as canaries.
        max_forgetting: Limit on the drop of off-target accuracy, a fraction in (0, 1]; ``None``:
            only measure.
        limit_on: ``"mean"`` or ``"worst"`` off-target task.
        confidence: Probability of exceeding the limit from which to stop, in [0.5, 1). For the
            forecast's sake it stops only once the next look is likely over the limit, see
            `guard.judge`; that may be so before training.
        action: ``"warn"``; ``"stop"`` to also stop training; or a callable that receives the
            `Verdict` of every look and returns True to stop.
        every: When to look: ``None`` for 5, 10, 20, 30, 50, 70 and 100 % of the steps, a number of
            steps, a fraction, ``"epoch"`` or ``"evaluate"``. The last step is always looked at.
        max_overhead: Looks are dropped so that they take at most this share of the wall time;
            ``None``: never drop. The looks before training and at the end are always taken.
        outcomes: Finished runs to learn the forecast from: `Outcome` records, a JSON-lines file or
            a `datasets.Dataset`. ``None``: those in `store`. Without any the limit applies to what
            is observed, and to what that makes likely for the end.
        store: JSON-lines file that this run is added to when it ends; ``"default"``: that of
            `store.default_store`, in the user's cache folder; ``None``: none.
        method: Fine-tuning method; ``None``: recognised by `tuning.detect`.
        processor: ``None``: the Trainer's `processing_class`, else that of the `PromptClassifier`,
            else the one saved with the model. For open_clip the pair (transform, tokenizer).
        encode: ``(encode_images, encode_texts)`` for a model without feature functions.
        batch_size: Images in one forward pass of the probe.
        cache_limit: Bytes of preprocessed probe images kept in memory.
        strict: Raise when a look during training fails; otherwise it warns once.
        verbose: Print the tables.

    Attributes:
        monitor: The `IIMMMonitor` of the latest run, with its history, forecast and verdict.
        outcome: The `Outcome` of the latest run, once it has ended.

    Raises:
        TypeError: A task is not a `Task`, or `action` is neither a known word nor callable.
        ValueError: A setting is out of its range, tasks that cannot guard one another, or
            ``action="stop"`` with nothing to judge by.
    """

    def __init__(
        self,
        task: Task,
        off_target: Sequence[Task] | None = None,
        *,
        max_forgetting: float | None = 0.05,
        limit_on: Literal["mean", "worst"] = "mean",
        confidence: float = 0.8,
        action: Action = "warn",
        every: Every = None,
        max_overhead: float | None = 0.05,
        outcomes: str | Path | Iterable[Outcome] | None = None,
        store: str | Path | None = "default",
        method: str | None = None,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        strict: bool = False,
        verbose: bool = True,
    ) -> None:
        check_tasks(task, off_target or ())
        check_every(every)
        Budget(max_overhead)
        if action not in ("warn", "stop") and not callable(action):
            raise TypeError(
                f"`action` must be 'warn', 'stop' or a callable of the verdict, got {action!r}"
            )
        unguarded = off_target is not None and len(off_target) == 0
        if action == "stop" and (max_forgetting is None or unguarded):
            missing = "no `max_forgetting`" if max_forgetting is None else "no `off_target` task"
            raise ValueError(
                f"`action='stop'` has nothing to judge by: {missing}; give one, or use 'warn'"
            )
        self.task = task
        self.off_target = off_target
        self.limits = Limits(max_forgetting, limit_on, confidence)
        self.action = action
        self.every = every
        self.max_overhead = max_overhead
        reread = outcomes is None or isinstance(outcomes, str | Path)
        self.outcomes = outcomes if reread else as_outcomes(outcomes)
        self.store = store
        self.method = method
        self.processor = processor
        self.encode = encode
        self.batch_size = batch_size
        self.cache_limit = cache_limit
        self.strict = strict
        self.verbose = verbose
        self.monitor: IIMMMonitor | None = None
        self.outcome: Outcome | None = None
        self._stop_reason = ""
        self._alarm: Verdict | None = None
        self._hold_first_step = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untouched model; a model that cannot be measured raises before training."""
        self._budget = Budget(self.max_overhead)
        self._began = time.perf_counter()
        self._stop_reason, self._alarm, self._hold_first_step = "", None, False
        self.outcome = None
        self.monitor = None
        saved = state.stateful_callbacks.get(self._state_key)
        resumed = state.global_step > 0
        # Resumed without the guard's state, the untouched model is to be had only if it hides
        # under adapters.
        untouched = zero_shot_twin(kwargs["model"]) if resumed and not saved else nullcontext()
        if untouched is None:
            logger.warning(
                "The IIMM guard is off: this run resumes at step %d from a checkpoint that was "
                "written without the guard, so the untouched model was never measured.",
                state.global_step,
            )
            return
        main = state.is_world_process_zero
        monitor = IIMMMonitor(
            self.task,
            self.off_target,
            limits=self.limits,
            outcomes=self.outcomes,
            store=self.store,
            method=self.method,
            processor=self.processor or kwargs.get("processing_class"),
            encode=self.encode,
            batch_size=self.batch_size,
            cache_limit=self.cache_limit,
            progress=self.verbose and main,
            autocast_dtype=host.autocast_dtype(args),
            strict=self.strict,
        )
        if saved and resumed:
            monitor.load_state_dict(saved["attributes"])
        verdict = monitor.begin(
            kwargs["model"],
            recipe=host.recipe(args, state),
            next_share=next_share(self.every, 0, state.max_steps, 0),
            untouched=untouched,
        )
        self.monitor = monitor
        self._budget.took(monitor.row()[keys.RUNTIME], counts=False)
        if saved and resumed:
            self._alarm = verdict
            return
        self._began = time.perf_counter()
        self._show(state, report.preflight_table(monitor.record()))
        if resumed:  # the untouched model's numbers are not those of this step
            self._look(args, state, control, kwargs["model"], needed=True)
        else:
            self._emit(args, state, control, monitor.row())
            self._act(args, state, control, verdict)
        if control.should_training_stop:
            self._hold_first_step = True
            if not host.can_hold_step(args):
                raise RuntimeError(
                    f"{self._stop_reason}. It ends in this error because neither DeepSpeed nor "
                    "fp16 without gradient clipping can be stopped otherwise before the first step"
                )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stopped before training: take the gradients away from the step that Trainer still does.

        The Trainer tests `should_training_stop` only after a training step. Without gradients
        (None, not zeros: weight decay acts on zeros) the optimizer changes nothing.
        """
        if self._hold_first_step:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look where one is due and the budget allows."""
        if self._hold_first_step:
            control.should_save = control.should_evaluate = control.should_log = False
        elif is_due(self.every, state.global_step, state.max_steps):
            self._look(args, state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, with ``every="epoch"``."""
        if self.every == "epoch" and not self._hold_first_step:
            self._look(args, state, control, kwargs["model"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put this step's numbers among the metrics, so that the best model can be chosen by one.

        Looks first with ``every="evaluate"``, or where `metric_for_best_model` is one of ours.
        """
        if self.monitor is None or metrics is None or not self.monitor.history:
            return
        wanted = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
        needed = wanted.startswith(keys.PREFIX)
        if self.every == "evaluate" or needed:
            self._look(args, state, control, kwargs["model"], needed=needed)
        if self.monitor.history[-1]["step"] == state.global_step:
            metrics.update(self.monitor.row())
        if needed and wanted not in metrics:
            # The Trainer would end in a KeyError; NaN is never the best.
            metrics[wanted] = math.nan

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model that the user is left with, and print predicted versus observed."""
        monitor = self.monitor
        if monitor is None:
            return
        if not self._hold_first_step:
            swapped = args.load_best_model_at_end and state.best_model_checkpoint is not None
            self._look(args, state, control, kwargs["model"], needed=True, again=swapped)
        # Numbers of an earlier step are no outcome, where the last look failed.
        seen = monitor.history[-1]["step"] == state.global_step
        complete = state.global_step >= state.max_steps and seen and not self._stop_reason
        early = "stopped early" if seen else "the last look failed"
        ended = self._stop_reason or ("finished" if complete else early)
        self.outcome = monitor.end(complete=complete, ended=ended)
        self._show(state, report.summary_table(self.record()))

    def record(self) -> dict[str, Any]:
        """The run as JSON-ready data, for `report.save_run` and `report.plot_run`.

        Raises:
            RuntimeError: No run has begun.
        """
        if self.monitor is None:
            raise RuntimeError("no guarded run has begun; call `trainer.train()` first")
        ended = self.outcome.ended if self.outcome else "running"
        return self.monitor.record() | {"ended": ended, "looks_dropped": self._budget.dropped}

    @property
    def _state_key(self) -> str:
        return f"IIMMCallback/{self.task.name}"

    def _look(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        *,
        needed: bool = False,
        again: bool = False,
    ) -> None:
        monitor = self.monitor
        if monitor is None or (monitor.history[-1]["step"] == state.global_step and not again):
            return
        step, total = state.global_step, max(state.max_steps, 1)
        elapsed = time.perf_counter() - self._began
        too_dear = not self._budget.allows(elapsed, max(step, 1), total)
        # All ranks look or none: the clock of one decides for all.
        if host.any_rank(too_dear, args) and not needed and step < total:
            self._budget.dropped += 1
            return
        start = time.perf_counter()
        looks = len(monitor.history)
        coming = next_share(self.every, step, total, monitor.history[-1]["step"])
        verdict = monitor.check(model, step, total, next_share=coming)
        self._budget.took(time.perf_counter() - start)
        failed = len(monitor.history) == looks
        if host.any_rank(failed, args):  # all ranks keep one history
            if not failed:
                monitor.retract()
            return
        self._show(state, report.look_line(monitor.history[-1]))
        self._emit(args, state, control, monitor.row())
        self._act(args, state, control, verdict)

    def _act(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        verdict: Verdict,
    ) -> None:
        monitor = self.monitor
        assert monitor is not None
        step = state.global_step
        worse = verdict.worse_than(self._alarm)
        stop = False
        if callable(self.action):
            stop = self.action(verdict) is True
        elif worse and verdict.level != "continue":
            logger.warning("IIMM guard, step %d: %s", step, verdict.reason)
        if worse:
            self._alarm = verdict
        stop = stop or (self.action == "stop" and verdict.level == "stop")
        if host.any_rank(stop, args) and step < state.max_steps:
            self._stop_reason = f"stopped by the guard at step {step}: {verdict.reason}"
            control.should_training_stop = True
            self._show(state, self._stop_reason)
        state.stateful_callbacks[self._state_key] = {
            "args": {},
            "attributes": monitor.state_dict(),
        }

    def _emit(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        row: dict[str, float],
    ) -> None:
        # Trackers see only what goes through `Trainer.log`, which no hook is handed; it also
        # clears `should_log`, and with it the Trainer's own row of this step.
        keep = control.should_log
        trainer = host.find_trainer()
        if trainer is None:
            state.log_history.append({**row, "step": state.global_step})
        else:
            trainer.log(dict(row))
        control.should_log = keep

    def _show(self, state: TrainerState, text: str) -> None:
        if self.verbose and state.is_world_process_zero:
            tqdm.write(text)
