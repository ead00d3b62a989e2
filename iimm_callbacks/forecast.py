"""Measurement + method + outcomes on record (+ what was seen so far) -> forecast with intervals.

No coefficients of the paper are published, so every forecast is fitted on recorded outcomes, and
says which, how many, by which predictors and with which error. Without any it is absent, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .accuracy import NEAR_CEILING
from .candidates import Blend, Candidate, Table, blend
from .measure import Measurement
from .outcomes import Outcome
from .records import QUANTITIES, Ask, Run, Runs, beyond, choose, tabulate

if TYPE_CHECKING:
    from .grading import Grade

COVERAGE = 0.9
# Without runs on record, what was lost so far says something of the end from here on.
_FROM_SHARE = 0.2

_MEAN = Candidate("mean")
_ZERO_SHOT = Candidate("zero-shot error", ("zero_shot_error",))
_OVER_ERROR = {"gain": "zero_shot_error"}  # the paper's target; forgetting is taken as it is
_RECIPE = ("log_learning_rate", "log_steps")


@dataclass(frozen=True)
class Prediction:
    """A predicted quantity: ``point + scale · t(dof)``, Student-t distributed.

    Attributes:
        point: The most likely value, a fraction.
        scale: Standard error of a new observation, a fraction.
        dof: Degrees of freedom, ≥ 1; infinite for a normal distribution.
    """

    point: float
    scale: float
    dof: float

    @property
    def low(self) -> float:
        """Lower end of the 90 % prediction interval."""
        return self.point - self._half_width

    @property
    def high(self) -> float:
        """Upper end of the 90 % prediction interval."""
        return self.point + self._half_width

    def probability_above(self, limit: float) -> float:
        """Probability that the value ends above `limit`, in [0, 1]."""
        if self.scale == 0:
            return float(self.point > limit)
        return float(stats.t.sf((limit - self.point) / self.scale, self.dof))

    @property
    def _half_width(self) -> float:
        return float(stats.t.ppf((1 + COVERAGE) / 2, self.dof)) * self.scale


@dataclass(frozen=True)
class Evidence:
    """What the forecast of one quantity rests on, and how good it was on the runs on record.

    Attributes:
        predictors: Name -> share of it in the forecast; they sum to 1.
        n_runs, n_tasks: That its errors were measured on.
        error: Its mean absolute error on them, the task left out, a fraction.
        error_of_mean: That of the plain mean of the method's runs.
        error_of_zero_shot: That of a line on the zero-shot error.
        coverage: Share of them inside their 90 % interval.
    """

    predictors: dict[str, float]
    n_runs: int
    n_tasks: int
    error: float
    error_of_mean: float | None
    error_of_zero_shot: float | None
    coverage: float


@dataclass(frozen=True)
class Forecast:
    """What fine-tuning is expected to do, and what that expectation rests on.

    Attributes:
        gain: Final gain on the task; ``None`` where nothing can be said.
        forgetting: Final mean forgetting over the off-target tasks; ``None`` likewise.
        worst: Final forgetting of the worst off-target task; ``None`` likewise.
        basis: In words: the outcomes it rests on, or why it is absent.
        n_outcomes: Number of outcomes it rests on.
        evidence: "gain", "forgetting", "worst" -> `Evidence`, where there is one.
        notes: What the reader should know: out of range, contradictions on record.
        base_rate: Whether it rests on published figures of other models only. It is then shown
            under that name, neither logged nor judged.
        next_look: "forgetting", "worst" -> `Prediction` for the next look, where that is known.
    """

    gain: Prediction | None
    forgetting: Prediction | None
    worst: Prediction | None
    basis: str
    n_outcomes: int = 0
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base_rate: bool = False
    next_look: Mapping[str, Prediction] = field(default_factory=dict)
    _asked: tuple[Ask, Runs] | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data: points and intervals in fractions, and all it rests on."""
        predictions = {q: p for q in QUANTITIES if (p := getattr(self, q)) is not None}
        return {
            **{q: {"point": p.point, "low": p.low, "high": p.high} for q, p in predictions.items()},
            "basis": self.basis,
            "n_outcomes": self.n_outcomes,
            "evidence": {name: asdict(found) for name, found in self.evidence.items()},
            "notes": list(self.notes),
            "base_rate": self.base_rate,
        }


class Forecaster:
    """Learns from outcomes on record how runs end, and says how well it does.

    Before training the candidates are the plain mean of the method, zero-shot error, IIMM (on gain
    over zero-shot error, the target of arXiv 2407.15731), its two terms, what other methods did on
    the same task, and recipe; during training also what was gained or lost so far, as it is, with
    the mean rest, and on lines learned from past trajectories. They are averaged by what each has
    earned on tasks left out (see `candidates`), so a predictor that explains nothing has next to no
    say. Never an extrapolation in steps. Methods are pooled, and models where the model has runs on
    fewer than 3 tasks; without any, published base rates stand in, labelled as such.

    It is *not* valid for recipes unlike the recorded ones: outside their range of learning rate,
    steps or IIMM it says so, widens, and abstains when far out.

    Example:
        >>> none = Forecaster().fit([], base_rates=False)
        >>> none.predict(Measurement(0.4, 0.2, 0.6, 0.01, 512, 10),
        ...     method="full", zero_shot_accuracy=0.3, model="1f").basis
        'no forecast: no complete run of this model is on record'
    """

    def __init__(self) -> None:
        self._record: list[Run] = []
        self._base_rates: list[Run] = []
        self._blends: dict[Any, Blend | None] = {}
        self._priors: dict[Any, dict[Run, float]] = {}

    def fit(self, outcomes: Iterable[Outcome], *, base_rates: bool = True) -> Forecaster:
        """Take these outcomes as the record. Interrupted and stopped runs are left out.

        Args:
            outcomes: Outcomes of any models and methods.
            base_rates: Whether published figures may stand in where they are of no use.

        Returns:
            Itself.
        """
        self._record = [Run(outcome) for outcome in outcomes if outcome.complete]
        self._base_rates = _load_base_rates() if base_rates else []
        self._blends, self._priors = {}, {}
        return self

    def predict(
        self,
        measurement: Measurement,
        *,
        method: str,
        zero_shot_accuracy: float,
        model: str | None = None,
        task: str = "",
        task_fingerprint: str = "",
        recipe: Mapping[str, Any] | None = None,
        off_target: Sequence[str] = (),
        next_share: float | None = None,
    ) -> Forecast:
        """The forecast before training.

        Args:
            measurement: IIMM of the task, untouched model.
            method: Fine-tuning method of the run.
            zero_shot_accuracy: On the task, a fraction.
            model: `model_fingerprint` of the model; ``None`` where all outcomes are of one model.
            task: Name of the task; where given, past runs on the same task are made use of.
            task_fingerprint: As `Outcome.task_fingerprint`; the same task has the same one.
            recipe: As `Outcome.recipe`; its ``learning_rate`` and ``steps`` are made use of.
            off_target: Names of the off-target tasks: runs with the same ones are preferred.
            next_share: Share of the steps at which the next look is due, if known.

        Returns:
            A `Forecast`; absent, with the reason, where there is nothing to go by.

        Raises:
            ValueError: `model` is None and the outcomes are of several models.
        """
        models = {run.outcome.model_fingerprint for run in self._record}
        if model is None:
            if len(models) > 1:
                raise ValueError(
                    f"`model` must be given: the outcomes are of {len(models)} models, and IIMM "
                    "does not compare across models; pass `model_fingerprint(model)`"
                )
            model = next(iter(models), "")
        m = measurement
        ask = Ask(
            method, model, zero_shot_accuracy, m.iimm, m.inter, m.intra, m.n_images,
            task, task_fingerprint, recipe or {}, tuple(off_target),
        )  # fmt: skip
        runs = choose(self._record, self._base_rates, ask)
        notes = list(runs.notes)
        predictions: dict[str, Prediction | None] = dict.fromkeys(QUANTITIES)
        evidence = {}
        for quantity in QUANTITIES:
            found = self._before(runs, ask, quantity, 1.0)
            if found is None:
                continue
            prediction, evidence[quantity], words = found
            notes += [word for word in words if word not in notes]
            predictions[quantity] = prediction
        if zero_shot_accuracy > NEAR_CEILING and runs.rows:
            predictions["gain"] = None
            evidence.pop("gain", None)
            notes.append(
                f"no gain is forecast: zero-shot accuracy {zero_shot_accuracy:.2f} is near 1"
            )
        basis = runs.label
        if runs.rows and not any(predictions.values()):
            basis = f"no forecast: {'; '.join(notes) or 'the runs on record do not allow one'}"
        return Forecast(
            predictions["gain"],
            predictions["forgetting"],
            predictions["worst"],
            basis,
            len(runs.rows),
            evidence,
            tuple(notes),
            runs.base_rate,
            self._next_look(runs, ask, next_share),
            (ask, runs),
        )

    def update(
        self,
        forecast: Forecast,
        *,
        share: float,
        seen: Mapping[str, tuple[float, float]],
        next_share: float | None = None,
    ) -> Forecast:
        """The forecast during training, from what has been observed so far.

        Args:
            forecast: What `predict` of this forecaster gave before training.
            share: Share of the training steps done, in (0, 1].
            seen: ``"gain"``, ``"forgetting"``, ``"worst"`` -> observed value and its standard
                error, fractions.
            next_share: Share of the steps at which the next look is due, if known.

        Returns:
            A new `Forecast`. At the last step it equals what is observed.

        Raises:
            ValueError: `forecast` is not one that `predict` gave.
        """
        if forecast._asked is None:
            raise ValueError("`forecast` must be what `predict` gave; this one was made otherwise")
        ask, runs = forecast._asked
        recorded = bool(runs.rows) and not runs.base_rate
        if share >= 1:
            names = [name for name in seen if recorded or name != "gain"]
            last: dict[str, Any] = {name: Prediction(*seen[name], math.inf) for name in names}
            if not last:
                return forecast
            return replace(
                forecast, **last, basis="what is observed", base_rate=False, next_look={}
            )
        if not recorded:
            return _without_record(forecast, share, seen, next_share)
        updated: dict[str, Any] = {}
        evidence = dict(forecast.evidence)
        next_look = {}
        for name in seen:
            prior = getattr(forecast, name)
            found = self._during(runs, ask, name, share, 1.0, seen, prior)
            if found is not None:
                updated[name], evidence[name] = found
            if next_share is not None and name != "gain":
                coming = self._during(runs, ask, name, share, next_share, seen, prior)
                if coming is not None:
                    next_look[name] = coming[0]
        basis = forecast.basis
        if updated:
            basis = f"{basis}; {' and '.join(updated)} at {share:.0%} of the steps"
        return replace(forecast, **updated, basis=basis, evidence=evidence, next_look=next_look)

    def grade(self, outcomes: Iterable[Outcome], **settings: Any) -> Grade:
        """Replay recorded runs as if live, their task left out: see `grading.grade`."""
        from .grading import grade

        return grade(outcomes, **settings)

    def _next_look(self, runs: Runs, ask: Ask, next_share: float | None) -> dict[str, Prediction]:
        if next_share is None or runs.base_rate:
            return {}
        found = {q: self._before(runs, ask, q, next_share) for q in ("forgetting", "worst")}
        return {name: prediction[0] for name, prediction in found.items() if prediction}

    def _before(
        self, runs: Runs, ask: Ask, quantity: str, share: float
    ) -> tuple[Prediction, Evidence, list[str]] | None:
        if not runs.rows:
            return None
        table, question, rows = tabulate(runs, ask, quantity, share)
        candidates = _candidates_before(quantity, table.features)
        fitted = self._blend(table, candidates, ask.method)
        if fitted is None:
            return None
        point, scale = fitted.predict(question)
        widening, words = beyond(table, question)
        if math.isinf(widening):
            return None
        if ask.method not in table.methods:
            means = [table.target[table.methods == m].mean() for m in set(table.methods)]
            # Its errors are those of other methods, so they are a guess: twice as wide.
            scale = 2 * math.hypot(scale, float(np.std(means)))
        if scale < 1e-9 and np.ptp(table.target) < 1e-9:
            scale = 0.5 / math.sqrt(ask.n_images)
            words.append(f"all {len(rows)} runs ended with the same {quantity}")
        if quantity == "gain":
            point = min(max(point, -ask.zero_shot_accuracy), 1 - ask.zero_shot_accuracy)
        return Prediction(point, scale * widening, fitted.dof), _evidence(fitted), words

    def _during(
        self,
        runs: Runs,
        ask: Ask,
        quantity: str,
        share: float,
        target_share: float,
        seen: Mapping[str, tuple[float, float]],
        prior: Prediction | None,
    ) -> tuple[Prediction, Evidence] | None:
        followed = [run for run in runs.rows if run.at(quantity, share) is not None]
        table, question, rows = tabulate(replace(runs, rows=followed), ask, quantity, target_share)
        if not rows:
            return None
        value, error = seen[quantity]
        so_far = np.array([run.at(quantity, share) for run in rows], dtype=float)
        features = {**table.features, "so_far": so_far}
        asked = {**question.features, "so_far": value}
        for other, name in (("gain", "gain_so_far"), ("forgetting", "mean_so_far")):
            if other != quantity and other in seen:
                features[name] = np.array([run.at(other, share) for run in rows], dtype=float)
                asked[name] = seen[other][0]
        if prior is not None:
            priors = self._left_out(runs, ask, quantity, rows)
            if priors is not None:
                features["prior"], asked["prior"] = priors, prior.point
        table = replace(table, features=features)
        question = replace(question, features=asked)
        fitted = self._blend(table, _candidates_during(features), ask.method)
        if fitted is None:
            return None
        point, scale = fitted.predict(question)
        # The scatter about the lines holds the sampling noise of the runs on record; what this
        # run's looks have beyond it comes on top.
        noises = [noise for run in rows if (noise := run.noise_at(quantity, share)) is not None]
        usual = float(np.mean(np.square(noises))) if noises else error**2
        excess = max(error**2 - usual, 0.0)
        scale = math.sqrt(scale**2 + fitted.slope("so_far") ** 2 * excess)
        return Prediction(point, scale, fitted.dof), _evidence(fitted)

    def _left_out(
        self, runs: Runs, ask: Ask, quantity: str, rows: list[Run]
    ) -> NDArray[np.float64] | None:
        """[n] forecast before training of each run on record, its own task left out."""
        values = [
            self._left_out_of(runs, ask, quantity, m) for m in {r.outcome.method for r in rows}
        ]
        found = {run: value for of_method in values for run, value in of_method.items()}
        known = np.array([found.get(run, math.nan) for run in rows])
        return None if np.isnan(known).any() else known

    def _left_out_of(self, runs: Runs, ask: Ask, quantity: str, method: str) -> dict[Run, float]:
        """Run of a method -> its forecast; the same for all questions that know as much."""
        known = tuple(bool(ask.recipe.get(name)) for name in ("learning_rate", "steps"))
        key = (ask.model, ask.task, ask.task_fingerprint, ask.off_target, known, quantity, method)
        if key not in self._priors:
            table, _, rows = tabulate(runs, replace(ask, method=method), quantity, 1.0)
            candidates = _candidates_before(quantity, table.features)
            fitted = self._blend(table, candidates, method)
            own = np.flatnonzero(table.methods == method)
            self._priors[key] = {rows[i]: float(fitted.left_out[i]) for i in own} if fitted else {}
        return self._priors[key]

    def _blend(self, table: Table, candidates: Sequence[Candidate], method: str) -> Blend | None:
        """`blend`, once for the same table: the looks of many runs ask the same."""
        key = (method, tuple(candidates), *table.content())
        if key not in self._blends:
            self._blends[key] = blend(table, candidates, method, COVERAGE)
        return self._blends[key]


def _candidates_before(quantity: str, features: Mapping[str, Any]) -> list[Candidate]:
    over_error = _OVER_ERROR.get(quantity)
    nested = [_MEAN, _ZERO_SHOT]
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
            replace(c, name=f"{c.name}, recipe", features=(*c.features, *recipe)) for c in nested
        ]
    return nested + [replace(c, pooled=True) for c in nested]


def _candidates_during(features: Mapping[str, Any]) -> list[Candidate]:
    """The forecast before training enters as it is, without a slope.

    Left-out forecasts of the runs on record are built from each other's ends (those of the plain
    mean exactly so), and a line on them would find that.
    """
    so_far = "what was seen so far"
    nested = [
        Candidate(f"{so_far} and the mean rest", offset="so_far"),
        Candidate(f"line on {so_far}", ("so_far",)),
    ]
    more = [
        (("zero_shot_error",), "zero-shot error"),
        (("iimm",), "IIMM"),
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


def _varied_recipe(features: Mapping[str, Any]) -> tuple[str, ...]:
    """The recipe's features that differ between the runs on record."""
    return tuple(n for n in _RECIPE if n in features and np.ptp(features[n]) > 1e-9)


def _evidence(fitted: Blend) -> Evidence:
    shares: dict[str, float] = {}
    for candidate, weight in fitted.weights.items():
        shares[candidate.name] = shares.get(candidate.name, 0.0) + weight
    ranked = dict(sorted(shares.items(), key=lambda item: -item[1]))
    errors = fitted.errors
    return Evidence(
        ranked,
        fitted.n_runs,
        fitted.n_tasks,
        fitted.error,
        errors.get(_MEAN, errors.get(replace(_MEAN, pooled=True))),
        errors.get(_ZERO_SHOT, errors.get(replace(_ZERO_SHOT, pooled=True))),
        fitted.coverage,
    )


def _without_record(
    forecast: Forecast,
    share: float,
    seen: Mapping[str, tuple[float, float]],
    next_share: float | None,
) -> Forecast:
    """No run on record: what was lost so far, from 20 % of the steps on.

    How much is still to come is taken from the shipped sample's runs, for want of anything better.
    """
    if share < _FROM_SHARE:
        return forecast
    updated: dict[str, Any] = {}
    next_look = {}
    for name in ("forgetting", "worst"):
        if name not in seen:
            continue
        value, error = seen[name]
        updated[name] = Prediction(value, math.hypot(error, _rest(name, share, 1.0)), 9)
        if next_share is not None:
            scale = math.hypot(error, _rest(name, share, next_share))
            next_look[name] = Prediction(value, scale, 9)
    if not updated:
        return forecast
    basis = (
        f"what was lost at {share:.0%} of the steps; no run on record, so the interval is that of "
        "the shipped sample's runs"
    )
    return replace(
        forecast,
        gain=None,
        **updated,
        basis=basis,
        evidence={},
        base_rate=False,
        next_look=next_look,
    )


@cache
def _rest(quantity: str, share: float, later: float) -> float:
    """Root mean square of what the shipped sample's runs lost between two shares of the steps."""
    from .sample import load_outcomes

    runs = [Run(outcome) for outcome in load_outcomes()]
    pairs = [(run.at(quantity, share), run.at(quantity, later)) for run in runs]
    changes = [end - now for now, end in pairs if now is not None and end is not None]
    return float(np.sqrt(np.mean(np.square(changes))))


def _load_base_rates() -> list[Run]:
    from .base_rates import load_base_rates

    return [Run(outcome) for outcome in load_base_rates()]
