"""The forecast: learns what is there, covers what it promises, says what it rests on and lacks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from iimm_callbacks import Forecast, Forecaster, Measurement, Outcome, sample
from iimm_callbacks.forecasting.runs import about, measured
from iimm_callbacks.records.forecast import Prediction
from iimm_callbacks.sample import load_base_rates

pytestmark = pytest.mark.once

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
EARLY = (0.0, 0.4, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)  # share of the final value reached at these


def run(
    task, x=0.4, gain=0.3, drop=0.05, *, before=0.3, worst=None, terms=None, curve=(), noise=0.01,
    **changes,
):  # fmt: skip
    """A run with this IIMM, gain and mean forgetting; `curve`: what part of them, look by look."""
    worst = drop if worst is None else worst
    ends = {"gain": gain, "forgetting": drop, "worst": worst}
    inter, intra = terms or (x, x)
    values = {
        "model": "m", "model_fingerprint": "1f", "method": "full", "task": f"{task}",
        "task_fingerprint": "2e", "iimm": x, "inter": inter, "intra": intra,
        "standard_error": 0.01, "n_images": 512, "n_classes": 10, "zero_shot_accuracy": before,
        "final_accuracy": before + gain, "off_target_before": {"a": 0.5, "b": 0.5},
        "off_target_after": {"a": 0.5 - worst, "b": 0.5 - (2 * drop - worst)},
        "trajectory": [
            {"share": share}
            | {name: part * end for name, end in ends.items()}
            | ({f"{name}_se": noise for name in ends} if share else {})
            for share, part in zip(SHARES, curve, strict=True)
        ] if len(curve) else [],
    }  # fmt: skip
    return Outcome(**values | changes)


def bare(outcome):
    """The same run without off-target tasks."""
    looks = [{k: v for k, v in o.items() if k[:4] in ("shar", "gain")} for o in outcome.trajectory]
    return replace(outcome, off_target_before={}, off_target_after={}, trajectory=looks)


def planted(n=9, noise=0.0, seed=0, **changes):
    """Gain over zero-shot error 0.1 + x, mean forgetting -0.05 + 0.5 x, worst 0.1 above it."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, x in enumerate(np.linspace(0.1, 0.5, n).tolist()):
        before = 0.2 + 0.05 * (i % 4)
        gain = (1 - before) * (0.1 + x + noise * rng.normal())
        drop = -0.05 + 0.5 * x + noise * rng.normal()
        rows.append(run(f"t{i}", x, gain, drop, before=before, worst=drop + 0.1, **changes))
    return rows


def scattered(n=9, seed=0, method="full", shift=0.0, **changes):
    """Runs whose ends follow nothing."""
    rng = np.random.default_rng(seed)
    return [
        run(
            f"t{i}", rng.uniform(0.2, 0.5), shift + rng.uniform(0.1, 0.4), rng.uniform(0, 0.1),
            before=rng.uniform(0.2, 0.5), method=method, **changes,
        ) for i in range(n)
    ]  # fmt: skip


def ask(outcomes, x=0.3, *, base_rates=False, before=0.3, method="full", model="1f", **asked):
    """The forecaster and its forecast before training."""
    forecaster = Forecaster().fit(outcomes, base_rates=base_rates)
    measured = x if isinstance(x, Measurement) else Measurement(x, x, x, 0.01, 512, 10)
    return forecaster, forecaster.predict(
        measured, method=method, zero_shot_accuracy=before, model=model, **asked
    )


def predict(outcomes, x=0.3, **asked):
    return ask(outcomes, x, **asked)[1]


def seen(gain=None, forgetting=None, worst=None, error=0.01):
    values = {"gain": gain, "forgetting": forgetting, "worst": worst}
    return {name: (value, error) for name, value in values.items() if value is not None}


def update(outcomes, share, observed, next_share=None, **asked):
    forecaster, prior = ask(outcomes, **asked)
    return prior, forecaster.update(prior, share=share, seen=observed, next_share=next_share)


# --- the distribution ---


def test_probabilities_are_those_of_the_t_and_the_normal_distribution():
    assert Prediction(0.06, 0.01, 10).probability_above(0.05) == pytest.approx(0.8296, abs=1e-4)
    normal = Prediction(0.06, 0.01, math.inf)
    assert normal.probability_above(0.05) == pytest.approx(0.8413, abs=1e-4)
    assert normal.high == pytest.approx(0.06 + 1.6449 * 0.01, abs=1e-6)
    assert normal.low == pytest.approx(0.06 - 1.6449 * 0.01, abs=1e-6)
    assert [Prediction(0.06, 0.0, 3).probability_above(limit) for limit in (0.05, 0.06)] == [1, 0]


# --- before training ---


def test_planted_lines_are_recovered():
    forecast = predict(planted(), 0.3, before=0.6)
    assert forecast.gain.point == pytest.approx((0.1 + 0.3) * (1 - 0.6), abs=1e-3)
    assert forecast.forgetting.point == pytest.approx(-0.05 + 0.5 * 0.3, abs=1e-3)
    assert forecast.worst.point == pytest.approx(-0.05 + 0.5 * 0.3 + 0.1, abs=1e-3)
    assert forecast.gain.high - forecast.gain.low < 0.01
    assert forecast.n_outcomes == 9
    assert forecast.basis == "9 complete runs of this model, 9 of them under method 'full'"
    assert forecast.notes == () or all("off-target" in note for note in forecast.notes)
    for quantity, evidence in forecast.evidence.items():
        best = next(iter(evidence.predictors))
        assert best == "IIMM", quantity
        assert evidence.error < 0.1 * min(evidence.error_of_mean, evidence.error_of_zero_shot)
        assert (evidence.n_runs, evidence.n_tasks) == (9, 9)
        assert sum(evidence.predictors.values()) == pytest.approx(1)


def simulate(r2, draws, tasks=9, seed=0):
    """|error| of gain and forgetting forecasts, of the fitted line and of the mean; covered?"""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(draws):
        inter, intra = rng.normal(0.2, 0.05, tasks + 1), rng.normal(0.6, 0.1, tasks + 1)
        x = (inter + intra) / 2
        strength = np.sqrt(r2) * (x - 0.4) / (np.hypot(0.05, 0.1) / 2)
        before = rng.uniform(0.2, 0.7, tasks + 1)
        ends = []  # [2, tasks + 1]: gain over zero-shot error, forgetting
        for mean, spread in ((0.5, 0.1), (0.08, 0.04)):
            noise = np.sqrt(1 - r2) * rng.normal(size=tasks + 1)
            ends.append(mean + spread * (strength + noise))
        ends[0] *= 1 - before if r2 else 0.5  # with no relation, none with zero-shot error either
        outcomes = [
            run(i, x[i], ends[0][i], ends[1][i], before=before[i], terms=(inter[i], intra[i]))
            for i in range(tasks)
        ]
        m = Measurement(x[-1], inter[-1], intra[-1], 0.01, 512, 10)
        forecast = predict(outcomes, m, before=before[-1])
        for name, y, by in (
            ("gain", ends[0], 1 - before if r2 else np.ones(tasks + 1)),
            ("forgetting", ends[1], np.ones(tasks + 1)),
        ):
            p = getattr(forecast, name)
            line = by[-1] * np.polyval(np.polyfit(x[:-1], (y / by)[:-1], 1), x[-1])
            errors = np.abs(np.array([p.point, line, y[:-1].mean()]) - y[-1])
            rows.append((*errors, p.low <= y[-1] <= p.high))
    gain, forgetting = np.array(rows[::2]), np.array(rows[1::2])
    return {"gain": gain.mean(0), "forgetting": forgetting.mean(0)}


@pytest.mark.whole
def test_with_the_papers_strength_it_is_near_the_least_squares_line():
    for quantity, (error, line, mean, covered) in simulate(0.9, 300).items():
        assert error < 1.2 * line, quantity  # 1.08 over many draws
        assert error < 0.5 * mean, quantity
        assert 0.85 <= covered <= 0.95, quantity


@pytest.mark.whole
def test_with_no_relation_it_is_near_the_plain_mean():
    for quantity, (error, line, mean, covered) in simulate(0.0, 300).items():
        assert error < 1.05 * mean, quantity  # 1.01 to 1.03 over 1,000 draws
        assert error < line, quantity
        assert 0.85 <= covered <= 0.95, quantity


@pytest.mark.parametrize("again", [False, True], ids=["other methods", "the same method"])
def test_runs_of_the_same_task_are_used_where_they_tell_more(again):
    rng = np.random.default_rng(0)
    rows = scattered(12)
    lora = [
        replace(o, method="lora", final_accuracy=o.zero_shot_accuracy + 0.5 * o.gain + e)
        for o, e in zip(rows, 0.005 * rng.normal(size=12), strict=True)
    ]
    if again:
        repeats = [replace(o, final_accuracy=o.final_accuracy + 0.005) for o in rows]
        rows = rows + repeats
        asked, rest = rows[3], [o for o in rows if o is not rows[3]]
    else:
        asked, rest = rows[3], [o for o in rows if o.task != "t3"]
    settings = {"before": asked.zero_shot_accuracy, "off_target": ["a", "b"]}
    known = predict(rest + lora, asked.iimm, task="t3", task_fingerprint="2e", **settings)
    assert next(iter(known.evidence["gain"].predictors)) == "other runs of the same task"
    assert abs(known.gain.point - asked.gain) < 0.03
    unknown = predict(rest + lora, asked.iimm, task="new", task_fingerprint="2e", **settings)
    other = predict(rest + lora, asked.iimm, task="t3", task_fingerprint="other", **settings)
    assert unknown.gain == other.gain
    assert known.gain.scale < 0.6 * unknown.gain.scale


def test_a_task_saved_once_under_each_method_still_helps():
    rows = scattered(12)
    lora = [replace(o, method="lora", final_accuracy=o.final_accuracy - 0.05) for o in rows]
    asked = {"before": rows[3].zero_shot_accuracy, "task": "t3", "task_fingerprint": "2e"}
    known = predict(rows + lora, rows[3].iimm, **asked)
    assert "other runs of the same task" in known.evidence["gain"].predictors


def test_the_learning_rate_is_used_where_it_varies():
    rates = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4] * 2
    rows = [
        run(i, 0.3 + 0.01 * (i % 3), drop=0.02 * math.log10(r / 1e-7), recipe={"learning_rate": r})
        for i, r in enumerate(rates)
    ]
    for rate in (3e-6, 5e-5):
        forecast = predict(rows, recipe={"learning_rate": rate})
        assert forecast.forgetting.point == pytest.approx(0.02 * math.log10(rate / 1e-7), abs=2e-3)
    assert next(iter(forecast.evidence["forgetting"].predictors)) == "mean + recipe"
    assert "recipe" not in "".join(predict(rows).evidence["forgetting"].predictors)  # not asked


@pytest.mark.parametrize(
    "value",
    ["1e-5", None, [1e-5], 0, -1.0, math.nan,
     True,
     pytest.param(10**400, id="huge")],
)  # fmt: skip
def test_a_learning_rate_that_is_no_number_is_passed_over(value):
    usual = predict(scattered())
    for rows, asked in ((value, 1e-5), (1e-5, value), (value, value)):
        found = predict(scattered(recipe={"learning_rate": rows}), recipe={"learning_rate": asked})
        assert math.isfinite(found.gain.scale)
        assert found.gain == usual.gain


# --- what it says of itself ---


@pytest.mark.parametrize(
    ("outcomes", "asked", "says"),
    [
        ([], {}, "no complete run of this model is saved"),
        ([replace(o, complete=False) for o in planted()], {}, "no complete run of this model"),
    ],
)
def test_no_forecast_is_made_up(outcomes, asked, says):
    forecast = predict(outcomes, **asked)
    assert (forecast.gain, forecast.forgetting, forecast.worst) == (None, None, None)
    assert forecast.basis.startswith("no forecast: ")
    assert says in forecast.basis
    assert not forecast.base_rate
    assert forecast.evidence == {}


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        (planted(2), "only 2 complete runs of this model are saved; runs on 3 tasks speak for"),
        ([run("t")], "only 1 complete run of this model is saved; runs on 3 tasks speak for"),
        ([run("t")] * 5, "all 5 complete runs of this model are of 't', which says nothing"),
        ([run("t"), run("u")] * 2, "of 't' and 'u', which says nothing of how tasks differ"),
    ],
)
def test_few_runs_count_from_the_first_one_and_that_is_said(outcomes, says):
    forecast = predict(outcomes)
    assert says in " ".join(forecast.notes)
    assert not forecast.base_rate
    for name in ("gain", "forgetting", "worst"):
        mean = np.mean([getattr(o, name) for o in outcomes])
        found = getattr(forecast, name)
        assert 0 < found.point / mean <= 1.01
        assert found.low <= mean <= found.high


def test_own_runs_take_over_from_borrowed_ones_as_they_come():
    rows = [run(f"t{i}", drop=-0.02) for i in range(2)]
    points = [predict(rows[:n], base_rates=True).forgetting.point for n in range(3)]
    assert points[0] > 0.03
    assert points[0] > points[1] > points[2] > -0.02
    assert points[2] < 0.01
    scales = [predict(rows[:n], base_rates=True).forgetting.scale for n in range(3)]
    assert scales[0] > scales[1] > scales[2]


@pytest.mark.parametrize("method", ["full", "lora", "bitfit"])
def test_without_runs_base_rates_stand_in_under_that_name(method):
    forecast = predict([], method=method, base_rates=True, before=0.5)
    assert forecast.base_rate
    shipped = len(load_base_rates()) + len(sample.load_outcomes())
    assert forecast.basis.startswith(f"base rates: borrowed from {shipped} complete runs of 4 othe")
    assert forecast.n_outcomes == shipped
    for found in (forecast.gain, forecast.forgetting, forecast.worst):
        assert -0.5 < found.low < found.point < found.high <= 0.5
    assert any("this model" in note for note in forecast.notes)
    assert not predict(planted(), method="full", base_rates=True).base_rate


def test_runs_of_the_very_task_alone_say_what_they_did():
    rows = [run("digits", gain=g) for g in (0.3, 0.32, 0.4)]
    forecast = predict(rows, task="digits", task_fingerprint="2e", base_rates=True)
    assert forecast.gain.point == pytest.approx(0.34, abs=0.01)
    assert not forecast.base_rate
    other = predict(rows, task="letters", task_fingerprint="3f", base_rates=True)
    assert other.gain.scale > 1.5 * forecast.gain.scale


# --- the linear probe ---


def probed(n=6, share=1.0, **changes):
    """Runs that gain a share of what their linear probe is ahead of zero-shot accuracy."""
    return [
        run(f"t{i}", 0.2 + 0.03 * ((5 * i) % 7), gain=share * way, before=0.3,
            linear_probe_accuracy=0.3 + way, **changes)
        for i, way in enumerate(np.linspace(0.05, 0.5, n).tolist())
    ]  # fmt: skip


SHORT = {"recipe": {"steps": 100, "batch_size": 32}}


def test_the_first_gain_is_that_of_the_linear_probe():
    asked = {"linear_probe_accuracy": 0.7, "base_rates": True, **SHORT}
    moved = predict([], **asked)
    assert moved.base_rate
    assert moved.gain.point == pytest.approx(0.4, abs=0.05)
    assert moved.evidence["gain"].predictors == {"linear probe, pooled": 1.0}
    light = predict([], method="bitfit", **asked)
    assert 0.1 < light.gain.point < 0.35
    unprobed = predict([], **asked | {"linear_probe_accuracy": None})
    assert unprobed.gain.scale > moved.gain.scale


def test_training_as_long_as_published_runs_goes_beyond_the_probe():
    asked = {"linear_probe_accuracy": 0.7, "base_rates": True, "before": 0.5}
    short = predict([], **asked, **SHORT).gain.point
    long = predict([], **asked, recipe={"steps": 4000, "batch_size": 32}).gain.point
    assert short == pytest.approx(0.2, abs=0.04)
    assert 0.27 < long < 0.4  # the error of 0.3 about halves
    unknown = predict([], **asked).gain
    assert short < unknown.point < long


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_own_runs_tell_how_far_a_method_goes(share):
    rows = probed(share=share, method="bitfit")
    asked = {"method": "bitfit", "linear_probe_accuracy": 0.6}
    points = [predict(rows[:n], **asked).gain.point for n in (1, 2, 6)]
    truth = share * 0.3
    assert points[-1] == pytest.approx(truth, abs=0.03)
    misses = [abs(p - truth) for p in points]
    assert misses[-1] <= misses[0] + 1e-9


def test_a_probe_that_tells_nothing_loses_to_the_mean():
    rows = [
        replace(o, final_accuracy=0.5, linear_probe_accuracy=0.3 + 0.05 * (i % 10))
        for i, o in enumerate(probed(10))
    ]
    forecast = predict(rows, linear_probe_accuracy=0.9)
    assert forecast.gain.point == pytest.approx(0.2, abs=0.05)
    assert forecast.evidence["gain"].predictors["mean"] > 0.3


def test_a_probe_that_is_unsure_widens_the_interval():
    usual = predict([], linear_probe_accuracy=0.6, base_rates=True, **SHORT)
    unsure = predict(
        [], linear_probe_accuracy=0.6, linear_probe_standard_error=0.2, base_rates=True, **SHORT
    )
    assert unsure.gain.scale > 1.3 * usual.gain.scale


def test_intervals_end_where_accuracies_end():
    asked = {"before": 0.9, "linear_probe_accuracy": 0.95, "base_rates": True}
    forecast = predict([], **asked, off_target={"a": 0.02, "b": 0.04})
    assert forecast.gain.high <= 0.1
    assert forecast.gain.probability_above(0.1) == 0
    assert forecast.forgetting.high <= 0.03
    assert forecast.worst.high <= 0.04


def test_a_recall_of_captions_has_no_base_rate():
    recipe = {"metrics": {"captions": "recall@1"}}
    forecast = predict([], base_rates=True, before=0.03, task="captions", recipe=recipe)
    assert forecast.gain is None
    assert forecast.forgetting is not None


def test_other_off_target_tasks_than_those_saved_are_said():
    same = predict(planted(), off_target=["a", "b"])
    other = predict(planted(), off_target=["c"])
    assert same.worst is not None
    assert other.worst is None
    assert not any("other off-target tasks" in note for note in same.notes)
    assert any("other off-target tasks" in note for note in other.notes)


def test_a_recipe_out_of_range_is_not_extrapolated():
    rows = [
        run(f"t{i}", 0.3 + 0.01 * (i % 3), drop=0.02 * (1 + level), recipe={"learning_rate": rate})
        for i in range(8)
        for level, rate in enumerate((1e-5, 1e-4))
    ]
    inside, edge, out = (predict(rows, recipe={"learning_rate": r}) for r in (3e-5, 1e-4, 2e-4))
    assert inside.in_range
    assert edge.in_range
    assert not out.in_range
    assert out.forgetting.point == pytest.approx(edge.forgetting.point)
    assert out.forgetting.scale > edge.forgetting.scale


def test_base_rates_without_a_probe_hold_for_any_recipe():
    recipe = {"learning_rate": 1e-2, "steps": 10}
    forecast = predict([], base_rates=True, before=0.5, recipe=recipe)
    assert forecast == predict([], base_rates=True, before=0.5)
    assert forecast.forgetting is not None
    assert "with other recipes" in forecast.basis


@pytest.mark.parametrize(("before", "gain"), [(0.95, True), (0.96, False)])
@pytest.mark.parametrize("base_rates", [False, True])
def test_near_the_ceiling_no_gain_is_forecast_and_that_is_said(before, gain, base_rates):
    forecast = predict([] if base_rates else planted(), before=before, base_rates=base_rates)
    assert (forecast.gain is not None) == gain == ("gain" in forecast.evidence)
    assert forecast.forgetting is not None
    assert ("zero-shot accuracy 0.96 is near 1" in " ".join(forecast.notes)) == (not gain)


def test_what_is_refused_before_training_is_not_forecast_in_it():
    rows = planted(curve=EARLY)
    observed = seen(gain=0.01, forgetting=0.02, worst=0.03)
    _, ceiling = update(rows, 0.2, observed, 0.3, before=0.96, off_target=["a", "b"])
    assert ceiling.gain is None
    assert None not in (ceiling.forgetting, ceiling.worst)
    _, others = update(rows, 0.2, observed, 0.3, off_target=["c"])
    assert others.worst is None
    assert "worst" not in others.next_look
    assert None not in (others.forgetting, others.gain)
    _, ended = update(rows, 1.0, observed, before=0.96, off_target=["c"])
    assert (ended.gain.point, ended.worst.point) == (0.01, 0.03)


def test_a_gain_beyond_the_ceiling_is_not_forecast():
    rows = [run(i, 0.2 + 0.02 * i, gain=0.5 + 0.01 * i, before=0.3) for i in range(8)]
    assert predict(rows, before=0.9).gain.point <= 0.1


def test_runs_without_off_target_tasks_forecast_the_gain_only():
    forecast = predict([bare(o) for o in planted()])
    assert forecast.gain is not None
    assert (forecast.forgetting, forecast.worst) == (None, None)


def test_runs_without_off_target_tasks_still_tell_of_gain_beside_others():
    others = [replace(bare(o), task=f"{o.task} alone") for o in planted()]
    forecast = predict([*planted(), *others])
    assert forecast.evidence["gain"].n_tasks == 18
    assert forecast.evidence["forgetting"].n_tasks == 9
    assert "9 complete runs without off-target tasks have only a gain" in forecast.notes


def test_different_off_target_sets_are_said_and_the_like_ones_preferred():
    wild = {"off_target_before": {"z": 0.9}, "off_target_after": {"z": 0.0}}
    rows = [*planted(5), *(replace(o, task=f"{o.task}z", **wild) for o in planted(5, seed=1))]
    forecast = predict(rows, task="new", off_target=["z"])
    assert any("different sets of off-target tasks" in note for note in forecast.notes)
    assert predict(rows).evidence["forgetting"].n_tasks == 10


def test_a_run_that_learns_a_canary_and_one_that_learns_another_task_compare():
    """All are measured on the canaries a to e: five learn one of these, two learn other tasks."""
    drops = {"a": 0.02, "b": 0.04, "c": 0.06, "d": 0.08, "e": 0.1}

    def learns(task):
        before = {name: 0.5 for name in drops if name != task}
        after = {name: 0.5 - drops[name] for name in before}
        return run(task, off_target_before=before, off_target_after=after)

    rows = [learns(task) for task in [*drops, "x", "y"]]
    for task in ("new", "y", "a"):
        rest = [o for o in rows if o.task != task]
        forecast = predict(rest, task=task, off_target=sorted(set(drops) - {task}))
        assert forecast.worst is not None
        assert forecast.evidence["worst"].n_tasks == len(rest)
        assert not [note for note in forecast.notes if "off-target" in note]
    assert predict(rows, task="new", off_target=["a", "z"]).worst is None


def test_one_set_of_off_target_tasks_for_all_is_one_set():
    assert predict(planted()).notes == ()


def test_one_suite_guarded_by_all_its_others_is_one_set():
    names = [f"t{i}" for i in range(5)]
    sets = [{n: 0.5 for n in names if n != mine} for mine in names]
    rows = [
        replace(o, off_target_before=s, off_target_after={n: 0.45 for n in s})
        for o, s in zip(planted(5), sets, strict=True)
    ]
    assert not any("off-target" in note for note in predict(rows).notes)


def test_runs_that_all_ended_the_same_are_no_certainty():
    rows = [run(i, 0.2 + 0.02 * i, gain=0.3, drop=0.05) for i in range(6)]
    forecast = predict(rows)
    assert forecast.gain.point == pytest.approx(0.3, abs=1e-6)
    assert forecast.gain.scale >= 0.5 / math.sqrt(512)
    assert "all 6 runs ended with the same gain" in forecast.notes
    assert 0 < forecast.forgetting.probability_above(0.06) < 0.5


def test_probes_of_the_former_form_are_used_and_said():
    rows = [replace(row, linear_probe_accuracy=0.6) for row in scattered(6)]
    former = [replace(row, schema_version=1) for row in rows[:2]]
    forecast = predict([*former, *rows[2:]], linear_probe_accuracy=0.6)
    assert "2 complete runs of this model were saved with the linear probe in its former form" in (
        " ".join(forecast.notes)
    )
    assert forecast.gain == (now := predict(rows, linear_probe_accuracy=0.6)).gain
    assert "former" not in " ".join(now.notes)


def test_contradicting_fingerprints_are_said_and_not_mixed():
    strangers = planted(4, model_fingerprint="9")
    forecast = predict([*planted(), *strangers])
    assert "4 complete runs of a model of the same name" in " ".join(forecast.notes)
    assert forecast.gain == predict(planted()).gain
    other = replace(planted()[0], task_fingerprint="other")
    notes = " ".join(predict([*planted(), other]).notes)
    assert "under one name with other images, prompts or preprocessing: 't0'" in notes


def test_a_task_whose_fingerprint_is_not_that_saved_is_said():
    forecast = predict(planted(), task="t0", task_fingerprint="other")
    assert any("'t0'" in note for note in forecast.notes)


@pytest.mark.parametrize("share", [None, 0.1])
def test_runs_without_iimm_are_forecast_from_what_there_is(share):
    unmeasured = {"iimm": None, "inter": None, "intra": None, "standard_error": None}
    rows = [replace(o, **unmeasured) for o in planted(curve=EARLY)]
    prior, new = update(rows, share or 0.1, seen(0.1, 0.02, 0.07))
    forecast = new if share else prior
    assert math.isfinite(forecast.gain.point)
    assert not any("IIMM" in name for name in forecast.evidence["gain"].predictors)
    # Few of many: they are left out, and IIMM is used.
    few = predict([*planted(), *(replace(o, task=f"{o.task}?") for o in rows[:3])])
    assert few.gain.point == pytest.approx((0.1 + 0.3) * 0.7, abs=1e-3)


def test_runs_without_the_two_terms_leave_no_nan():
    rows = [replace(o, inter=None, intra=None) for o in planted()]
    assert math.isfinite(predict(rows).gain.point)


def test_runs_without_off_target_tasks_leave_no_nan_in_training():
    rows = scattered(curve=EARLY)
    rows += [replace(bare(o), task=f"{o.task} alone") for o in rows]
    _, new = update(rows, 0.1, seen(0.1, 0.02, 0.02))
    assert math.isfinite(new.gain.point)


def test_incomplete_runs_are_left_out():
    cut = [run(f"c{i}", 0.3, -0.2, 0.4, complete=False) for i in range(9)]
    assert predict([*planted(), *cut]) == predict(planted())


def test_the_model_may_be_left_out_only_where_there_is_one():
    assert predict(planted(), model=None) == predict(planted())
    with pytest.raises(ValueError, match="outcomes are of 2 models"):
        predict([*planted(), run("t", model_fingerprint="9")], model=None)


def test_runs_of_other_models_stand_in_without_their_iimm():
    rows = [*planted(model_fingerprint="8"), *planted(2)]
    forecast = predict(rows)
    assert not forecast.base_rate
    assert forecast.basis == (
        "2 complete runs of this model, pooled with 9 complete runs of 1 other model"
    )
    assert not any("IIMM" in name for name in forecast.evidence["gain"].predictors)
    assert forecast.gain.scale > predict(planted()).gain.scale


def test_a_method_never_seen_is_forecast_from_the_others_with_their_spread():
    rows = [*scattered(), *scattered(seed=1, method="lora", shift=0.3)]
    forecast = predict(rows, method="bitfit")
    assert "no run under method 'bitfit' is saved: its interval is a guess" in forecast.notes
    for method in ("full", "lora"):
        assert forecast.gain.scale > 1.2 * predict(rows, method=method).gain.scale
    middle = np.mean([o.gain for o in rows])
    assert forecast.gain.point == pytest.approx(middle, abs=0.08)


def test_a_method_never_seen_is_as_unsure_as_the_methods_differ():
    # The two seen are known well, and lie 0.3 apart: a spread of 0.15 about their mean.
    rows = [
        run(f"t{i}", 0.3 + 0.01 * i, gain + 0.01 * (i % 2), method=method)
        for i in range(8)
        for method, gain in (("full", 0.2), ("lora", 0.5))
    ]
    assert predict(rows).gain.scale < 0.02
    assert 0.3 <= predict(rows, method="bitfit").gain.scale < 0.32  # doubled: it is a guess


def test_a_method_seen_once_is_pooled_with_the_others():
    rows = [*scattered(12), *scattered(1, seed=3, method="lora", shift=0.5)]
    points = [predict(rows, method=m).gain.point for m in ("full", "lora")]
    assert points[0] + 0.05 < points[1] < rows[-1].gain


def test_a_method_never_seen_under_any_model_is_said():
    others = [*scattered(model_fingerprint="8"), *scattered(model_fingerprint="9")]
    forecast = predict(others, method="bitfit")
    assert any("'bitfit'" in note for note in forecast.notes)
    assert forecast.gain.scale > predict(others).gain.scale


RATE = {"recipe": {"learning_rate": 1e-5, "steps": 100}}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"x": 0.7}, "IIMM lies outside the range of the saved runs"),
        ({"x": -0.1}, "IIMM lies outside the range of the saved runs"),
        ({"recipe": {"learning_rate": 4e-5, "steps": 100}}, "learning rate lies outside"),
        ({"recipe": {"learning_rate": 3e-6, "steps": 100}}, "learning rate lies outside"),
        ({"recipe": {"learning_rate": 1e-5, "steps": 400}}, "number of steps lies outside"),
    ],
)
def test_out_of_range_is_said_and_widens(asked, says):
    rows = scattered(**RATE)
    usual = predict(rows, **{"x": 0.3, **RATE})
    forecast = predict(rows, **{"x": 0.3, **RATE, **asked})
    assert says in " ".join(forecast.notes)
    assert says not in " ".join(usual.notes)
    for quantity in ("gain", "forgetting", "worst"):
        assert getattr(forecast, quantity).scale > 1.5 * getattr(usual, quantity).scale


@pytest.mark.parametrize(
    "asked",
    [{"x": 2.0}, {"recipe": {"learning_rate": 1.0, "steps": 100}},
     {"recipe": {"learning_rate": 1e-5, "steps": 10**5}}],
)  # fmt: skip
def test_far_out_of_range_there_is_no_forecast(asked):
    forecast = predict(scattered(**RATE), **{"x": 0.3, **RATE, **asked})
    assert (forecast.gain, forecast.forgetting, forecast.worst) == (None, None, None)
    assert forecast.basis.startswith("no forecast: ")


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"x": 2.0}, "IIMM"), ({"recipe": {"learning_rate": 1.0, "steps": 100}}, "learning rate")],
)
def test_far_out_of_range_the_reason_is_given(asked, says):
    forecast = predict(scattered(**RATE), **{"x": 0.3, **RATE, **asked})
    assert f"{says} lies" in forecast.basis


def test_one_run_without_a_learning_rate_does_not_hide_that_another_is_out_of_range():
    rows = [*scattered(**RATE), replace(scattered(10)[-1], recipe={})]
    forecast = predict(rows, recipe={"learning_rate": 1.0, "steps": 100})
    assert "learning rate lies" in " ".join((forecast.basis, *forecast.notes))


def test_out_of_range_widens_in_training_too():
    rows = scattered(curve=EARLY, seed=2)
    rng = np.random.default_rng(0)
    for o in rows:  # looks that leave some spread
        o.trajectory[2]["forgetting"] += 0.01 * rng.normal()
    scales = [
        update([replace(o, **RATE) for o in rows], 0.1, seen(forgetting=0.02),
               recipe={"learning_rate": rate, "steps": 100})[1].forgetting.scale
        for rate in (1e-5, 4e-5)
    ]  # fmt: skip
    assert scales[1] > 1.2 * scales[0]


# --- during training ---


def test_the_learned_line_takes_over():
    prior, new = update(scattered(curve=EARLY), 0.1, seen(0.1, 0.045, 0.045))
    assert new.forgetting.point == pytest.approx(0.09, abs=1e-3)  # half of it is lost at 10 %
    assert new.gain.point == pytest.approx(0.2, abs=1e-3)
    assert new.forgetting.scale < 0.1 * prior.forgetting.scale
    assert new.evidence["forgetting"].predictors["line on what was seen so far"] > 0.5
    assert "gain and forgetting and worst at 10% of the steps" in new.basis
    assert prior.basis in new.basis


def test_between_looks_saved_the_line_is_interpolated():
    _, new = update(scattered(curve=EARLY), 0.15, seen(forgetting=0.06))
    assert new.forgetting.point == pytest.approx(0.1, abs=1e-3)  # 60 % is lost at 15 %


def test_looks_that_tell_nothing_leave_the_forecast_near_that_before_training():
    rng = np.random.default_rng(0)
    rows = planted(12, curve=EARLY)
    for o in rows:
        o.trajectory[2]["forgetting"] = 0.05 + 0.05 * rng.normal()
    prior, new = update(rows, 0.1, seen(forgetting=0.1))
    assert new.evidence["forgetting"].predictors["forecast before training"] > 0.9
    assert new.forgetting.point == pytest.approx(prior.forgetting.point, abs=0.01)


def test_quantities_that_were_not_seen_keep_their_forecast():
    prior, new = update(scattered(curve=EARLY), 0.1, seen(forgetting=0.03))
    assert (new.gain, new.worst) == (prior.gain, prior.worst)


@pytest.mark.parametrize("outcomes", [planted(curve=EARLY), []], ids=["record", "none"])
def test_at_the_last_step_it_equals_what_is_observed(outcomes):
    prior, new = update(outcomes, 1.0, seen(None, 0.03, error=0.02))
    assert new.forgetting == Prediction(0.03, 0.02, math.inf)
    assert new.worst == prior.worst  # not seen
    assert new.basis == "what is observed"
    assert (new.base_rate, new.next_look) == (False, {})


def test_at_the_last_step_the_gain_is_the_observed_one():
    _, new = update(planted(), 1.0, seen(0.25, error=0.02))
    assert new.gain == Prediction(0.25, 0.02, math.inf)


def test_with_no_record_nothing_is_made_of_what_was_lost():
    prior, new = update([], 0.3, seen(0.3, 0.04, 0.1), next_share=0.8)
    assert new == prior


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.7])
def test_a_first_run_borrows_the_line_from_what_was_lost_so_far(share):
    asked = {"base_rates": True, "linear_probe_accuracy": 0.6, **SHORT}
    prior, low = update([], share, seen(0.1, 0.0, 0.01), next_share=0.8, **asked)
    _, high = update([], share, seen(0.1, 0.1, 0.2), next_share=0.8, **asked)
    assert high.base_rate
    assert f"gain and forgetting and worst at {share:.0%} of the steps" in high.basis
    for name in ("forgetting", "worst"):
        one, other = getattr(low, name), getattr(high, name)
        assert one.point + 0.04 < other.point
        assert one.scale < 1.1 * getattr(prior, name).scale
        assert high.next_look[name].scale <= other.scale * 1.05
    assert high.gain.scale <= prior.gain.scale
    if share >= 0.3:  # before that the gain so far tells nothing: the linear probe's forecast stays
        assert high.gain.scale < prior.gain.scale


def test_it_never_extrapolates_in_steps():
    # In all runs half was lost at 5 %, and no more after 10 %: a line in steps would say tenfold.
    curve = (0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    _, new = update(scattered(curve=curve), 0.1, seen(forgetting=0.08))
    assert new.forgetting.point == pytest.approx(0.08, abs=1e-3)


def test_looks_noisier_than_those_saved_widen_the_interval():
    rows = scattered(curve=EARLY)
    usual, same, noisy = (
        update(rows, 0.1, seen(forgetting=0.03, error=error))[1].forgetting
        for error in (0.002, 0.01, 0.05)
    )
    assert usual == same  # the scatter of the saved runs holds as much already
    # The end is twice what is lost at 10 %, and so is the noise in it.
    assert noisy.scale == pytest.approx(2 * math.sqrt(0.05**2 - 0.01**2), rel=0.02)
    assert noisy.point == same.point
    assert noisy.probability_above(0.1) > same.probability_above(0.1)


def test_intervals_in_training_cover_about_90_percent():
    rng = np.random.default_rng(0)
    inside, errors, plain = [], [], []
    for draw in range(60):
        rows = scattered(12, seed=draw, curve=EARLY)
        for o in rows:
            o.trajectory[2]["forgetting"] += 0.01 * rng.normal()
        mine, rest = rows[-1], rows[:-1]
        observed = seen(forgetting=mine.trajectory[2]["forgetting"])
        _, new = update(rest, 0.1, observed, x=mine.iimm, before=mine.zero_shot_accuracy)
        inside.append(new.forgetting.low <= mine.forgetting <= new.forgetting.high)
        errors.append(abs(new.forgetting.point - mine.forgetting))
        plain.append(abs(np.mean([o.forgetting for o in rest]) - mine.forgetting))
    assert 0.82 <= np.mean(inside) <= 0.98  # two sigma of 60 draws
    assert np.mean(errors) < 0.75 * np.mean(plain)


def test_the_next_look_is_forecast_beside_the_end():
    rows = scattered(curve=EARLY)
    prior, new = update(rows, 0.1, seen(0.1, 0.045, 0.045), next_share=0.2)
    assert set(new.next_look) == {"forgetting", "worst"}
    assert new.next_look["forgetting"].point == pytest.approx(0.09 * 0.7, abs=1e-3)
    assert prior.next_look == {}
    before = predict(rows, next_share=0.05)
    assert set(before.next_look) == {"forgetting", "worst"}
    found = before.next_look["forgetting"].point
    # The end rests on the pooled forecast too, so it is near what the look says, not at it.
    assert found == pytest.approx(0.4 * before.forgetting.point, rel=0.03)
    half = predict(scattered(curve=(0.0, 0.2, *EARLY[2:])), next_share=0.05)
    assert half.next_look["forgetting"].point == pytest.approx(found / 2, abs=1e-6)


def test_runs_without_looks_leave_the_forecast_as_it_was():
    prior, new = update(planted(), 0.1, seen(0.1, 0.05, 0.1), next_share=0.2)
    assert new == prior


def test_only_a_forecast_of_predict_can_be_updated():
    forecaster, prior = ask(planted(curve=EARLY))
    by_hand = Forecast(prior.gain, prior.forgetting, prior.worst, prior.basis)
    with pytest.raises(ValueError, match="must be what `predict` gave"):
        forecaster.update(by_hand, share=0.1, seen=seen(0.1, 0.05, 0.1))


@pytest.mark.parametrize("n", [3, 4, 9])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.999])
def test_few_runs_and_odd_moments_give_finite_numbers(n, share):
    rows = scattered(n, curve=EARLY)
    forecaster, prior = ask(rows)
    new = forecaster.update(prior, share=share, seen=seen(0.1, 0.02, 0.03), next_share=1.0)
    for forecast in (prior, new):
        text = json.dumps(forecast.to_json(), allow_nan=False)
        assert json.loads(text)["n_outcomes"] == n
        for quantity in ("gain", "forgetting", "worst"):
            p = getattr(forecast, quantity)
            assert p.low <= p.point <= p.high
            assert p.scale > 0
            assert p.dof >= 1


def test_data_for_a_file_holds_what_the_forecast_rests_on():
    data = predict(planted(noise=0.01)).to_json()
    assert data["gain"]["low"] < data["gain"]["point"] < data["gain"]["high"]
    assert data["evidence"]["gain"]["n_tasks"] == 9
    assert set(data["evidence"]) == {"gain", "forgetting", "worst"}
    assert {"basis", "notes", "base_rate", "n_outcomes"} <= set(data)


def test_the_same_forecaster_answers_again_alike_and_forgets_what_it_was_fitted_on():
    forecaster, first = ask(planted(noise=0.05, curve=EARLY))
    settings = {"method": "full", "zero_shot_accuracy": 0.3, "model": "1f"}
    m = Measurement(0.3, 0.3, 0.3, 0.01, 512, 10)
    assert forecaster.predict(m, **settings) == first
    again = forecaster.fit(planted(noise=0.05, seed=1), base_rates=False).predict(m, **settings)
    assert again.gain != first.gain


def test_no_look_makes_the_forecast_of_the_gain_less_sure():
    runs = sample.load_outcomes()
    new = next(o for o in runs if o.task == "handwritten_digits" and o.method == "full")
    known = Forecaster().fit([o for o in runs if o.task != new.task])
    before = known.predict(measured(new), **about(new))
    widths = []
    for look in new.trajectory[1:-1]:
        seen = {q: (look[q], look[f"{q}_se"]) for q in ("gain", "forgetting", "worst")}
        widths.append(known.update(before, share=look["share"], seen=seen).gain.width)
    assert max(widths) <= before.gain.width
    assert widths[0] == before.gain.width  # the probe tells more than the first steps
    assert widths[-1] < before.gain.width
