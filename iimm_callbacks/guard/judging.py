"""Look + forecast + limits -> verdict and log row. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scipy import special

from ..measures.results import Forgetting, forgetting, paired_drop
from ..records import keys
from ..records.forecast import Forecast, Prediction
from ..records.look import Look
from ..records.verdict import Limits, Verdict

# A drop below this many standard errors is not told from no drop at all (one-sided 95 %).
_NOISE = 1.645
# The run will end over the limit: stop if the next look is over it with more than this probability.
_NEXT_LOOK = 0.5


def judge(forecast: Forecast | None, observed: Forgetting | None, limits: Limits) -> Verdict:
    """The verdict on a run.

    The probability of exceeding the limit is taken from the forecast of the end (Student-t) and
    from what is observed (normal, with the paired sampling error). The larger counts; where both
    are above 0.5, p and q, it is ``1 - (1 - p)(1 - q)``. Above 0.5 it warns. It stops from
    ``limits.confidence`` on, but for the forecast's sake alone not before the limit is likely to be
    exceeded at the *next look*, where that is known: until then there is something to be gained
    within the limit. An observed drop within its own sampling error raises no alarm, whatever the
    limit. A forecast that is borrowed from other models' runs may warn before the first look in
    training; it stops no run there.

    Args:
        forecast: Of the end of the run; ``None`` or absent where there is none.
        observed: Forgetting so far; ``None`` before training.
        limits: The user's limits.

    Returns:
        A `Verdict`.
    """
    limit = limits.max_forgetting
    if limit is None:
        return Verdict("continue", None, "no limit set")
    borrowed = observed is None and forecast is not None and forecast.base_rate
    expected = _by_forecast(forecast, limits, limit, may_stop=not borrowed)
    seen = _by_observed(observed, limits, limit)
    candidates = [*expected, *seen]
    if candidates[1:] and min(candidates)[0] > 0.5:
        # Over the limit, and expected to stay: to wait for more would only lose more.
        (p, ahead, _), (q, now, _) = expected[0], seen[0]
        candidates.append((1 - (1 - p) * (1 - q), f"{now}, {ahead}", True))
    if not candidates:
        return Verdict("continue", None, "nothing to judge by yet")
    probability, text, _ = max(candidates)
    level: Literal["continue", "warn", "stop"] = "warn" if probability > 0.5 else "continue"
    stopping = [c for c in candidates if c[0] >= limits.confidence and c[2]]
    if stopping:
        level = "stop"
        probability, text, _ = max(stopping)
    elif level == "warn" and probability >= limits.confidence:
        why = "not yet seen in this run" if borrowed else "not yet at the next look"
        text = f"{text}, {why}"
    return Verdict(
        level,
        probability,
        f"{text}; limit {_points(limit)}, exceeded with probability {probability:.2f}",
    )


# Probability of exceeding the limit, what it rests on, and whether it may stop the run now.
_Candidate = tuple[float, str, bool]


def _by_forecast(
    forecast: Forecast | None, limits: Limits, limit: float, *, may_stop: bool
) -> list[_Candidate]:
    quantity = "forgetting" if limits.limit_on == "mean" else "worst"
    predicted: Prediction | None = None if forecast is None else getattr(forecast, quantity)
    if forecast is None or predicted is None:
        return []
    text = (
        f"forecast {limits.limit_on} forgetting {_points(predicted.point)} "
        f"(90 % between {_points(predicted.low)} and {_points(predicted.high)})"
    )
    coming = forecast.next_look.get(quantity)
    now = coming is None or coming.probability_above(limit) > _NEXT_LOOK
    text = f"borrowed {text}" if forecast.base_rate else text
    return [(predicted.probability_above(limit), text, now and may_stop)]


def _by_observed(observed: Forgetting | None, limits: Limits, limit: float) -> list[_Candidate]:
    if observed is None:
        return []
    drop = observed.mean if limits.limit_on == "mean" else observed.worst
    above = float(special.ndtr((drop.value - limit) / max(drop.standard_error, 1e-12)))
    real = drop.value > _NOISE * drop.standard_error
    where = f" on {observed.worst_task!r}" if limits.limit_on == "worst" else ""
    text = (
        f"observed {limits.limit_on} forgetting{where} {_points(drop.value)} "
        f"± {_points(drop.standard_error)}"
    )
    return [(above if real else min(above, 0.5), text, True)]


def recommend(forecasts: Mapping[str, Forecast], limits: Limits) -> str | None:
    """The method with the most forecast gain among those likely to stay within the limit.

    A forecast outside the range of the saved runs recommends nothing.

    Args:
        forecasts: Method -> its forecast before training.
        limits: The user's limits; without one, every method stays within it.

    Returns:
        The method; None where no method has a forecast of gain, or none is more likely to stay
        within the limit than not. Borrowed forecasts are not told apart.
    """
    gains = {}
    for method, forecast in forecasts.items():
        predicted = forecast.forgetting if limits.limit_on == "mean" else forecast.worst
        limit = limits.max_forgetting
        inside = limit is None or (
            predicted is not None and predicted.probability_above(limit) <= 0.5
        )
        if forecast.gain is not None and inside and forecast.in_range:
            gains[method] = forecast.gain.point
    return max(gains, key=lambda method: gains[method], default=None)


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f} points"


@dataclass(frozen=True)
class Judged:
    """What is made of a look.

    Attributes:
        forecast: Of the end of the run.
        verdict: On it, and on what is observed.
        row: The logged keys, ``step``, ``share``, ``level``, ``reason``, ``n_images`` shown and
            ``standard_errors`` of what is observed; ``drops`` of the off-target tasks.
    """

    forecast: Forecast
    verdict: Verdict
    row: dict[str, Any]


def judge_first(baseline: Look, prior: Forecast, limits: Limits) -> Judged:
    """Of the look at the untouched model.

    Args:
        baseline: That look; the task being learnt comes first in it.
        prior: The forecast before training.
        limits: The user's.
    """
    return _judged(baseline, baseline, 0.0, prior, limits, None, {})


def judge_look(
    look: Look,
    baseline: Look,
    prior: Forecast,
    update: Callable[..., Forecast],
    limits: Limits,
    *,
    share: float,
    coming: float,
) -> Judged:
    """Of a look during training.

    Args:
        look: At the model as it trains.
        baseline: At the untouched model, with these images and maybe more.
        prior: The forecast before training.
        update: `Forecaster.update` of the forecaster that made it.
        limits: The user's.
        share: Of the steps that are done, in [0, 1].
        coming: Share of the steps at which the next look is due.
    """
    shown = baseline.first(look)
    task, *off_target = look.correct
    gain = paired_drop(shown.seen(task), look.seen(task))
    seen = {"gain": (-gain.value, gain.standard_error)}
    observed = drops = None
    if off_target:
        before, after = ({t: one.seen(t) for t in off_target} for one in (shown, look))
        observed = forgetting(before, after)
        seen["forgetting"] = (observed.mean.value, observed.mean.standard_error)
        seen["worst"] = (observed.worst.value, observed.worst.standard_error)
        drops = observed.values
    forecast = update(prior, share=share, seen=seen, next_share=coming, drops=drops)
    return _judged(look, baseline, share, forecast, limits, observed, seen)


def _judged(
    look: Look,
    baseline: Look,
    share: float,
    forecast: Forecast,
    limits: Limits,
    observed: Forgetting | None,
    seen: Mapping[str, tuple[float, float]],
) -> Judged:
    # At the end there is nothing left to forecast.
    verdict = judge(forecast if share < 1 else None, observed, limits)
    row = keys.look_row(look, baseline, forecast, observed, verdict) | {
        "step": look.step,
        "share": share,
        "level": verdict.level,
        "reason": verdict.reason,
        "n_images": sum(map(len, look.correct.values())),
        "standard_errors": {name: error for name, (_, error) in seen.items()},
    }
    if observed is not None:
        row["drops"] = observed.values
    return Judged(forecast, verdict, row)
