"""Begin, check, end: the conductor of a guarded run, for any training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.tasks import Task, check_tasks
from ..forecasting.runs import about
from ..guard.judging import judge_first
from ..guard.pace import Pace
from ..guard.schedule import Every, next_share
from ..measures.embeddings import NotFiniteError
from ..models.encoders import EncodePair
from ..probing import ranks
from ..probing.learnable import TrainingSet
from ..probing.probe import Probe
from ..records.checks import anything, dict_of
from ..records.journal import Journal
from ..records.ledger import Ledger
from ..records.outcomes import Outcome
from ..records.verdict import Limits, Verdict
from .measured import Measured

logger = logging.getLogger(__name__)


class IIMMMonitor(Measured):
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
            from ..sample import default_off_target

            off_target = default_off_target(task)
        check_tasks(task, off_target)
        probe = Probe(
            task,
            off_target,
            processor=processor,
            encode=encode,
            batch_size=batch_size,
            cache_limit=cache_limit,
            progress=progress,
            train=None if train is None else TrainingSet(train),
        )
        limits = limits or Limits()
        pace = Pace(every, max_overhead, guarded=limits.max_forgetting is not None)
        super().__init__(probe, limits, pace, Ledger(store, run_file), outcomes)
        self.method = method
        self.autocast_dtype = autocast_dtype
        self.strict = strict

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
        n_outcomes = self._learn(resumed)
        settings = dict_of(anything)(dict(recipe or {}), "recipe")  # a file must be able to hold it
        journal = resumed or self._first_look(model, untouched, n_outcomes)
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

    def _learn(self, resumed: Journal | None) -> int:
        """Fit the forecaster; of a run that goes on, to what it learnt from when it began."""
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
        return len(outcomes)

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
        if complete and self.is_later_phase:
            complete, self.ended = False, "finished, as a later phase of its training"
        outcome = self._keep(self.ended, complete)
        self._ledger.close()
        return outcome
