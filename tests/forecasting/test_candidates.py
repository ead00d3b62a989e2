"""Candidates and their average, against refitting from scratch and against arithmetic by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from iimm_callbacks.forecasting.candidates import Candidate, _weights, blend
from iimm_callbacks.forecasting.tabulate import Question, Table

pytestmark = pytest.mark.once

MEAN = Candidate("mean")
LINE = Candidate("line", ("x",))
BOTH = Candidate("both", ("x", "z"))
OVER = Candidate("over error", ("x",), times="e")
FREE = Candidate("as it is", offset="s", intercept=False)
REST = Candidate("and the mean rest", offset="s")
SINGLE = (MEAN, LINE, BOTH, OVER, FREE, REST)
POOLED = tuple(replace(c, pooled=True) for c in (MEAN, LINE, OVER, REST))


def table(tasks, target, methods=None, models=None, **features):
    n = len(tasks)
    columns = {k: np.asarray(v, dtype=float) for k, v in features.items()}
    names = [np.array([*map(str, c)]) for c in (tasks, methods or ["m"] * n, models or ["1"] * n)]
    return Table(*names, np.asarray(target, dtype=float), columns)


def random_table(seed=0, tasks=7, methods=("m", "o", "p"), models=("1",), drop=0.2):
    """Runs of methods on tasks, some of them repeated and some missing."""
    rng = np.random.default_rng(seed)
    cells = [(t, m, w) for t in range(tasks) for m in methods for w in models]
    cells = [c for c in cells if rng.random() > drop] + [c for c in cells if rng.random() < 0.3]
    n = len(cells)
    features = {k: rng.normal(size=n) for k in "xzs"} | {"e": rng.uniform(0.2, 0.9, n)}
    return table(
        [f"t{t}" for t, _, _ in cells],
        rng.normal(size=n) + [0.5 * t for t, _, _ in cells],
        [m for _, m, _ in cells],
        [w for _, _, w in cells],
        **features,
    )


def fit_from_scratch(data, candidate, method, keep):
    """Weighted least squares by `lstsq` on the kept rows, the ridge as added rows; -> predictor."""
    rows = np.flatnonzero(keep if candidate.pooled else keep & (data.methods == method))
    cell = list(zip(data.tasks, data.methods, data.models, strict=True))
    methods = sorted(set(data.methods)) if candidate.pooled else []
    models = sorted(set(data.models)) if candidate.pooled else []
    models = models if len(models) > 1 else []

    def columns(i):
        times = data.features[candidate.times][i] if candidate.times else 1.0
        own = [data.features[name][i] for name in candidate.features]
        marks = [data.methods[i] == m for m in methods] + [data.models[i] == m for m in models]
        return times * np.array([1.0] * candidate.intercept + own + [*map(float, marks)])

    def offset(i):
        return data.features[candidate.offset][i] if candidate.offset else 0.0

    x = np.array([columns(i) for i in rows])
    y = np.array([data.target[i] - offset(i) for i in rows])
    root = np.sqrt([1 / cell.count(cell[i]) for i in rows])
    everywhere = [i for i in range(len(cell)) if candidate.pooled or data.methods[i] == method]
    size = np.mean([columns(i)[0] ** 2 for i in everywhere]) if x.size else 1.0
    free = x.shape[1] - len(methods) - len(models)
    ridge = np.sqrt(size) * np.eye(x.shape[1])[free:]
    beta = np.linalg.lstsq(
        np.concatenate([x * root[:, None], ridge]),
        np.concatenate([y * root, np.zeros(len(ridge))]),
        rcond=None,
    )[0]
    return lambda i: offset(i) + columns(i) @ beta


@pytest.mark.parametrize("models", [("1",), ("1", "2")])
@pytest.mark.parametrize("candidate", [*SINGLE, *POOLED], ids=lambda c: f"{c.name}-{c.pooled}")
def test_left_out_predictions_are_those_of_refitting_without_the_task(candidate, models):
    data = random_table(models=models)
    found = blend(data, [candidate], "m", 0.9)  # alone: the average is the candidate itself
    for i in range(len(data.tasks)):
        if data.methods[i] != "m":
            assert np.isnan(found.left_out[i])
            continue
        refit = fit_from_scratch(data, candidate, "m", data.tasks != data.tasks[i])
        assert found.left_out[i] == pytest.approx(refit(i), abs=1e-6)


@pytest.mark.parametrize("candidate", [*SINGLE, *POOLED], ids=lambda c: f"{c.name}-{c.pooled}")
def test_a_prediction_is_that_of_the_fit_to_all_tasks(candidate):
    data = random_table(1)
    refit = fit_from_scratch(data, candidate, "m", np.ones(len(data.tasks), bool))
    found = blend(data, [candidate], "m", 0.9)
    for i in np.flatnonzero(data.methods == "m"):
        asked = Question("m", "1", {k: v[i] for k, v in data.features.items()})
        assert found.predict(asked)[0] == pytest.approx(refit(i), abs=1e-6)


@pytest.mark.parametrize("candidate", [MEAN, LINE, REST, *POOLED], ids=str)
def test_what_a_task_did_leaves_no_trace_in_its_left_out_predictions(candidate):
    data = random_table(2)
    wild = replace(data, target=np.where(data.tasks == "t3", 1e3, data.target))
    rows = (data.tasks == "t3") & (data.methods == "m")
    before, after = (blend(d, [candidate], "m", 0.9).left_out for d in (data, wild))
    assert rows.any()
    np.testing.assert_allclose(after[rows], before[rows], rtol=1e-6)
    assert not np.allclose(
        after[~rows & (data.methods == "m")], before[~rows & (data.methods == "m")]
    )


def test_weights_by_hand():
    # Two tasks: errors 0.1 and 0.2, then T/2 = 1, so 1/0.1 : 1/0.2; the slope costs a factor 4.
    weights = _weights(np.array([[0.05, 0.15], [0.2, 0.2], [0.1, 0.1]]), np.array([0, 0, 1]))
    np.testing.assert_allclose(weights, np.array([10, 5, 10 / 4]) / 17.5)
    # Ten tasks: twice as wrong weighs 1/32.
    weights = _weights(np.array([[0.1] * 10, [0.2] * 10]), np.array([0, 0]))
    assert weights[1] / weights[0] == pytest.approx(1 / 32)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1.0, 1e6])
def test_weights_sum_to_1_whatever_the_errors(scale):
    rng = np.random.default_rng(0)
    weights = _weights(scale * rng.uniform(size=(5, 9)), np.arange(5))
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()


def test_the_average_is_weighted_by_the_errors_of_all_tasks():
    data = random_table(3, drop=0)
    candidates = [MEAN, LINE, FREE]
    found = blend(data, candidates, "m", 0.9)
    asked = Question("m", "1", {"x": 0.3, "z": 0.1, "s": -0.2, "e": 0.5})
    alone = [blend(data, [c], "m", 0.9) for c in candidates]
    assert sum(found.weights.values()) == pytest.approx(1)
    for c, single in zip(candidates, alone, strict=True):
        assert found.errors[c] == pytest.approx(single.error)
    raw = [found.errors[c] ** -3.5 / 4 ** len(c.features) for c in candidates]  # seven tasks
    assert list(found.weights.values()) == pytest.approx(list(raw / np.sum(raw)))
    points = [single.predict(asked)[0] for single in alone]
    assert found.predict(asked)[0] == pytest.approx(np.dot(raw, points) / np.sum(raw))


def test_a_perfect_predictor_takes_over():
    x = np.arange(8.0)
    found = blend(table(range(8), 2 + 3 * x, x=x), [MEAN, LINE], "m", 0.9)
    assert found.weights[LINE] > 0.9999
    assert found.predict(Question("m", "1", {"x": 20.0}))[0] == pytest.approx(62, abs=1e-3)
    assert found.error < 1e-3


def test_a_slope_that_explains_nothing_has_less_say_than_the_mean():
    shares = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = table(range(9), rng.normal(size=9), x=rng.normal(size=9))
        shares.append(blend(data, [MEAN, LINE], "m", 0.9).weights[LINE])
    assert np.mean(shares) < 0.25


@pytest.mark.parametrize("repeats", [1, 2, 30])
def test_repeats_of_one_run_do_not_count_as_more(repeats):
    x, y = np.array([0.0, 1, 2, 4, 7]), np.array([1.0, 0, 3, 2, 9])
    again = [0] * (repeats - 1) + list(range(5))  # the first run, repeated
    data = table(again, y[again], x=x[again])
    found = blend(data, [MEAN, LINE], "m", 0.9)
    once = blend(table(range(5), y, x=x), [MEAN, LINE], "m", 0.9)
    asked = Question("m", "1", {"x": 5.0})
    assert data.weights[:repeats].sum() == pytest.approx(1)
    assert found.predict(asked)[0] == pytest.approx(once.predict(asked)[0])
    assert found.predict(asked)[1] == pytest.approx(once.predict(asked)[1], rel=0.02)
    assert found.error == pytest.approx(once.error)
    assert (found.dof, found.n_tasks) == (once.dof, 5)


def test_cells_are_told_apart_by_task_method_and_model():
    data = table("aaab", [0] * 4, methods=["m", "m", "o", "m"], models="1211")
    np.testing.assert_array_equal(data.weights, 1)
    data = table("aaab", [0] * 4, methods=["m", "m", "o", "m"])
    np.testing.assert_array_equal(data.weights, [0.5, 0.5, 1, 1])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_offset_of_a_method_on_n_tasks_is_shrunk_to_n_over_n_plus_1(n):
    # The intercept is pinned to 0 by very many other methods; "o" lies 1 above it on n tasks.
    names = [f"m{k}" for k in range(200) for _ in range(5)] + ["o"] * n
    data = table([*range(5)] * 200 + [*range(n)], [0.0] * 1000 + [1.0] * n, methods=names)
    found = blend(data, [replace(MEAN, pooled=True)], "o", 0.9)
    point, _ = found.predict(Question("o", "1", {}))
    assert point == pytest.approx(n / (n + 1), abs=0.01)


def test_a_method_never_seen_gets_no_offset_of_its_own():
    data = table([*range(6)] * 2, [0.0] * 6 + [1.0] * 6, methods=["m"] * 6 + ["o"] * 6)
    found = blend(data, [MEAN, replace(MEAN, pooled=True)], "new", 0.9)
    assert list(found.weights) == [replace(MEAN, pooled=True)]
    assert found.predict(Question("new", "1", {}))[0] == pytest.approx(0.5)
    assert (found.n_runs, found.n_tasks) == (12, 6)


def test_the_standard_error_is_that_of_the_left_out_errors():
    # Means of the others: 3, 2.5, 2.5, 2, so the errors are -3, -0.5, ... by hand.
    y = np.array([0.0, 1, 2, 7])
    errors = y - (y.sum() - y) / 3
    found = blend(table(range(4), y), [MEAN], "m", 0.9)
    point, scale = found.predict(Question("m", "1", {}))
    assert point == pytest.approx(2.5)
    assert found.scale == pytest.approx(np.sqrt(np.mean(errors**2)))
    # Leverage of a mean of 4 is 1/4; those errors were measured with means of 3.
    assert scale == pytest.approx(found.scale * np.sqrt((1 + 1 / 4) / (1 + 1 / 3)))
    assert found.dof == 3


def test_the_interval_widens_away_from_the_data_as_the_textbook_one():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, 12)
    data = table(range(12), 1 + x + 0.1 * rng.normal(size=12), x=x)
    found = blend(data, [LINE], "m", 0.9)

    def textbook(at):
        return np.sqrt(1 + 1 / 12 + (at - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))

    centre = found.predict(Question("m", "1", {"x": x.mean()}))[1]
    for at in (-2.0, 0.2, 1.0, 5.0):
        wider = found.predict(Question("m", "1", {"x": at}))[1] / centre
        assert wider == pytest.approx(textbook(at) / textbook(x.mean()), rel=1e-6)


def test_the_scale_is_near_the_textbook_standard_error():
    ratios = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x = rng.uniform(0, 1, 12)
        y = 1 + x + 0.1 * rng.normal(size=12)
        line = stats.linregress(x, y)
        s = np.sqrt(np.sum((y - line.intercept - line.slope * x) ** 2) / 10)
        found = blend(table(range(12), y, x=x), [LINE], "m", 0.9)
        scale = found.predict(Question("m", "1", {"x": x.mean()}))[1]
        ratios.append(scale / (s * np.sqrt(1 + 1 / 12)))
    assert 0.95 < np.mean(ratios) < 1.1


def test_errors_of_the_average_come_from_weights_blind_to_the_task():
    data = random_table(5, drop=0)
    found = blend(data, SINGLE, "m", 0.9)
    single = {c: blend(data, [c], "m", 0.9).left_out for c in SINGLE}
    rows = data.methods == "m"
    names = sorted(set(data.tasks))
    misses = np.array(
        [
            [np.abs(data.target - left)[rows & (data.tasks == t)].mean() for t in names]
            for left in single.values()
        ]
    )
    slopes = np.array([len(c.features) + 0.5 * bool(c.times) for c in SINGLE])
    for t, name in enumerate(names):
        mine = rows & (data.tasks == name)
        raw = np.delete(misses, t, axis=1).mean(1) ** -3.0 / 4.0**slopes  # six other tasks
        expected = (raw / raw.sum()) @ np.array([left[mine] for left in single.values()])
        np.testing.assert_allclose(found.left_out[mine], expected)
    misfit = [np.mean((data.target - found.left_out)[rows & (data.tasks == t)] ** 2) for t in names]
    assert found.scale == pytest.approx(np.sqrt(np.mean(misfit)))


@pytest.mark.parametrize(
    ("tasks", "candidates", "fitted"),
    [
        (2, [MEAN, LINE], None),
        (3, [MEAN, LINE, BOTH], [MEAN]),
        (4, [MEAN, LINE, BOTH], [MEAN, LINE]),
        (5, [MEAN, LINE, BOTH], [MEAN, LINE, BOTH]),
        (5, [Candidate("?", ("unheard of",))], None),
        (5, [replace(MEAN, pooled=True)], None),  # one method of one model: nothing to pool
        (5, [], None),
    ],
)
def test_no_candidate_is_fitted_to_fewer_tasks_than_it_needs(tasks, candidates, fitted):
    rng = np.random.default_rng(0)
    rows = [*range(tasks)] * 2  # twice, which does not make them more
    x, z = rng.normal(size=(2, 2 * tasks))
    found = blend(table(rows, rng.normal(size=2 * tasks), x=x, z=z), candidates, "m", 0.9)
    assert (None if found is None else list(found.weights)) == fitted


def test_a_feature_that_never_varied_is_left_out():
    data = table(range(6), np.arange(6.0), x=[0.3] * 6, z=np.arange(6.0) ** 2)
    assert list(blend(data, [MEAN, LINE, BOTH], "m", 0.9).weights) == [MEAN]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_feature_that_varies_in_one_task_only_makes_no_interval_narrower(pooled):
    """Without that task it is an intercept: its leverage has no bound."""
    target, tasks = [1.0, 2, 1, 2, 1, 3, 1.5], [0, 1, 2, 3, 4, 5, 5]
    methods = ["m", "m", "m", "m", "o", "m", "m"] if pooled else None
    mean, line = replace(MEAN, pooled=pooled), replace(LINE, pooled=pooled)
    data = table(tasks, target, methods, x=[0, 0, 0, 0, 0, 0, 1])
    found = blend(data, [mean, line], "m", 0.9)
    assert list(found.weights) == [mean]
    alone = blend(data, [mean], "m", 0.9)
    question = Question("m", "1", {"x": 0.0})
    assert found.predict(question) == alone.predict(question)


def test_a_feature_that_varies_in_one_task_only_leaves_finite_numbers():
    data = table(range(6), [1.0, 2, 1, 2, 1, 9], x=[0, 0, 0, 0, 0, 1])
    found = blend(data, [MEAN, LINE], "m", 0.9)
    assert np.isfinite(found.left_out).all()
    assert np.isfinite(found.predict(Question("m", "1", {"x": 0.0}))).all()
    assert np.abs(found.left_out).max() < 10


def test_slope_is_what_a_feature_moves_the_average_by():
    data = random_table(6, drop=0)
    found = blend(data, [MEAN, LINE, FREE, REST, BOTH, POOLED[1]], "m", 0.9)
    here = {"x": 0.3, "z": 0.1, "s": -0.2, "e": 0.5}
    for name in "xzs":
        moved = Question("m", "1", here | {name: here[name] + 1})
        change = found.predict(moved)[0] - found.predict(Question("m", "1", here))[0]
        assert found.slope(name) == pytest.approx(change)


@pytest.mark.parametrize("n", [3, 4, 7, 8, 12])
def test_what_was_learnt_elsewhere_is_ahead_until_the_record_has_eight_tasks(n):
    target = np.arange(n, dtype=float)
    mean = (target.sum() - target) / (n - 1)  # of the other tasks
    data = table(range(n), target, s=2 * target - mean)  # as far off, on the other side
    elsewhere = replace(FREE, learnt_elsewhere=True)
    weights = blend(data, [MEAN, elsewhere], "m", 0.9).weights
    slopes = 0.8 * max(8 - n, 0)
    assert weights[elsewhere] / weights[MEAN] == pytest.approx(4**slopes)


def test_the_past_coverage_counts_runs_inside_intervals_from_other_tasks():
    # The mean's left-out errors of [0]*9 + [10]: -10/9 each, and 10. The last task alone is outside
    # what the others' errors allow.
    found = blend(table(range(10), [0.0] * 9 + [10.0]), [MEAN], "m", 0.9)
    assert found.coverage == pytest.approx(0.9)
    assert blend(table(range(6), [0.0, 1] * 3), [MEAN], "m", 0.9).coverage == 1


@pytest.mark.parametrize("tasks", [6, 10, 20])
def test_90_percent_intervals_cover_about_90_percent(tasks):
    rng = np.random.default_rng(0)
    inside, said = [], []
    for _ in range(400):
        x, z = rng.normal(size=(2, tasks + 1))
        y = x + 0.7 * rng.normal(size=tasks + 1)
        found = blend(table(range(tasks), y[:-1], x=x[:-1], z=z[:-1]), [MEAN, LINE, BOTH], "m", 0.9)
        point, scale = found.predict(Question("m", "1", {"x": x[-1], "z": z[-1]}))
        inside.append(abs(y[-1] - point) <= stats.t.ppf(0.95, found.dof) * scale)
        said.append(found.coverage)
    assert 0.85 < np.mean(inside) < 0.96
    assert 0.85 < np.mean(said) < 0.95


def test_tables_with_the_same_content_are_told_from_others():
    data = random_table(7)
    assert data.content() == random_table(7).content()
    assert data.content() != replace(data, target=data.target + 1e-12).content()
    moved = data.features | {"x": data.features["x"][::-1].copy()}
    assert data.content() != replace(data, features=moved).content()
    assert hash(data.content()) == hash(random_table(7).content())
