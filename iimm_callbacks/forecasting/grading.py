"""Leave-one-task-out evaluation of forecast and guard on saved runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..guard.judging import judge
from ..guard.schedule import DEFAULT_SHARES
from ..measures.results import Drop, Forgetting
from ..records.forecast import QUANTITIES, Prediction
from ..records.outcomes import Outcome, at_the_last_step, one_of_each_run
from ..records.verdict import Limits
from .replay import Replay, replay_all

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
    replays = replay_all(new, runs)
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
    over = stopped_over = stopped_under = never_began = within = 0
    excess, gains, oracle_gains = [], [], []
    for r in replays:
        ends_over = getattr(r.outcome, quantity) > limit
        over += ends_over
        at = _stops_at(r, policy, limits, quantity)
        oracle_gains.append(r.looks[_stops_at(r, "oracle", limits, quantity)]["gain"])
        gains.append(r.looks[at]["gain"])
        if at == len(r.looks) - 1:
            continue
        stopped_over += ends_over
        stopped_under += not ends_over
        never_began += at == 0
        look = r.looks[at]
        above = look.get(quantity, 0.0) - limit
        excess.append(max(above, 0.0))
        within += above <= _TOLERANCE + _NOISE * look.get(f"{quantity}_se", 0.0)
    return GuardGrade(
        policy,
        limit,
        len(replays),
        over,
        stopped_over,
        stopped_under,
        never_began,
        within / len(excess) if excess else math.nan,
        float(np.mean(excess)) if excess else 0.0,
        float(np.mean(gains)),
        float(np.mean(oracle_gains)),
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
