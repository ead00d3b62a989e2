"""`reproduce`: the paper's experiment, or a part of it, run by run; resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState
from torch import nn

from ...data.tasks import Task
from ...models.wrappers import model_fingerprint
from ...probing import ranks
from ...probing.probe import Probe
from ...records.log import get_logger
from ...records.outcomes import Outcome, library_versions, one_of_each_run, provenance
from ...records.run_file import save_run
from ...records.store import append_outcome, read_outcomes
from ...reports.words import gained
from ..calibration.work import digest
from .published import MODELS, TASKS, Splits, read_splits
from .training import Setting, measure, tuned

logger = get_logger(__name__)
_LOOK_BATCH = 64  # images in a forward pass without gradients
_MEASURED = (  # of what `training.measure` found, that an outcome has
    "iimm", "inter", "intra", "standard_error", "n_images", "n_classes", "zero_shot_accuracy",
    "linear_probe_accuracy", "linear_probe_standard_error", "linear_probe_n_train",
)  # fmt: skip
Run = tuple[str, str, float]  # task, method, learning rate


@dataclass(frozen=True)
class Part:
    """The part of the experiment that is run.

    Attributes:
        models: Keys of `published.MODELS`.
        tasks: Keys of `published.TASKS`; each is off-target for the others.
        methods: Keys of `published.METHODS`.
        rates: Learning rates; the one of best validation accuracy counts.
        setting: Of each run.
        most_test: Test images of a task, at most; ``None``: all.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    methods: Sequence[str]
    rates: Sequence[float]
    setting: Setting
    most_test: int | None = None

    def runs(self) -> list[Run]:
        """Every run on a model."""
        return [(t, m, r) for t in self.tasks for m in self.methods for r in self.rates]


@dataclass
class Found:
    """What is known by now.

    Attributes:
        measured: Model -> task -> what `training.measure` returns.
        outcomes: Model -> its runs.
        failed: Run, in words -> why it failed.
        n_left: Runs that were not begun, for want of time.
    """

    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    n_left: int = 0


def reproduce(
    part: Part,
    load_model: Callable[[str], tuple[nn.Module, Any]],
    *,
    output: Path,
    mirror: Path | None = None,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> Found:
    """Measure every task on every model, fine-tune, and evaluate on all other tasks.

    Every finished run is saved at once, in ``outcomes.jsonl``. Called again with the same part and
    `output` it does what is missing. On several ranks (``accelerate launch``) all must call it.

    Args:
        part: What is run.
        load_model: Key of `published.MODELS` -> untouched model on the CPU, and its processor.
        output: Folder for results; it must exist.
        mirror: As `published.read_splits`.
        budget: Seconds, from the call on; a run that would take longer is not begun.
        say: Told of each result, on the first rank.

    Returns:
        What was found. A run that fails is told and passed over.

    Raises:
        OSError: A result cannot be written.
        ValueError: A model or data set cannot be had or measured.
    """
    end = None if budget is None else perf_counter() + budget
    state = PartialState(cpu=True) if part.setting.use_cpu else PartialState()
    splits = {name: read_splits(name, TASKS[name], mirror, part.most_test) for name in part.tasks}
    store, found = output / "outcomes.jsonl", Found()
    known = ranks.from_first(lambda: read_outcomes(store) if store.exists() else [])
    done = {o.run: o for o in one_of_each_run(known) if o.complete and o.run}
    pace = 0.0  # seconds that a training image took in the latest run

    def tell(text: str) -> None:
        if state.is_main_process:
            say(text)

    for key in part.models:
        untouched, processor = load_model(key)
        model = _Model(key, untouched.to(state.device), processor, splits, output, part.setting)
        found.measured[key] = model.measured
        for name in splits:
            model.measure(name, tell)
        outcomes = found.outcomes[key] = []
        for run in part.runs():
            if (identity := model.identity(run)) in done:
                outcomes.append(done[identity])
                continue
            n_shown = part.setting.epochs * len(splits[run[0]].train)
            if end is not None and ranks.from_first(perf_counter) + pace * n_shown > end:
                found.n_left += 1
                continue
            title, began = model.title(run), perf_counter()
            try:
                outcome = model.run(run)
            except OSError:
                raise  # a full disk will not be any better for the next run
            except Exception as error:
                found.failed[title] = f"{type(error).__name__}: {error}"
                logger.warning("The run %s failed: %s", title, error)
            else:
                ranks.from_first(partial(append_outcome, store, outcome))
                outcomes.append(outcome)
                tell(f"{title}: {gained(outcome.gain, outcome.forgetting)}")
            pace = (perf_counter() - began) / n_shown
        untouched.to("cpu")
    return found


@dataclass(frozen=True)
class _Model:
    """A model of the experiment, and what is known of the tasks on it."""

    key: str
    model: nn.Module
    processor: Any
    splits: dict[str, Splits]
    output: Path
    setting: Setting
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        return model_fingerprint(self.model)

    def title(self, run: Run) -> str:
        task, method, rate = run
        return f"{MODELS[self.key].title}, {task}, {method} {rate:g}"

    def measure(self, name: str, tell: Callable[[str], None]) -> None:
        """Note what is measured of a task, by now or by an earlier try."""
        of, path = self.splits[name], self.output / f"{self.key}-{name}.json"
        about = digest([self.fingerprint, _about(of.train), _about(of.test)])
        saved: dict[str, Any] | None = ranks.from_first(partial(_read_json, path))
        # An earlier version measured fewer scores.
        if saved is not None and saved.get("of") == about and "EMMS" in saved.get("scores", {}):
            self.measured[name] = saved
            return
        found = {"of": about} | measure(self.model, of, self.processor, _LOOK_BATCH)
        self.measured[name] = found
        ranks.from_first(partial(save_run, found, path))
        tell(
            f"{MODELS[self.key].title}, {name}: IIMM {found['iimm']:.3f}, zero-shot accuracy "
            f"{found['zero_shot_accuracy']:.3f}, linear probe {found['linear_probe_accuracy']:.3f}"
        )

    def identity(self, run: Run) -> str:
        """What a run is known by: model, recipe, and the images of all tasks."""
        images = [(name, about["test_fingerprint"]) for name, about in self.measured.items()]
        recipe = (self.setting.epochs, self.setting.batch_size, self.setting.seed)
        trained = self.measured[run[0]]["train_fingerprint"]
        return digest([self.fingerprint, *run, *recipe, trained, images])

    def run(self, run: Run) -> Outcome:
        """Fine-tune, and evaluate on all tasks."""
        task, method, rate = run
        own = self.splits[task]
        others = [name for name in self.splits if name != task]
        probe = Probe(
            own.test,
            [self.splits[name].test for name in others],
            processor=self.processor,
            batch_size=_LOOK_BATCH,
            cache_limit=0,
            progress=False,
        )
        with tuned(self.model, own, self.processor, method, rate, self.setting) as best:
            look = probe.look(best.model, best.steps)
        about = self.measured[task]
        return Outcome(
            model=MODELS[self.key].title,
            model_fingerprint=self.fingerprint,
            method=method,
            task=task,
            task_fingerprint=about["test_fingerprint"],
            **{name: about[name] for name in _MEASURED},
            final_accuracy=look.accuracy(task),
            off_target_before={n: self.measured[n]["zero_shot_accuracy"] for n in others},
            off_target_after={name: look.accuracy(name) for name in others},
            recipe={
                "optimizer": "SGD",
                "learning_rate": rate,
                "steps": best.steps,
                "batch_size": self.setting.batch_size,
                "epochs": self.setting.epochs,
                "best_epoch": best.epoch,
                "validation_accuracy": best.validation_accuracy,
            },
            versions=library_versions(),
            provenance=provenance(),
            run=self.identity(run),
            n_train=len(own.train),
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _about(task: Task) -> list[Any]:
    """Labels, prompts and size: what is known of a task without decoding its images."""
    return [task.name, task.prompts([]), task.probe_size, task.labels(range(len(task)))]
