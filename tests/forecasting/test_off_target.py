"""What each off-target task will lose: planted profiles are found again, by hand-worked values."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from test_forecast import run

from iimm_callbacks import Forecaster, Measurement
from iimm_callbacks.forecasting.off_target import by_task
from iimm_callbacks.forecasting.runs import Ask, Run
from iimm_callbacks.records.forecast import Prediction

pytestmark = pytest.mark.once

PROFILE = {"strong": 1.0, "steady": 0.0, "safe": -1.0}
BEFORE = {"strong": 0.9, "steady": 0.5, "safe": 0.2}
MEAN = Prediction(0.06, 0.01, 8)


def lost(mean, spread=0.5, profile=PROFILE):
    """Drops about a mean, in proportion to it."""
    return {name: mean * (1 + spread * u) for name, u in profile.items()}


def planted(n=5, method="full", profile=PROFILE, looks=(), **more):
    """Runs on n tasks that lose 2, 4, 6, ... points in the mean, by the same profile."""
    found = []
    for i in range(n):
        drops = lost(0.02 * (i + 1), profile=profile)
        found.append(
            replace(
                run(f"t{i}", method=method),
                off_target_before=BEFORE,
                off_target_after={name: BEFORE[name] - drop for name, drop in drops.items()},
                trajectory=[
                    {"share": s, "gain": 0.0, "drops": {k: part * v for k, v in drops.items()}}
                    for s, part in looks
                ],
                **more,
            )
        )
    return found


def ask(method="full", before=BEFORE):
    known = {"off_target": tuple(before), "off_target_accuracies": tuple(before.values())}
    return Ask(method, "1f", 0.4, 0.3, 0.2, 0.4, 512, "new", **known)


def found(outcomes, mean=MEAN, seen=None, **of):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return by_task([Run(o) for o in outcomes], ask(**of), mean, seen)


def points(predictions):
    return {name: p.point for name, p in predictions.items()}


def test_a_profile_in_proportion_to_the_mean_is_found_again():
    predictions = found(planted())
    assert points(predictions) == pytest.approx(lost(0.06), abs=1e-9)
    assert list(predictions) == ["strong", "steady", "safe"]  # most at risk first
    # All that is unsure is the mean: the saved runs follow the profile without error.
    assert [p.scale for p in predictions.values()] == pytest.approx([MEAN.scale] * 3)
    assert all((p.most, p.least) == (BEFORE[n], BEFORE[n] - 1) for n, p in predictions.items())


def test_no_task_is_forecast_to_lose_more_than_it_has():
    assert found(planted(), replace(MEAN, point=0.8))["strong"].point == 0.9


def test_what_scatters_about_the_profile_widens_the_interval():
    rng = np.random.default_rng(0)
    noisy = []
    for o in planted() * 20:
        after = {name: a + rng.normal(0, 0.02) for name, a in o.off_target_after.items()}
        noisy.append(replace(o, off_target_after=after))
    scale = found(noisy, Prediction(0.06, 0.0, 8))["safe"].scale
    assert scale == pytest.approx(0.02 * np.sqrt(2 / 3), rel=0.15)  # about each run's own mean


def test_another_methods_profile_is_used_and_the_methods_own_takes_over():
    upside_down = {name: -u for name, u in PROFILE.items()}
    others = planted(method="lora", profile=upside_down)
    borrowed = points(found(others))
    assert borrowed["safe"] > borrowed["strong"]
    own = points(found([*others, *planted(12)]))
    assert own["strong"] > own["safe"]


def test_a_task_without_saved_runs_is_judged_by_what_it_has_to_lose():
    before = {"strong": 0.9, "new and good": 0.85, "new and poor": 0.1}
    predictions = points(found(planted(), before=before))
    assert predictions["new and good"] > predictions["new and poor"]
    assert np.mean(list(predictions.values())) == pytest.approx(MEAN.point)


def test_what_is_seen_of_a_run_counts_where_tasks_have_no_profile():
    # Every run forgets other tasks, half of it in the first half of the steps.
    rng = np.random.default_rng(0)
    outcomes = []
    for task in range(12):
        profile = dict(zip(PROFILE, rng.permutation([1.0, 0.0, -1.0]).tolist(), strict=True))
        (one,) = planted(1, profile=profile, looks=[(0.5, 0.5), (1.0, 1.0)])
        outcomes.append(replace(one, task=f"t{task}"))
    turned = {"strong": 0.0, "steady": 0.03, "safe": 0.06}
    predictions = points(found(outcomes, seen=(0.5, turned)))
    assert predictions == pytest.approx({"strong": 0.0, "steady": 0.06, "safe": 0.12}, abs=1e-3)


@pytest.mark.parametrize(
    "outcomes",
    [[], planted(2), [replace(o, off_target_before={}, off_target_after={}) for o in planted()]],
)
def test_with_too_little_to_go_by_nothing_is_said(outcomes):
    assert found(outcomes) == {}
    assert found(planted(), before={"strong": 0.9}) == {}  # one task: its drop is the mean


def test_forecaster_names_the_task_most_at_risk_before_and_during_training():
    forecaster = Forecaster().fit(planted(looks=[(0.5, 0.5), (1.0, 1.0)]), base_rates=False)
    before = forecaster.predict(
        Measurement(0.4, 0.2, 0.6, 0.01, 512, 10),
        method="full", zero_shot_accuracy=0.3, model="1f", off_target=BEFORE,
    )  # fmt: skip
    assert next(iter(before.off_target)) == "strong"
    told = before.to_json()["off_target"]["strong"]
    assert told["low"] < told["point"] < told["high"]
    seen = {"forgetting": (0.03, 0.005), "worst": (0.05, 0.01)}
    during = forecaster.update(before, share=0.5, seen=seen, drops=lost(0.03))
    assert next(iter(during.off_target)) == "strong"
    mean = np.mean([p.point for p in during.off_target.values()])
    assert mean == pytest.approx(during.forgetting.point)
    assert forecaster.update(before, share=1.0, seen=seen, drops=lost(0.06)).off_target == {}
