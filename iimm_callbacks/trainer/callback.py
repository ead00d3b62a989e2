"""`IIMMCallback(TrainerCallback)`: hooks, logs and control around an `IIMMMonitor`."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.tasks import Task, check_tasks
from ..guard.pace import Budget
from ..guard.schedule import Every, check_every
from ..models.encoders import EncodePair
from ..models.undisturbed import undisturbed
from ..models.wrappers import find_untouched
from ..monitor import IIMMMonitor
from ..probing import ranks
from ..records import keys
from ..records.outcomes import Outcome
from ..records.run_file import file_name
from ..records.store import as_outcomes
from ..records.verdict import LEVELS, Limits, Verdict
from ..reports import terminal as report
from ..reports.card import update_card
from ..reports.tables import rescue_table
from ..rescue.rescuer import Rescuer, rescue_at_end
from . import alerts, host
from .alerts import Forgiving
from .amended import amend_cards

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
    eval_iimm_linear_probe_accuracy         of a linear probe on its embeddings; at step 0 only
    eval_iimm_linear_probe_se               standard error of that
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
            `guard.judging.judge`; that may be so before training.
        action: ``"warn"``; ``"stop"`` to also stop training; or a callable that receives the
            `Verdict` of every look and returns True to stop.
        on_exceed: ``"rescue"``: where the observed forgetting is over the limit when training ends,
            leave the model with the mix of untouched and fine-tuned weights that gains most
            within it, see `rescue.sweep.rescue`; the fine-tuned weights go to a file in the output
            folder, and checkpoints hold them. Costs a copy of the weights that train in the memory
            of each process, and as much on disk where checkpoints are written; with adapters
            nothing. At the end it takes as long as eleven looks.
        every: When to look: ``None`` for 5, 10, 20, 30, 50, 70 and 100 % of the steps, a number of
            steps, a fraction, ``"epoch"`` or ``"evaluate"``. The last step is always looked at.
        max_overhead: Share of the wall time that looks may take, the last one apart: they show
            fewer images to keep to it, see `schedule.first_look` and `schedule.Budget`, and six are
            taken whatever they cost where there is a limit. ``None``: all images, every time.
        outcomes: Finished runs to learn the forecast from: `Outcome` records, a JSON-lines file or
            a `datasets.Dataset`. ``None``: those in `store`. Without any the limit applies to what
            is observed, and to what that makes likely for the end.
        store: JSON-lines file that this run is added to when it ends; ``"default"``: that of
            `store.default_store`, in the user's cache folder; ``None``: none.
        run_file: JSON file that has all that was measured, from every look on; ``"default"``:
            ``iimm_<task>.json`` in the output folder; ``None``: none.
        base_model: The untouched model, for a run that goes on from a checkpoint that was written
            without the guard: the model, its Hub name or folder, or a function that returns it.
            To rescue with, too: then nothing is kept for that.
        report: Write the run as a web page with pictures when it ends, into the folder
            ``iimm_<task>_report`` in the output folder; needs matplotlib.
        card: Where the Trainer writes a model card, such as to push it, add a section with the
            numbers and a `model-index` entry for every task.
        method: Fine-tuning method; ``None``: recognised by `tuning.detect`.
        processor: ``None``: the Trainer's `processing_class`, else that of the `PromptClassifier`,
            else the one saved with the model. For open_clip the pair (transform, tokenizer).
        encode: ``(encode_images, encode_texts)`` for a model without feature functions.
        batch_size: Images in one forward pass of the probe; halved where memory does not suffice.
        cache_limit: Bytes of preprocessed probe images kept in memory, on each rank.
        train: What the run trains on, for the linear probe that the forecast of the gain rests on:
            a `Task` or a data set that one can be made of; ``"auto"``: the Trainer's, where its
            images and labels can be read as the task's are; ``None``: the probe is cross-validated
            on the task's own probe images.
        strict: Raise when a look during training fails, or `action`, a tracker or the terminal
            raises; otherwise that costs one warning each, never the run.
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
        on_exceed: Literal["rescue"] | None = None,
        every: Every = None,
        max_overhead: float | None = 0.05,
        outcomes: str | Path | Iterable[Outcome] | None = None,
        store: str | Path | None = "default",
        run_file: str | Path | None = "default",
        base_model: nn.Module | str | Path | Callable[[], nn.Module] | None = None,
        report: bool = False,
        card: bool = True,
        method: str | None = None,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        train: Any = "auto",
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
        if on_exceed not in (None, "rescue"):
            raise ValueError(f"`on_exceed` must be 'rescue' or None, got {on_exceed!r}")
        unguarded = off_target is not None and len(off_target) == 0
        if max_forgetting is None or unguarded:
            missing = "no `max_forgetting`" if max_forgetting is None else "no `off_target` task"
            if action == "stop":
                raise ValueError(
                    f"`action='stop'` has nothing to judge by: {missing}; give one, or use 'warn'"
                )
            if on_exceed == "rescue":
                raise ValueError(
                    f"`on_exceed='rescue'` has no limit to keep to: {missing}; give one, or None"
                )
        self.task = task
        self.off_target = off_target
        self.limits = Limits(max_forgetting, limit_on, confidence)
        self.action = action
        self.on_exceed = on_exceed
        self.every = every
        self.max_overhead = max_overhead
        reread = outcomes is None or isinstance(outcomes, str | Path)
        self.outcomes = outcomes if reread else as_outcomes(outcomes)
        self.store = store
        self.run_file = run_file
        self.base_model = base_model
        if report:  # better told now than at the end of a run
            from ..reports.drawing import require_matplotlib

            require_matplotlib()
        self.report = report
        self.card = card
        self.method = method
        self.processor = processor
        self.encode = encode
        self.batch_size = batch_size
        self.cache_limit = cache_limit
        self.train = train
        self._finds_training_set = isinstance(train, str) and train == "auto"
        self.strict = strict
        self.verbose = verbose
        self.monitor: IIMMMonitor | None = None
        self.outcome: Outcome | None = None
        self._model: weakref.ref[nn.Module] | None = None  # that the latest run trains
        self._stop_reason = ""
        self._held: host.HeldStep | None = None
        self._rescuer: Rescuer | None = None
        self._forgiving = Forgiving(strict)
        self._back_in_line: Callable[[], None] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untouched model; a model that cannot be measured raises before training."""
        model = kwargs["model"]
        broken_off = self.outcome is None and self._model is not None and self._model() is model
        self._model = weakref.ref(model)
        self._stop_reason, self._held = "", None
        self._forgiving = Forgiving(self.strict)
        self.outcome = None
        if state.global_step > 0:
            self._resume(args, state, control, **kwargs)
            self._amend_card()
            self._hold_if_stopped(args, state, model)
            return
        # `auto_find_batch_size` tries anew with the model as it was when memory ran out, and so
        # does a user after an exception: its baseline stays that of the first try.
        first_try = self.monitor if broken_off else None
        if first_try is not None and first_try.probe.task is not self.task:
            first_try = None
        kept = self._rescuer if first_try is not None else None
        self.monitor = self._rescuer = None  # should the model not be measurable
        monitor = self._new_monitor(args, state, **kwargs)
        if first_try is not None:
            monitor.try_again(first_try)
        rescuer = self._new_rescuer(args)
        if rescuer is not None:
            rescuer.begin(model, will_save=args.save_strategy != "no", kept=kept)
        verdict = monitor.begin(model, recipe=host.recipe(args, state))
        self.monitor, self._rescuer = monitor, rescuer
        self._amend_card()
        self._show(state, lambda: report.preflight_table(monitor.record()))
        self._show(state, lambda: monitor.plan)
        self._emit(state, control, monitor.row())
        self._act(state, control, verdict, "continue")
        self._hold_if_stopped(args, state, model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stopped before training: take the gradients away from the step that Trainer still does.

        The Trainer tests `should_training_stop` only after a training step. Without gradients
        (None, not zeros: weight decay acts on zeros) the optimizer changes nothing.
        """
        if self._held is not None:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look where one is due and the budget allows."""
        if self._held is not None:
            self._held.undo()
            control.should_save = control.should_evaluate = control.should_log = False
        else:
            self._look_if_due(state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, with ``every="epoch"``."""
        if self._held is not None:
            control.should_save = control.should_evaluate = control.should_log = False
        else:
            self._look_if_due(state, control, kwargs["model"], "epoch")

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
        if metrics is None:
            return
        wanted = f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}"
        chooses = wanted.startswith(keys.PREFIX)
        if self.monitor is not None and self.monitor.history:
            step, trains = self._step(state), self.outcome is None and self._held is None
            if trains and not chooses:
                self._look_if_due(state, control, kwargs["model"], "evaluate")
            elif trains and not self.monitor.has_seen(step):
                self._look(state, control, kwargs["model"])
            if self.monitor.history[-1]["step"] == step and not self.monitor.is_mixed:
                metrics.update(self.monitor.row())
        in_run = self._model is not None and self.outcome is None  # whether the guard is on or off
        if chooses and in_run and wanted not in metrics:
            # The Trainer would end in a KeyError; NaN is never the best.
            metrics[wanted] = math.nan

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Go before the trackers: they end their runs in `on_train_end`, where we may still look.

        The row with `train_runtime` is the Trainer's last one, and `on_train_end` the next hook.
        """
        if logs and "train_runtime" in logs:
            self._back_in_line = host.first_in_line(self)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model that the user is left with, and print predicted versus observed."""
        if self._back_in_line is not None:
            self._back_in_line()
            self._back_in_line = None
        monitor, model = self.monitor, kwargs["model"]
        if monitor is None:
            return
        step = self._step(state)
        swapped = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if swapped or not monitor.has_seen(step):
            self._look(state, control, model, may_stop=False)
        rescuer = self._rescuer
        if rescuer is not None and monitor.is_exceeded():
            rescue_at_end(lambda: monitor.rescue(model, rescuer), rescuer, strict=self.strict)
        self.outcome = monitor.end(model, step, ended=self._stop_reason)
        self._card_of_checkpoints(state)
        record = monitor.record()
        self._show(state, lambda: report.summary_table(record))
        if "rescue" in record:
            score = record["metrics"].get(self.task.name, "accuracy")
            self._show(state, lambda: rescue_table(record["rescue"], self.task.name, score))
        if self.report and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{self._file_stem}_report"
            self._forgiving("the report", lambda: _write_report(record, folder, monitor))

    def record(self) -> dict[str, Any]:
        """The run as JSON-ready data, for `run_file.save_run` and `report.plot_run`.

        Raises:
            RuntimeError: No run has begun.
        """
        if self.monitor is None:
            raise RuntimeError("no guarded run has begun; call `trainer.train()` first")
        return self.monitor.record()

    def _amend_card(self) -> None:
        trainer, monitor = host.find_trainer(), self.monitor
        if self.card and trainer is not None:
            amend_cards(trainer, self.task.name, lambda path: self._update_card(path, monitor))

    def _update_card(self, path: Path, monitor: IIMMMonitor | None) -> None:
        if monitor is not None:  # else the guard is off
            self._forgiving("the model card", lambda: update_card(path, monitor.record()))

    @property
    def _file_stem(self) -> str:
        return file_name(self.task.name).removesuffix(".json")

    @property
    def _state_key(self) -> str:
        return f"IIMMCallback/{self.task.name}"

    def _new_rescuer(self, args: TrainingArguments) -> Rescuer | None:
        if self.on_exceed is None:
            return None
        return Rescuer(Path(args.output_dir), self._file_stem, self.base_model)

    def _new_monitor(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> IIMMMonitor:
        run_file = self.run_file
        if run_file == "default":
            run_file = Path(args.output_dir) / file_name(self.task.name)
        monitor = IIMMMonitor(
            self.task,
            self.off_target,
            limits=self.limits,
            every=self.every,
            max_overhead=self.max_overhead,
            outcomes=self.outcomes,
            store=self.store,
            run_file=run_file,
            method=self.method,
            processor=self.processor or kwargs.get("processing_class"),
            encode=self.encode,
            batch_size=self.batch_size,
            cache_limit=self.cache_limit,
            progress=self.verbose and state.is_world_process_zero,
            autocast_dtype=host.autocast_dtype(args),
            strict=self.strict,
            train=None if self._finds_training_set else self.train,
        )
        if self._finds_training_set:
            monitor.probe.train = host.training_set(kwargs.get("train_dataloader"))
        return monitor

    def _hold_if_stopped(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """Stopped in `on_train_begin`: the Trainer still does a step, which must change nothing."""
        if not self._stop_reason:
            return
        self._held = host.HeldStep(state, model)
        if not host.can_hold_step(args):
            raise RuntimeError(
                f"{self._stop_reason}. It ends in this error because DeepSpeed, optimizers that "
                "step in backward, and fp16 without gradient clipping cannot be stopped otherwise "
                "before the first step"
            )

    def _step(self, state: TrainerState) -> int:
        """Steps done; the Trainer also counts a held one, and one after the last checkpoint."""
        if self._held is not None:
            return self._held.step
        return min(int(state.global_step), int(state.max_steps))

    def _resume(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Go on as if the run had never been interrupted, or switch the guard off and say so."""
        self.monitor, model = None, kwargs["model"]
        saved = state.stateful_callbacks.get(self._state_key)
        try:
            monitor = self._new_monitor(args, state, **kwargs)
            untouched = None
            if saved is not None:
                monitor.load_state_dict(saved["attributes"])
            else:
                with undisturbed(model):  # a user's function may draw, or fail on some ranks
                    untouched = ranks.together(lambda: find_untouched(model, self.base_model))
            monitor.begin(model, recipe=host.recipe(args, state), untouched=untouched)
        except Exception as error:
            if self.strict:
                raise
            if state.is_world_process_zero:
                logger.warning(
                    "The IIMM guard is off: this run resumes at step %d and cannot be compared "
                    "with the untouched model (%s)",
                    state.global_step,
                    error,
                )
            return
        self.monitor = monitor
        self._rescuer = self._new_rescuer(args)
        try:
            if self._rescuer is not None:
                self._rescuer.resume(model)
        except Exception as error:
            self._rescuer = None
            if self.strict:
                raise
            if state.is_world_process_zero:
                logger.warning("This run cannot be rescued at its end: %s", error)
        if saved is None:
            self._show(state, lambda: report.preflight_table(monitor.record()))
            self._look(state, control, model)  # the untouched model's numbers are not of this step
        elif (
            saved.get("stopped")
            and self.action != "warn"
            and saved.get("limits") == asdict(self.limits)
        ):
            # Of a run that was killed after it had been stopped.
            self._stop_reason = str(saved["stopped"])
            control.should_training_stop = True
        elif state.epoch == int(state.epoch or 0):
            # A checkpoint of an epoch's last step may have been written before the look there.
            event = "evaluate" if args.eval_strategy == "epoch" else None
            self._look_if_due(state, control, model, "epoch" if self.every == "epoch" else event)

    def _look_if_due(
        self, state: TrainerState, control: TrainerControl, model: Any, event: str | None = None
    ) -> None:
        if self.monitor and self.monitor.is_due(self._step(state), state.max_steps, event):
            self._look(state, control, model)

    def _look(
        self, state: TrainerState, control: TrainerControl, model: Any, *, may_stop: bool = True
    ) -> None:
        monitor = self.monitor
        assert monitor is not None
        looks, alarm = len(monitor.history), monitor.alarm
        step = self._step(state)
        # This step's own is logged after the look, but is there already where a run is resumed.
        losses = [r["loss"] for r in state.log_history if "loss" in r and r["step"] < step]
        loss = losses[-1] if losses else None
        verdict = monitor.check(model, step, state.max_steps, loss)
        if len(monitor.history) > looks:
            self._show(state, lambda: report.look_line(monitor.history[-1]))
            self._emit(state, control, monitor.row())
            self._act(state, control, verdict, alarm, may_stop=may_stop)
        else:
            self._remember(state)

    def _act(
        self,
        state: TrainerState,
        control: TrainerControl,
        verdict: Verdict,
        alarm: str,
        *,
        may_stop: bool = True,
    ) -> None:
        """Warn where it got worse than the `alarm` so far, and stop where that is asked for."""
        step = self._step(state)
        stop = self.action == "stop" and verdict.level == "stop"
        if callable(self.action):
            action = self.action
            stop = self._forgiving("`action`", lambda: action(verdict)) is True
        elif LEVELS.index(verdict.level) > LEVELS.index(alarm) and state.is_world_process_zero:
            logger.warning("IIMM guard, step %d: %s", step, verdict.reason)
        if state.is_world_process_zero and self.monitor is not None:
            before = [row["level"] for row in self.monitor.history[-2:-1]] or ["continue"]
            for tracker, alert in alerts.due(self.task.name, verdict, before[0]):
                self._forgiving(f"an alert to {tracker}", alert)
        if ranks.any_rank(stop) and may_stop and step < state.max_steps:
            self._stop_reason = f"stopped by the guard at step {step}: {verdict.reason}"
            control.should_training_stop = True
            self._show(state, lambda: self._stop_reason)
        self._remember(state)

    def _remember(self, state: TrainerState) -> None:
        """What the next checkpoint keeps; it survives whatever the Trainer restores or does not."""
        assert self.monitor is not None
        state.stateful_callbacks[self._state_key] = {
            "args": {},
            "attributes": self.monitor.state_dict(),
            "stopped": self._stop_reason,
            "limits": asdict(self.limits),
        }
        self._card_of_checkpoints(state)

    def _card_of_checkpoints(self, state: TrainerState) -> None:
        """Checkpoints are pushed with the card in the output folder; nobody writes one for them."""
        trainer = host.find_trainer() if self.card and state.is_world_process_zero else None
        if trainer is not None and trainer.args.push_to_hub:
            self._update_card(Path(trainer.args.output_dir) / "README.md", self.monitor)

    def _emit(self, state: TrainerState, control: TrainerControl, row: dict[str, float]) -> None:
        self._forgiving("a tracker", lambda: host.log(state, control, row))

    def _show(self, state: TrainerState, text: Callable[[], str]) -> None:
        if self.verbose and state.is_world_process_zero:
            self._forgiving("printing", lambda: tqdm.write(text()))


def _write_report(record: dict[str, Any], folder: Path, monitor: IIMMMonitor) -> None:
    from ..reports.page import write_report

    write_report(record, folder, monitor.outcomes())
