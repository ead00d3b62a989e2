"""The forecast: recovers what was planted, covers what it promises, refuses what it cannot know."""

import math
from dataclasses import replace

import numpy as np
import pytest

from iimm_callbacks import Forecaster, Measurement, Outcome
from iimm_callbacks.forecast import Prediction, _line


def run(x, over_error=0.5, drop=0.1, *, before=0.2, worst=None, **changes):
    """A run with this IIMM, gain over zero-shot error and mean forgetting."""
    worst = drop if worst is None else worst
    after = {"a": 0.5 - worst, "b": 0.5 - (2 * drop - worst)}
    return Outcome(
        model="m",
        model_fingerprint=changes.pop("model", "1f"),
        method=changes.pop("method", "full"),
        task=f"task {x}",
        task_fingerprint="2e",
        iimm=x,
        inter=x,
        intra=x,
        standard_error=0.01,
        n_images=512,
        n_classes=10,
        zero_shot_accuracy=before,
        final_accuracy=before + over_error * (1 - before),
        off_target_before=changes.pop("off_target_before", {"a": 0.5, "b": 0.5}),
        off_target_after=changes.pop("off_target_after", after),
        **changes,
    )


def at(x):
    return Measurement(x, x, x, 0.01, 512, 10)


def predict(outcomes, x=0.4, *, method="full", before=0.3, model="1f"):
    return (
        Forecaster()
        .fit(outcomes)
        .predict(at(x), method=method, zero_shot_accuracy=before, model=model)
    )


def planted(noise=0.0, n=8, seed=0, **changes):
    """Gain over error 0.1 + 1.5 x, mean forgetting -0.05 + 0.5 x, worst 0.1 above it."""
    rng = np.random.default_rng(seed)
    rows = []
    for x in np.linspace(0.1, 0.5, n):
        gain = 0.1 + 1.5 * x + noise * rng.normal()
        drop = -0.05 + 0.5 * x + noise * rng.normal()
        rows.append(run(float(x), gain, drop, worst=drop + 0.1, **changes))
    return rows


def test_planted_coefficients_are_recovered():
    forecast = predict(planted(), x=0.3, before=0.6)
    assert forecast.gain.point == pytest.approx((0.1 + 1.5 * 0.3) * (1 - 0.6))
    assert forecast.forgetting.point == pytest.approx(-0.05 + 0.5 * 0.3)
    assert forecast.worst.point == pytest.approx(-0.05 + 0.5 * 0.3 + 0.1)
    assert forecast.gain.high - forecast.gain.low < 1e-6
    assert forecast.n_outcomes == 8
    assert forecast.basis == (
        "line on IIMM through 8 runs of this model under method 'full' (8 tasks)"
    )


def test_the_interval_is_the_textbook_one():
    # x = 1, 2, 3, 4 and y = 1, 3, 2, 4: slope 4/5, intercept 1/2, residuals -.3, .9, -.9, .3, so
    # s² = 1.8/2; at x = 5 scale² = s² (1 + 1/4 + 2.5²/5). t(0.95; 2) = 2.919986.
    prediction = _line([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0], 5.0)
    assert prediction.point == pytest.approx(0.5 + 0.8 * 5)
    assert prediction.scale == pytest.approx(math.sqrt(0.9 * (1 + 1 / 4 + 2.5**2 / 5)))
    assert prediction.dof == 2
    assert prediction.high - prediction.point == pytest.approx(2.919986 * prediction.scale)
    assert prediction.point - prediction.low == pytest.approx(2.919986 * prediction.scale)


def test_90_percent_intervals_cover_90_percent():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(600):
        x = rng.uniform(0.1, 0.6, 7)
        y = 0.3 + 0.5 * x + rng.normal(0, 0.05, 7)
        prediction = _line(x[:6].tolist(), y[:6].tolist(), x[6])
        covered.append(prediction.low <= y[6] <= prediction.high)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.03)  # two and a half sigma of 600 draws


def test_probabilities_are_those_of_the_t_and_the_normal_distribution():
    assert Prediction(0.06, 0.01, 10).probability_above(0.05) == pytest.approx(0.8296, abs=1e-4)
    assert Prediction(0.06, 0.01, math.inf).probability_above(0.05) == pytest.approx(
        0.8413, abs=1e-4
    )
    assert Prediction(0.06, 0.01, math.inf).high == pytest.approx(0.06 + 1.6449 * 0.01, abs=1e-6)
    assert [Prediction(0.06, 0.0, 3).probability_above(limit) for limit in (0.05, 0.06)] == [1, 0]


@pytest.mark.parametrize(
    ("outcomes", "asked", "says"),
    [
        ([], {}, "no complete run of this model under method 'full' is on record"),
        (
            planted(n=2),
            {},
            "only 2 complete runs of this model under method 'full' are on record; 3",
        ),
        (planted(n=1), {}, "only 1 complete run of this model"),
        (planted(), {"model": "other"}, "no complete run of this model"),
        (planted(), {"method": "lora"}, "under method 'lora'"),
        (planted(complete=False), {}, "no complete run"),
        ([run(0.3), run(0.3), run(0.3)], {}, "3 runs on record all have about the same IIMM"),
    ],
)
def test_no_forecast_is_made_up(outcomes, asked, says):
    forecast = predict(outcomes, **asked)
    assert (forecast.gain, forecast.forgetting, forecast.worst) == (None, None, None)
    assert forecast.basis.startswith("no forecast: ")
    assert says in forecast.basis


@pytest.mark.parametrize("off_target", [True, False])
def test_near_the_ceiling_the_forecast_of_gain_says_so(off_target):
    alone = {} if off_target else {"off_target_before": {}, "off_target_after": {}}
    forecast = predict(planted(**alone), before=0.96)
    assert forecast.gain is None
    assert (forecast.forgetting is not None) == off_target
    assert "zero-shot accuracy 0.96" in forecast.basis
    assert "same IIMM" not in forecast.basis


def test_runs_without_off_target_tasks_forecast_the_gain_only():
    forecast = predict(planted(off_target_before={}, off_target_after={}))
    assert forecast.gain is not None
    assert (forecast.forgetting, forecast.worst) == (None, None)


def test_incomplete_runs_are_left_out():
    cut = [run(0.3, -0.9, 0.9, complete=False)] * 9
    assert predict([*planted(), *cut]) == predict(planted())


def test_runs_of_another_model_or_method_are_left_out():
    others = [*planted(seed=1, noise=1.0, model="9"), *planted(seed=2, noise=1.0, method="lora")]
    assert predict([*planted(), *others]) == predict(planted())


@pytest.mark.parametrize(("x", "extrapolates"), [(0.05, True), (0.3, False), (0.6, True)])
def test_extrapolation_is_said_and_widens_the_interval(x, extrapolates):
    forecast = predict(planted(noise=0.01), x=x)
    assert ("lies outside theirs, so it extrapolates" in forecast.basis) == extrapolates
    assert forecast.gain.scale >= predict(planted(noise=0.01), x=0.3).gain.scale


def test_the_model_may_be_left_out_only_where_there_is_one():
    assert predict(planted(), model=None) == predict(planted())
    with pytest.raises(ValueError, match="outcomes are of 2 models"):
        predict([*planted(), run(0.3, model="9")], model=None)


def update(outcomes, share, seen, x=0.3):
    forecaster = Forecaster().fit(outcomes)
    prior = predict(outcomes, x)
    new = forecaster.update(prior, method="full", model="1f", share=share, seen=seen)
    return prior, new


def followed(noise):
    """Runs whose mean forgetting at 10 % of the steps is half the final one."""
    return [
        replace(o, trajectory=[{"share": s, "gain": 0.0, "forgetting": s and o.forgetting * k}
                for s, k in ((0.0, 0), (0.1, 0.5), (1.0, 1.0))])
        for o in planted(noise)
    ]  # fmt: skip


def test_at_the_last_step_the_forecast_equals_what_is_observed():
    prior, new = update(planted(), 1.0, {"gain": (0.25, 0.02), "forgetting": (0.03, 0.01)})
    assert new.gain == Prediction(0.25, 0.02, math.inf)
    assert new.forgetting == Prediction(0.03, 0.01, math.inf)
    assert new.worst == prior.worst  # not seen
    assert "what is observed" in new.basis


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_what_was_lost_so_far_takes_over_where_it_leaves_less_spread(share):
    prior, new = update(followed(noise=0.05), share, {"forgetting": (share / 0.1 * 0.04, 0.01)})
    assert new.forgetting.scale < prior.forgetting.scale
    assert new.forgetting.point == pytest.approx(0.08)  # 0.04 lost at 10 % is half of the end
    assert f"at {share:.0%} of the steps" in new.basis
    assert new.gain == prior.gain


def test_the_forecast_from_before_training_stays_where_it_is_narrower():
    rows = planted()  # exactly on the line
    rng = np.random.default_rng(0)
    noisy = [
        replace(o, trajectory=[{"share": 0.1, "gain": 0.0, "forgetting": rng.normal(0, 0.1)}])
        for o in rows
    ]
    prior, new = update(noisy, 0.1, {"forgetting": (0.4, 0.01)})
    assert new == prior


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_an_absent_forecast_stays_absent_without_outcomes(share):
    prior, new = update([], share, {"gain": (0.3, 0.01), "forgetting": (0.2, 0.01)})
    assert new == prior
    assert new.forgetting is None
