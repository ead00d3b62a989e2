"""What a run measures and keeps, look by look; `IIMMMonitor` says when."""

from __future__ import annotations

import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from ..forecasting.forecaster import Forecaster
from ..forecasting.runs import about
from ..guard.judging import Judged, judge_look
from ..guard.pace import Pace
from ..guard.schedule import next_share
from ..models.tuning import detect, trainable_share
from ..models.wrappers import find_own_head, model_fingerprint, model_name
from ..probing import ranks
from ..probing.probe import Probe
from ..records import keys
from ..records.catalog import Catalog
from ..records.forecast import Forecast
from ..records.journal import Journal, Journaled, opening
from ..records.ledger import Ledger
from ..records.log import get_logger
from ..records.objects import Address
from ..records.outcomes import OFF_TARGET_PROBE_SIZE, Outcome
from ..records.store import as_catalog
from ..records.verdict import Limits
from ..rescue.mixing import trained_before
from ..rescue.rescuer import Rescuer, is_exceeded
from ..rescue.sweep import Rescue
from .telling import Forgiving, Warned

logger = get_logger(__name__)

Verbose = bool | Literal["all"]


class Measured(Journaled):
    """The looks of one run, their verdicts, and what is saved of them.

    Args:
        probe: What every look shows.
        limits: The user's.
        pace: When there is a look, and at how many images.
        ledger: The run's places on disk.
        outcomes: As `IIMMMonitor`.
    """

    def __init__(
        self,
        probe: Probe,
        limits: Limits,
        pace: Pace,
        ledger: Ledger,
        outcomes: str | Path | Address | Iterable[Outcome] | None,
    ) -> None:
        super().__init__()
        self.probe = probe
        self.limits = limits
        self._pace = pace
        self.verbose: Verbose = True
        self._model: weakref.ref[nn.Module] | None = None  # that `begin` was given
        self._forgiving = Forgiving(strict=False)
        self.named: list[str] = []  # off-target tasks that the user named
        self.method: str | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.strict = False
        self.forecast: Forecast | None = None
        self.ended = "running"
        self.looked_at = -1
        self._failure: Exception | None = None  # of the latest look
        self._ledger = ledger
        self._outcomes = outcomes
        self._forecaster = Forecaster()
        self._prior: Forecast | None = None  # set by `begin`
        self._now = (0, 0)  # the latest step and the total that are known
        self._began = 0.0  # on the clock
        self._is_partial = False  # the latest look
        self._warned = Warned()
        self._rescue: Rescue | None = None

    def has_seen(self, step: int) -> bool:
        """Whether there was a look at this step, and at all images."""
        return self.looked_at == step and not self._is_partial

    @property
    def is_mixed(self) -> bool:
        """Whether the model was mixed by a rescue after the latest look."""
        return self._rescue is not None and self._rescue.applied and self._rescue.alpha < 1

    def is_exceeded(self) -> bool:
        """Whether the forgetting that the latest look observed is over the limit."""
        journal = self._require_begun("is_exceeded")
        return self._failure is None and is_exceeded(journal.history[-1], self.limits)

    def rescue(self, model: nn.Module, rescuer: Rescuer) -> Rescue:
        """Leave the model with the mix of untouched and fine-tuned weights that gains most.

        Call it before `end`: the outcome stays that of the fine-tuned model, since that is what
        the next run learns from; the curve is saved beside it, as ``"rescue"``.

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
            model, self.probe, self.limits, baseline=journal.baseline,
            autocast_dtype=self.autocast_dtype,
        )  # fmt: skip
        return self._rescue

    def try_again(self, first: Measured) -> None:
        """Take the baseline of a run that failed and is tried again: call it before `begin`.

        What was trained in between does not become the baseline; images that were preprocessed are
        used again. It is one run, saved once. Steps that the first try did count for a phase of
        their own, since the model keeps them.

        Args:
            first: The monitor of that run, which is given up.

        Raises:
            RuntimeError: `begin` of `first` was not called.
        """
        journal = first._require_begun("try_again")
        first._ledger.drop()
        self.probe = first.probe
        self._journal = replace(journal, history=[], failures=0, dropped=0)
        self.is_later_phase |= first._now[0] > 0

    def go_on_from(self, journal: Journal, model: nn.Module) -> bool:
        """Take the baseline of an earlier run that trained this model: call it before `begin`.

        The outcome is then that of several trainings, and no forecast learns from it.

        Args:
            journal: Of that run.
            model: As it is now.

        Returns:
            Whether it was taken: not where images, prompts or preprocessing differ.
        """
        size = self.probe.off_target_size
        self.probe.off_target_size = journal.off_target_size or OFF_TARGET_PROBE_SIZE
        self.probe.prepare(model)
        if self.probe.fingerprints != journal.fingerprints:
            self.probe.off_target_size = size
            return False
        start = replace(
            journal.start,
            method=self.method or detect(model),
            run=ranks.from_first(lambda: uuid.uuid4().hex),
            recipe=journal.start.recipe | {"trainable_share": trainable_share(model)},
        )
        n_outcomes = ranks.from_first(lambda: self.past().n_outcomes)
        self._journal = replace(
            journal, start=start, n_outcomes=n_outcomes, history=[], failures=0, dropped=0
        )
        self.is_later_phase = True
        return True

    def loaded(self, best_step: int | None) -> None:
        """Note that the model at the end is of an earlier step: call it before `end`.

        The outcome is that model's. Forecasts learn from the look at the last step.

        Args:
            best_step: Steps it was trained for; None: unknown.
        """
        journal = self._require_begun("loaded")
        recipe = journal.start.recipe | {"best_step": best_step}
        journal.start = replace(journal.start, recipe=recipe)

    def row(self) -> dict[str, float]:
        """The latest look's logged keys, Python floats only; empty where it failed.

        Accuracies on single off-target tasks are among them where the user named the tasks.
        """
        if not self.history:
            self._require_begun("row")
        if self._failure is not None:
            return {}
        off_target = {task.name for task in self.probe.off_target}
        quiet = set(map(keys.accuracy_key, off_target.difference(self.named)))
        found = self.history[-1].items()
        return {k: v for k, v in found if k.startswith(keys.PREFIX) and k not in quiet}

    def record(self) -> dict[str, Any]:
        """The run so far as JSON-ready data: what `reports` shows and a file keeps."""
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

    @property
    def plan(self) -> str:
        """The looks to come, in words; after `begin`."""
        journal = self._require_begun("plan")
        n_images = sum(map(len, journal.baseline.correct.values()))
        return self._pace.plan(n_images, self.probe.off_target_size)

    def _require_begun(self, call: str) -> Journal:
        if self._journal is None or self._prior is None:
            raise RuntimeError(f"call `begin(model)` on the untouched model before `{call}`")
        return self._journal

    def past(self) -> Catalog:
        """The finished runs to learn from: those given, or those in the store."""
        return self._ledger.catalog() if self._outcomes is None else as_catalog(self._outcomes)

    def _trained(self, call: str) -> nn.Module:
        """The model that `begin` was given."""
        self._require_begun(call)
        model = self._model() if self._model is not None else None
        if model is None:
            raise RuntimeError(f"`{call}` needs the model that `begin` was given: keep it")
        return model

    def _say(self, text: Callable[[], str]) -> None:
        if self.verbose and ranks.world()[0] == 0:
            self._forgiving("printing", lambda: tqdm.write(text()))

    def _learn(self, past: Catalog | None, journal: Journal, *, resumed: bool) -> None:
        """Fit the forecaster; of a run that goes on, to what it learnt from when it began."""
        model, first = journal.start.model_fingerprint, journal.n_outcomes if resumed else None
        # The first rank's: files may differ between ranks.
        there = ranks.from_first(lambda: past.n_outcomes if past else 0)
        if first is not None and there < first:
            said = (
                f"Of {first} saved runs that this one learnt from when it began, {there} are still "
                "there: forecasts from here on may differ from those of an uninterrupted run"
            )
            logger.warning(said)
        outcomes = ranks.from_first(lambda: past.relevant(model, first) if past else [])
        journal.n_outcomes = there if first is None else first
        self._forecaster.fit(outcomes)

    def _first_look(
        self, model: nn.Module, untouched: nn.Module | AbstractContextManager[Any] | None
    ) -> Journal:
        if untouched is not None:  # else the look reads while it embeds
            self.probe.prepare(model)
        before = untouched if isinstance(untouched, nn.Module) else model
        inside = untouched if isinstance(untouched, AbstractContextManager) else nullcontext()
        with inside:
            look = self.probe.look(before, 0, self.autocast_dtype, linear_probe=True)
        tasks = [self.probe.task, *self.probe.off_target]
        metrics = {task.name: task.metric.name for task in tasks if task.metric}
        if self.probe.encode is None and find_own_head(model) is not None:
            metrics.setdefault(self.probe.task.name, "accuracy of its own classifier")
        fingerprint, recipe = model_fingerprint(before), {"trainable_share": trainable_share(model)}
        start = opening(
            look,
            model=model_name(before),
            model_fingerprint=fingerprint,
            method=self.method or detect(model),
            fingerprint=self.probe.fingerprints[self.probe.task.name],
            recipe=recipe | ({"metrics": metrics} if metrics else {}),
            run=ranks.from_first(lambda: uuid.uuid4().hex),
        )
        if trained := trained_before(model):
            self._warned.of_adapters(trained[0])
        return Journal(
            start,
            look,
            self.probe.fingerprints,
            n_outcomes=0,  # until `_learn` has counted them
            off_target_size=self.probe.off_target_size,
            is_later_phase=bool(trained)
            or untouched not in (None, before)
            or (untouched is before and fingerprint != model_fingerprint(model)),
        )

    def _first_forecast(self, journal: Journal) -> Forecast:
        total = journal.start.recipe.get("steps")
        coming = next_share(self._pace.every, 0, total, 0) if isinstance(total, int) else None
        prior = self._forecaster.predict(
            journal.baseline.measurement, **about(journal.start), next_share=coming
        )
        return prior if self.probe.off_target else replace(prior, forgetting=None, worst=None)

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
        """Put the run so far on disk, and what is saved should it end here."""
        assert self._journal is not None
        outcome = self._journal.outcome(complete, ended)
        if ranks.world()[0] == 0:
            self._ledger.draft(outcome, self.record())
        return outcome

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
