"""Begin, check, end: the conductor of a guarded run, for any training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import keys
from .accuracy import Forgetting, forgetting, paired_drop
from .encoders import EncodePair
from .forecast import Forecast
from .forecaster import Forecaster
from .guard import Limits, Verdict, judge
from .ledger import Ledger
from .outcomes import Outcome, library_versions, parse_outcome
from .probe import Look, Probe
from .sources import kind
from .store import as_outcomes
from .tasks import Task, check_tasks
from .tuning import detect, trainable_share
from .wrappers import model_fingerprint, model_name

logger = logging.getLogger(__name__)


class IIMMMonitor:
    """Measures a run before, during and after training, and judges it against the limits.

    Call `begin` on the untouched model, `check` every now and then, `end` when training is over.
    `IIMMCallback` is the Trainer's shell around it.

    Args:
        task: What is being learnt.
        off_target: What must not be forgotten. ``None``: the shipped sample tasks, as canaries.
        limits: How much forgetting is too much.
        outcomes: Finished runs to learn the forecast from: `Outcome` records, a JSON-lines file or
            a `datasets.Dataset`. ``None``: those in `store`.
        store: JSON-lines file that the run is added to when it ends; ``"default"``:
            `store.default_store`; ``None``: none.
        method: Fine-tuning method; ``None``: recognised by `tuning.detect`.
        processor: See `encoders.find_encoder`.
        encode: See `encoders.find_encoder`.
        batch_size: Images in one forward pass of the probe.
        cache_limit: See `Probe`.
        progress: See `Probe`.
        autocast_dtype: See `Probe.look`.
        strict: Raise when a look fails; otherwise warn once and let the run go on.

    Attributes:
        history: One row per look: the logged keys, with ``step``, ``share``, ``level``, ``reason``.
        verdict: The latest `Verdict`.
        forecast: The latest `Forecast`.
        failures: Number of looks that failed.

    Raises:
        TypeError: A task is not a `Task`.
        ValueError: Two tasks of one name, an off-target task that is the task itself, or none given
            for a task that the shipped ones do not suit.
    """

    def __init__(
        self,
        task: Task,
        off_target: Sequence[Task] | None = None,
        *,
        limits: Limits | None = None,
        outcomes: str | Path | Iterable[Outcome] | None = None,
        store: str | Path | None = "default",
        method: str | None = None,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        progress: bool = True,
        autocast_dtype: torch.dtype | None = None,
        strict: bool = False,
    ) -> None:
        if off_target is None:
            from .sample import canaries

            if (found := kind(task.images([0])[0])) != "image":
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
        )
        self.limits = limits or Limits()
        self.method = method
        self.autocast_dtype = autocast_dtype
        self.strict = strict
        self.history: list[dict[str, Any]] = []
        self.verdict = Verdict("continue", None, "nothing measured yet")
        self.forecast: Forecast | None = None
        self.failures = 0
        self._ledger = Ledger(store)
        self._outcomes = self._ledger.read() if outcomes is None else as_outcomes(outcomes)
        self._forecaster = Forecaster().fit(self._outcomes)
        self._baseline: Look | None = None
        self._start: Outcome | None = None  # the run before its first step
        self._prior: Forecast | None = None  # set by `begin`
        self._fingerprints: dict[str, str] = {}  # of the probe that took the baseline

    def begin(
        self,
        model: nn.Module,
        *,
        recipe: Mapping[str, Any] | None = None,
        next_share: float | None = None,
        untouched: AbstractContextManager[Any] | None = None,
    ) -> Verdict:
        """Measure the untouched model; after `load_state_dict`, only make ready to go on.

        Args:
            model: The model before its first training step.
            recipe: Optimizer, learning rate, steps and so on: for the forecast and the record.
            next_share: Share of the steps at which the next look is due, if known.
            untouched: Inside it the model is the untouched one, where it is not so anyway: see
                `wrappers.zero_shot_twin`.

        Returns:
            The verdict on the forecast.

        Raises:
            ValueError: The model cannot be measured; or, going on, images, prompts or
                preprocessing are not those of the start.
            RuntimeError: The run has begun already.
        """
        if self._prior is not None:
            raise RuntimeError("`begin` was called already; make a new IIMMMonitor for every run")
        self.probe.prepare(model)
        if self._baseline is not None:
            self.probe.check_fingerprints(self._fingerprints)
        else:
            with untouched or nullcontext():
                self._baseline = self.probe.look(model, 0, self.autocast_dtype)
            self._fingerprints = self.probe.fingerprints
            self._start = self._before_training(model, recipe or {})
        assert self._start is not None
        self.method = self._start.method
        prior = self._forecaster.predict(
            self._baseline.measurement,
            method=self._start.method,
            zero_shot_accuracy=self._start.zero_shot_accuracy,
            model=self._start.model_fingerprint,
            task=self._start.task,
            task_fingerprint=self._start.task_fingerprint,
            recipe=self._start.recipe,
            off_target=list(self._start.off_target_before),
            next_share=next_share,
        )
        self._prior = prior
        if not self.history:
            self.forecast = prior
            self.verdict = judge(prior, None, self.limits)
            self.history.append(self._row(self._baseline, 0.0, None, {}))
        self._draft()
        return self.verdict

    def check(
        self, model: nn.Module, step: int, total_steps: int, *, next_share: float | None = None
    ) -> Verdict:
        """Look at the model in training and judge it.

        A failing look leaves verdict and history as they were, and warns the first time.

        Args:
            model: The model as it trains.
            step: Optimizer steps done.
            total_steps: Of the whole training.
            next_share: Share of the steps at which the next look is due, if known.

        Returns:
            The verdict.

        Raises:
            RuntimeError: `begin` was not called.
            Exception: What the look raised, if `strict`.
        """
        if self._baseline is None or self._prior is None:
            raise RuntimeError("call `begin(model)` on the untouched model before `check`")
        share = min(step / max(total_steps, 1), 1.0)
        self._before = self.verdict, self.forecast
        try:
            look = self.probe.look(model, step, self.autocast_dtype)
        except Exception as error:
            if self.strict:
                raise
            self.failures += 1
            if self.failures == 1:
                logger.warning(
                    "The IIMM guard could not measure the model at step %d (%s: %s). Training goes "
                    "on, without numbers for this step; further failures are counted silently.",
                    step,
                    type(error).__name__,
                    error,
                )
            return self.verdict
        before, after = self._split(self._baseline), self._split(look)
        observed = forgetting(before, after) if before else None
        name = self.probe.task.name
        gain = paired_drop(self._baseline.correct[name], look.correct[name])
        seen = {"gain": (-gain.value, gain.standard_error)}
        if observed is not None:
            seen["forgetting"] = (observed.mean.value, observed.mean.standard_error)
            seen["worst"] = (observed.worst.value, observed.worst.standard_error)
        self.forecast = self._forecaster.update(
            self._prior, share=share, seen=seen, next_share=next_share
        )
        # At the end there is nothing left to forecast.
        self.verdict = judge(self.forecast if share < 1 else None, observed, self.limits)
        self.history.append(self._row(look, share, observed, seen))
        self._draft()
        return self.verdict

    def retract(self) -> None:
        """Take back the latest `check`, because another rank could not make it."""
        self.history.pop()
        self.verdict, self.forecast = self._before
        self._draft()

    def end(self, *, complete: bool = True, ended: str = "finished") -> Outcome:
        """The record of the run, from the last look; it is added to the store.

        A store that cannot be written is warned of. A run that never gets here is added as
        interrupted when the monitor goes away, unless the process is killed.

        Args:
            complete: Whether training ran to its last planned step.
            ended: Why it ended.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if self._start is None:
            raise RuntimeError("call `begin(model)` on the untouched model before `end`")
        outcome = keys.as_outcome(self._start, self.history, complete, ended)
        self._ledger.draft(outcome)
        self._ledger.close()
        return outcome

    def row(self) -> dict[str, float]:
        """The latest look's logged keys, Python floats only."""
        return {k: v for k, v in self.history[-1].items() if k.startswith(keys.PREFIX)}

    def record(self) -> dict[str, Any]:
        """The run so far as JSON-ready data: what `report` shows and a file keeps."""
        facts = asdict(self._start) if self._start else {}
        names = ("model", "model_fingerprint", "method", "recipe", "n_images", "n_classes")
        return {
            "task": self.probe.task.name,
            "off_target": [task.name for task in self.probe.off_target],
            **{name: facts.get(name) for name in names},
            "fingerprints": self._fingerprints,
            "limits": asdict(self.limits),
            "forecast": self._prior.to_json() if self._prior else None,
            "failures": self.failures,
            "looks": self.history,
        }

    def state_dict(self) -> dict[str, Any]:
        """Baseline and history as JSON-ready data, for a checkpoint."""
        if self._baseline is None or self._start is None:
            return {}
        return self._baseline.to_json() | {
            "start": asdict(self._start),
            "fingerprints": self._fingerprints,
            "history": list(self.history),
            "verdict": asdict(self.verdict),
            "n_outcomes": len(self._outcomes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state_dict`: call it before `begin`.

        The baseline is the recorded one; a half-trained model is never taken for it. Runs that
        ended since are not learnt from, so the verdicts are those of a run in one piece.
        """
        self._baseline = Look.from_json(state)
        self._start = parse_outcome(state["start"])
        self._fingerprints = dict(state["fingerprints"])
        self.history = [dict(row) for row in state["history"]]
        self.verdict = Verdict(**state["verdict"])
        self._outcomes = self._outcomes[: state["n_outcomes"]]
        self._forecaster.fit(self._outcomes)

    def _draft(self) -> None:
        """What goes on record should the run end here."""
        assert self._start is not None
        self._ledger.draft(keys.as_outcome(self._start, self.history, False, "interrupted"))

    def _before_training(self, model: nn.Module, recipe: Mapping[str, Any]) -> Outcome:
        assert self._baseline is not None
        m = self._baseline.measurement
        name = self.probe.task.name
        accuracies = {t.name: self._baseline.accuracy(t.name) for t in self.probe.off_target}
        return Outcome(
            model=model_name(model),
            model_fingerprint=model_fingerprint(model),
            method=self.method or detect(model),
            task=name,
            task_fingerprint=self._fingerprints[name],
            iimm=m.iimm,
            inter=m.inter,
            intra=m.intra,
            standard_error=None if math.isnan(m.standard_error) else m.standard_error,
            n_images=m.n_images,
            n_classes=m.n_classes,
            zero_shot_accuracy=self._baseline.accuracy(name),
            final_accuracy=self._baseline.accuracy(name),
            off_target_before=accuracies,
            off_target_after=accuracies,
            recipe={"trainable_share": trainable_share(model), **recipe},
            versions=library_versions(),
        )

    def _row(
        self,
        look: Look,
        share: float,
        observed: Forgetting | None,
        seen: dict[str, tuple[float, float]],
    ) -> dict[str, Any]:
        assert self._baseline is not None
        assert self.forecast is not None
        return keys.look_row(
            look, self._baseline, self.probe.task.name, self.forecast, observed, self.verdict
        ) | {
            "step": look.step,
            "share": share,
            "level": self.verdict.level,
            "reason": self.verdict.reason,
            "standard_errors": {name: error for name, (_, error) in seen.items()},
            "time": time.time(),
        }

    def _split(self, look: Look) -> dict[str, np.ndarray]:
        return {task.name: look.correct[task.name] for task in self.probe.off_target}
