"""Begin, step, end: a guarded run of any training loop."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.tasks import Task, check_tasks
from ..guard.judging import judge_first
from ..guard.pace import Pace
from ..guard.schedule import Every, whole
from ..models.encoders import EncodePair
from ..probing import ranks
from ..probing.learnable import TrainingSet
from ..probing.probe import Probe
from ..records.former import check_former, pick
from ..records.journal import checked_recipe
from ..records.ledger import Ledger, Past
from ..records.log import get_logger
from ..records.outcomes import Outcome
from ..records.verdict import Limits, Verdict
from ..reports import terminal
from .measured import Measured, Verbose
from .telling import Forgiving, as_loss, ended_as, has_moved

logger = get_logger(__name__)

_FORMER = {
    "limits": "give the `Limits` as `max_forgetting`",
    "store": "name the file as `outcomes`, or call `append_outcome` with the run's outcome",
    "progress": "use `verbose`",
}


class IIMMMonitor(Measured):
    """Measures a run before, during and after training, and judges it against the limits.

    For your own training loop; `IIMMCallback` is a thin wrapper around it for the Trainer. One
    monitor guards one run. All ranks must call `begin`, `step` and `end`, at the same steps: each
    embeds a share of the images, and all have the same numbers and verdicts::

        monitor = IIMMMonitor(task, off_target, max_forgetting=0.05)
        monitor.begin(model, recipe={"learning_rate": 1e-5, "steps": total})
        for step in range(1, total + 1):
            ...  # train
            verdict = monitor.step(step)
            if verdict is not None:
                accelerator.log(monitor.row(), step=step)
                if verdict.level == "stop":
                    break
        outcome = monitor.end()

    To resume, keep its `state_dict` in the checkpoint, as accelerate does after
    ``accelerator.register_for_checkpointing(monitor)``.

    Args:
        task: What is being learnt.
        off_target: What must not be forgotten. ``None``: the shipped sample tasks, as canaries.
        max_forgetting: As `IIMMCallback`: a number, or `Limits`.
        every: When looks are due, see `schedule.check_every`; the guard also has from it when the
            next one will be.
        max_overhead: As `IIMMCallback`, by ``steps`` and ``batch_size`` of the recipe.
        outcomes: As `IIMMCallback`: what the forecast learns from, and where the outcome goes.
        run_file: JSON file that holds the run's `record` from every look on; ``None``: none.
        method: Fine-tuning method; ``None``: recognised by `tuning.detect`.
        processor: See `encoders.find_encoder`.
        encode: See `encoders.find_encoder`.
        batch_size: Images in one forward pass of the probe; halved where memory does not suffice.
        cache_limit: See `Probe`.
        verbose: As `IIMMCallback`.
        autocast_dtype: See `Probe.look`.
        strict: Raise when a look fails; otherwise warn once and let the run go on.
        train: As `IIMMCallback`; there is no ``"auto"``.

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
        off_target: Task | Sequence[Task] | None = None,
        max_forgetting: float | Limits | None = 0.05,
        *,
        every: Every = None,
        outcomes: str | Path | Iterable[Outcome] | Past | None = "default",
        max_overhead: float | None = 0.05,
        run_file: str | Path | None = None,
        method: str | None = None,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        autocast_dtype: torch.dtype | None = None,
        train: Any = None,
        strict: bool = False,
        verbose: Verbose = True,
        **former: Any,
    ) -> None:
        from ..sample import off_target_tasks

        check_former("IIMMMonitor", former, _FORMER)
        is_named, off_target = off_target is not None, off_target_tasks(task, off_target)
        check_tasks(task, off_target)
        verbose = former.get("progress", verbose)
        probe = Probe(
            task,
            off_target,
            processor=processor,
            encode=encode,
            batch_size=batch_size,
            cache_limit=cache_limit,
            progress=bool(verbose),
            train=None if train is None else TrainingSet(train),
        )
        limits = Limits.of(former.get("limits", max_forgetting)).unless_watching()
        pace = Pace(every, max_overhead, guarded=limits.max_forgetting is not None)
        past = Past.of(outcomes, **pick(former, "store"))
        super().__init__(probe, limits, pace, Ledger(past.store, run_file), past.runs)
        self.verbose = verbose
        self.named = [t.name for t in off_target] if is_named else []
        self.method = method
        self.autocast_dtype = autocast_dtype
        self.strict = strict
        self._forgiving = Forgiving(strict)

    @ranks.during("the guard's start")
    def begin(
        self,
        model: nn.Module,
        *,
        recipe: Mapping[str, Any] | None = None,
        untouched: nn.Module | AbstractContextManager[Any] | None = None,
    ) -> Verdict:
        """Measure the untouched model; after `load_state_dict`, only prepare to continue.

        Args:
            model: The model before its first training step.
            recipe: ``learning_rate``, ``steps``, optimizer and so on: for forecast and record.
            untouched: Where `model` has been trained already: the model as it was before; or a
                context inside which `model` is that, see `untouched.zero_shot_twin`. If they
                differ, the outcome is that of several trainings, and none to learn from.

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
        is_new = resumed is None or not resumed.history
        settings = checked_recipe(recipe or {})
        self._size_probe(settings, resumed)
        if resumed:
            self.probe.prepare(model)
            self.probe.check_fingerprints(resumed.fingerprints)
        past = ranks.together(lambda: self.past() if ranks.world()[0] == 0 else None)
        journal = resumed or self._first_look(model, untouched)
        self._learn(past, journal, resumed=resumed is not None)
        if not journal.history:  # maybe tried again with other settings
            journal.start = replace(journal.start, recipe=journal.start.recipe | settings)
        elif isinstance(steps := settings.get("steps"), int) and steps > 0:
            journal.plan(steps)
        start = journal.start
        total = start.recipe.get("steps")
        prior = self._first_forecast(journal)
        if not journal.history:
            self._note(journal, judge_first(journal.baseline, prior, self.limits))
        self._journal, self._prior, self.method = journal, prior, start.method
        self.verdict = journal.verdict
        self.forecast = self.forecast or prior
        self.looked_at = self.history[-1]["step"]
        self._now = (self.looked_at, total if isinstance(total, int) else 0)
        look = self.probe.seconds or journal.baseline.runtime
        self._pace.began(time.perf_counter() - began, look, resumed=not is_new)
        self._began = time.perf_counter()
        self._keep("interrupted")
        self._model = weakref.ref(model)
        if is_new:
            self._say(lambda: terminal.preflight_lines(self.record(), self.plan))
            if self.verbose == "all":
                self._say(lambda: terminal.preflight_table(self.record()))
        return self.verdict

    def step(
        self, step: int, training_loss: float | None = None, *, event: str | None = None
    ) -> Verdict | None:
        """Call it after each optimizer step: it looks at the model where a look is due.

        Args:
            step: Optimizer steps done, from 1 on; a look due since the last call is taken now.
            training_loss: As `check`.
            event: As `is_due`; what ``every="epoch"`` and ``every="evaluate"`` wait for.

        Returns:
            The verdict of the look; None where none was due.

        Raises:
            RuntimeError: `begin` was not called, or its recipe has no ``steps``.
            Exception: As `check`.
        """
        journal = self._require_begun("step")
        total = journal.start.recipe.get("steps")
        if not isinstance(total, int):
            raise RuntimeError(
                "`step` needs the number of steps, a whole number: call "
                f"`begin(model, recipe={{'steps': total}})`, got {total!r}"
            )
        if not self.is_due(step, total, event):
            if self.limits.max_forgetting is not None and not journal.looks_taken:
                self._warned.of_no_look(self._pace.every, step, total)
            return None
        return self.check(self._trained("step"), step, total, training_loss)

    def is_due(self, step: int, total_steps: int, event: str | None = None) -> bool:
        """Whether to `check` now: by the schedule, and within `max_overhead`.

        Args:
            step: Optimizer steps done. The last one is always due; beyond it `every` holds.
            total_steps: Of the whole training.
            event: ``"epoch"`` or ``"evaluate"`` at one of these; else None.

        Raises:
            RuntimeError: `begin` was not called.
        """
        journal = self._require_begun("is_due")
        step, total_steps = whole(step, "step"), whole(total_steps, "total_steps")
        since, self._now = self._now[0], (step, total_steps)
        self._warned.of_steps(since, step, total_steps, event)
        scheduled = self._pace.is_scheduled(step, total_steps, event, since)
        if self.looked_at == step or not scheduled:
            return False
        elapsed, taken = time.perf_counter() - self._began, journal.looks_taken
        agree = partial(ranks.least, what=f"whether to look at step {step}")
        due = self._pace.pays(elapsed, step, total_steps, taken, agree)
        journal.dropped += not due
        return due

    def check(
        self, model: nn.Module, step: int, total_steps: int, training_loss: float | None = None
    ) -> Verdict:
        """The verdict on the model in training, of a look at it now.

        A look that fails on any rank leaves verdict and history as they were on all of them, and
        warns the first time.

        Args:
            model: The model as it trains.
            step: Optimizer steps done.
            total_steps: Of the whole training.
            training_loss: The latest, where it is known; it is saved.

        Raises:
            RuntimeError: `begin` was not called.
            Exception: What the look raised, if `strict`.
        """
        journal = self._require_begun("check")
        step, total_steps = whole(step, "step"), whole(total_steps, "total_steps")
        self._now = step, total_steps
        self.looked_at, self._failure, started = step, None, time.perf_counter()
        part, self._pace.part = self._pace.part, 1.0
        try:
            judged = self._judge(journal, model, step, total_steps, part)
            if part < 1 and judged.verdict.worse_than(self.verdict):
                part = 1.0  # an alarm is raised on all images only
                judged = self._judge(journal, model, step, total_steps, part)
        except Exception as error:
            journal.failures += 1
            self._is_partial = False  # it is not tried again at all images
            if self.strict:
                raise
            self._failure = error
            self._warned.of_failure(step, error)
        else:
            if self._is_partial and journal.history[-1]["step"] == step:
                journal.history.pop()  # the same look at more images
            self._is_partial = part < 1
            if (loss := as_loss(training_loss)) is not None:
                judged.row["training_loss"] = loss
            self._note(journal, judged)
            self._say(lambda: terminal.look_line(journal.history[-1]))
        self._pace.budget.took(time.perf_counter() - started, part)
        self._keep("interrupted")
        return self.verdict

    @ranks.during("the guard's end")
    def end(
        self, model: nn.Module | None = None, step: int | None = None, *, ended: str = ""
    ) -> Outcome:
        """Look at the model once more, if it may have trained since the last look; record the run.

        The outcome is added to the store. A store that cannot be written is warned of. A run that
        never gets here is added as interrupted when the monitor goes away, unless the process is
        killed.

        Args:
            model: The model after training; ``None``: the one that `begin` was given.
            step: Optimizer steps done; ``None``: the latest that `step`, `is_due` or `check` was
                told; where none was, all ``steps`` of the recipe, unless `ended` is given.
            ended: Why training ended before its last step; empty: it did not, or did so unguarded.

        Returns:
            The outcome.

        Raises:
            RuntimeError: `begin` was not called.
        """
        journal = self._require_begun("end")
        now, total = self._now
        done = whole(step, "step") if step is not None else now or None
        now = done if done is not None else 0 if ended else total
        now = max(now, -int(ranks.least(-now, "the last step")))  # uneven batches: of any rank
        done = done and now
        if ranks.any_rank(done is None or not self.has_seen(now), "the last look"):
            self.check(self._trained("end") if model is None else model, now, total)
        if now > total > 0:
            journal.plan(now)  # it was longer than was said
        moved, later = has_moved(journal.history) and not self.is_mixed, self.is_later_phase
        self.ended, complete = ended_as(self._failure, ended, done, total, moved, later)
        outcome = self._keep(self.ended, complete)
        self._ledger.close()
        self._say(lambda: terminal.summary_table(self.record()))
        self._say(lambda: terminal.saved_lines(*self._ledger.saved))
        return outcome
