"""The mixed model, held against itself."""

import numpy as np
import pytest

from iimm_callbacks.forecasting.mixed_model import (
    Effect,
    Rows,
    covariance,
    heavy_tailed,
    left_out,
    predict,
    surprises,
)

EFFECTS = (
    Effect("one", (), 0.3),
    Effect("one", ("task",), 0.1),
    Effect("slope", ("model",), 0.2),
    Effect("one", ("model", "task"), 0.05),
)


def rows(n, seed):
    rng = np.random.default_rng(seed)
    numbers = {
        "one": np.ones(n),
        "slope": rng.normal(size=n),
        "noise": rng.uniform(0.005, 0.1, n),
    }
    groups = {
        "task": rng.choice(list("abcde"), n),
        "model": rng.choice(["x", "y"], n),
    }
    return Rows(numbers, groups, rng.normal(size=n))


def take(rows, some):
    numbers, groups = ({k: v[some] for k, v in m.items()} for m in (rows.numbers, rows.groups))
    return Rows(numbers, groups, rows.target[some])


@pytest.mark.parametrize("by", ["task", "model"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_is_predicted_from_all_other_groups(by, seed):
    known = rows(40, seed)
    asked = np.random.default_rng(seed).random(40) < 0.7
    points, scales = left_out(known, covariance(known, known, EFFECTS), asked, by)
    assert np.isnan(points[~asked]).all()
    assert np.isnan(scales[~asked]).all()
    for group in set(known.groups[by][asked]):
        own = known.groups[by] == group
        expected = predict(take(known, ~own), take(known, own & asked), EFFECTS)
        np.testing.assert_allclose(points[own & asked], expected[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(scales[own & asked], expected[1], rtol=1e-9)


def test_the_only_group_is_predicted_from_nothing():
    known = rows(6, 0)
    known.groups["task"][:] = "a"
    points, scales = left_out(known, covariance(known, known, EFFECTS), np.ones(6, bool), "task")
    nothing = predict(take(known, np.zeros(6, bool)), known, EFFECTS)
    np.testing.assert_allclose(points, nothing[0], atol=1e-12)
    np.testing.assert_allclose(scales, nothing[1], rtol=1e-9)


def test_one_run_moves_its_group_by_the_share_of_the_variance_that_is_not_noise():
    one, nothing = np.ones(1), np.array([0.0])
    known = Rows({"one": one, "noise": one * 0.1}, {"task": np.array(["a"])}, np.array([0.5]))
    asked = Rows({"one": one, "noise": nothing}, {"task": np.array(["a"])}, np.array([np.nan]))
    point, scale = predict(known, asked, [Effect("one", ("task",), 0.2)])
    assert point[0] == pytest.approx(0.5 * 0.04 / 0.05)
    assert scale[0] == pytest.approx((0.04 - 0.04**2 / 0.05) ** 0.5)


TASKS = (Effect("one", (), 0.1), Effect("one", ("task",), 0.02))


def of_tasks(*targets):
    """A run each on so many tasks."""
    one = np.ones(len(targets))
    names = np.array([f"task {i}" for i in range(len(targets))])
    return Rows({"one": one, "noise": 0.01 * one}, {"task": names}, np.array(targets))


def asked():
    return Rows(
        {"one": np.ones(1), "noise": np.array([0.01])}, {"task": np.array(["new"])}, np.zeros(1)
    )


def test_an_odd_task_hardly_moves_the_forecast_of_another():
    usual, odd = of_tasks(0.05, 0.04, 0.06), of_tasks(0.05, 0.04, 0.06, 0.45)
    without = predict(usual, asked(), TASKS)[0][0]
    assert predict(odd, asked(), TASKS)[0][0] > without + 0.08
    rows = heavy_tailed(odd, covariance(odd, odd, TASKS), "task", 3)
    assert abs(predict(rows, asked(), TASKS)[0][0] - without) < 0.02
    assert not rows.numbers["odd"][:3].any()
    points, scales = left_out(rows, covariance(rows, rows, TASKS), np.ones(4, bool), "task")
    squares = surprises(rows, points, scales, np.ones(4, bool), "task")
    # What it weighs is the weight of a Student-t likelihood: 4 / (3 + s²).
    weight = scales[3] ** 2 / (scales[3] ** 2 + rows.numbers["odd"][3] ** 2)
    assert weight == pytest.approx(4 / (3 + squares[3]), rel=0.1)


def test_tasks_that_do_as_expected_count_as_before():
    known = of_tasks(0.05, 0.04, 0.06)
    rows = heavy_tailed(known, covariance(known, known, TASKS), "task", 3)
    assert predict(rows, asked(), TASKS) == predict(known, asked(), TASKS)


def test_with_normal_tails_no_task_counts_less():
    known = of_tasks(0.05, 0.04, 0.06, 0.45)
    rows = heavy_tailed(known, covariance(known, known, TASKS), "task", np.inf)
    assert not rows.numbers["odd"].any()


def test_what_is_left_out_of_an_odd_task_is_as_wide_as_of_a_new_one():
    odd = of_tasks(0.05, 0.04, 0.06, 0.45)
    rows = heavy_tailed(odd, covariance(odd, odd, TASKS), "task", 3)
    others = take(rows, np.arange(4) < 3)
    points, scales = left_out(rows, covariance(rows, rows, TASKS), np.ones(4, bool), "task")
    expected = predict(others, asked(), TASKS)
    assert points[3] == pytest.approx(expected[0][0])
    assert scales[3] == pytest.approx(expected[1][0])
