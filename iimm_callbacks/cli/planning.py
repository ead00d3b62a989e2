"""`iimm plan`: which method, learning rate and number of steps gain most within the limit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .calibrating import off_target_of
from .loading import check_name, task_name_of
from .measuring import (
    Measured,
    Subject,
    check_methods,
    check_names,
    check_rates,
    limits_of,
    measure,
    open_runs,
)
from .outcomes import Store, store_to_write
from .shell import Answer, LimitOn

if TYPE_CHECKING:
    from ..data.tasks import Task
    from ..records.outcomes import Outcome
    from ..records.verdict import Limits
    from ..trainer.calibration import runs
    from ..trainer.calibration.options import Option
    from ..trainer.calibration.recipes import Recipe


_Key = tuple[str, float | None, int | None]  # method, learning rate, steps


def plan(
    subject: Subject,
    max_forgetting: Annotated[float, typer.Option(help="Limit, a fraction")] = 0.05,
    limit_on: LimitOn = "mean",
    risk: Annotated[
        float, typer.Option(help="Probability of exceeding that a choice may have")
    ] = 0.3,
    method: Annotated[
        list[str] | None, typer.Option(help="Repeatable [default: on record]")
    ] = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="Repeatable [default: on record]")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Repeatable [default: on record]", min=1)
    ] = None,
    off_target: Annotated[
        list[str] | None,
        typer.Option(help="Not to forget, as DATASET; repeatable [default: shipped tasks]"),
    ] = None,
    attempt: Annotated[
        bool, typer.Option("--try", help="Run the choice, save it, answer again; needs --train")
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
    limits = limits_of(max_forgetting, limit_on, 0.8)
    check_rates(learning_rate or [])
    if attempt:
        from ..records.objects import check_writable

        check_writable(store_to_write(store))  # before what takes time
    check_names(subject)
    past = open_runs(subject.model, store)
    check_methods(method or (), past)
    for name in off_target or ():
        check_name(name, "--off-target", is_model=False)
    from ..reports import calibrated
    from ..trainer.calibration.options import choice, observed

    found = measure(subject)
    record = past.relevant(found.about["model"])
    asked = (method, learning_rate, steps)
    guarded = [task_name_of(name) for name in off_target or ()]
    keys = _keys(record, found.about["model"], asked)
    options = _options(found, record, keys, guarded)
    best = choice(options, limits, risk)
    tried = None
    if attempt and best is not None:
        tried = _Attempt.of(found, best).run(off_target_of(off_target, subject.split), store)
        record = [*record, tried]
        at = options.index(best)  # of its rate and steps the run may know more
        keys[at] = tried.method, tried.recipe.get("learning_rate"), tried.recipe.get("steps")
        options = _options(found, record, keys, guarded)
        options[at] = observed(options[at], tried)
        best = choice(options, limits, risk)
    data = found.data | _as_data(options, best, limits, risk, record, found.about["model"])
    data["tried"] = None if tried is None else {
        name: getattr(tried, name) for name in ("gain", "forgetting", "worst", "run")
    }  # fmt: skip
    data["try_seconds"] = None
    if best is not None and not best.is_tried and subject.train is not None:
        kept = off_target_of(off_target, subject.split)
        data["try_seconds"] = _Attempt.of(found, best).seconds(found, kept)
    return Answer(data, calibrated.plan(data), 2 if best is None else 0)


def _keys(
    record: Sequence[Outcome],
    model: str,
    asked: tuple[Sequence[str] | None, Sequence[float] | None, Sequence[int] | None],
) -> list[_Key]:
    """The recipes on record, those of them that were asked for, or what was asked for instead."""
    from ..trainer.calibration.options import recipes_on_record
    from ..trainer.calibration.recipes import METHODS

    wanted: list[_Key] = list(recipes_on_record(record, model))
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
    found: Measured, record: Sequence[Outcome], keys: Sequence[_Key], off_target: Sequence[str]
) -> list[Option]:
    """Each recipe and its forecast."""
    from ..forecasting.forecaster import Forecaster
    from ..trainer.calibration.options import Option, recipes_on_record

    known = recipes_on_record(record, found.about["model"])
    forecaster = Forecaster().fit(record)
    options = []
    for key in keys:
        named = dict(zip(("learning_rate", "steps"), key[1:], strict=True))
        recipe = {name: value for name, value in named.items() if value is not None}
        forecast = forecaster.predict(
            found.measurement, method=key[0], recipe=recipe, off_target=off_target, **found.about
        )
        options.append(Option(key[0], recipe, len(known.get(key, ())), forecast))
    return options


@dataclass(frozen=True)
class _Attempt:
    """An option on the task itself: what `runs.fine_tune` is given of it."""

    subject: runs.Subject
    task: Task
    train: Task
    recipe: Recipe

    @classmethod
    def of(cls, found: Measured, option: Option) -> _Attempt:
        from ..data.training import training_task
        from ..trainer.calibration import runs
        from ..trainer.calibration.recipes import Recipe

        opened, named = found.opened, dict(option.recipe)
        steps = named.pop("steps", None)
        recipe = Recipe(option.method, named | ({} if steps is None else {"max_steps": steps}))
        model = runs.Subject(opened.model.cpu(), opened.processor)
        return cls(model, opened.task, training_task(opened.train, opened.task), recipe)

    def seconds(self, found: Measured, off_target: list[Task] | None) -> float:
        """What it would take, from a few of its steps."""
        from ..data.tasks import TASK_PROBE_SIZE
        from ..trainer.calibration.lessons import seconds_of_looks
        from ..trainer.calibration.runs import seconds_of_a_step

        with tempfile.TemporaryDirectory() as folder:
            given = (self.subject, self.task, self.train, self.recipe, Path(folder))
            step = seconds_of_a_step(*given)
        probe = found.opened.probe
        an_image = probe.seconds / min(len(self.task), self.task.probe_size or TASK_PROBE_SIZE)
        looks = seconds_of_looks(self.task, self.train, off_target, an_image)
        return self.recipe.steps * step + looks

    def run(self, off_target: list[Task] | None, store: str | None) -> Outcome:
        """The run under a guard that watches, saved."""
        from ..records.store import append_outcome
        from ..trainer.calibration.runs import fine_tune

        with tempfile.TemporaryDirectory() as folder:
            outcome = fine_tune(
                self.subject, self.task, self.train, off_target, self.recipe, self.recipe.steps,
                Path(folder),
            )  # fmt: skip
        append_outcome(store_to_write(store), outcome)
        return outcome


def _as_data(
    options: Sequence[Option],
    best: Option | None,
    limits: Limits,
    risk: float,
    record: Sequence[Outcome],
    model: str,
) -> dict[str, Any]:
    from ..trainer.calibration.options import ranked, told_apart

    rows = []
    for option in ranked(options, limits, risk):
        own = option.risk(limits)
        allowed = own is not None and own <= risk and option.forecast.gain is not None
        alike = None
        if allowed and best is not None and option is not best:
            alike = not told_apart(best, option, record, model)
        rows.append({
            "name": option.name, "method": option.method, "recipe": dict(option.recipe),
            "n_tasks": option.n_tasks, "tried": option.is_tried, "exceed_probability": own,
            "allowed": allowed, "not_told_apart": alike, "forecast": option.forecast.to_json(),
        })  # fmt: skip
    return {
        "limits": asdict(limits),
        "risk": risk,
        "options": rows,
        "choice": None if best is None else best.name,
    }
