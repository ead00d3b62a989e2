"""`IIMMCallback(TrainerCallback)`: hooks, logs and control around an `IIMMMonitor`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.metrics import check_by_images
from ..data.tasks import Task, as_tasks, check_tasks
from ..guard.pace import Budget
from ..guard.schedule import Every, check_every
from ..models.encoders import EncodePair
from ..monitor.measured import Verbose
from ..monitor.telling import Forgiving
from ..records import keys
from ..records.former import check_former, pick
from ..records.ledger import Past
from ..records.log import get_logger
from ..records.outcomes import Outcome
from ..records.verdict import Limits
from . import host
from .run import Action, GuardedRun

logger = get_logger(__name__)

FORMER = {
    "limit_on": "use `max_forgetting=Limits(0.05, limit_on=...)`",
    "confidence": "use `max_forgetting=Limits(0.05, confidence=...)`",
    "on_exceed": "use `action='rescue'`",
    "store": "name the file as `outcomes`, or call `append_outcome` with `guard.outcome`",
    "run_file": "the file is always `iimm_<task>.json` in the output folder",
    "method": "it is recognized from the model",
}


class IIMMCallback(GuardedRun, TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
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
    eval_iimm_<off-target task>_accuracy    zero-shot accuracy on that task, if you named it
    ======================================  ====================================================

    A number that does not exist (no forecast, no off-target task, no limit) is not logged.

    Args:
        task: The task that the model is fine-tuned on.
        off_target: The task or tasks that must not be forgotten. ``None``: the shipped sample
            tasks, as canaries. ``[]``: none, only the gain is measured.
        max_forgetting: Limit on the mean drop of off-target accuracy, a fraction in (0, 1]; or
            `Limits`, with ``limit_on="worst"`` or another ``confidence``. ``None``: only measure.
        action: What to do over the limit. ``"warn"``; ``"stop"``: stop training, see
            `guard.judging.judge`, maybe before the first step; ``"rescue"``: at the end leave the
            model with the mix of untouched and fine-tuned weights that gains most within the
            limit, see `rescue.sweep.rescue`; or a callable that receives the `Verdict` of every
            look and returns True to stop. ``"rescue"`` keeps the fine-tuned weights in a file in
            the output folder, costs a copy of the weights that train in the memory of each
            process, as much on disk where checkpoints are written (with adapters nothing), and
            takes as long as eleven looks at the end.
        every: When to look: ``None`` for 5, 10, 20, 30, 50, 70 and 100 % of the steps, a number of
            steps, a fraction, a list of fractions, ``"epoch"`` or ``"evaluate"``. The last step
            always has a look.
        outcomes: The saved runs that the forecast learns from, and where this run's outcome goes.
            ``"default"``: the store in the user's cache folder, see `store.default_store`; a path:
            that JSON-lines file, made if it is missing; `Outcome` records or a `datasets.Dataset`
            of them: learn from these and save nothing; ``None``: neither. Without any run the limit
            applies to what is observed, and to what that makes likely for the end.
        max_overhead: Share of the wall time that looks may take, without the last one: they show
            fewer images to stay within it, see `guard.pace`; with a limit, six looks are taken
            whatever they cost. ``None``: all images, every time.
        train: What the run trains on, for the linear probe that the forecast of the gain rests on:
            a `Task` or a data set that one can be made of; ``"auto"``: the Trainer's, where its
            images and labels can be read as the task's are; ``None``: the probe is cross-validated
            on the task's own probe images.
        base_model: The untouched model, for a model that has been trained already, as in a second
            phase or from a checkpoint that was written without the guard: the model, its Hub name
            or folder, or a function that returns it. Gain and forgetting count from it, and a
            rescue mixes with it. ``None``: the model as training begins.
        processor: ``None``: the Trainer's `processing_class`, else that of the `PromptClassifier`,
            else the one saved with the model. For open_clip the pair (transform, tokenizer).
        encode: ``(encode_images, encode_texts)`` for a model without feature functions.
        batch_size: Images in one forward pass of the probe; halved when memory runs out.
        cache_limit: Bytes of preprocessed probe images kept in memory, on each rank.
        report: Write the run as a web page with pictures when it ends, into the folder
            ``iimm_<task>_report`` in the output folder; needs matplotlib.
        card: Where the Trainer writes a model card, such as to push it, add a section with the
            numbers and a `model-index` entry for every task.
        strict: Raise when a look during training fails, or `action`, a tracker or the terminal
            raises; otherwise that costs one warning each, never the run.
        verbose: Print five lines before training, one for each look and predicted beside observed
            at the end; ``"all"``: also both terms of IIMM, the linear probe, and what the forecast
            rests on.
        former: Arguments of the release before: each works, with a warning that says what replaces
            it.

    Attributes:
        monitor: The `IIMMMonitor` of the latest run, with its history, forecast and verdict.
        outcome: The `Outcome` of the latest run, once it has ended.

    Raises:
        TypeError: A task is not a `Task`, or `action` is neither a known word nor callable.
        ValueError: A setting is out of its range, tasks that cannot guard one another,
            ``action="stop"`` with nothing to judge by, or ``"rescue"`` with a task whose metric is
            neither accuracy nor recall@k.
    """

    def __init__(
        self,
        task: Task,
        off_target: Task | Sequence[Task] | None = None,
        max_forgetting: float | Limits | None = 0.05,
        action: Action = "warn",
        *,
        every: Every = None,
        outcomes: str | Path | Iterable[Outcome] | None = "default",
        max_overhead: float | None = 0.05,
        train: Any = "auto",
        base_model: nn.Module | str | Path | Callable[[], nn.Module] | None = None,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        report: bool = False,
        card: bool = True,
        strict: bool = False,
        verbose: Verbose = True,
        **former: Any,
    ) -> None:
        check_former("IIMMCallback", former, FORMER)
        self.off_target = None if off_target is None else as_tasks(off_target)
        check_tasks(task, self.off_target or ())
        check_every(every)
        Budget(max_overhead)
        self.limits = Limits.of(max_forgetting, **pick(former, "limit_on", "confidence"))
        on_exceed = former.get("on_exceed")
        self.rescues = check_action(action, self.limits, self.off_target, on_exceed)
        if self.rescues:
            check_by_images([task, *(self.off_target or ())])
        if report:  # better told now than at the end of a run
            from ..reports.drawing import require_matplotlib

            require_matplotlib()
        self.task = task
        self.action = action
        self.every = every
        self.past = Past.of(outcomes, **pick(former, "store"))
        self.train = train
        self.base_model = base_model
        self.processor = processor
        self.encode = encode
        self.report = report
        self.card = card
        self.strict = strict
        self.verbose = verbose
        self.run_file = former.get("run_file", "default")
        self.passed_on = {"max_overhead": max_overhead, "batch_size": batch_size}
        self.passed_on |= {"cache_limit": cache_limit} | pick(former, "method")
        super().__init__()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untouched model; a model that cannot be measured raises before training."""
        host.check_alone(IIMMCallback)
        host.check_same_epochs(self.every, kwargs.get("train_dataloader"))
        if state.is_world_process_zero:
            host.warn_of_direction(args)
            host.warn_of_no_look(args, state, self.every, self.limits)
        model = kwargs["model"]
        known = self._model is not None and self._model() is model
        broken_off = known and self.outcome is None
        self._model = weakref.ref(model)
        self._stop_reason, self._held = "", None
        self._forgiving = Forgiving(self.strict)
        self.outcome = None
        if state.global_step > 0:
            self._resume(args, state, control, **kwargs)
        else:
            previous = self.monitor if known else None
            first_try, before = (previous, None) if broken_off else (None, previous)
            self._begin(args, state, control, first_try, before, **kwargs)
        self._amend_card()
        if self._stop_reason:  # the Trainer still does a step, which must change nothing
            self._held = host.HeldStep(state, model)
            host.check_can_hold(args, self._stop_reason)

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
        self._look_if_due(state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look, with ``every="epoch"``."""
        self._look_if_due(state, control, kwargs["model"], "epoch")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the number that the best model is chosen by among the metrics, if it is one of ours.

        Looks first with ``every="evaluate"``, or where `metric_for_best_model` is one of ours. No
        other number of ours goes there: transformers' default objective of a search over
        hyperparameters is the sum of all metrics. An objective of the user's own has them all.
        """
        if metrics is None:
            return
        wanted = host.metric_for_best_model(args)
        row: dict[str, float] = {}
        chooses = wanted.startswith(keys.PREFIX)
        if self.monitor is not None and self.monitor.history:
            step, trains = self._step(state), self.outcome is None and self._held is None
            if trains and not chooses:
                self._look_if_due(state, control, kwargs["model"], "evaluate")
            elif trains and not self.monitor.has_seen(step):
                self._look(state, control, kwargs["model"])
            if self.monitor.history[-1]["step"] == step and not self.monitor.is_mixed:
                row = self.monitor.row()  # empty where the look failed
                if chooses and row:
                    metrics.update(pick(self.monitor.history[-1], wanted))
                elif host.searches_by_own_objective():
                    metrics.update(row)
        in_run = self._model is not None and self.outcome is None  # whether the guard is on or off
        excused = not row or host.comes_and_goes(wanted)  # else no look will ever have it
        if chooses and in_run and wanted not in metrics and excused:
            # The Trainer would end in a KeyError; NaN is never the best.
            metrics[wanted] = math.nan
        self._step_back()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go before callbacks that read our number in `on_evaluate`, such as early stopping."""
        if self._model is not None and self._back_in_line is None:
            if host.metric_for_best_model(args).startswith(keys.PREFIX):
                self._back_in_line = host.first_in_line(self)

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Step back: nothing is evaluated."""
        self._step_back()

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
        if logs and "train_runtime" in logs and self._back_in_line is None:
            self._back_in_line = host.first_in_line(self)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the model that the user is left with, and print predicted versus observed."""
        self._step_back()
        if self.monitor is not None:
            self._end(args, state, control, kwargs["model"])

    def record(self) -> dict[str, Any]:
        """The run as JSON-ready data, for `run_file.save_run` and `figures.plot_run`.

        Raises:
            RuntimeError: No run has begun.
        """
        if self.monitor is None:
            raise RuntimeError("no guarded run has begun; call `trainer.train()` first")
        return self.monitor.record()


def check_action(
    action: Action,
    limits: Limits,
    off_target: list[Task] | None,
    on_exceed: str | None,
) -> bool:
    """Whether a run over its limit is rescued; raises where there is nothing to act on."""
    if action not in ("warn", "stop", "rescue") and not callable(action):
        raise TypeError(
            f"`action` must be 'warn', 'stop', 'rescue' or a callable of the verdict, got "
            f"{action!r}"
        )
    if on_exceed not in (None, "rescue"):
        raise ValueError(f"`on_exceed` must be 'rescue' or None, got {on_exceed!r}")
    rescues = on_exceed == "rescue" or action == "rescue"
    if (limits.max_forgetting is None or off_target == []) and (rescues or action == "stop"):
        missing = "`max_forgetting`" if limits.max_forgetting is None else "`off_target` task"
        raise ValueError(
            f"`action={'rescue' if rescues else 'stop'!r}` needs a limit to keep to, got no "
            f"{missing}; give one, or use 'warn'"
        )
    return rescues
