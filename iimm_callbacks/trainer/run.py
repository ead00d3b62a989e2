"""A guarded run of the Trainer, hook by hook: measure, log, warn, stop, remember."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..data.tasks import Task
from ..guard.schedule import Every
from ..models.encoders import EncodePair, undisturbed
from ..models.untouched import find_untouched
from ..models.wrappers import model_fingerprint
from ..monitor import IIMMMonitor
from ..monitor.measured import Verbose
from ..monitor.telling import Forgiving
from ..probing import ranks
from ..records.catalog import of_model
from ..records.ledger import Past
from ..records.log import get_logger
from ..records.outcomes import Outcome
from ..records.run_file import file_name
from ..records.verdict import LEVELS, Limits, Verdict
from ..reports.card import update_card
from ..reports.tables import rescue_table
from ..reports.words import page
from ..rescue.rescuer import Rescuer, rescue_at_end
from . import baseline, host
from .outlets import alerts_due, amend_cards

logger = get_logger(__name__)

Action = Literal["warn", "stop", "rescue"] | Callable[[Verdict], Any]


class GuardedRun:
    """What the hooks of `IIMMCallback` call, which has and documents these settings."""

    task: Task
    off_target: list[Task] | None
    limits: Limits
    action: Action
    rescues: bool
    every: Every
    past: Past
    train: Any
    base_model: nn.Module | str | Path | Callable[[], nn.Module] | None
    processor: Any
    encode: EncodePair | None
    report: bool
    card: bool
    strict: bool
    verbose: Verbose
    run_file: Any
    passed_on: dict[str, Any]  # what `IIMMMonitor` is given as it is

    def __init__(self) -> None:
        self.monitor: IIMMMonitor | None = None
        self.outcome: Outcome | None = None
        self._model: weakref.ref[nn.Module] | None = None  # that the latest run trains
        self._ended_as = ""  # fingerprint of the model when the latest run ended
        self._stop_reason = ""
        self._held: host.HeldStep | None = None
        self._rescuer: Rescuer | None = None
        self._forgiving = Forgiving(self.strict)
        self._back_in_line: Callable[[], None] | None = None

    def _begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        first_try: IIMMMonitor | None,
        before: IIMMMonitor | None,
        **kwargs: Any,
    ) -> None:
        """Measure the untouched model, or take its numbers from where it was measured.

        That is `first_try`, a run of this model that failed, or `before`, one that has ended.
        """
        model = kwargs["model"]
        # `auto_find_batch_size` tries again with the model as it was when memory ran out, and so
        # does a user after an exception: its baseline stays that of the first try.
        if first_try is not None and first_try.probe.task is not self.task:
            first_try = None
        kept = None if first_try is None and before is None else self._rescuer
        self.monitor = self._rescuer = None  # should the model not be measurable
        monitor = self._new_monitor(args, **kwargs)
        if first_try is not None:
            monitor.try_again(first_try)
        elif self.base_model is None:
            earlier = baseline.earlier_journal(model, self._state_key, before, self._ended_as)
            if earlier is None or not monitor.go_on_from(earlier, model):
                kept = None
        rescuer = self._new_rescuer(args)
        if rescuer is not None:
            rescuer.begin(model, will_save=args.save_strategy != "no", kept=kept)
        base = self.base_model if first_try is None else None
        untouched = baseline.other_baseline(model, base)
        recipe = host.recipe(args, state, kwargs.get("optimizer"))
        counts_from = baseline.counts_from(untouched, monitor)
        verdict = monitor.begin(model, recipe=recipe, untouched=untouched)
        self.monitor, self._rescuer = monitor, rescuer
        if self.verbose == "all" or counts_from != baseline.AS_IT_IS:
            self._show(state, lambda: page(counts_from))
        if self.verbose == "all":
            self._show(state, lambda: page(self.task.pairing()))
        if state.is_world_process_zero and self.encode is None:
            baseline.warn_of_other_heads(model)
        self._forgiving("a tracker", lambda: host.log(state, control, monitor.row()))
        self._act(state, control, verdict, "continue")

    def _end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
    ) -> None:
        """Look at the model that the user is left with, rescue it, record and show the run."""
        step, monitor = self._step(state), self.monitor
        assert monitor is not None
        swapped = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if swapped or not monitor.has_seen(step):
            self._look(state, control, model, may_stop=False)
        if (rescuer := self._rescuer) is not None and monitor.is_exceeded():
            rescue_at_end(lambda: monitor.rescue(model, rescuer), rescuer, strict=self.strict)
        if swapped and (best := host.best_step(state)) != step:
            monitor.loaded(best)
        self.outcome = monitor.end(model, step, ended=self._stop_reason)
        self._ended_as = model_fingerprint(model)
        self._card_of_checkpoints(state)
        record = monitor.record()
        if "rescue" in record:
            score = record["metrics"].get(self.task.name, "accuracy")
            self._show(state, lambda: rescue_table(record["rescue"], self.task.name, score))
        if self.report and state.is_world_process_zero:
            folder = host.output_dir(args) / f"{self._file_stem}_report"
            from ..reports.page import write_report  # takes time to import

            self._forgiving(
                "the report",
                lambda: write_report(record, folder, of_model(monitor.past(), record)),
            )
            self._show(state, lambda: page(f"Report: {folder}"))

    def _step_back(self) -> None:
        """To the place in the line of callbacks that `host.first_in_line` took us from."""
        if self._back_in_line is not None:
            self._back_in_line()
            self._back_in_line = None

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
        if not self.rescues:
            return None
        return Rescuer(host.output_dir(args), self._file_stem, self.base_model)

    def _new_monitor(self, args: TrainingArguments, **kwargs: Any) -> IIMMMonitor:
        finds_training_set = isinstance(self.train, str) and self.train == "auto"
        own_file = host.output_dir(args) / file_name(self.task.name)
        monitor = IIMMMonitor(
            self.task,
            self.off_target,
            self.limits,
            every=self.every,
            outcomes=self.past,
            run_file=own_file if self.run_file == "default" else self.run_file,
            processor=self.processor or kwargs.get("processing_class"),
            encode=self.encode,
            verbose=self.verbose,
            autocast_dtype=host.autocast_dtype(args),
            strict=self.strict,
            train=None if finds_training_set else self.train,
            **self.passed_on,
        )
        if finds_training_set:
            monitor.probe.train = host.training_set(kwargs.get("train_dataloader"))
        return monitor

    def _step(self, state: TrainerState) -> int:
        """Steps done; the Trainer also counts a held one, and one after the last checkpoint."""
        if self._held is not None:
            return self._held.step
        return min(int(state.global_step), int(state.max_steps))

    def _resume(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on as if the run had never been interrupted, or switch the guard off and say so."""
        model, saved = kwargs["model"], state.stateful_callbacks.get(self._state_key)
        warning = (
            f"The IIMM guard is off: this run resumes at step {state.global_step} and cannot be "
            "compared with the untouched model (%s)"
        )
        self.monitor = self._resumed(
            state, lambda: self._resumed_monitor(args, state, saved, **kwargs), warning
        )
        if self.monitor is None:
            return
        if (rescuer := self._new_rescuer(args)) is not None:
            warning = "This run cannot be rescued at its end: %s"
            self._rescuer = self._resumed(state, lambda: rescuer.resume(model), warning)
        if saved is None:
            self._look(state, control, model)  # the untouched model's numbers are not of this step
        elif (
            saved.get("stopped")
            and self.action not in ("warn", "rescue")
            and saved.get("limits") == asdict(self.limits)
        ):
            # The run was stopped, and then killed.
            self._stop_reason = str(saved["stopped"])
            control.should_training_stop = True
        elif state.epoch == int(state.epoch or 0):
            # A checkpoint of an epoch's last step may have been written before the look there.
            event = "evaluate" if args.eval_strategy == "epoch" else None
            self._look_if_due(state, control, model, "epoch" if self.every == "epoch" else event)

    def _resumed(self, state: TrainerState, find: Callable[[], Any], warning: str) -> Any:
        """What `find` finds; None, with a warning, where it raises."""
        try:
            return find()
        except Exception as error:
            if self.strict:
                raise
            if state.is_world_process_zero:
                logger.warning(warning, error)
            return None

    def _resumed_monitor(
        self, args: TrainingArguments, state: TrainerState, saved: Any, **kwargs: Any
    ) -> IIMMMonitor:
        model, untouched = kwargs["model"], None
        monitor = self._new_monitor(args, **kwargs)
        if saved is not None:
            monitor.load_state_dict(saved["attributes"])
        else:
            with undisturbed(model):  # a user's function may draw, or fail on some ranks
                untouched = ranks.together(lambda: find_untouched(model, self.base_model))
        recipe = host.recipe(args, state, kwargs.get("optimizer"))
        monitor.begin(model, recipe=recipe, untouched=untouched)
        monitor.is_later_phase &= saved is not None  # its steps count from the base model
        return monitor

    def _look_if_due(
        self, state: TrainerState, control: TrainerControl, model: Any, event: str | None = None
    ) -> None:
        if self._held is not None:  # also of an epoch: of several accumulated, no step has ended
            self._held.leave_nothing(control)
        elif self.monitor and self.monitor.is_due(self._step(state), state.max_steps, event):
            self._look(state, control, model)

    def _look(
        self, state: TrainerState, control: TrainerControl, model: Any, *, may_stop: bool = True
    ) -> None:
        step, monitor = self._step(state), self.monitor
        assert monitor is not None
        last, alarm = monitor.history[-1], monitor.alarm
        verdict = monitor.check(model, step, state.max_steps, host.training_loss(state, step))
        if monitor.history[-1] is not last:
            self._forgiving("a tracker", lambda: host.log(state, control, monitor.row()))
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
            said = self._forgiving("`action`", lambda: action(verdict))
            stop = isinstance(said, bool | np.bool_) and bool(said)  # not whatever is true
        elif LEVELS.index(verdict.level) > LEVELS.index(alarm) and state.is_world_process_zero:
            logger.warning("IIMM guard, step %d: %s", step, verdict.reason)
        if state.is_world_process_zero and self.monitor is not None:
            before = [row["level"] for row in self.monitor.history[-2:-1]] or ["continue"]
            for tracker, alert in alerts_due(self.task.name, verdict, before[0]):
                self._forgiving(f"an alert to {tracker}", alert)
        stop = ranks.any_rank(stop, what=f"the verdict at step {step}")
        if stop and may_stop and step < state.max_steps:
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
        """Checkpoints have no card of their own: they are pushed with that of the output folder."""
        trainer = host.find_trainer() if self.card and state.is_world_process_zero else None
        if trainer is not None and trainer.args.push_to_hub:
            self._update_card(Path(trainer.args.output_dir) / "README.md", self.monitor)

    def _show(self, state: TrainerState, text: Callable[[], str]) -> None:
        if self.verbose and state.is_world_process_zero:
            self._forgiving("printing", lambda: tqdm.write(text()))
