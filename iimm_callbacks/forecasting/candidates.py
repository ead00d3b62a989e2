"""Candidate predictors of a run's outcome, averaged by leave-one-task-out error.

Which predictor of gain or forgetting is best differs between models, methods and moments of a run,
and a record holds few tasks. So none is picked for good: each candidate is a small least-squares
fit, its error is measured on every task in turn with that task left out, and their predictions are
averaged with weights ``w_k ∝ 4^(-cost_k) · MAE_k^(-T/2)`` for T tasks: the root of the
leave-one-task-out likelihood under Laplace-distributed errors, times a prior that asks each slope
to earn its place. With ten tasks, one twice as wrong as another weighs 1/32 of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from .mixed_model import Floats
from .runs import MIN_TASKS
from .tabulate import Question, Table

# Prior strength of a method's (or model's) own offset, in tasks: that of a method seen on n tasks
# is shrunk to n/(n + 1) of itself. Partial pooling.
_POOLING = 1.0
# Set on simulated records of nine tasks: less is slow to use what explains, more runs after noise.
_SHARPNESS, _PENALTY = 0.5, float(np.log(4))
_SINGULAR = 1e8  # condition number
# One that knows other tasks and models, too, was better alone on 3 to 7 tasks of the sample and of
# another model, on 9 it was not: slopes that it is ahead for each task fewer than 8.
_FEW, _AHEAD = 8, 0.8


@dataclass(frozen=True)
class Candidate:
    """One way to predict: ``offset + times · (intercept + Σ slope · feature)``.

    Attributes:
        name: For people.
        features: Each gets a slope.
        offset: A feature that is taken as it is.
        times: A feature that multiplies the fit, e.g. the zero-shot error for a fit of gain over
            zero-shot error; ``None``: 1.
        intercept: Whether there is one.
        pooled: Fitted to the runs of all methods, each with an offset of its own that is pulled
            to zero, instead of to those of the method alone.
        credit: How many slopes it is ahead of the others by, for what it has shown elsewhere.
        learnt_elsewhere: Whether it knows other tasks and models, too: ahead on fewer than 8 tasks.
    """

    name: str
    features: tuple[str, ...] = ()
    offset: str | None = None
    times: str | None = None
    intercept: bool = True
    pooled: bool = False
    credit: float = 0.0
    learnt_elsewhere: bool = False


@dataclass(frozen=True)
class _Fit:
    candidate: Candidate
    methods: list[str]  # with an offset each
    models: list[str]
    coefficients: Floats  # [p]
    inverse: Floats  # [p, p], of the normal equations
    left_out: Floats  # [n] prediction of each scored row with its task left out
    leverage: float  # mean over the scored rows, their task left out

    def predict(self, question: Question) -> tuple[float, float]:
        """Prediction, and how much less sure it is than those the errors were measured on."""
        features = {k: np.array([v]) for k, v in question.features.items()}
        method, model = np.array([question.method]), np.array([question.model])
        row = _columns(self.candidate, features, method, model, self.methods, self.models)[0]
        offset = question.features[self.candidate.offset] if self.candidate.offset else 0.0
        leverage = float(row @ self.inverse @ row)
        widening = float(np.sqrt((1 + leverage) / (1 + self.leverage)))
        return float(offset + row @ self.coefficients), widening


@dataclass(frozen=True)
class Blend:
    """Candidates averaged by leave-one-task-out error.

    Attributes:
        weights: Candidate -> share of it in the prediction; they sum to 1.
        errors: Candidate -> mean absolute error with the task left out.
        error: That of the average.
        scale: Standard error of a prediction, from the same errors.
        dof: Degrees of freedom of `scale`.
        coverage: Share of the scored runs inside their 90 % interval, each interval from the
            errors on the other tasks.
        left_out: [n] the average's prediction of each run with its task left out; NaN for rows
            that were not scored.
        n_runs, n_tasks: That were scored.
    """

    weights: dict[Candidate, float]
    errors: dict[Candidate, float]
    error: float
    scale: float
    dof: float
    coverage: float
    left_out: Floats
    n_runs: int
    n_tasks: int
    _fits: list[_Fit] = field(repr=False)

    def predict(self, question: Question) -> tuple[float, float]:
        """The average's prediction, and the standard error of a new observation."""
        point = widening = 0.0
        for fit in self._fits:
            value, factor = fit.predict(question)
            point += self.weights[fit.candidate] * value
            widening += self.weights[fit.candidate] * factor
        return float(point), float(self.scale * widening)

    def slope(self, name: str) -> float:
        """How much the prediction moves with a feature that no candidate multiplies."""
        total = 0.0
        for fit in self._fits:
            c = fit.candidate
            own = 1.0 if c.offset == name else 0.0
            if name in c.features:
                own += fit.coefficients[int(c.intercept) + c.features.index(name)]
            total += self.weights[c] * own
        return total


def blend(
    table: Table, candidates: Sequence[Candidate], method: str, coverage: float
) -> Blend | None:
    """Fit all candidates for a method and average them.

    The errors are those on the method's own runs, where there are at least `MIN_TASKS` tasks of
    them; otherwise those on all runs, and only pooled candidates are fitted.

    Args:
        table: Saved runs.
        candidates: To choose from; those that cannot be fitted to the table are left out.
        method: That is asked about.
        coverage: Of the intervals whose past coverage is counted.

    Returns:
        The `Blend`; None where no candidate can be fitted.
    """
    scored = table.methods == method
    alone = len(np.unique(table.task_index[scored])) >= MIN_TASKS
    if not alone:
        scored = np.ones(len(table.tasks), dtype=bool)
    tasks = np.unique(table.task_index[scored])
    if len(tasks) < MIN_TASKS:
        return None
    fits = [
        fit
        for c in candidates
        if (alone or c.pooled or not (c.intercept or c.features))
        and (fit := _fit(table, c, method, scored)) is not None
    ]
    if not fits:
        return None
    inside = [np.flatnonzero(scored & (table.task_index == task)) for task in tasks]
    misses = np.array(  # [K, T] mean absolute error of each candidate on each task
        [[np.abs(table.target - f.left_out)[rows].mean() for rows in inside] for f in fits]
    )
    fitted = [f.candidate for f in fits]
    # Being fitted over another feature counts half a slope, as it is a choice too.
    slopes = np.array([len(c.features) + (0.5 if c.times else 0.0) for c in fitted])
    more = _AHEAD * max(_FEW - len(tasks), 0)
    costs = slopes - [c.credit + more * c.learnt_elsewhere for c in fitted]
    weights = _weights(misses, costs)  # [K]
    left_out = np.full(len(table.tasks), np.nan)
    for t, rows in enumerate(inside):
        blind = _weights(np.delete(misses, t, axis=1), costs)  # they have not seen the task either
        left_out[rows] = np.sum([w * f.left_out[rows] for w, f in zip(blind, fits, strict=True)], 0)
    residuals = [table.target[rows] - left_out[rows] for rows in inside]
    squares = np.array([np.mean(r**2) for r in residuals])  # [T]
    dof = max(len(tasks) - 1 - float(weights @ slopes), 1.0)
    reach = float(special.stdtrit(dof, (1 + coverage) / 2))
    others = [float(np.sqrt(np.delete(squares, t).mean())) for t in range(len(tasks))]
    held = [np.abs(r) <= reach * other for r, other in zip(residuals, others, strict=True)]
    return Blend(
        weights=dict(zip(fitted, weights.tolist(), strict=True)),
        errors=dict(zip(fitted, misses.mean(1).tolist(), strict=True)),
        error=float(np.mean([np.abs(r).mean() for r in residuals])),
        scale=float(np.sqrt(squares.mean())),
        dof=dof,
        coverage=float(np.concatenate(held).mean()),
        left_out=left_out,
        n_runs=int(scored.sum()),
        n_tasks=len(tasks),
        _fits=fits,
    )


def _weights(misses: Floats, slopes: Floats) -> Floats:
    """[K, T] errors -> [K] weights."""
    errors = misses.mean(1)
    floor = max(1e-3 * float(errors.max()), 1e-12)  # a perfect candidate is not infinitely good
    score = -_SHARPNESS * misses.shape[1] * np.log(np.maximum(errors, floor)) - _PENALTY * slopes
    shares = np.exp(score - score.max())
    return np.asarray(shares / shares.sum())


def _fit(table: Table, candidate: Candidate, method: str, scored: NDArray[np.bool_]) -> _Fit | None:
    """Least squares with a ridge on the offsets, once in all and once without each task.

    With ``A_t``, ``b_t`` the normal equations of task t alone, leaving it out solves
    ``(Σ A - A_t + Λ) β = Σ b - b_t``: no row is read twice.
    """
    if not {*candidate.features, candidate.offset, candidate.times} <= {None, *table.features}:
        return None
    rows, methods, models = table.methods == method, [], []
    if candidate.pooled:
        rows = np.ones(len(rows), bool)
        methods = sorted(set(table.methods.tolist()))
        models = sorted(set(table.models.tolist()))
        models = models if len(models) > 1 else []
        if len(methods) < 2 and not models:
            return None  # the same as without
    free = candidate.intercept or bool(candidate.features)
    n_tasks = len(np.unique(table.task_index[rows]))
    if free and n_tasks < MIN_TASKS + len(candidate.features):
        return None
    if any(np.ptp(table.features[name][rows]) < 1e-9 for name in candidate.features):
        return None
    x = _columns(candidate, table.features, table.methods, table.models, methods, models)  # [n, p]
    offset = table.features[candidate.offset] if candidate.offset else np.zeros(len(x))
    (n, p), task = x.shape, table.task_index
    t = int(task.max()) + 1
    share = np.zeros((t, n))  # a row's weight in its task
    share[task, np.arange(n)] = np.where(rows, table.weights, 0.0)
    gram = (share @ (x[:, :, None] * x[:, None, :]).reshape(n, p * p)).reshape(t, p, p)
    moment = share @ (x * (table.target - offset)[:, None])  # [T, p]
    offsets = len(methods) + len(models)
    size = float(np.mean(x[rows, 0] ** 2)) if p else 1.0
    ridge = np.diag([1e-9 * size] * (p - offsets) + [_POOLING * size] * offsets)
    whole = gram.sum(0) + ridge
    normal = np.concatenate([whole[None], whole - gram])  # of all tasks, then without each
    if p and np.linalg.cond(normal).max() > _SINGULAR:
        return None  # features that say the same, or vary in one task only: it would be made up
    inverse, without = np.linalg.inv(whole), np.linalg.inv(normal[1:])  # [p, p], [T, p, p]
    betas = (without @ (moment.sum(0) - moment)[:, :, None])[:, :, 0]  # [T, p]
    left_out = offset + (x * betas[task]).sum(1)
    leverage = (x * (without[task] @ x[:, :, None])[:, :, 0]).sum(1)
    return _Fit(
        candidate,
        methods,
        models,
        inverse @ moment.sum(0),
        inverse,
        np.where(scored, left_out, np.nan),
        float(np.average(leverage[scored], weights=table.weights[scored])),
    )


def _columns(
    candidate: Candidate,
    features: Mapping[str, Floats],
    methods: NDArray[np.str_],
    models: NDArray[np.str_],
    known_methods: Sequence[str],
    known_models: Sequence[str],
) -> Floats:
    """[n, p]: intercept, features, then one column per method and per model."""
    times = features[candidate.times] if candidate.times else np.ones(len(methods))
    columns = [times] if candidate.intercept else []
    columns += [times * features[name] for name in candidate.features]
    columns += [times * (methods == name) for name in known_methods]
    columns += [times * (models == name) for name in known_models]
    return np.stack(columns, axis=1) if columns else np.zeros((len(methods), 0))


MEAN = Candidate("mean")
ZERO_SHOT = Candidate("zero-shot error", ("zero_shot_error",))
# Quantity -> the pooled forecast as it is. What that of the gain rests on was learnt on other tasks
# and models too: ahead of what this record suggests.
_BY_ERROR = Candidate(
    "zero-shot error, pooled", offset="pooled", intercept=False, learnt_elsewhere=True
)
POOLED = {
    "gain": replace(_BY_ERROR, name="linear probe, pooled", credit=4.0),
    "forgetting": _BY_ERROR,
    "worst": _BY_ERROR,
}
RECIPE = ("log_learning_rate", "log_steps")


def before_training(quantity: str, features: Mapping[str, Floats]) -> list[Candidate]:
    """The candidates for the end of a run, from what is known before it, nested.

    Args:
        quantity: "gain", "forgetting" or "worst"; gain is fitted over zero-shot error too.
        features: Those of the table: the recipe's are used where they differ between runs.
    """
    over_error = "zero_shot_error" if quantity == "gain" else None  # the paper's target
    nested = [MEAN, ZERO_SHOT]
    if over_error:
        nested.append(Candidate("mean gain over zero-shot error", times=over_error))
    nested += [
        Candidate("IIMM", ("iimm",), times=over_error),
        Candidate("both terms of IIMM", ("inter", "intra"), times=over_error),
        Candidate("zero-shot error and IIMM", ("zero_shot_error", "iimm")),
        Candidate("other runs of the same task", ("same_task",)),
    ]
    if recipe := _varied_recipe(features):
        nested += [
            replace(c, name=f"{c.name} + recipe", features=(*c.features, *recipe)) for c in nested
        ]
    return [POOLED[quantity], *nested, *(replace(c, pooled=True) for c in nested)]


def during_training(features: Mapping[str, Floats]) -> list[Candidate]:
    """The candidates for the end of a run, from what was seen of it so far.

    The forecast before training enters as it is, without a slope: left-out forecasts of the saved
    runs are built from each other's ends (those of the plain mean exactly so), and a line on them
    would find that.
    """
    so_far = "what was seen so far"
    nested = [
        Candidate(f"{so_far} and the mean rest", offset="so_far"),
        Candidate(f"line on {so_far}", ("so_far",)),
    ]
    more = [
        (("zero_shot_error",), "zero-shot error"),
        (("iimm",), "IIMM"),
        (("probe_gain",), "linear probe"),
        (("gain_so_far",), "gain so far"),
        (("mean_so_far",), "mean forgetting so far"),
        (_varied_recipe(features), "recipe"),
    ]
    nested += [
        Candidate(f"line on {so_far} and {name}", ("so_far", *added))
        for added, name in more
        if added
    ]
    return [
        Candidate("forecast before training", offset="prior", intercept=False),
        Candidate(so_far, offset="so_far", intercept=False),
        *nested,
        *(replace(c, pooled=True) for c in nested),
    ]


def _varied_recipe(features: Mapping[str, Floats]) -> tuple[str, ...]:
    """The recipe's features that differ between the saved runs."""
    return tuple(n for n in RECIPE if n in features and np.ptp(features[n]) > 1e-9)
