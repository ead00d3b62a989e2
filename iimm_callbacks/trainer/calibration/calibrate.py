"""`calibrate`: fine-tune a model on a few diverse tasks, and learn from that how it behaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ...data.tasks import Task, check_tasks
from ...data.training import training_task
from ...probing import ranks
from ...probing.learnable import TrainingSet
from ...probing.probe import Probe
from ...records.log import get_logger
from ...records.objects import Address, as_store, check_writable
from ...records.outcomes import Outcome, one_of_each_run
from ...records.store import append_outcome, default_store, read_outcomes
from ...reports.words import duration, gained
from . import learnt
from .recipes import Recipe
from .runs import Left, OutOfTimeError, Subject
from .work import Job, Lesson, Work

logger = get_logger(__name__)
_CHOOSING = 256  # training images that the linear probe of a task to choose from learns from


@dataclass(frozen=True)
class Calibration:
    """What a calibration did and taught.

    Attributes:
        model: Fingerprint.
        tasks: Names of those that were chosen.
        outcomes: Complete runs of this calibration, those of an earlier try included.
        n_planned: Runs that were planned.
        failed: Run, in words -> why it failed.
        errors: Of forecasts before training, before the calibration and now.
        curve: As `learnt.grade`.
        expected: What each recipe came to.
        run_files: Of the runs that have one.
    """

    model: str
    tasks: list[str]
    outcomes: list[Outcome]
    n_planned: int
    failed: dict[str, str]
    errors: list[learnt.Error]
    curve: list[dict[str, float | int | None]]
    expected: list[learnt.Expected]
    run_files: list[Path]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, without the outcomes' looks."""
        about = ("task", "method", "gain", "forgetting", "worst", "run")
        return {
            "model_fingerprint": self.model,
            "tasks": self.tasks,
            "n_planned": self.n_planned,
            "runs": [
                {name: getattr(o, name) for name in about}
                | {name: o.recipe.get(name) for name in ("learning_rate", "steps", "asked_steps")}
                for o in self.outcomes
            ],
            "failed": self.failed,
            "errors": [asdict(row) for row in self.errors],
            "curve": self.curve,
            "expected": [asdict(row) for row in self.expected],
            "run_files": [str(path) for path in self.run_files],
        }


def calibrate(
    model: nn.Module,
    tasks: Sequence[tuple[Task, Any]],
    recipes: Sequence[Recipe],
    *,
    processor: Any,
    off_target: Sequence[Task] | None = None,
    n_tasks: int = 4,
    store: str | Path | Address = "default",
    output: str | Path = "iimm_calibration",
    budget: float | None = None,
    script: str | Path | None = None,
    use_cpu: bool = False,
    progress: bool = True,
) -> Calibration:
    """Fine-tune a model on a few diverse tasks, under a guard that watches; save the outcomes.

    The first real run then has a forecast learnt on this model and this recipe. Every finished run
    is saved at once. Called again with the same settings and `output` it does what is missing, and
    comes to the same outcomes. On several ranks (``accelerate launch``) all must call it.

    Args:
        model: Untouched dual encoder. It is left as it was; each run trains a copy.
        tasks: Pairs of a `Task` of held-out images and the training images, a `Task` or a data set
            as `IIMMCallback` takes it as ``train``. Where there are more than `n_tasks` all are
            measured, and the most different in IIMM, headroom and zero-shot accuracy are learnt.
        recipes: Each is run on each task.
        processor: As `IIMMCallback`.
        off_target: As `IIMMCallback`; give what your real runs will be guarded by. A task that is
            learnt, too, is left out of its own runs.
        n_tasks: To learn.
        store: That the outcomes are added to, as `append_outcome`; ``"default"``: the user's.
        output: Folder for the plan and the run files.
        budget: Seconds, from the call on. Runs become shorter, down to a fifth of their steps, then
            fewer; a run that is not done by then is ended and counts for nothing. ``None``: no
            limit.
        script: A training script of your own, called once for each task as ``python SCRIPT DATA
            FOLDER``, in place of `recipes`; see `runs.run_script`.
        use_cpu: Keep off a GPU.
        progress: Print the plan and each run.

    Returns:
        A `Calibration`. Its errors are of these tasks; a task unlike them may do worse.

    Raises:
        ValueError: No task or recipe, tasks of one name or without classes, a training set that
            does not fit its task, a store that cannot be written, a budget too short for one run,
            or a model that cannot be measured or trained by a recipe.
        OSError: An outcome or run file cannot be written.
    """
    began = perf_counter()
    state = PartialState(cpu=True) if use_cpu else PartialState()
    _check(tasks, recipes, n_tasks, script, state.num_processes)
    place = default_store() if store == "default" else as_store(store)
    ranks.from_first(lambda: check_writable(place))

    def say(text: str) -> None:
        if progress and state.is_main_process:
            tqdm.write(text)

    def left() -> float | None:
        return None if budget is None else budget - (perf_counter() - began)

    home = next(model.parameters()).device
    model.to(state.device)
    try:
        lessons: list[Lesson] = []
        for task, train in tasks:
            rest = ranks.from_first(left)
            if rest is not None and rest <= 0:
                raise ValueError(
                    f"`budget` must allow measuring {len(tasks)} tasks and then a run, got "
                    f"{duration(budget or 0.0)}, in which {len(lessons)} were measured; allow "
                    "more, or give fewer tasks"
                )
            lessons.append(_lesson(model, task, train, processor))
    finally:
        model.to(home)
    if len(tasks) > n_tasks:
        chosen = most_different([lesson.features for lesson in lessons], n_tasks)
        lessons = [lessons[i] for i in sorted(chosen)]
        say(f"Chosen of {len(tasks)} tasks: {', '.join(one.task.name for one in lessons)}.")
    subject = Subject(model, processor, use_cpu)
    work = Work(subject, lessons, list(recipes), off_target, script, Path(output))
    jobs = ranks.from_first(work.read_plan)
    if jobs is None:
        cost = work.time()
        jobs = ranks.from_first(lambda: work.make_plan(cost, left()))
    known = ranks.from_first(lambda: read_outcomes(place) if place.exists() else [])
    done = {o.run: o for o in one_of_each_run(known) if o.complete and o.run}
    to_do = [job for job in jobs if work.key(job) not in done]
    say(work.in_words(jobs, to_do, budget))
    failed = _do(work, to_do, done, place, left, say)
    return ranks.from_first(lambda: _learn(work, jobs, done, known, failed))


def _lesson(model: nn.Module, task: Task, train: Any, processor: Any) -> Lesson:
    read = training_task(train, task)
    probe = Probe(task, processor=processor, progress=False, train=TrainingSet(read))
    probe.training_size = _CHOOSING
    look = probe.look(model, 0, linear_probe=True)
    assert look.learnable is not None
    zero_shot, learnable = look.accuracy(task.name), look.learnable
    headroom = 0.0
    if learnable.probe is not None:
        headroom = learnable.probe.at(learnable.n_train)[0] - zero_shot
    iimm = look.measurement.iimm
    features = (iimm if math.isfinite(iimm) else 0.0, headroom, zero_shot)
    seconds = probe.seconds / max(len(look.correct[task.name]), 1)
    return Lesson(task, read, probe.fingerprints[task.name], features, seconds)


def most_different(features: Sequence[Sequence[float]], n: int) -> list[int]:
    """A row in the middle and the n - 1 farthest from it and one another: farthest-point sampling.

    Each column is scaled to unit variance. The first is the row nearest to the mean; each further
    one has the largest distance to the nearest that is chosen. On the study's runs four tasks
    chosen like this taught the forgetting of others more than four that began at an extreme.

    Args:
        features: [N, F] finite numbers, such as IIMM, headroom and zero-shot accuracy.
        n: At least 1.

    Returns:
        [min(n, N)] positions, in the order in which they were chosen; ties go to the first.

    Example:
        >>> most_different([[0.0], [0.1], [1.0], [0.5]], 3)
        [3, 0, 2]
    """
    rows = np.asarray(features, dtype=float)
    rows = (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-9)
    chosen = [int(np.argmin(np.linalg.norm(rows, axis=1)))]
    while len(chosen) < min(n, len(rows)):
        gaps = np.linalg.norm(rows[:, None] - rows[chosen], axis=2).min(axis=1)
        gaps[chosen] = -1.0
        chosen.append(int(np.argmax(gaps)))
    return chosen


def _do(
    work: Work,
    to_do: Sequence[Job],
    done: dict[str, Outcome],
    store: Path | Address,
    left: Left,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Run what is to do, save it and note it in `done`; run -> why it failed."""
    failed: dict[str, str] = {}
    slower = 1.0  # than planned, in the latest run
    usual = 0.0  # seconds of a script's latest run
    for n, job in enumerate(to_do):
        rest = ranks.from_first(left)
        if rest is not None and max(slower * job.seconds, usual) > rest:
            say(f"Out of time: {len(to_do) - n} runs were not begun.")
            break
        started = perf_counter()
        try:
            outcome = work.run(job, left, _ScriptTime(len(to_do) - n, rest, say, usual > 0))
        except OSError:
            raise  # a full disk will not be any better for the next run
        except KeyboardInterrupt:
            say(f"Interrupted after {n} of {len(to_do)} runs; the same command does the rest.")
            raise
        except OutOfTimeError:
            say(f"Out of time: {work.title(job)} was ended, {len(to_do) - n - 1} were not begun.")
            break
        except Exception as error:
            failed[work.title(job)] = f"{type(error).__name__}: {error}"
            logger.warning("The run %s failed: %s", work.title(job), error)
        else:
            done[outcome.run] = outcome
            ranks.from_first(partial(append_outcome, store, outcome))
            ends = gained(outcome.gain, outcome.forgetting)
            say(f"{n + 1} of {len(to_do)}: {work.title(job)}: {ends}")
            usual = 0.0 if job.seconds else perf_counter() - started
        took = perf_counter() - started
        slower = max(took / job.seconds, 1.0) if job.seconds else 1.0
    return failed


@dataclass
class _ScriptTime:
    """What a script's first looks say of its runs; printed once.

    Attributes:
        n: Runs that are to do, this one included.
        rest: Seconds that are left for them; None: no limit.
        say: Prints.
        is_told: Whether it was, or need not be.
    """

    n: int
    rest: float | None
    say: Callable[[str], None]
    is_told: bool

    def __call__(self, whole: float, is_sure: bool) -> None:
        if self.is_told or not is_sure:
            return
        self.is_told = True
        fit = self.n if self.rest is None else min(int(self.rest // whole), self.n)
        left = "" if self.rest is None else f"; {fit} of {self.n} fit into {duration(self.rest)}"
        self.say(f"A run takes about {duration(whole)}{left}.")
        if not fit:
            raise OutOfTimeError


def _learn(
    work: Work,
    jobs: Sequence[Job],
    done: dict[str, Outcome],
    known: Sequence[Outcome],
    failed: dict[str, str],
) -> Calibration:
    own = [done[work.key(job)] for job in jobs if work.key(job) in done]
    others = [o for o in known if o.model_fingerprint != work.model]
    errors, curve = learnt.grade(own, others)
    return Calibration(
        work.model, [lesson.task.name for lesson in work.lessons], own, len(jobs), failed, errors,
        curve, learnt.expected(own), [path for job in jobs for path in work.run_files(job)],
    )  # fmt: skip


def _check(
    tasks: Sequence[tuple[Task, Any]],
    recipes: Sequence[Recipe],
    n_tasks: int,
    script: str | Path | None,
    n_ranks: int,
) -> None:
    if not tasks:
        raise ValueError("`tasks` must hold a task at least, got none")
    if not recipes and script is None:
        raise ValueError("`recipes` must hold a recipe at least, got none")
    if not isinstance(n_tasks, int) or n_tasks < 1:
        raise ValueError(f"`n_tasks` must be a number of at least 1, got {n_tasks!r}")
    first, *others = (task for task, _ in tasks)
    check_tasks(first, others)
    for task, _ in tasks:
        if task.is_captions:
            raise ValueError(f"`tasks` must have classes, got captions in {task.name!r}")
    if script is not None and not Path(script).is_file():
        raise ValueError(f"`script` must be a file, got {str(script)!r}")
    if script is not None and n_ranks > 1:
        raise ValueError(
            f"`script` must be run by one process, got {n_ranks}: let it launch its own ranks"
        )
