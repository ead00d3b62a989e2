"""Begin, check, end: the conductor of a guarded run, for any training loop."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data.tasks import OFF_TARGET_PROBE_SIZE, Task, check_tasks
from .forecasting.forecaster import Forecaster
from .forecasting.runs import about
from .guard.judging import Judged, judge_first, judge_look
from .guard.pace import Pace
from .guard.schedule import Every, next_share
from .measures.embeddings import NotFiniteError
from .models.encoders import EncodePair
from .models.tuning import detect, trainable_share
from .models.wrappers import model_fingerprint, model_name
from .probing import ranks
from .probing.learnable import TrainingSet
from .probing.probe import Probe
from .records import keys
from .records.checks import anything, dict_of
from .records.forecast import Forecast
from .records.journal import Journal, opening
from .records.ledger import Ledger
from .records.outcomes import Outcome
from .records.store import as_outcomes
from .records.verdict import Limits, Verdict
from .rescue.rescuer import Rescuer, is_exceeded
from .rescue.sweep import Rescue

logger = logging.getLogger(__name__)


class IIMMMonitor:
    """Measures a run before, during and after training, and judges it against the limits.

    For a training loop of one's own; `IIMMCallback` is the Trainer's shell around it. One monitor
    guards one run. Of several ranks all must call `begin`, `is_due`, `check` and `end`, at the same
    steps: each embeds a share of the images, and all have the same numbers and verdicts::

        monitor = IIMMMonitor(task, off_target, limits=Limits(0.05))
        monitor.begin(model, recipe={"learning_rate": 1e-5, "steps": total})
        for step in range(1, total + 1):
            ...  # train
            if monitor.is_due(step, total):
                verdict = monitor.check(model, step, total)
                accelerator.log(monitor.row(), step=step)
                if verdict.level == "stop":
                    break
        outcome = monitor.end(model)

    To resume, hand its `state_dict` through the checkpoint: accelerate does so after
    ``accelerator.register_for_checkpointing(monitor)``.

    Args:
        task: What is being learnt.
        off_target: What must not be forgotten. ``None``: the shipped sample tasks, as canaries.
        limits: How much forgetting is too much.
        every: When looks are due, see `schedule.check_every`; the guard also has from it when the
            next one will be.
        max_overhead: As `IIMMCallback`; what the look before training shows goes by ``steps`` and
            ``batch_size`` of the recipe.
        outcomes: Finished runs to learn the forecast from: `Outcome` records, a JSON-lines file or
            a `datasets.Dataset`. ``None``: those in `store`.
        store: JSON-lines file that the run is added to when it ends; ``"default"``:
            `store.default_store`; ``None``: none.
        run_file: JSON file that holds the run's `record` from every look on; ``None``: none.
        method: Fine-tuning method; ``None``: recognised by `tuning.detect`.
        processor: See `encoders.find_encoder`.
        encode: See `encoders.find_encoder`.
        batch_size: Images in one forward pass of the probe; halved where memory does not suffice.
        cache_limit: See `Probe`.
        progress: See `Probe`.
        autocast_dtype: See `Probe.look`.
        strict: Raise when a look fails; otherwise warn once and let the run go on.
        train: What the run trains on, a `Task` or a data set that one can be made of: the linear
            probe that the forecast of the gain rests on learns from a sample of it. ``None``: it is
            cross-validated on the task's own probe images.

    Attributes:
        verdict: The latest `Verdict`.
        forecast: The latest `Forecast`.
        looked_at: Steps done at the latest look, whether or not it failed.
        ended: Why the run ended, in words; ``"running"`` before.

    Raises:
        TypeError: A task is not a `Task`.
        ValueError: Two tasks of one name, an off-target task that is the task itself, none given
            for a task that the shipped ones do not suit, or a setting out of its range.
    """

    def __init__(
        self,
        task: Task,
        off_target: Sequence[Task] | None = None,
        *,
        limits: Limits | None = None,
        every: Every = None,
        max_overhead: float | None = 0.05,
        outcomes: str | Path | Iterable[Outcome] | None = None,
        store: str | Path | None = "default",
        run_file: str | Path | None = None,
        method: str | None = None,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        progress: bool = True,
        autocast_dtype: torch.dtype | None = None,
        strict: bool = False,
        train: Any = None,
    ) -> None:
        if off_target is None:
            from .sample import canaries

            if (found := task.kind()) != "image":
                raise ValueError(
                    f"`off_target` must be given for a task of {found}s, got None: the shipped "
                    "tasks are pictures; pass tasks of your own, or [] to measure the gain only"
                )
            off_target = canaries(except_for=task.name)
        check_tasks(task, off_target)
        self.probe = Probe(
            task,
            off_target,
            processor=processor,
            encode=encode,
            batch_size=batch_size,
            cache_limit=cache_limit,
            progress=progress,
            train=None if train is None else TrainingSet(train),
        )
        self.limits = limits or Limits()
        self._pace = Pace(every, max_overhead, guarded=self.limits.max_forgetting is not None)
        self.method = method
        self.autocast_dtype = autocast_dtype
        self.strict = strict
        self.verdict = Verdict("continue", None, "nothing measured yet")
        self.forecast: Forecast | None = None
        self.ended = "running"
        self.looked_at = -1
        self._failure: Exception | None = None  # of the latest look
        self._ledger = Ledger(store, run_file)
        self._outcomes = outcomes
        self._forecaster = Forecaster()
        self._journal: Journal | None = None
        self._prior: Forecast | None = None  # set by `begin`
        self._now = (0, 0)  # the latest step and the total that are known
        self._began = 0.0  # on the clock
        self._is_partial = False  # the latest look
        self._warned: set[str] = set()
        self._rescue: Rescue | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """One row per look: logged keys, ``step``, ``share``, ``level``, ``reason`` and so on."""
        return self._journal.history if self._journal else []

    @property
    def failures(self) -> int:
        """Number of looks that failed."""
        return self._journal.failures if self._journal else 0

    def begin(
        self,
        model: nn.Module,
        *,
        recipe: Mapping[str, Any] | None = None,
        untouched: nn.Module | AbstractContextManager[Any] | None = None,
    ) -> Verdict:
        """Measure the untouched model; after `load_state_dict`, only make ready to go on.

        Args:
            model: The model before its first training step.
            recipe: ``learning_rate``, ``steps``, optimizer and so on: for forecast and record.
            untouched: Where `model` has been trained already: the model as it was before; or a
                context inside which `model` is that, see `wrappers.zero_shot_twin`.

        Returns:
            The verdict on the forecast.

        Raises:
            ValueError: The model cannot be measured; or, going on, images, prompts or
                preprocessing are not those of the start.
            RuntimeError: The run has begun already, or another rank failed.
        """
        if self._prior is not None:
            raise RuntimeError("`begin` was called already; make a new IIMMMonitor for every run")
        began = time.perf_counter()
        resumed = self._journal
        self._size_probe(recipe or {}, resumed)
        self.probe.prepare(model)
        outcomes = ranks.from_first(self.outcomes)  # files may differ between ranks
        if resumed:
            self.probe.check_fingerprints(resumed.fingerprints)
            if len(outcomes) < resumed.n_outcomes:
                logger.warning(
                    "Of %d finished runs that this one learnt from when it began, %d are still on "
                    "record: forecasts from here on may differ from those of a run in one piece",
                    resumed.n_outcomes,
                    len(outcomes),
                )
            outcomes = outcomes[: resumed.n_outcomes]
        self._forecaster.fit(outcomes)
        settings = dict_of(anything)(dict(recipe or {}), "recipe")  # a file must be able to hold it
        journal = resumed or self._first_look(model, untouched, len(outcomes))
        seconds = time.perf_counter() - began
        if not journal.history:  # maybe tried anew with other settings
            journal.start = replace(journal.start, recipe=journal.start.recipe | settings)
        elif isinstance(steps := settings.get("steps"), int) and steps > 0:
            journal.plan(steps)
        start = journal.start
        total = start.recipe.get("steps")
        prior = self._forecaster.predict(
            journal.baseline.measurement,
            **about(start),
            next_share=next_share(self._pace.every, 0, total, 0)
            if isinstance(total, int)
            else None,
        )
        if not self.probe.off_target:
            prior = replace(prior, forgetting=None, worst=None)
        if not journal.history:
            self._note(journal, judge_first(journal.baseline, prior, self.limits))
        self._journal, self._prior, self.method = journal, prior, start.method
        self.verdict = journal.verdict
        self.forecast = self.forecast or prior
        self.looked_at = self.history[-1]["step"]
        self._now = (self.looked_at, total if isinstance(total, int) else 0)
        self._pace.budget.began(seconds, self.probe.seconds or journal.baseline.runtime)
        self._began = time.perf_counter()
        self._keep("interrupted")
        return self.verdict

    def is_due(self, step: int, total_steps: int, event: str | None = None) -> bool:
        """Whether to `check` now: by the schedule, and within `max_overhead`.

        Args:
            step: Optimizer steps done. The last one is always due.
            total_steps: Of the whole training.
            event: ``"epoch"`` or ``"evaluate"`` at one of these; else None.

        Raises:
            RuntimeError: `begin` was not called.
        """
        journal = self._require_begun("is_due")
        self._now = step, total_steps
        scheduled = self._pace.is_scheduled(step, total_steps, event)
        if self.looked_at == step or not scheduled:
            return False
        elapsed, taken = time.perf_counter() - self._began, journal.looks_taken
        due = self._pace.pays(elapsed, step, total_steps, taken, ranks.least)
        journal.dropped += not due
        return due

    def check(
        self,
        model: nn.Module,
        step: int,
        total_steps: int,
        training_loss: float | None = None,
    ) -> Verdict:
        """Look at the model in training and judge it.

        A look that fails on any rank leaves verdict and history as they were on all of them, and
        warns the first time.

        Args:
            model: The model as it trains.
            step: Optimizer steps done.
            total_steps: Of the whole training.
            training_loss: The latest, where it is known; it goes on record.

        Returns:
            The verdict.

        Raises:
            RuntimeError: `begin` was not called.
            Exception: What the look raised, if `strict`.
        """
        journal = self._require_begun("check")
        assert self._prior is not None
        self._now = step, total_steps
        self.looked_at, self._failure = step, None
        started = time.perf_counter()
        part, self._pace.part = self._pace.part, 1.0
        try:
            judged = self._judge(journal, model, step, total_steps, part)
            if part < 1 and judged.verdict.worse_than(self.verdict):
                part = 1.0  # an alarm is raised on all images only
                judged = self._judge(journal, model, step, total_steps, part)
        except Exception as error:
            journal.failures += 1
            if self.strict:
                raise
            self._failure = error
            self._warn(step, error)
        else:
            if self._is_partial and journal.history[-1]["step"] == step:
                journal.history.pop()  # the same look at more images
            self._is_partial = part < 1
            if training_loss is not None and math.isfinite(training_loss):
                judged.row["training_loss"] = float(training_loss)
            self._note(journal, judged)
        self._pace.budget.took(time.perf_counter() - started, part)
        self._keep("interrupted")
        return self.verdict

    def _judge(
        self, journal: Journal, model: nn.Module, step: int, total_steps: int, part: float
    ) -> Judged:
        assert self._prior is not None
        last_step = journal.history[-1]["step"]
        coming = self._pace.coming(step, total_steps, last_step, journal.looks_taken + 1)
        return judge_look(
            self.probe.look(model, step, self.autocast_dtype, part=part),
            journal.baseline,
            self._prior,
            self._forecaster.update,
            self.limits,
            share=min(step / max(total_steps, 1), 1.0),
            coming=coming,
        )

    def end(self, model: nn.Module, step: int | None = None, *, ended: str = "") -> Outcome:
        """Look at the model once more, if it has trained since the last look; record the run.

        The outcome is added to the store. A store that cannot be written is warned of. A run that
        never gets here is added as interrupted when the monitor goes away, unless the process is
        killed.

        Args:
            model: The model after training.
            step: Optimizer steps done; ``None``: the latest that `is_due` or `check` was told.
            ended: Why training ended before its last step; empty: it did not, or did so unguarded.

        Returns:
            The outcome.

        Raises:
            RuntimeError: `begin` was not called.
        """
        self._require_begun("end")
        now, total = self._now
        now = now if step is None else step
        if not self.has_seen(now):
            self.check(model, now, total)
        # Numbers of an earlier step are no outcome, where the last look failed.
        complete = self._failure is None and now >= total and not ended
        if isinstance(self._failure, NotFiniteError):
            ended = ended or "training diverged"
        elif self._failure is not None:
            ended = ended or "the last look failed"
        self.ended = ended or ("finished" if complete else "stopped early")
        outcome = self._keep(self.ended, complete)
        self._ledger.close()
        return outcome

    def has_seen(self, step: int) -> bool:
        """Whether there was a look at this step, and at all images."""
        return self.looked_at == step and not self._is_partial

    @property
    def is_mixed(self) -> bool:
        """Whether the model is not the one last looked at, but a mix that it was rescued by."""
        return self._rescue is not None and self._rescue.applied and self._rescue.alpha < 1

    def is_exceeded(self) -> bool:
        """Whether the forgetting that the latest look observed is over the limit."""
        journal = self._require_begun("is_exceeded")
        return self._failure is None and is_exceeded(journal.history[-1], self.limits)

    def rescue(self, model: nn.Module, rescuer: Rescuer) -> Rescue:
        """Leave the model with the mix of untouched and fine-tuned weights that gains most.

        Call it before `end`: the outcome stays that of the fine-tuned model, since that is what
        the next run learns from; the curve goes on record beside it, as ``"rescue"``.

        Args:
            model: The model after training.
            rescuer: What has the untouched weights.

        Returns:
            The curve and the choice.

        Raises:
            Exception: As `rescue.sweep.sweep`; the model is as it was.
        """
        journal = self._require_begun("rescue")
        self._rescue = rescuer.rescue(
            model,
            self.probe,
            self.limits,
            baseline=journal.baseline,
            autocast_dtype=self.autocast_dtype,
        )
        return self._rescue

    def try_again(self, first: IIMMMonitor) -> None:
        """Take the baseline of a run that was broken off and is tried anew: call it before `begin`.

        What was trained in between does not become the baseline; images that were preprocessed are
        used again. It is one run, on record once.

        Args:
            first: The monitor of that run, which is given up.

        Raises:
            RuntimeError: `begin` of `first` was not called.
        """
        journal = first._require_begun("try_again")
        first._ledger.drop()
        self.probe = first.probe
        self._journal = replace(journal, history=[], failures=0, dropped=0)

    def row(self) -> dict[str, float]:
        """The latest look's logged keys, Python floats only; empty where it failed."""
        if self._failure is not None:
            return {}
        return {k: v for k, v in self.history[-1].items() if k.startswith(keys.PREFIX)}

    def record(self) -> dict[str, Any]:
        """The run so far as JSON-ready data: what `report` shows and a file keeps."""
        journal = self._journal
        facts = asdict(journal.start) if journal else {}
        names = ("model", "model_fingerprint", "method", "recipe", "versions", "run")
        tasks = [self.probe.task, *self.probe.off_target]
        return {
            "task": self.probe.task.name,
            "off_target": [task.name for task in self.probe.off_target],
            **{name: facts.get(name) for name in (*names, "n_images", "n_classes")},
            "fingerprints": journal.fingerprints if journal else {},
            "templates": {task.name: list(task.templates) for task in tasks},
            "metrics": {task.name: task.metric.name for task in tasks if task.metric},
            "limits": asdict(self.limits),
            "linear_probe": journal.linear_probe if journal else None,
            "forecast": self._prior.to_json() if self._prior else None,
            "failures": self.failures,
            "looks_dropped": journal.dropped if journal else 0,
            "ended": self.ended,
            "looks": self.history,
        } | ({} if self._rescue is None else {"rescue": self._rescue.to_json()})

    def state_dict(self) -> dict[str, Any]:
        """The run so far as JSON-ready data, for a checkpoint; empty before `begin`."""
        return self._journal.to_json() if self._journal else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state_dict`: call it before `begin`.

        The baseline is the recorded one; a half-trained model is never taken for it. Runs that
        ended since are not learnt from, so the verdicts are those of a run in one piece.

        Raises:
            ValueError: It is not what `state_dict` gave; the message names the field.
        """
        self._journal = Journal.from_json(state)
        self.verdict = self._journal.verdict

    @property
    def plan(self) -> str:
        """The looks to come, in words; after `begin`."""
        journal = self._require_begun("plan")
        n_images = sum(map(len, journal.baseline.correct.values()))
        return self._pace.plan(n_images, self.probe.off_target_size)

    @property
    def alarm(self) -> str:
        """The worst level of all verdicts so far."""
        return self._journal.alarm if self._journal else "continue"

    def _require_begun(self, call: str) -> Journal:
        if self._journal is None or self._prior is None:
            raise RuntimeError(f"call `begin(model)` on the untouched model before `{call}`")
        return self._journal

    def outcomes(self) -> list[Outcome]:
        """The finished runs that there are now to learn from: those given, or on record."""
        return self._ledger.read() if self._outcomes is None else as_outcomes(self._outcomes)

    def _first_look(
        self,
        model: nn.Module,
        untouched: nn.Module | AbstractContextManager[Any] | None,
        n_outcomes: int,
    ) -> Journal:
        before = untouched if isinstance(untouched, nn.Module) else model
        inside = untouched if isinstance(untouched, AbstractContextManager) else nullcontext()
        with inside:
            look = self.probe.look(before, 0, self.autocast_dtype, linear_probe=True)
        tasks = [self.probe.task, *self.probe.off_target]
        metrics = {task.name: task.metric.name for task in tasks if task.metric}
        recipe = {"trainable_share": trainable_share(model)}
        start = opening(
            look,
            model=model_name(before),
            model_fingerprint=model_fingerprint(before),
            method=self.method or detect(model),
            fingerprint=self.probe.fingerprints[self.probe.task.name],
            recipe=recipe | ({"metrics": metrics} if metrics else {}),
            run=ranks.from_first(lambda: uuid.uuid4().hex),
        )
        return Journal(
            start,
            look,
            self.probe.fingerprints,
            n_outcomes,
            off_target_size=self.probe.off_target_size,
        )

    def _size_probe(self, recipe: Mapping[str, Any], resumed: Journal | None) -> None:
        """Let the first look show fewer images where the run is short."""
        if resumed:
            self.probe.off_target_size = resumed.off_target_size or OFF_TARGET_PROBE_SIZE
            return
        n_task, n_off_target = len(self.probe.task.subset()), len(self.probe.off_target)
        sizes = self._pace.first_look(recipe, n_task, n_off_target)
        self.probe.off_target_size, self.probe.training_size = sizes

    def _note(self, journal: Journal, judged: Judged) -> None:
        journal.history.append(judged.row | {"time": time.time()})  # seconds since 1970
        self.forecast, self.verdict = judged.forecast, judged.verdict

    def _keep(self, ended: str, complete: bool = False) -> Outcome:
        """Put the run so far on disk, and what goes on record should it end here."""
        assert self._journal is not None
        outcome = self._journal.outcome(complete, ended)
        if ranks.world()[0] == 0:
            self._ledger.draft(outcome, self.record())
        return outcome

    def _warn(self, step: int, error: Exception) -> None:
        kind = type(error).__name__
        if kind in self._warned or ranks.world()[0] != 0:
            return
        self._warned.add(kind)
        logger.warning(
            "The IIMM guard could not measure the model at step %d (%s: %s). Training goes on, "
            "without numbers for this step; further failures of the kind are counted silently.",
            step,
            kind,
            error,
        )
