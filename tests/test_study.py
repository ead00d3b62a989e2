"""The study: transferability scores against slow references, and its report on planted outcomes."""

import importlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from iimm_callbacks import append_outcome, iimm, read_outcomes, sample
from iimm_callbacks.measures.probe_accuracy import LinearProbe
from iimm_callbacks.measures.transferability import SCORES, emms
from iimm_callbacks.records.outcomes import Outcome

pytestmark = pytest.mark.once

STUDY = Path(__file__).parent.parent / "examples" / "study"


@pytest.fixture
def study(monkeypatch):
    """(name) -> a module of the study."""
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module


@pytest.fixture
def scores():
    return SCORES


def clusters(n=90, dim=6, n_classes=3, apart=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return rng.normal(size=(n_classes, dim))[labels] * apart + rng.normal(size=(n, dim)), labels


NAMES = ("H-Score", "GBC", "LogME", "TransRate")
every_score = pytest.mark.parametrize("name", NAMES)


@every_score
def test_a_score_ignores_the_order_of_images_and_the_names_of_classes(scores, name):
    x, y = clusters()
    order = np.random.default_rng(1).permutation(len(x))
    renamed = np.array(["c", "a", "b"])[y]
    assert scores[name](x[order], y[order]) == pytest.approx(scores[name](x, y), rel=1e-6)
    assert scores[name](x, renamed) == pytest.approx(scores[name](x, y), rel=1e-6)


@every_score
def test_separate_clusters_score_higher_than_shuffled_labels(scores, name):
    x, y = clusters(apart=3)
    shuffled = np.random.default_rng(1).permutation(y)
    assert scores[name](x, y) > scores[name](x, shuffled)


@every_score
def test_a_rotation_changes_no_score(scores, name):
    x, y = clusters()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    assert scores[name](x @ rotation, y) == pytest.approx(scores[name](x, y), rel=1e-6)


@pytest.mark.parametrize("name", ["H-Score", "GBC", "LogME"])
def test_scale_changes_no_score_but_transrate(scores, name):
    x, y = clusters()
    assert scores[name](x / 1000, y) == pytest.approx(scores[name](x, y), rel=1e-5)
    assert scores["TransRate"](x / 1000, y) < 0.1 * scores["TransRate"](x, y)


@every_score
def test_a_score_refuses_one_class_wrong_shapes_and_nan(scores, name):
    x, y = clusters(n=6)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        scores[name](x, np.zeros(6, dtype=int))
    with pytest.raises(ValueError, match=r"\(6, 6\) and \(5,\)"):
        scores[name](x, y[:5])
    with pytest.raises(ValueError, match="finite"):
        scores[name](np.where(x == x[0, 0], np.nan, x), y)


def test_emms_is_the_error_of_least_squares_by_hand():
    # Best w of (0, 0, 3) from (1, 1, 2) is 6/6 = 1: misses -1, -1, 1.
    x, y = np.array([[1.0], [1.0], [2.0]]), np.array([0, 0, 1])
    assert emms(x, y, [[0.0], [3.0]]) == pytest.approx(-1.0)
    # A second encoder whose misses are 1, 1, -1 = the opposite: half of each meets all.
    other = [[2.0], [1.0]]  # w = (2 + 2 + 2)/6 = 1
    assert emms(x, y, other) == pytest.approx(-1.0)
    assert emms(x, y, [[[0.0], [3.0]], other]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_emms_is_the_minimum_over_a_grid_of_shares(seed):
    rng = np.random.default_rng(seed)
    x, y = clusters(seed=seed)
    texts = rng.normal(size=(3, 3, 4)) * [[[1.0]], [[0.3]], [[2.0]]]
    found = []
    for a in np.linspace(0, 1, 41):
        for b in np.linspace(0, 1 - a, 41):
            z = (a * texts[0] + b * texts[1] + (1 - a - b) * texts[2])[y]
            w = np.linalg.lstsq(x, z, rcond=None)[0]
            found.append(-(((x @ w - z) ** 2).sum() / len(x)))
    assert emms(x, y, texts) >= max(found) - 1e-12
    assert emms(x, y, texts) == pytest.approx(max(found), rel=0.02)
    linear = rng.normal(size=(6, 6))
    assert emms(x @ linear, y, texts) == pytest.approx(emms(x, y, texts))


def test_emms_refuses_texts_that_do_not_suit_the_labels():
    x, y = clusters(n=6)
    with pytest.raises(ValueError, match=r"in \[0, 2\).* got 0 to 2"):
        emms(x, y, np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        emms(x, y, np.ones(4))
    with pytest.raises(ValueError, match="finite"):
        emms(x, y, np.full((3, 4), np.nan))


def test_h_score_in_one_dimension_is_the_share_of_variance_between_classes(scores):
    x, y = np.array([[0.0], [2.0], [4.0], [6.0]]), np.array([0, 0, 1, 1])
    # Mean 3, variance (9 + 1 + 1 + 9)/4 = 5; class means 1 and 5, variance (4 + 4)/2 = 4.
    assert scores["H-Score"](x, y) == pytest.approx(4 / 5)


def test_h_score_ignores_invertible_linear_maps_and_is_bounded_by_the_classes(scores):
    x, y = clusters()
    linear = np.random.default_rng(1).normal(size=(6, 6))
    assert scores["H-Score"](x @ linear + 5, y) == pytest.approx(scores["H-Score"](x, y))
    far, _ = clusters(apart=1e3)
    assert 1.99 < scores["H-Score"](far, y) <= 2 + 1e-9  # C - 1


def test_h_score_survives_a_dead_direction(scores):
    x, y = clusters()
    dead = np.hstack([x, x[:, :1]])
    assert scores["H-Score"](dead, y) == pytest.approx(scores["H-Score"](x, y))


def test_gbc_of_two_classes_is_the_formula_by_hand(scores):
    # Class means (0, 0) and (4, 0). Variances per dimension: a (1 + 0)/2, b (1 + 4)/2 · 1/1.
    a = np.array([[-1.0, 0.0], [1.0, 0.0]])
    b = np.array([[3.0, 2.0], [5.0, -2.0]])
    middle = (0.5 + 2.5) / 2
    distance = 16 / (8 * middle) + math.log(middle / math.sqrt(0.5 * 2.5))  # D/2 = 1
    found = scores["GBC"](np.vstack([a, b]), np.array([0, 0, 1, 1]))
    assert found == pytest.approx(-2 * math.exp(-distance))


def test_gbc_is_the_double_loop_over_full_gaussians(scores):
    x, y = clusters(apart=0.5)
    total = 0.0
    for a in range(3):
        for b in range(3):
            if a == b:
                continue
            (mu_a, cov_a), (mu_b, cov_b) = (
                (x[y == c].mean(0), x[y == c].var(0).mean() * np.eye(6)) for c in (a, b)
            )
            cov = (cov_a + cov_b) / 2
            det = np.linalg.det
            mahalanobis = (mu_a - mu_b) @ np.linalg.inv(cov) @ (mu_a - mu_b)
            distance = mahalanobis / 8 + math.log(det(cov) / math.sqrt(det(cov_a) * det(cov_b))) / 2
            total -= math.exp(-distance)
    assert scores["GBC"](x, y) == pytest.approx(total)


def test_gbc_keeps_the_64_widest_directions(scores):
    x, y = clusters(n=120, dim=64)
    thin = 1e-9 * np.random.default_rng(1).normal(size=(120, 10))
    assert scores["GBC"](np.hstack([thin, x]), y) == pytest.approx(scores["GBC"](x, y))


def test_logme_is_the_largest_marginal_likelihood_over_a_grid(scores):
    x, y = clusters(n=24, dim=3)
    expected = []
    for c in range(3):
        target = (y == c).astype(float)
        evidence = []
        for alpha in np.geomspace(1e-2, 1e3, 120):
            for beta in np.geomspace(1e-1, 1e2, 120):
                # Weights integrated out: y ~ N(0, I/β + FFᵀ/α).
                covariance = np.eye(24) / beta + x @ x.T / alpha
                log_det = np.linalg.slogdet(covariance)[1]
                fit = target @ np.linalg.solve(covariance, target)
                evidence.append(-(fit + log_det + 24 * math.log(2 * math.pi)) / 2)
        expected.append(max(evidence) / 24)
    assert scores["LogME"](x, y) == pytest.approx(np.mean(expected), abs=2e-3)


def test_logme_is_finite_where_labels_are_met_exactly_and_with_more_dimensions_than_images(scores):
    y = np.array([0, 1, 0, 1])
    assert math.isfinite(scores["LogME"](np.eye(2)[y], y))
    assert math.isfinite(scores["LogME"](*clusters(n=12, dim=30)))


def test_transrate_in_one_dimension_is_the_formula_by_hand(scores):
    x, y = np.array([[-2.0], [-1.0], [1.0], [2.0]]), np.array([0, 0, 1, 1])
    # Mean square 2.5 over all and in each class: the labels save nothing.
    assert scores["TransRate"](x, y) == pytest.approx(0, abs=1e-12)
    # Mean squares 2.5 (all), 1 (class 0) and 4 (class 1), over ε = 1e-4.
    mixed = np.array([0, 1, 0, 1])
    x = np.array([[-1.0], [-2.0], [1.0], [2.0]])
    rates = [math.log(1 + square / 1e-4) / 2 for square in (2.5, 1, 4)]
    assert scores["TransRate"](x, mixed) == pytest.approx(rates[0] - (rates[1] + rates[2]) / 2)


@pytest.mark.parametrize("seed", range(10))
def test_transrate_is_never_negative_even_with_unequal_classes(scores, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 5)), np.r_[0, 1, 2, rng.choice(3, 37, p=[0.7, 0.2, 0.1])]
    assert scores["TransRate"](x, y) >= 0


TASKS = "abcdefgh"


def planted(gain, method="full", rates=(1e-4, 3e-4), seeds=(0, 1), forgetting=None):
    """Outcomes whose gain and forgetting are functions of (iimm, rate, seed)."""
    forgetting = forgetting or (lambda iimm, rate, seed: 0.04 + 0.03 * math.sin(40 * iimm))
    outcomes = []
    for i, task in enumerate(TASKS):
        value = 0.3 + 0.02 * i
        for rate in rates:
            for seed in seeds:
                lost = forgetting(value, rate, seed)
                outcomes.append(
                    Outcome(
                        model="m",
                        model_fingerprint="f",
                        method=method,
                        task=task,
                        task_fingerprint=task,
                        iimm=value,
                        inter=value / 2,
                        intra=1.5 * value,
                        standard_error=0.01,
                        n_images=100,
                        n_classes=4,
                        zero_shot_accuracy=0.5 + 0.01 * (i % 3),
                        final_accuracy=0.5 + 0.01 * (i % 3) + gain(value, rate, seed),
                        off_target_before={"x": 0.5},
                        off_target_after={"x": 0.5 - lost},
                        trajectory=[
                            {"share": s, "gain": 0.0, "forgetting": s * lost} for s in (0, 0.5, 1)
                        ],
                        recipe={"learning_rate": rate, "seed": seed, "steps": 100},
                        versions={"torch": "9.9"},
                    )
                )
    return outcomes


def rows(text, title):
    """The rows of the first table under a heading: list of lists of cells."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_gain_that_is_linear_in_iimm_is_reported_as_r2_of_one_and_without_error(study):
    outcomes = planted(lambda iimm, rate, seed: 0.5 * iimm - 0.1)
    text = study("report").markdown(outcomes, {"H-Score": dict.fromkeys(TASKS, 1.0)})
    head, _, gentle, harsh, both = rows(text, "R² against gain (")
    for row in (gentle, harsh, both):
        found = dict(zip(head, row, strict=True))
        assert (found["n"], found["IIMM"], found["H-Score"]) == ("8", "**1.00**", "–")
    assert [gentle[:3], both[:3]] == [
        ["gentle", "full", "0.0001"],
        ["both", "full", "0.0001, 0.0003"],
    ]
    tau = dict(zip(head, rows(text, "Kendall's τ against gain (")[2], strict=True))
    assert tau["IIMM"] == "+1.00"
    left_out = rows(text, "Mean absolute error of forecasting gain")
    assert dict(zip(left_out[0], left_out[2], strict=True))["IIMM"] == "**0.0**"
    assert "torch 9.9" in text
    assert "from 32 runs" in text


def test_how_much_each_predictor_explains_stands_first(study):
    outcomes = planted(lambda iimm, rate, seed: 0.5 * iimm - 0.1)
    text = study("report").markdown(outcomes, {})
    found = {row[0]: row[1:] for row in rows(text, "How much each explains")}
    assert found["predictor"] == ["full"]
    assert found["IIMM"] == ["**1.00**"]
    assert found["linear probe"] == ["–"]  # none of these outcomes has one
    probed = [replace(o, linear_probe_accuracy=o.final_accuracy - 0.02) for o in outcomes]
    text = study("report").markdown(probed, {})
    assert rows(text, "How much each explains")[-1] == ["linear probe", "**1.00**"]


def test_the_report_counts_what_chance_would_give(study):
    outcomes = planted(lambda iimm, rate, seed: 0.5 * iimm - 0.1)
    text = study("report").markdown(outcomes, {})
    # Two levels x three targets x four predictors; `both` is not counted again.
    assert "Of 24 pairs" in text
    assert "1 would if nothing were related" in text


def test_seeds_are_averaged_and_not_counted_as_observations(study):
    analysis = study("analysis")
    noisy = planted(lambda iimm, rate, seed: 0.5 * iimm + (0.05 if seed else -0.05), rates=(1e-4,))
    (group,) = analysis.groups_of(noisy)
    found = analysis.relations_of(group, {})["gain", "IIMM"]
    assert (found.n, found.r2, found.slope) == (8, pytest.approx(1), pytest.approx(0.5))
    assert analysis.seed_agreement(group, analysis.TARGETS["gain"]) == (
        8,
        pytest.approx(1),
        pytest.approx(0.1),
    )


def test_a_left_out_error_is_that_of_the_loop(study):
    rng = np.random.default_rng(0)
    x, y = (dict(zip(TASKS, rng.normal(size=8), strict=True)) for _ in range(2))
    expected, of_mean = [], []
    for task in TASKS:
        others = [t for t in TASKS if t != task]
        slope, intercept = np.polyfit([x[t] for t in others], [y[t] for t in others], 1)
        expected.append(abs(slope * x[task] + intercept - y[task]))
        of_mean.append(abs(np.mean([y[t] for t in others]) - y[task]))
    analysis = study("analysis")
    assert analysis.left_out_error(x, y) == pytest.approx(np.mean(expected))
    assert analysis.left_out_error(None, y) == pytest.approx(np.mean(of_mean))
    assert analysis.left_out_error(x, {"a": 1.0, "b": 2.0}) is None


def test_nine_of_ten_new_points_fall_into_the_prediction_band(study):
    rng = np.random.default_rng(0)
    band, inside = study("analysis").prediction_band, 0
    for _ in range(2000):
        x = rng.normal(size=7)
        y = 2 * x + rng.normal(size=7)
        slope, intercept = np.polyfit(x[:-1], y[:-1], 1)
        half = band(x[:-1], y[:-1], x[-1])
        inside += abs(slope * x[-1] + intercept - y[-1]) < half
    assert stats.binomtest(inside, 2000, 0.9).pvalue > 0.01


def test_two_methods_with_the_same_gains_tell_each_other(study):
    outcomes = planted(lambda i, r, s: 0.1 * math.sin(70 * i))
    outcomes += planted(lambda i, r, s: 0.05 - 0.05 * math.sin(70 * i), method="lora")
    text = study("report").markdown(outcomes, {})
    gentle = rows(text, "Does one method's outcome")[2]
    assert gentle[:5] == ["gentle", "full", "lora", "8", "1.00"]


def test_the_share_of_forgetting_so_far_is_that_of_the_looks(study):
    text = study("report").markdown(planted(lambda i, r, s: 0.1 * i), {})
    head, _, gentle, _ = rows(text, "Share of the final")
    assert dict(zip(head, gentle, strict=True))["at 50%"] == "50 %"
    none_lost = planted(lambda i, r, s: 0.1 * i, forgetting=lambda i, r, s: 0.001)
    assert rows(study("report").markdown(none_lost, {}), "Share of the final")[2][3] == "–"


def test_one_task_cannot_make_the_line_alone_unnoticed(study):
    outcomes = planted(lambda i, r, s: 0.01 * math.sin(90 * i))
    far = [replace(o, task="z", iimm=0.9, final_accuracy=0.99) for o in outcomes if o.task == "a"]
    text = study("report").markdown(outcomes + far, {})
    assert float(rows(text, "R² against gain (")[2][4].strip("*")) > 0.9
    without = rows(text, "R² of IIMM without")[2]
    assert without[3:5] == ["8", "z"]
    assert float(without[6].strip("*")) < 0.5


def test_unfinished_runs_and_too_few_tasks_are_left_out(study):
    outcomes = [o for o in planted(lambda i, r, s: 0.1 * i) if o.task in "ab"]
    outcomes.append(replace(outcomes[0], complete=False))
    text = study("report").markdown(outcomes, {})
    assert "1 unfinished runs are left out" in text
    assert rows(text, "R² against gain (")[2][3:5] == ["–", "–"]


def test_near_the_ceiling_there_is_no_gain_over_zero_shot_error(study):
    outcomes = planted(lambda i, r, s: 0.01)
    outcomes = [
        replace(o, zero_shot_accuracy=0.97, final_accuracy=0.98) if o.task == "a" else o
        for o in outcomes
    ]
    analysis = study("analysis")
    group = analysis.groups_of(outcomes)[0]
    assert "a" not in group.per_task(analysis.TARGETS["gain over zero-shot error"])
    assert "a" in group.per_task(analysis.TARGETS["gain"])


def test_the_scores_see_the_images_of_the_recorded_measurement(study):
    model = sample.load_model()
    outcome = next(o for o in sample.load_outcomes() if o.task == "arrow_directions")
    embeds, labels = study("report").unit_embeddings(model, sample.load_task(outcome.task))
    assert embeds.shape == (outcome.n_images, 128)
    # Only the image-image term is without texts.
    assert iimm(embeds, np.eye(6, 128), labels).intra == pytest.approx(outcome.intra, abs=1e-4)


@pytest.mark.whole
def test_the_report_is_written_with_its_pictures(study, tmp_path, capsys):
    shipped = [o for o in sample.load_outcomes() if o.task in sample.task_names()[:3]]
    other = replace(shipped[0], model_fingerprint="another model", task="unknown")
    for outcome in [*shipped, other]:
        append_outcome(tmp_path / "o.jsonl", outcome)
    arguments = ["--outcomes", str(tmp_path / "o.jsonl"), "--output_dir", str(tmp_path / "out")]
    study("report").main(arguments)
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    assert len(written) == 4
    assert all(0 < size < 150_000 for size in written.values())
    text = (tmp_path / "out" / "RESULTS.md").read_text(encoding="utf-8")
    assert f"from {len(shipped)} runs" in text
    assert str(tmp_path) not in text
    for name in NAMES:
        assert name in text
    assert "RESULTS.md" in capsys.readouterr().out


def test_the_report_refuses_runs_of_another_model(study, tmp_path):
    other = replace(sample.load_outcomes()[0], model_fingerprint="another model")
    append_outcome(tmp_path / "o.jsonl", other)
    assert len(read_outcomes(tmp_path / "o.jsonl")) == 1
    with pytest.raises(ValueError, match="got none among 1"):
        study("report").main(["--outcomes", str(tmp_path / "o.jsonl")])


def test_the_committed_reports_are_of_the_saved_runs():
    runs = len(sample.load_outcomes())
    told = {
        "GRADES.txt": f"on {runs} runs",
        "RESULTS.md": f"from {runs} runs: {len(sample.task_names())} tasks",
        "README.md": f"{runs} runs",
        "../README.md": f"{runs} runs of the sample",
    }
    for name, words in told.items():
        assert words in (STUDY / name).read_text(encoding="utf-8")


def test_the_committed_linear_probes_are_those_of_the_shipped_tasks():
    committed = (STUDY / "LINEAR_PROBE.txt").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("│")] for line in committed.splitlines()]
    accuracies = {row[1]: (float(row[2]), float(row[3])) for row in rows if len(row) == 5}
    assert accuracies.keys() == set(sample.task_names())
    for o in sample.load_outcomes():  # which test_sample.py holds against the tasks
        recorded = o.zero_shot_accuracy, o.linear_probe_accuracy
        assert accuracies[o.task] == pytest.approx(recorded, abs=0.0006)


def test_the_linear_probe_is_graded_against_gains_saved(study):
    outcomes = [
        replace(sample.load_outcomes()[0], task=name, method="full", iimm=iimm_value,
                zero_shot_accuracy=0.4, final_accuracy=0.4 + gain)
        for name, gain, iimm_value in (("a", 0.0, 0.1), ("b", 0.1, 0.3), ("c", 0.2, 0.2))
    ]  # fmt: skip
    accuracies = {"a": (0.4, 0.41), "b": (0.41, 0.51), "c": (0.4, 0.61)}
    found = {
        name: (before, LinearProbe(accuracy, 0.02, 1.0, 300, 300, True))
        for name, (before, accuracy) in accuracies.items()
    }
    row = study("linear_probe").grade(found, outcomes, "full")
    # |0.01-0|, |0.1-0.1|, |0.21-0.2|; the gains' mean; |0.15-0|, |0.1-0.1|, |0.05...-0.2|
    assert row[:3] == ["0.7", "10.0", "10.0"]
    assert row[3] == "1.00"
    assert row[5] == "0.25"


# --- heads on frozen embeddings ---


def embedded(n=40, dim=6, n_classes=3):
    """Unit rows x [N, D] and t [C, D], labels [N]."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % n_classes
    t = torch.randn(n_classes, dim, generator=generator)
    x = t[y] + 1.5 * torch.randn(n, dim, generator=generator)
    return *(torch.nn.functional.normalize(m, dim=1) for m in (x, t)), y


def test_the_ridge_leaves_one_out_as_the_loop_does(study):
    x, t, y = embedded()
    target = torch.nn.functional.one_hot(y, 3) - (5 * x @ t.T).softmax(1)
    ridge = study("heads").Ridge(x, target)
    penalty = 0.1 * ridge.unit
    for i in (0, 7):
        rest = torch.arange(len(x)) != i
        a, b = x[rest].double(), target[rest].double()
        w = torch.linalg.solve(a.T @ a + penalty * torch.eye(6), a.T @ b)
        assert ridge.left_out(0.1)[i].numpy() == pytest.approx((x[i].double() @ w).numpy())


def test_a_strong_penalty_leaves_the_zero_shot_classifier_and_the_slope_is_zero_else(study):
    x, t, y = embedded()
    start = 5 * x @ t.T
    path = study("heads")._logistic_path(x, y, start, (1e6, 1e-2))
    assert path[1e6].abs().max() < 1e-5
    v = path[1e-2].requires_grad_()
    loss = torch.nn.functional.cross_entropy(start + x @ v.T, y) + 1e-2 * v.square().sum()
    assert torch.autograd.grad(loss, v)[0].abs().max() < 1e-3
    wide = torch.cat([x, x @ torch.randn(6, 60, generator=torch.Generator().manual_seed(1))], 1)
    (found,) = study("heads")._logistic_path(wide, y, start, (1e-2,)).values()  # more columns, rows
    found.requires_grad_()
    loss = torch.nn.functional.cross_entropy(start + wide @ found.T, y)
    slope = torch.autograd.grad(loss + 1e-2 * found.square().sum(), found)[0]
    assert slope.abs().max() < 1e-2


def test_the_error_times_the_ratio_of_other_tasks_is_the_arithmetic(study):
    found, tuned = np.array([0.5, 0.6, 0.8]), np.array([[0.6, 0.7, 0.9]])
    plain, scaled = study("compare_heads").errors(found, tuned)
    assert plain == pytest.approx([0.1])
    # 1 - (0.3 + 0.1)/(0.4 + 0.2)·0.5 and so on
    expected = [1 - 0.4 / 0.6 * 0.5 - 0.6, 1 - 0.5 / 0.7 * 0.4 - 0.7, 1 - 0.7 / 0.9 * 0.2 - 0.9]
    assert scaled == pytest.approx([np.abs(expected).mean()])


@pytest.mark.whole
def test_the_heads_are_tabled(study):
    compare = study("compare_heads")
    tasks = ["handwritten_digits", "flag_regions", "clipart_folders"]
    settings = compare.Settings(tasks=tasks, n_images=80, draws=1)
    table = compare.tabulate(settings)
    assert table.row_count == len(compare.HEADS) + len(compare.OF_LAYERS)
    committed = (STUDY / "HEADS.txt").read_text(encoding="utf-8")
    names = [line.split("│")[1].strip() for line in committed.splitlines() if "│" in line]
    assert names == [name.strip() for name in (*compare.HEADS, *compare.OF_LAYERS)]


# --- rescues ---


@pytest.mark.whole
def test_the_rescues_are_tabled(study, capsys, monkeypatch):
    rescues = study("rescues")
    monkeypatch.setattr(rescues.study, "OFF_TARGET_IMAGES", 16)
    few = partial(sample.load_task, probe_size=64)
    monkeypatch.setattr(rescues.study, "probe_task", few)
    rescues.main(["--tasks", "arrow_directions", "--steps", "2"])
    printed = capsys.readouterr().out
    assert printed.count("arrow_directions") == 2
    assert "mean of 2" in printed
    assert "of 2 are over the limit of 5 points" in printed
