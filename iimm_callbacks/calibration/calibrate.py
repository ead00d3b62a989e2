"""`calibrate`: fine-tune a model on a few diverse tasks, and learn from that how it behaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm

from ..data.tasks import OFF_TARGET_PROBE_SIZE, TASK_PROBE_SIZE, Task, check_tasks
from ..data.training import SAMPLE_SIZE
from ..models.wrappers import model_fingerprint
from ..probing import ranks
from ..records.log import get_logger
from ..records.outcomes import Outcome, one_of_each_run
from ..records.run_file import file_name, save_run
from ..records.store import append_outcome, default_store, read_outcomes
from ..records.verdict import WATCH
from . import learnt
from .budget import Cost, Job, fit, words
from .lessons import Lesson, measure, write_folder
from .recipes import Recipe
from .runs import LOOKS, Subject, fine_tune, run_script, seconds_of_a_step

logger = get_logger(__name__)


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
        curve: As `learnt.learning_curve`.
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
    store: str | Path = "default",
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
        off_target: As `IIMMCallback`; give what your real runs will be guarded by.
        n_tasks: To learn.
        store: JSON-lines file that the outcomes are added to; ``"default"``: the user's.
        output: Folder for the plan and the run files.
        budget: Seconds, from the call on. Runs become shorter, down to a fifth of their steps, then
            fewer. ``None``: no limit.
        script: A training script of your own, called once for each task as ``python SCRIPT DATA
            FOLDER``, in place of `recipes`; see `runs.run_script`.
        use_cpu: Keep off a GPU.
        progress: Print the plan and show a bar.

    Returns:
        A `Calibration`. Its errors are of these tasks; a task unlike them may do worse.

    Raises:
        ValueError: No task or recipe, tasks of one name or without classes, a training set that
            does not fit its task, a budget too short for one run, or a model that cannot be
            measured or trained by a recipe.
        OSError: An outcome or run file cannot be written.
    """
    began = perf_counter()
    state = PartialState(cpu=True) if use_cpu else PartialState()
    is_first = state.is_main_process
    _check(tasks, recipes, n_tasks, script, state.num_processes)
    store = default_store() if store == "default" else Path(store)
    output = Path(output)
    subject = Subject(model, processor, use_cpu)
    fingerprint = model_fingerprint(model)

    def say(text: str) -> None:
        if progress and is_first:
            tqdm.write(text)

    lessons = measure(model, tasks, processor, n_tasks, state.device)
    if len(tasks) > n_tasks:
        say(f"Chosen of {len(tasks)} tasks: {', '.join(one.task.name for one in lessons)}.")
    names = [recipe.name for recipe in recipes] if script is None else [Path(script).name]
    keys = _Keys(fingerprint, lessons, recipes, off_target, script)

    def left() -> float | None:
        return None if budget is None else budget - (perf_counter() - began)

    def plan() -> list[Job]:
        saved = _read_plan(output / "plan.json", keys.of_all())
        if saved is not None:
            return saved
        wanted = [Job(i, j, _steps(recipes, j)) for i in range(len(lessons))
                  for j in range(len(names))]  # fmt: skip
        jobs = fit(wanted, cost, left())
        output.mkdir(parents=True, exist_ok=True)
        save_run({"key": keys.of_all(), "jobs": [asdict(j) for j in jobs]}, output / "plan.json")
        return jobs

    cost = Cost([0.0] * len(lessons), [0.0] * len(names))
    if script is None and not ranks.any_rank((output / "plan.json").exists()):
        cost = _time(subject, lessons, off_target, recipes, output / "timed")
    jobs = ranks.from_first(plan)
    known = ranks.from_first(lambda: read_outcomes(store) if store.exists() else [])
    done = {o.run: o for o in one_of_each_run(known) if o.complete and o.run}
    to_do = [job for job in jobs if keys.of(job) not in done]
    say(_plan_in_words(jobs, to_do, lessons, names, recipes, budget))
    failed: dict[str, str] = {}
    slower, asked = 1.0, sum(job.seconds for job in to_do)
    with _bar(len(to_do), progress and is_first, asked) as bar:
        for job in to_do:
            rest = ranks.from_first(left)
            if rest is not None and slower * job.seconds > rest:
                say(f"Out of time: {len(to_do) - bar.n} of {len(jobs)} runs were not begun.")
                break
            lesson = lessons[job.task]
            title = f"{lesson.task.name}, {names[job.recipe]}, {job.steps} steps"
            folder = output / f"{file_name(lesson.task.name)[5:-5]}-{keys.of(job)}"
            started = perf_counter()
            try:
                if is_first:
                    folder.mkdir(parents=True, exist_ok=True)
                outcome = _run(subject, lesson, off_target, recipes, job, folder, script)
            except OSError:
                raise  # a full disk will not be any better for the next run
            except Exception as error:
                failed[title] = f"{type(error).__name__}: {error}"
                logger.warning("The run %s failed: %s", title, error)
            else:
                outcome = replace(outcome, run=keys.of(job))
                if is_first:
                    append_outcome(store, outcome)
                done[outcome.run] = outcome
                say(_result(title, outcome))
            took = perf_counter() - started
            slower = max(took / job.seconds, 1.0) if job.seconds else 1.0
            bar.update()
    own = [done[keys.of(job)] for job in jobs if keys.of(job) in done]
    return ranks.from_first(
        lambda: _learn(fingerprint, lessons, jobs, own, known, failed, output, keys)
    )


def _run(
    subject: Subject,
    lesson: Lesson,
    off_target: Sequence[Task] | None,
    recipes: Sequence[Recipe],
    job: Job,
    folder: Path,
    script: str | Path | None,
) -> Outcome:
    if script is not None:
        data = folder.parent / "data" / file_name(lesson.task.name)[5:-5]
        for task, split in ((lesson.train, "train"), (lesson.task, "test")):
            write_folder(task, data / split)
        return run_script(Path(script), data, folder, WATCH)
    recipe = recipes[job.recipe]
    return fine_tune(subject, lesson.task, lesson.train, off_target, recipe, job.steps, folder)


def _learn(
    fingerprint: str,
    lessons: Sequence[Lesson],
    jobs: Sequence[Job],
    own: list[Outcome],
    known: Sequence[Outcome],
    failed: dict[str, str],
    output: Path,
    keys: _Keys,
) -> Calibration:
    others = [o for o in known if o.model_fingerprint != fingerprint]
    files = [
        path
        for job in jobs
        for path in sorted(output.glob(f"*-{keys.of(job)}/iimm_*.json"))
        if not path.name.endswith(".unfinished")
    ]
    return Calibration(
        fingerprint,
        [lesson.task.name for lesson in lessons],
        own,
        len(jobs),
        failed,
        learnt.errors(own, others),
        learnt.learning_curve(own, others),
        learnt.expected(own),
        files,
    )


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


def _time(
    subject: Subject,
    lessons: Sequence[Lesson],
    off_target: Sequence[Task] | None,
    recipes: Sequence[Recipe],
    folder: Path,
) -> Cost:
    """What looks and steps take; a recipe that the model cannot be trained by is an error."""
    from ..sample import off_target_tasks

    looks = []
    for lesson in lessons:
        others = off_target_tasks(lesson.task, off_target)
        sizes = [min(len(t), t.probe_size or OFF_TARGET_PROBE_SIZE) for t in others]
        own = min(len(lesson.task), lesson.task.probe_size or TASK_PROBE_SIZE)
        images = (len(LOOKS) + 2) * (own + sum(sizes)) + min(len(lesson.train), SAMPLE_SIZE)
        looks.append(images * lesson.seconds)
    first = lessons[0]
    steps = []
    for recipe in recipes:
        try:
            steps.append(seconds_of_a_step(subject, first.task, first.train, recipe, folder))
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise ValueError(
                f"`recipes` must be ways to train this model, got {recipe.name}, which fails "
                f"({type(error).__name__}: {error})"
            ) from error
    return Cost(looks, steps)


class _Keys:
    """What makes a run of a calibration: it is not done twice."""

    def __init__(
        self,
        model: str,
        lessons: Sequence[Lesson],
        recipes: Sequence[Recipe],
        off_target: Sequence[Task] | None,
        script: str | Path | None,
    ) -> None:
        guarded = None if off_target is None else [task.name for task in off_target]
        code = None if script is None else Path(script).read_text(encoding="utf-8")
        self._common = [model, guarded, code]
        self._lessons = [[one.task.name, one.fingerprint, len(one.train)] for one in lessons]
        self._recipes = [[r.method, dict(r.arguments), dict(r.peft)] for r in recipes] or [[]]

    def of(self, job: Job) -> str:
        """Of a run."""
        return _digest(
            [*self._common, self._lessons[job.task], self._recipes[job.recipe], job.steps]
        )

    def of_all(self) -> str:
        """Of the calibration."""
        return _digest([*self._common, self._lessons, self._recipes])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_plan(path: Path, key: str) -> list[Job] | None:
    """The runs that an earlier try planned; None where it had other settings."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["key"] != key:
            return None
        return [Job(**job) for job in saved["jobs"]]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _steps(recipes: Sequence[Recipe], position: int) -> int:
    return recipes[position].steps if recipes else 1


def _plan_in_words(
    jobs: Sequence[Job],
    to_do: Sequence[Job],
    lessons: Sequence[Lesson],
    names: Sequence[str],
    recipes: Sequence[Recipe],
    budget: float | None,
) -> str:
    n_all = len(lessons) * len(names)
    parts = [f"{len(jobs)} runs: {', '.join(names)} on {len(lessons)} tasks"]
    if len(jobs) < len(to_do) + 1 and len(jobs) < n_all:
        parts.append(f"{n_all - len(jobs)} more do not fit")
    steps = sorted({job.steps for job in jobs})
    asked = max((recipe.steps for recipe in recipes), default=1)
    if recipes:
        shorter = f", shorter than the {asked} asked for" if steps[-1] < asked else ""
        parts.append(f"{' or '.join(map(str, steps))} steps each{shorter}")
    if len(to_do) < len(jobs):
        parts.append(f"{len(jobs) - len(to_do)} of them done already")
    seconds = sum(job.seconds for job in to_do)
    if seconds:
        within = "" if budget is None else f" of {words(budget)} allowed"
        parts.append(f"about {words(seconds)}{within}")
    return f"Calibration: {'; '.join(parts)}."


def _result(title: str, o: Outcome) -> str:
    drop = "" if o.forgetting is None else f", forgetting {100 * o.forgetting:+.1f}"
    return f"{title}: gain {100 * o.gain:+.1f}{drop} points"


@contextmanager
def _bar(total: int, shown: bool, seconds: float) -> Iterator[Any]:
    about = f", about {words(seconds)}" if seconds else ""
    with tqdm(total=total, desc=f"calibrating{about}", unit="run", disable=not shown) as bar:
        yield bar
