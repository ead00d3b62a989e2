"""Tasks, recipes and the seconds allowed -> the runs of a calibration: which, and how long."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...data.images import content
from ...data.tasks import Task
from ...models.wrappers import model_fingerprint
from ...probing import ranks
from ...probing.probe import Probe
from ...records.outcomes import Outcome
from ...records.run_file import file_name, read_run, save_run
from ...reports.words import duration
from .recipes import Recipe
from .runs import Left, Subject, Tell, fine_tune, run_script, seconds_of_a_step, seconds_of_looks

_HASHED = 64  # training images by which a training set is known
# A run is not made shorter than this: forgetting would not have set in.
_LEAST_STEPS, _LEAST_SHARE = 20, 0.2


@dataclass(frozen=True)
class Job:
    """One run of a calibration.

    Attributes:
        task: Position of the task.
        recipe: Position of the recipe.
        steps: Optimizer steps, maybe fewer than the recipe's.
        seconds: What it is expected to take.
    """

    task: int
    recipe: int
    steps: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What was timed before the runs, in seconds.

    Attributes:
        looks: [T] all looks of a run on each task.
        steps: [R] an optimizer step by each recipe.
    """

    looks: Sequence[float]
    steps: Sequence[float]

    def of(self, job: Job) -> float:
        """Seconds that a job takes."""
        return self.looks[job.task] + job.steps * self.steps[job.recipe]


def fit(jobs: Sequence[Job], cost: Cost, seconds: float | None) -> list[Job]:
    """The jobs that fit: shorter ones first, then fewer.

    All are made shorter by one factor, down to a fifth of their steps or 20. If that is not enough,
    the last ones are left out.

    Args:
        jobs: All that are wanted, in their order.
        cost: As measured.
        seconds: That are left; ``None``: no limit.

    Returns:
        A part of `jobs`, with their steps and `Job.seconds`.

    Raises:
        ValueError: Not even one fits.

    Example:
        >>> [job.steps for job in fit([Job(0, 0, 100)] * 3, Cost([10.0], [1.0]), 180.0)]
        [50, 50, 50]
    """
    share = 1.0
    if seconds is not None:
        looks = sum(cost.looks[job.task] for job in jobs)
        training = sum(cost.of(job) for job in jobs) - looks
        share = min(max((seconds - looks) / max(training, 1e-9), _LEAST_SHARE), 1.0)
    found: list[Job] = []
    left = math.inf if seconds is None else seconds + 1e-6
    for job in jobs:
        steps = max(math.floor(share * job.steps + 1e-9), min(_LEAST_STEPS, job.steps))
        short = replace(job, steps=steps)
        short = replace(short, seconds=cost.of(short))
        left -= short.seconds
        if left < 0:
            break
        found.append(short)
    if not found:
        raise ValueError(
            f"`budget` must allow a run at least, which takes {duration(short.seconds)} with its "
            f"looks, got {duration(max(seconds or 0.0, 0.0))} after what was measured; "
            "allow more, or ask for fewer steps"
        )
    return found


@dataclass(frozen=True)
class Lesson:
    """A task that can be learnt.

    Attributes:
        task: Its held-out images.
        train: Its training images.
        fingerprint: Of the held-out ones.
        features: IIMM, headroom of the linear probe, zero-shot accuracy.
        seconds: That a look at one image takes.
    """

    task: Task
    train: Task
    fingerprint: str
    features: tuple[float, float, float]
    seconds: float


@dataclass(frozen=True)
class Work:
    """What a calibration has to do.

    Attributes:
        subject: The model.
        lessons: Tasks that are learnt.
        recipes: None with a script.
        off_target: As `IIMMCallback`.
        script: The user's own; or None.
        output: Folder of plan and runs.
    """

    subject: Subject
    lessons: Sequence[Lesson]
    recipes: Sequence[Recipe]
    off_target: Sequence[Task] | None
    script: str | Path | None
    output: Path

    @cached_property
    def model(self) -> str:
        """Its fingerprint."""
        return model_fingerprint(self.subject.model)

    @property
    def names(self) -> list[str]:
        """Of the recipes, or of the script."""
        if self.script is not None:
            return [Path(self.script).name]
        return [recipe.name for recipe in self.recipes]

    @cached_property
    def _settings(self) -> tuple[list[Any], list[Any], list[Any]]:
        """What makes runs the same: all in common, by task, by recipe."""
        guarded = None
        if self.off_target is not None:
            guarded = [[task.name, len(task)] for task in self.off_target]
        code = None if self.script is None else Path(self.script).read_text(encoding="utf-8")
        lessons = [[x.task.name, x.fingerprint, _known_by(x.train)] for x in self.lessons]
        recipes = [[r.method, _of_all_ranks(r), dict(r.peft)] for r in self.recipes]
        return [self.model, guarded, code], lessons, recipes or [[]]

    def key(self, job: Job) -> str:
        """What a run is known by: the same for the same model, images, recipe and steps."""
        common, lessons, recipes = self._settings
        return digest([*common, lessons[job.task], recipes[job.recipe], job.steps])

    def title(self, job: Job) -> str:
        """A run, for people."""
        steps = f", {job.steps} steps" if self.recipes else ""
        return f"{self.lessons[job.task].task.name}, {self.names[job.recipe]}{steps}"

    def folder(self, job: Job) -> Path:
        """Where a run's files go."""
        return self.output / f"{self._stem(job)}-{self.key(job)}"

    def _stem(self, job: Job) -> str:
        name = file_name(self.lessons[job.task].task.name)
        return name.removeprefix("iimm_").removesuffix(".json")

    def _kept(self, task: Task) -> list[Task] | None:
        """What a run is guarded by; a task is not off target of its own run."""
        if self.off_target is None:
            return None
        return [other for other in self.off_target if other.name != task.name]

    def read_plan(self) -> list[Job] | None:
        """The runs that an earlier try planned; None where it had other settings."""
        try:
            saved = json.loads(self._plan_file.read_text(encoding="utf-8"))
            if saved["key"] != digest(self._settings):
                return None
            return [Job(**job) for job in saved["jobs"]]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def make_plan(self, cost: Cost, seconds: float | None) -> list[Job]:
        """The runs that fit into the seconds that are left, task by task; saved.

        Raises:
            OSError: The plan cannot be written.
            ValueError: Not one fits.
        """
        steps = [recipe.steps for recipe in self.recipes] or [1]
        wanted = [Job(i, j, n) for i in range(len(self.lessons)) for j, n in enumerate(steps)]
        jobs = fit(wanted, cost, seconds)
        self.output.mkdir(parents=True, exist_ok=True)
        plan = {"key": digest(self._settings), "jobs": [asdict(job) for job in jobs]}
        save_run(plan, self._plan_file)
        return jobs

    @property
    def _plan_file(self) -> Path:
        return self.output / "plan.json"

    def time(self) -> Cost:
        """What looks and steps take; nothing is known of a script.

        Raises:
            ValueError: The model cannot be trained by a recipe, or measured on off-target tasks.
        """
        if self.script is not None:
            return Cost([0.0] * len(self.lessons), [0.0])
        from ...sample import off_target_tasks

        first = self.lessons[0]
        others = off_target_tasks(first.task, self._kept(first.task))
        probe = Probe(first.task, others, processor=self.subject.processor, progress=False)
        probe.prepare(self.subject.model)
        steps = []
        for recipe in self.recipes:
            try:
                given = self.subject, first.task, first.train, recipe, self.output
                steps.append(seconds_of_a_step(*given))
            except (ValueError, TypeError, RuntimeError, ImportError) as error:
                raise ValueError(
                    f"`recipe` {recipe.name!r} must train this model, and fails "
                    f"({type(error).__name__}: {error!s:.400}); change it or leave it out"
                ) from error
        looks = [
            seconds_of_looks(x.task, x.train, self._kept(x.task), x.seconds) for x in self.lessons
        ]
        return Cost(looks, steps)

    def in_words(self, jobs: Sequence[Job], to_do: Sequence[Job], budget: float | None) -> str:
        """The plan."""
        n_all = len(self.lessons) * len(self.names)
        parts = [f"{len(jobs)} runs: {', '.join(self.names)} on {len(self.lessons)} tasks"]
        if len(jobs) < n_all:
            parts.append(f"{n_all - len(jobs)} more do not fit")
        if self.recipes:
            steps = sorted({job.steps for job in jobs})
            asked = max(recipe.steps for recipe in self.recipes)
            shorter = f", shorter than the {asked} asked for" if steps[-1] < asked else ""
            parts.append(f"{' or '.join(map(str, steps))} steps each{shorter}")
        if len(to_do) < len(jobs):
            parts.append(f"{len(jobs) - len(to_do)} of them done already")
        if seconds := sum(job.seconds for job in to_do):
            within = "" if budget is None else f" of {duration(budget)} allowed"
            parts.append(f"about {duration(seconds)}{within}")
        elif to_do:
            parts.append("how long one takes is known from its first looks on")
        return f"Calibration: {'; '.join(parts)}."

    def run(self, job: Job, left: Left, tell: Tell) -> Outcome:
        """A run's outcome, known by its key; not saved yet.

        Args:
            job: Which.
            left: Seconds.
            tell: As `run_script`; only a script's run calls it.

        Raises:
            OutOfTimeError: None of the seconds in `left` is left before its end.
            Exception: Training or measuring fails.
        """
        lesson, folder = self.lessons[job.task], self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        if self.script is None:
            recipe = self.recipes[job.recipe]
            outcome = fine_tune(
                self.subject, lesson.task, lesson.train, self._kept(lesson.task), recipe, job.steps,
                folder, left,
            )  # fmt: skip
        else:
            data = self.output / "data" / self._stem(job)
            write_folder(lesson.train, data / "train")
            write_folder(lesson.task, data / "test")
            outcome = run_script(Path(self.script), data, folder, left(), tell)
        # A script calls each task as it likes, maybe all by one name: they would count as one.
        outcome = replace(outcome, run=self.key(job), task=lesson.task.name)
        if ranks.world()[0] == 0:  # so that a report knows the run's own outcome
            known = {name: getattr(outcome, name) for name in ("run", "recipe", "task")}
            for path in self.run_files(job):
                save_run(read_run(path) | known, path)
        return outcome

    def run_files(self, job: Job) -> list[Path]:
        """What a run has written, if it is on this disk."""
        return sorted(self.folder(job).glob("iimm_*.json"))


def write_folder(task: Task, folder: Path) -> None:
    """The task's images as PNG files in a folder of each class; what is there already is kept."""
    if (folder / ".complete").exists():
        return
    width = len(str(len(task.class_names)))
    for i, name in enumerate(task.class_names):
        safe = "".join(c if c.isalnum() or c in " -" else "_" for c in name)
        (folder / f"{i:0{width}}_{safe}").mkdir(parents=True, exist_ok=True)
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    for i in range(len(task)):
        image, (label,) = task.images([i])[0], task.labels([i])
        if not hasattr(image, "save"):
            raise ValueError(f"`script` needs tasks of pictures, got others in {task.name!r}")
        image.save(folders[label] / f"{i:06}.png")
    (folder / ".complete").touch()


def _known_by(train: Task) -> str:
    """A hash of all labels and of some images; of all it would take as long as an epoch."""
    positions = range(0, len(train), max(len(train) // _HASHED, 1))
    images = hashlib.sha256(b"".join(map(content, train.images(positions)))).hexdigest()
    return digest([train.labels(range(len(train))), images])


def _of_all_ranks(recipe: Recipe) -> dict[str, Any]:
    """Its arguments; two ranks of 16 images a step train as one of 32 does."""
    arguments = dict(recipe.arguments)
    each = arguments.pop("per_device_train_batch_size")
    return arguments | {"batch_size": each * ranks.world()[1]}


def digest(value: Any) -> str:
    """What a thing is known by: a hash of it as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
