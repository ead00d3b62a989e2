"""Replaying runs: figures that can be checked by hand, and the verdicts they rest on."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from test_forecast import EARLY, SHARES, bare, planted, run, scattered

from iimm_callbacks import Forecast, Forecaster, Limits, Measurement
from iimm_callbacks.forecasting.grading import POLICIES
from iimm_callbacks.guard.judging import judge, recommend
from iimm_callbacks.guard.schedule import is_due, next_share
from iimm_callbacks.measures.results import Drop, Forgetting
from iimm_callbacks.records.forecast import Prediction

pytestmark = pytest.mark.once

STEADY = tuple(SHARES)  # as much as the share of the steps


def forecast_rows(outcomes, **settings):
    rows = Forecaster().grade(outcomes, **settings).forecasts
    return {(row.quantity, row.method, row.share): row for row in rows}


def guard_rows(outcomes, *limits, **settings):
    rows = Forecaster().grade(outcomes, limits=limits, **settings).guard
    return {(row.policy, row.limit): row for row in rows}


def test_the_errors_are_those_of_runs_whose_task_was_left_out():
    outcomes = scattered(curve=EARLY)
    rows = forecast_rows(outcomes)
    for quantity in ("gain", "forgetting", "worst"):
        ends = np.array([getattr(o, quantity) for o in outcomes])
        mean = np.abs([np.delete(ends, i).mean() - y for i, y in enumerate(ends)]).mean()
        error = np.array([1 - o.zero_shot_accuracy for o in outcomes])
        line = [
            abs(np.polyval(np.polyfit(np.delete(error, i), np.delete(ends, i), 1), error[i]) - y)
            for i, y in enumerate(ends)
        ]
        for share in SHARES[:-1]:
            row = rows[quantity, "all", share]
            assert row.n_runs == 9
            assert row.error_of_mean == pytest.approx(mean)
            assert row.error_of_zero_shot == pytest.approx(np.mean(line))
            assert row == replace(rows[quantity, "full", share], method="all")
        assert rows[quantity, "all", 0.0].error < 1.6 * mean
        assert rows[quantity, "all", 0.1].error < 1e-3  # half of it, always


def test_the_replay_is_the_live_forecast_from_the_other_tasks():
    outcomes = scattered(7, curve=EARLY) + scattered(7, seed=1, method="lora", curve=EARLY)
    asked = outcomes[3]
    others = [o for o in outcomes if o.task != asked.task]
    assert len(others) == 12
    live = Forecaster().fit(others, base_rates=False).predict(
        Measurement(asked.iimm, asked.inter, asked.intra, 0.01, 512, 10),
        method="full", zero_shot_accuracy=asked.zero_shot_accuracy, model="1f", task="t3",
        task_fingerprint="2e", off_target=["a", "b"],
    )  # fmt: skip
    alone = [replace(o, trajectory=[]) for o in others]  # only this one is replayed
    row = forecast_rows([asked, *alone])["gain", "full", 0.0]
    assert row.n_runs == 1
    assert row.error == pytest.approx(abs(live.gain.point - asked.gain))
    assert row.coverage == (live.gain.low <= asked.gain <= live.gain.high)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_wild_run_of_the_same_task_is_not_used(method):
    outcomes = scattered(curve=EARLY)
    wild = run("t4", 0.4, gain=0.69, drop=-0.4, method=method)  # without looks: not replayed
    others = [replace(o, trajectory=[]) if o.task != "t4" else o for o in outcomes]
    key = "gain", "full", 0.0
    assert forecast_rows([*others, wild])[key] == forecast_rows(others)[key]
    elsewhere = replace(wild, task="t5")
    assert forecast_rows([*others, elsewhere])[key] != forecast_rows(others)[key]


def test_past_intervals_cover_about_90_percent():
    outcomes = [o for seed in range(3) for o in planted(12, noise=0.1, seed=seed, curve=EARLY)]
    outcomes = [  # looks at the start and the end only
        replace(o, task=f"{o.task} {i // 12}", trajectory=o.trajectory[:: len(SHARES) - 1])
        for i, o in enumerate(outcomes)
    ]
    rows = forecast_rows(outcomes)
    for quantity in ("gain", "forgetting", "worst"):
        row = rows[quantity, "all", 0.0]
        assert 0.8 <= row.coverage <= 0.98, quantity
        assert row.error < 0.95 * row.error_of_mean, quantity


def test_the_plain_mean_is_that_where_all_began_alike():
    outcomes = [run(f"t{i}", gain=g, curve=EARLY) for i, g in enumerate((0.0, 0.1, 0.2, 0.5))]
    row = forecast_rows(outcomes)["gain", "all", 0.0]
    # Means of the others: 0.8/3, 0.7/3, 0.6/3, 0.3/3.
    assert row.error_of_mean == pytest.approx((0.8 / 3 + 0.4 / 3 + 0.0 + 0.4) / 4)
    assert math.isnan(row.error_of_zero_shot)


def test_other_methods_and_models_do_not_enter_the_plain_mean():
    outcomes = scattered(5, curve=EARLY)
    others = scattered(5, seed=1, method="lora", shift=0.3)
    strangers = scattered(5, seed=2, model_fingerprint="9", shift=0.3)
    for rest in (others, strangers):
        key = "gain", "full", 0.0
        mean = forecast_rows([*outcomes, *rest])[key].error_of_mean
        assert mean == pytest.approx(forecast_rows(outcomes)[key].error_of_mean)


# Forgetting 6, 5, 4, 1 and 0 points at the end, as much as the share of the steps; a point of gain
# for each tenth of them.
FIVE = [
    run(f"t{i}", 0.2 + 0.05 * i, gain=0.1, drop=d, before=0.2 + 0.05 * (i % 3), noise=0.0,
        curve=STEADY)
    for i, d in enumerate((0.06, 0.05, 0.04, 0.01, 0.0))
]  # fmt: skip


def test_the_policies_that_know_no_forecast_by_hand():
    rows = guard_rows(FIVE, 0.03)
    # Over 3 points at the end: 6, 5, 4. Within them at the last: 0.5, 0.5 and 0.7 of the steps.
    oracle = rows["oracle", 0.03]
    assert (oracle.n_runs, oracle.n_over) == (5, 3)
    assert (oracle.stopped_of_over, oracle.stopped_of_under) == (3, 0)
    assert (oracle.kept_to_limit, oracle.over_by) == (1.0, 0.0)
    assert oracle.gain == pytest.approx(0.1 * (0.5 + 0.5 + 0.7 + 1 + 1) / 5)
    # Observed to exceed at 0.7 of the steps: 4.2 and 3.5 points; the third only at the end.
    seen = rows["stop when observed exceeds", 0.03]
    assert (seen.stopped_of_over, seen.stopped_of_under) == (2, 0)
    assert seen.kept_to_limit == 0.5  # 3.5 is half a point over: just kept
    assert seen.over_by == pytest.approx((0.012 + 0.005) / 2)
    assert seen.gain == pytest.approx(0.1 * (0.7 + 0.7 + 1 + 1 + 1) / 5)
    finish = rows["always finish", 0.03]
    assert (finish.stopped_of_over, finish.stopped_of_under, finish.over_by) == (0, 0, 0.0)
    assert math.isnan(finish.kept_to_limit)
    assert finish.gain == pytest.approx(0.1)
    assert {row.gain_of_oracle for row in rows.values()} == {oracle.gain}
    assert {policy for policy, _ in rows} == set(POLICIES)


def test_the_guard_with_a_forecast_that_knows_stops_as_late_as_the_oracle():
    outcomes = [replace(o, task=f"{o.task} {k}") for o in FIVE for k in range(3)]
    rows = guard_rows(outcomes, 0.03)
    guard, oracle = rows["guard", 0.03], rows["oracle", 0.03]
    assert (guard.n_over, guard.stopped_of_over, guard.stopped_of_under) == (9, 9, 0)
    assert guard.kept_to_limit == 1.0
    assert guard.gain == pytest.approx(oracle.gain)


def test_a_needless_stop_is_counted():
    # It loses 5 points on the way and wins all of them back; all others keep what they lost.
    back = (0.0, 0.5, 5, 5, 5, 5, 5, 1.0)
    outcomes = [*FIVE, run("back", 0.3, gain=0.1, drop=0.01, noise=0.0, curve=back)]
    rows = guard_rows(outcomes, 0.03)
    for policy in ("guard", "stop when observed exceeds"):
        assert rows[policy, 0.03].stopped_of_under == 1
    for policy in ("oracle", "always finish"):
        assert rows[policy, 0.03].stopped_of_under == 0


def test_sampling_noise_is_granted_beyond_the_limit():
    noisy = [replace(run(o.task, o.iimm, 0.1, o.forgetting, before=o.zero_shot_accuracy,
                         noise=0.01, curve=STEADY)) for o in FIVE]  # fmt: skip
    row = guard_rows(noisy, 0.03)["stop when observed exceeds", 0.03]
    assert row.kept_to_limit == 1.0  # 1.2 points over are within 0.5 + 1.645
    assert row.over_by == pytest.approx((0.012 + 0.005) / 2)


def test_limits_on_the_worst_task_are_graded_by_it():
    outcomes = [run(o.task, o.iimm, 0.1, 0.0, worst=o.forgetting, before=o.zero_shot_accuracy,
                    noise=0.0, curve=STEADY) for o in FIVE]  # fmt: skip
    mean = guard_rows(outcomes, 0.03)["stop when observed exceeds", 0.03]
    worst = guard_rows(outcomes, 0.03, limit_on="worst")["stop when observed exceeds", 0.03]
    assert (mean.n_over, mean.stopped_of_over) == (0, 0)
    assert (worst.n_over, worst.stopped_of_over) == (3, 2)


def test_limits_are_graded_one_by_one():
    rows = guard_rows(FIVE, 0.005, 0.02, 0.9)
    assert [rows["always finish", limit].n_over for limit in (0.005, 0.02, 0.9)] == [4, 3, 0]
    assert [rows["oracle", limit].stopped_of_over for limit in (0.005, 0.02, 0.9)] == [4, 3, 0]


def test_runs_without_off_target_tasks_are_no_matter_of_the_guard():
    outcomes = [*FIVE, *(replace(bare(o), task=f"{o.task}b") for o in FIVE)]
    assert guard_rows(outcomes, 0.03)["always finish", 0.03].n_runs == 5
    found = Forecaster().grade([bare(o) for o in FIVE])
    assert found.guard == ()
    assert {row.quantity for row in found.forecasts} == {"gain"}


def test_what_cannot_be_replayed_is_counted():
    good = scattered(6, curve=EARLY)
    odd = [
        replace(good[0], complete=False),
        replace(good[1], trajectory=[]),
        replace(good[2], iimm=None, inter=None, intra=None),
    ]
    found = Forecaster().grade([*good, *odd])
    assert (found.n_runs, found.n_left_out) == (7, 2)  # without IIMM by what else there is


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ([], "got 0 runs of 0 tasks"),
        (scattered(), "got 9 runs of 9 tasks"),  # no looks
        (scattered(1, curve=EARLY), "got 1 runs of 1 tasks"),  # none is left
        ([run("t", curve=EARLY)] * 5, "got 5 runs of 1 tasks"),
        (scattered(curve=EARLY, complete=False), "got 9 runs"),
    ],
)
def test_nothing_to_replay_is_an_error(outcomes, says):
    with pytest.raises(ValueError, match=says):
        Forecaster().grade(outcomes)


def test_data_for_a_file_has_no_nan():
    outcomes = [run(f"t{i}", gain=0.1 * i, curve=EARLY) for i in range(5)]
    data = json.loads(json.dumps(Forecaster().grade(outcomes).to_json(), allow_nan=False))
    finish = [row for row in data["guard"] if row["policy"] == "always finish"]
    assert {row["kept_to_limit"] for row in finish} == {None}
    assert (data["n_runs"], data["n_left_out"]) == (5, 0)


def without(trajectory, *names):
    return [{k: v for k, v in look.items() if k not in names} for look in trajectory]


ODD_LOOKS = {
    "late start": lambda looks: looks[2:],
    "start at the end": lambda looks: looks[-1:],
    "unsorted": lambda looks: looks[::-1],
    "a share twice": lambda looks: [*looks[:3], *looks[2:]],
    "no errors": lambda looks: without(looks, "gain_se", "forgetting_se", "worst_se"),
    "no last look": lambda looks: looks[:-1],
    "forgetting late": lambda looks: [*without(looks[:3], "forgetting", "worst"), *looks[3:]],
    "no worst": lambda looks: without(looks, "worst", "worst_se"),
    "lost before the start": lambda looks: [looks[0] | {"forgetting": 0.2}, *looks[1:]],
}


@pytest.mark.parametrize("looks", ODD_LOOKS)
def test_odd_looks_are_graded_or_left_out(looks):
    outcomes = [
        replace(o, trajectory=ODD_LOOKS[looks](o.trajectory)) for o in scattered(6, curve=EARLY)
    ]
    json.dumps(Forecaster().grade(outcomes).to_json(), allow_nan=False)


@pytest.mark.parametrize("changes", [{"inter": None, "intra": None}, {"n_images": None}])
def test_what_a_record_may_lack_is_no_crash(changes):
    outcomes = [run(f"t{i}", 0.2 + 0.02 * i, curve=EARLY, **changes) for i in range(6)]
    Forecaster().grade(outcomes)


def test_the_forecaster_passes_its_settings_on():
    row = Forecaster().grade(FIVE, limits=(0.03,), limit_on="worst").guard[0]
    assert (row.policy, row.limit, row.n_over) == ("guard", 0.03, 3)


# --- what the guard makes of forecasts ---


def forecast(mean, scale=0.01, *, coming=None, gain=0.3, base_rate=False):
    next_look = {} if coming is None else {"forgetting": Prediction(coming, scale, 10)}
    own = Prediction(mean, scale, 10)
    gain = None if gain is None else Prediction(gain, 0.1, 10)
    return Forecast(gain, own, own, "by hand", 12, base_rate=base_rate, next_look=next_look)


def observed(mean, error=0.01):
    return Forgetting({"a": Drop(mean, error)}, Drop(mean, error), "a")


LIMITS = Limits(0.05)


@pytest.mark.parametrize(
    ("predicted", "seen", "level", "says"),
    [
        # What is borrowed warns, and stops no run before the first look at it.
        (forecast(0.9, base_rate=True), None, "warn", "not yet seen in this run"),
        (forecast(0.0, base_rate=True), None, "continue", "borrowed forecast mean"),
        (forecast(0.9, base_rate=True), observed(0.0), "stop", "borrowed forecast mean"),
        (forecast(0.0, base_rate=True), observed(0.2), "stop", "observed mean"),
        # The end is over the limit: it stops once the next look likely is, too.
        (forecast(0.2), None, "stop", "forecast mean"),
        (forecast(0.2, coming=0.051), None, "stop", "forecast mean"),
        (forecast(0.2, coming=0.05), None, "warn", "not yet at the next look"),
        (forecast(0.2, coming=0.0), observed(0.04), "warn", "not yet at the next look"),
        (forecast(0.2, coming=0.0), observed(0.07), "stop", "points"),
        # The next look alone stops nothing, nor makes up for what is not sure of the end.
        (forecast(0.0, coming=0.2), None, "continue", "forecast mean"),
        (forecast(0.055, coming=0.2), None, "warn", "0.69"),
        (forecast(0.055, coming=0.0), None, "warn", "0.69"),
        # Of the other quantity nothing is known: as before.
        (forecast(0.2), observed(0.0), "stop", "forecast mean"),
    ],
)
def test_a_forecast_stops_only_when_the_next_look_is_likely_over_the_limit(
    predicted, seen, level, says
):
    verdict = judge(predicted, seen, LIMITS)
    assert verdict.level == level
    assert says in verdict.reason


def test_the_next_look_of_the_quantity_that_is_limited_counts():
    verdict = judge(forecast(0.2, coming=0.0), None, Limits(0.05, limit_on="worst"))
    assert verdict.level == "stop"  # only the mean's next look is known, and is low


def test_not_yet_at_the_next_look_is_said_only_where_it_holds_a_stop_back():
    assert "not yet" not in judge(forecast(0.055, coming=0.0), None, LIMITS).reason
    assert "not yet" not in judge(forecast(0.2, coming=0.1), None, LIMITS).reason


@pytest.mark.parametrize(
    ("forecasts", "limit", "best"),
    [
        ({"full": forecast(0.2, gain=0.5), "lora": forecast(0.01, gain=0.2)}, 0.05, "lora"),
        ({"full": forecast(0.04, gain=0.5), "lora": forecast(0.01, gain=0.2)}, 0.05, "full"),
        ({"full": forecast(0.2, gain=0.5), "lora": forecast(0.01, gain=0.2)}, None, "full"),
        ({"full": forecast(0.2, gain=0.5), "lora": forecast(0.06, gain=0.2)}, 0.05, None),
        ({"full": forecast(0.05, gain=0.1)}, 0.05, "full"),  # as likely as not
        ({"full": forecast(0.01, gain=None)}, 0.05, None),
        ({"full": Forecast(forecast(0).gain, None, None, "")}, 0.05, None),
        ({"full": Forecast(forecast(0).gain, None, None, "")}, None, "full"),
        ({"full": forecast(0.2, base_rate=True), "lora": forecast(0.0, base_rate=True)}, 0.05,
         "lora"),
        ({"full": replace(forecast(0.01, gain=0.9), in_range=False),
          "lora": forecast(0.01, gain=0.2)}, 0.05, "lora"),
        ({}, 0.05, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("limit_on", ["mean", "worst"])
def test_the_method_with_most_gain_within_the_limit_is_recommended(
    forecasts, limit, best, limit_on
):
    assert recommend(forecasts, Limits(limit, limit_on)) == best


@pytest.mark.parametrize("total", [1, 2, 7, 30, 100, 999])
@pytest.mark.parametrize("every", [None, 1, 3, 50, 0.1, 0.25, 0.3, 0.07, 0.999])
def test_the_next_share_is_that_of_the_next_step_that_is_due(every, total):
    for step in range(total):
        due = next(s for s in range(step + 1, total + 1) if is_due(every, s, total))
        assert next_share(every, step, total, 0) == pytest.approx(due / total)


@pytest.mark.parametrize("event", ["epoch", "evaluate"])
def test_the_next_event_is_expected_as_many_steps_on(event):
    assert next_share(event, 0, 100, 0) == 1  # nothing known yet
    assert next_share(event, 30, 100, 10) == 0.5
    assert next_share(event, 80, 100, 40) == 1
    assert next_share(event, 100, 100, 90) == 1
