"""`iimm plan`: which method, learning rate and number of steps gain most within the limit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from .loading import check_data, load_off_target, task_name_of
from .measuring import Measured, Subject, check_methods, check_rates, limits_of, measured, open_runs
from .outcomes import Store, store_to_write
from .shell import Answer, LimitOn, MaxForgetting, Names, OffTarget

if TYPE_CHECKING:
    from ..data.tasks import Task
    from ..records.outcomes import Outcome
    from ..records.verdict import Limits
    from ..trainer.calibration import learnt, runs
    from ..trainer.calibration.recipes import Recipe


def plan(
    subject: Subject,
    max_forgetting: MaxForgetting = 0.05,
    limit_on: LimitOn = "mean",
    risk: Annotated[float, Option(help="Probability of exceeding that a choice may have")] = 0.3,
    method: Annotated[Names, Option(help="Repeatable [default: on record]")] = None,
    learning_rate: Annotated[
        list[float] | None, Option(help="Repeatable [default: on record]")
    ] = None,
    steps: Annotated[
        list[int] | None, Option(help="Repeatable [default: on record]", min=1)
    ] = None,
    off_target: OffTarget = None,
    attempt: Annotated[
        bool, Option("--try", help="Run the choice, save it, answer again; needs --train")
    ] = False,
    store: Store = None,
) -> Answer:
    """Rank the recipes on record by gain within the limit.

    Recipes are those of MODEL's saved runs, or yours. Exit code 2: no choice.
    """
    if not 0 < risk < 1:
        raise ValueError(f"`--risk` must be a probability between 0 and 1, got {risk}")
    if attempt and subject.train is None:
        raise ValueError("`--try` needs `--train`, the training data, got none")
    limits = limits_of(max_forgetting, limit_on)
    check_rates(learning_rate or [])
    if attempt:
        from ..records.objects import check_writable
        from ..records.store import append_outcome

        check_writable(store_to_write(store))  # before what takes time
    subject.check_names()
    past = open_runs(subject.model, store)
    check_methods(method or (), past)
    check_data("--off-target", off_target)
    from ..reports import experiments
    from ..trainer.calibration import learnt

    found = measured(subject)
    model, guarded = found.about["model"], [task_name_of(name) for name in off_target or ()]
    record = past.relevant(model)
    keys = _keys(record, model, (method, learning_rate, steps))
    options = _options(found, record, keys, guarded)
    best = learnt.choice(options, limits, risk)
    tried = seconds = None
    if attempt and best is not None:
        tried = _run(found, best, load_off_target(off_target, subject.split))
        append_outcome(store_to_write(store), tried)
        record = [*record, tried]
        at = options.index(best)
        keys[at] = learnt.key_of(tried)  # of its rate and steps the run may know more
        options = _options(found, record, keys, guarded)
        options[at] = learnt.observed(options[at], tried)
        best = learnt.choice(options, limits, risk)
    if best is not None and not best.is_tried and subject.train is not None:
        seconds = _seconds(found, best, load_off_target(off_target, subject.split))
    ends = ("gain", "forgetting", "worst", "run")
    data = found.data | {
        "limits": asdict(limits),
        "risk": risk,
        "options": _rows(options, best, limits, risk, record, model),
        "choice": None if best is None else best.name,
        "tried": None if tried is None else {name: getattr(tried, name) for name in ends},
        "try_seconds": seconds,
    }
    return Answer(data, experiments.plan(data), 2 if best is None else 0)


def _keys(
    record: Sequence[Outcome],
    model: str,
    asked: tuple[Sequence[str] | None, Sequence[float] | None, Sequence[int] | None],
) -> list[learnt.Key]:
    """The recipes on record, those of them that were asked for, or what was asked for instead."""
    from ..trainer.calibration.learnt import recipes_on_record
    from ..trainer.calibration.recipes import METHODS

    wanted = list(recipes_on_record(record, model))
    wanted = wanted or [(method, None, None) for method in METHODS]
    for position, choices in enumerate(asked):
        if not choices:
            continue
        kept = [key for key in wanted if key[position] in choices]
        lacking = [value for value in choices if value not in [key[position] for key in kept]]
        others: list[Any] = [
            (*key[:position], value, *key[position + 1 :])
            for key, value in product(wanted, lacking)
        ]
        wanted = list(dict.fromkeys([*kept, *others]))
    return wanted


def _options(
    found: Measured,
    record: Sequence[Outcome],
    keys: Sequence[learnt.Key],
    off_target: Sequence[str],
) -> list[learnt.Option]:
    """Each recipe and its forecast."""
    from ..forecasting.forecaster import Forecaster
    from ..trainer.calibration import learnt

    known = learnt.recipes_on_record(record, found.about["model"])
    forecaster = Forecaster().fit(record)
    options = []
    for method, rate, steps in keys:
        named = {"learning_rate": rate, "steps": steps}
        recipe = {name: value for name, value in named.items() if value is not None}
        forecast = forecaster.predict(
            found.measurement, method=method, recipe=recipe, off_target=off_target, **found.about
        )
        n_tasks = len(known.get((method, rate, steps), ()))
        options.append(learnt.Option(method, recipe, n_tasks, forecast))
    return options


def _attempt(found: Measured, option: learnt.Option) -> tuple[runs.Subject, Task, Task, Recipe]:
    """An option on the task itself: model, task, training images and recipe."""
    from ..data.training import training_task
    from ..trainer.calibration import runs
    from ..trainer.calibration.recipes import Recipe

    named = {"max_steps" if k == "steps" else k: v for k, v in option.recipe.items()}
    subject = runs.Subject(found.model.cpu(), found.processor)
    train = training_task(found.train, found.task)
    return subject, found.task, train, Recipe(option.method, named)


def _seconds(found: Measured, option: learnt.Option, off_target: list[Task] | None) -> float:
    """What an option would take, from a few of its steps."""
    from ..data.tasks import TASK_PROBE_SIZE
    from ..trainer.calibration.runs import seconds_of_a_step, seconds_of_looks

    _, task, train, recipe = given = _attempt(found, option)
    with tempfile.TemporaryDirectory() as folder:
        step = seconds_of_a_step(*given, Path(folder))
    an_image = found.probe.seconds / min(len(task), task.probe_size or TASK_PROBE_SIZE)
    return recipe.steps * step + seconds_of_looks(task, train, off_target, an_image)


def _run(found: Measured, option: learnt.Option, off_target: list[Task] | None) -> Outcome:
    """An option's run under a guard that watches; not saved yet."""
    from ..trainer.calibration.runs import fine_tune

    subject, task, train, recipe = _attempt(found, option)
    with tempfile.TemporaryDirectory() as folder:
        return fine_tune(subject, task, train, off_target, recipe, recipe.steps, Path(folder))


def _rows(
    options: Sequence[learnt.Option],
    best: learnt.Option | None,
    limits: Limits,
    risk: float,
    record: Sequence[Outcome],
    model: str,
) -> list[dict[str, Any]]:
    """The options, ranked, as data."""
    from ..trainer.calibration.learnt import ranked, told_apart

    rows = []
    for option in ranked(options, limits, risk):
        allowed, alike = option.is_allowed(limits, risk), None
        if allowed and best is not None and option is not best:
            alike = not told_apart(best, option, record, model)
        rows.append({
            "name": option.name, "method": option.method, "recipe": dict(option.recipe),
            "n_tasks": option.n_tasks, "tried": option.is_tried,
            "exceed_probability": option.risk(limits), "allowed": allowed,
            "not_told_apart": alike, "forecast": option.forecast.to_json(),
        })  # fmt: skip
    return rows
