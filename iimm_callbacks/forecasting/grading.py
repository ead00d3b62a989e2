"""Leave-one-task-out evaluation of forecast and guard on saved runs, told again look by look."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import stats
from tqdm.auto import tqdm

from ..guard.judging import judge
from ..guard.schedule import DEFAULT_SHARES
from ..measures.results import Drop, Forgetting
from ..records.forecast import QUANTITIES, Forecast, Prediction
from ..records.outcomes import Outcome, at_the_last_step, one_of_each_run
from ..records.verdict import Limits
from .runs import about, measured

if TYPE_CHECKING:
    from .forecaster import Forecaster

SHARES = (0.0, *DEFAULT_SHARES[:-1])
POLICIES = ("guard", "stop when observed exceeds", "always finish", "oracle")
# A stopped run may end this much over the limit, and its sampling noise (one-sided 95 %) beyond.
_TOLERANCE, _NOISE = 0.005, 1.645


@dataclass(frozen=True)
class ForecastGrade:
    """How good forecasts of one quantity were at one moment, over runs. Fractions.

    Attributes:
        quantity: ``"gain"``, ``"forgetting"`` (mean) or ``"worst"``.
        method: Of the runs; ``"all"`` for all of them.
        share: Of the steps that had been done; 0 is before training.
        n_runs: That were forecast.
        error: Mean absolute error of the forecast of the end.
        error_of_mean: That of the plain mean of the method's runs on other tasks.
        error_of_zero_shot: That of the method's least-squares line on zero-shot error.
        coverage: Share of the runs that ended inside their 90 % interval.
    """

    quantity: str
    method: str
    share: float
    n_runs: int
    error: float
    error_of_mean: float
    error_of_zero_shot: float
    coverage: float


@dataclass(frozen=True)
class GuardGrade:
    """What a policy did with the runs under one limit. Fractions.

    Attributes:
        policy: One of `POLICIES`.
        limit: On forgetting.
        n_runs: All runs.
        n_over: Runs that end over the limit if nothing stops them.
        stopped_of_over: How many of those were stopped.
        stopped_of_under: How many of the others were stopped, needlessly.
        never_began: How many of the stopped runs were so before their first step.
        kept_to_limit: Share of the stopped runs that were at most half a point and their sampling
            noise over the limit when stopped; NaN where none was stopped.
        over_by: Mean of what stopped runs were over the limit, 0 for those within.
        gain: Mean gain kept over all runs.
        gain_of_oracle: Mean gain that the oracle keeps, who knows each trajectory and stops at the
            last look within the limit.
    """

    policy: str
    limit: float
    n_runs: int
    n_over: int
    stopped_of_over: int
    stopped_of_under: int
    never_began: int
    kept_to_limit: float
    over_by: float
    gain: float
    gain_of_oracle: float


@dataclass(frozen=True)
class Grade:
    """The grades of forecast and guard.

    Attributes:
        forecasts: One row per quantity, method and moment.
        guard: One row per limit and policy.
        n_runs: Runs that were replayed.
        n_left_out: Runs that were not: incomplete, without looks, or on the only task.
    """

    forecasts: tuple[ForecastGrade, ...]
    guard: tuple[GuardGrade, ...]
    n_runs: int
    n_left_out: int

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data; NaN becomes None."""

        def plain(row: Any) -> dict[str, Any]:
            values = asdict(row).items()
            return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values}

        return {
            "forecasts": [plain(row) for row in self.forecasts],
            "guard": [plain(row) for row in self.guard],
            "n_runs": self.n_runs,
            "n_left_out": self.n_left_out,
        }


@dataclass(frozen=True)
class Replay:
    """A saved run, and what would have been forecast of it at each look.

    Attributes:
        outcome: The run.
        shares: Of the steps done at each look, the one before training first.
        looks: As `Outcome.trajectory`, at these shares.
        forecasts: At these shares, from runs on other tasks.
        plain: Quantity -> what the plain mean of the method's runs on other tasks says of it, and
            their line on zero-shot error.
    """

    outcome: Outcome
    shares: tuple[float, ...]
    looks: tuple[dict[str, float], ...]
    forecasts: tuple[Forecast, ...]
    plain: dict[str, tuple[float, float]]


def grade(
    new: Callable[[], Forecaster],
    outcomes: Iterable[Outcome],
    *,
    limits: Sequence[float] = (0.02, 0.03, 0.05),
    limit_on: Literal["mean", "worst"] = "mean",
    confidence: float = 0.8,
) -> Grade:
    """Leave-one-task-out evaluation on saved runs: each is forecast from runs on *other* tasks.

    Args:
        new: Makes the forecaster that is graded, unfitted.
        outcomes: Saved runs, with their trajectories.
        limits: Limits on forgetting to grade the guard at.
        limit_on: As `Limits`.
        confidence: As `Limits`.

    Returns:
        The `Grade`. It tells how the forecast did on these runs, not how it will do on a model or
        recipe that they have not seen.

    Raises:
        ValueError: No run can be replayed.
    """
    runs = [at_the_last_step(outcome) for outcome in one_of_each_run(outcomes)]
    replays = _replay_all(new, runs)
    if not replays:
        raise ValueError(
            "`outcomes` must hold complete runs with looks on at least 2 tasks, got "
            f"{len(runs)} runs of {len({o.task for o in runs})} tasks; save more runs"
        )
    methods = ["all", *sorted({r.outcome.method for r in replays})]
    forecasts = [
        row
        for quantity in QUANTITIES
        for method in methods
        for share in SHARES
        if (row := _grade_forecast(replays, quantity, method, share)) is not None
    ]
    quantity = "forgetting" if limit_on == "mean" else "worst"
    guarded = [
        r
        for r in replays
        if r.outcome.off_target_before and all(quantity in look for look in r.looks[1:])
    ]
    guard = [
        _grade_policy(guarded, policy, Limits(limit, limit_on, confidence))
        for limit in limits
        for policy in POLICIES
        if guarded
    ]
    return Grade(tuple(forecasts), tuple(guard), len(replays), len(runs) - len(replays))


def _replay_all(new: Callable[[], Forecaster], runs: Sequence[Outcome]) -> list[Replay]:
    """Each complete run with looks, forecast look by look from the runs on other tasks."""
    replays = []
    forecasters: dict[str, Forecaster] = {}
    for o in tqdm(runs, desc="replaying", unit="run", disable=None, leave=False, delay=2):
        if o.complete and o.trajectory:
            others = [other for other in runs if other.task != o.task]
            if o.task not in forecasters:
                forecasters[o.task] = new().fit(others, base_rates=False)
            replays.append(replay_one(o, forecasters[o.task], others))
    return [replay for replay in replays if replay is not None]


def replay_one(o: Outcome, forecaster: Forecaster, others: Sequence[Outcome]) -> Replay | None:
    """A run, forecast look by look; None where nothing is known.

    Args:
        o: A complete run with looks.
        forecaster: Fitted to runs without it.
        others: Runs that the plain mean and the line on zero-shot error are of.
    """
    looks = sorted(o.trajectory, key=lambda look: look["share"])
    looks = [{"share": 0.0, "gain": 0.0}] * (looks[0]["share"] > 0) + looks
    shares = [look["share"] for look in looks]
    coming = [*shares[1:], None]
    prior = forecaster.predict(measured(o), **about(o), next_share=coming[0])
    if not prior.n_outcomes:
        return None
    forecasts = [prior]
    for look, next_share in zip(looks[1:], coming[1:], strict=True):
        seen = {q: (look[q], look.get(f"{q}_se", 0.0)) for q in QUANTITIES if q in look}
        drops: Any = look.get("drops")
        forecasts.append(
            forecaster.update(
                prior, share=look["share"], seen=seen, next_share=next_share, drops=drops
            )
        )
    plain = {q: _plain(o, q, others) for q in QUANTITIES}
    return Replay(o, tuple(shares), tuple(looks), tuple(forecasts), plain)


def _plain(o: Outcome, quantity: str, others: Sequence[Outcome]) -> tuple[float, float]:
    """Plain mean of the method's other runs, and their line on zero-shot error."""
    rows = [
        (1 - other.zero_shot_accuracy, getattr(other, quantity))
        for other in others
        if (other.model_fingerprint, other.method) == (o.model_fingerprint, o.method)
        and other.complete
        and getattr(other, quantity) is not None
    ]
    mean = float(np.mean([y for _, y in rows])) if rows else math.nan
    if len(rows) < 2 or np.ptp([x for x, _ in rows]) == 0:
        return mean, math.nan
    line = stats.linregress(*zip(*rows, strict=True))
    return mean, float(line.intercept + line.slope * (1 - o.zero_shot_accuracy))


def _grade_forecast(
    replays: Sequence[Replay], quantity: str, method: str, share: float
) -> ForecastGrade | None:
    rows = []
    for r in replays:
        if method not in ("all", r.outcome.method):
            continue
        near = [i for i, s in enumerate(r.shares) if abs(s - share) < 0.01]
        prediction: Prediction | None = getattr(r.forecasts[near[0]], quantity) if near else None
        end = getattr(r.outcome, quantity)
        if prediction is None or end is None:
            continue
        mean, line = r.plain[quantity]
        if math.isnan(mean):
            continue  # nothing to compare with: its method has saved runs on one task only
        rows.append(
            (
                abs(prediction.point - end),
                abs(mean - end),
                abs(line - end),
                float(prediction.low <= end <= prediction.high),
            )
        )
    if not rows:
        return None
    error, of_mean, of_line, coverage = (np.array(column) for column in zip(*rows, strict=True))
    lines = of_line[np.isfinite(of_line)]  # none where all began alike
    return ForecastGrade(
        quantity,
        method,
        share,
        len(rows),
        float(error.mean()),
        float(of_mean.mean()),
        float(lines.mean()) if len(lines) else math.nan,
        float(coverage.mean()),
    )


def _grade_policy(replays: Sequence[Replay], policy: str, limits: Limits) -> GuardGrade:
    quantity = "forgetting" if limits.limit_on == "mean" else "worst"
    limit = limits.max_forgetting
    assert limit is not None
    ends_over = [getattr(r.outcome, quantity) > limit for r in replays]
    ends = [_stops_at(r, policy, limits, quantity) for r in replays]
    best = [_stops_at(r, "oracle", limits, quantity) for r in replays]
    stopped = [i for i, r in enumerate(replays) if ends[i] < len(r.looks) - 1]
    over = sum(ends_over[i] for i in stopped)
    looks = [replays[i].looks[ends[i]] for i in stopped]
    above = [look.get(quantity, 0.0) - limit for look in looks]
    noise = [_NOISE * look.get(f"{quantity}_se", 0.0) for look in looks]
    within = sum(a <= _TOLERANCE + n for a, n in zip(above, noise, strict=True))
    return GuardGrade(
        policy,
        limit,
        len(replays),
        sum(ends_over),
        over,
        len(stopped) - over,
        sum(ends[i] == 0 for i in stopped),
        within / len(stopped) if stopped else math.nan,
        float(np.mean(np.maximum(above, 0.0))) if stopped else 0.0,
        float(np.mean([r.looks[i]["gain"] for r, i in zip(replays, ends, strict=True)])),
        float(np.mean([r.looks[i]["gain"] for r, i in zip(replays, best, strict=True)])),
    )


def _stops_at(r: Replay, policy: str, limits: Limits, quantity: str) -> int:
    """The look at which the run is stopped; the last one, where it is not."""
    last = len(r.looks) - 1
    values = [look.get(quantity, 0.0) for look in r.looks]
    if policy == "always finish":
        return last
    assert limits.max_forgetting is not None
    if policy == "oracle":
        inside = [i for i, value in enumerate(values) if value <= limits.max_forgetting]
        return max(inside, default=0)
    for i in range(last):
        if policy == "guard":
            stop = judge(r.forecasts[i], _observed(r.looks[i]), limits).level == "stop"
        else:
            stop = values[i] > limits.max_forgetting
        if stop:
            return i
    return last


def _observed(look: dict[str, float]) -> Forgetting | None:
    if "forgetting" not in look or look["share"] == 0:
        return None
    mean = Drop(look["forgetting"], look.get("forgetting_se", 0.0))
    worst = Drop(look["worst"], look.get("worst_se", 0.0)) if "worst" in look else mean
    return Forgetting({"worst": worst}, mean, "worst")
