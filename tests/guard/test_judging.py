"""A look by another metric is judged as one by accuracy is."""

import json
import math

import numpy as np
import pytest
from scipy import special

from iimm_callbacks import Forecast, Forecaster, Limits, Measurement
from iimm_callbacks.guard.judging import judge, judge_first, judge_look
from iimm_callbacks.measures.results import Drop, Forgetting, Score, forgetting, paired_drop
from iimm_callbacks.records.forecast import Prediction
from iimm_callbacks.records.look import Look

pytestmark = pytest.mark.once

MEASURED = Measurement(0.3, 0.2, 0.4, 0.01, 40, 4)
PARTS_OF_MEASURED = (Measurement(0.3, 0.05, 0.55, 0.02, 20, 4),)


def bits(share, n=40):
    return np.arange(n) < share * n


def look(step, learnt, kept, by_metric=()):
    """Shares of right images of the task and of an off-target one; of these some as a `Score`."""
    correct = {"task": bits(learnt), "other": bits(kept)}
    scores = {name: Score(float(correct[name].mean()), correct[name].astype(float))
              for name in by_metric}  # fmt: skip
    return Look(step, MEASURED, correct, 0.1, scores, parts=PARTS_OF_MEASURED)


def judged(by_metric, after):
    return judged_look(look(5, *after, by_metric), by_metric)


def judged_look(now, by_metric=()):
    baseline = look(0, 0.5, 0.9, by_metric)
    forecaster = Forecaster().fit([], base_rates=False)
    prior = forecaster.predict(MEASURED, method="full", zero_shot_accuracy=0.5, model="m")
    limits = Limits(0.1)
    first = judge_first(baseline, prior, limits)
    return first, judge_look(
        now,
        baseline,
        prior,
        forecaster.update,
        limits,
        share=0.5,
        coming=1.0,
    )


@pytest.mark.parametrize("by_metric", [("task",), ("other",), ("task", "other")])
@pytest.mark.parametrize("after", [(0.9, 0.9), (0.5, 0.2), (0.4, 1.0)])
def test_a_metric_that_is_accuracy_gives_the_verdict_of_accuracy(by_metric, after):
    for one, other in zip(judged(by_metric, after), judged((), after), strict=True):
        errors = one.row.pop("standard_errors"), other.row.pop("standard_errors")
        assert one.row.pop("drops", {}) == pytest.approx(other.row.pop("drops", {}))
        assert errors[0] == pytest.approx(errors[1])
        assert one.row == pytest.approx(other.row)
        assert one.verdict.level == other.verdict.level


@pytest.mark.parametrize(
    ("ahead", "seen", "level", "probability"),
    [
        (0.7, 0.7, "stop", 0.91),  # over the limit and expected to stay: 1 - 0.3²
        (0.55, 0.55, "warn", 0.7975),
        (0.3, 0.7, "warn", 0.7),  # expected to come back
        (0.7, 0.3, "warn", 0.7),  # not there yet
    ],
)
def test_what_is_seen_and_what_is_expected_add_up(ahead, seen, level, probability):
    limit, se = 0.05, 0.01
    # At the next look it is still within the limit: the forecast alone stops nothing.
    inside = {"forgetting": Prediction(0.0, 0.01, math.inf)}
    expected = Prediction(limit + se * float(special.ndtri(ahead)), se, math.inf)
    forecast = Forecast(None, expected, None, "", next_look=inside)
    drop = Drop(limit + se * float(special.ndtri(seen)), se)
    found = judge(forecast, Forgetting({"a": drop}, drop, "a"), Limits(limit))
    assert (found.level, found.exceed_probability) == (level, pytest.approx(probability))


@pytest.mark.parametrize(("right", "accuracy"), [(20, 0.5), (15, 0.25), (10, 0.0), (0, 0.0)])
def test_numbers_of_a_look_at_fewer_images_compare_with_those_before_training(right, accuracy):
    """The first 20 of 40 images are right before training, of the task all that are."""
    correct = {"task": np.arange(20) < right, "other": np.arange(20) < 20}
    few = Measurement(0.35, 0.1, 0.6, 0.01, 20, 4)
    first, fewer = judged_look(Look(5, few, correct, 0.1, {}))
    assert first.row["eval_iimm_accuracy"] == 0.5
    # Of these 20 images the untouched model's were 0.05 lower each.
    assert [fewer.row[f"eval_iimm{end}"] for end in ("", "_inter", "_intra")] == pytest.approx(
        [0.35, 0.25, 0.45]
    )
    assert fewer.row["eval_iimm_gain_observed"] == right / 20 - 1
    assert fewer.row["eval_iimm_accuracy"] == pytest.approx(accuracy)
    assert fewer.row["eval_iimm_other_accuracy"] == pytest.approx(0.9)  # and not 1, of these 20
    assert fewer.row["drops"] == {"other": 0.0}


def test_verdict_and_row_are_in_the_metrics_units():
    baseline, now = look(0, 0.5, 0.9, ("other",)), look(5, 0.5, 0.9, ("other",))
    now.scores["other"] = Score(0.4, np.full(40, 0.4))  # the same images right, and yet
    forecaster = Forecaster().fit([], base_rates=False)
    prior = forecaster.predict(MEASURED, method="full", zero_shot_accuracy=0.5, model="m")
    found = judge_look(now, baseline, prior, forecaster.update, Limits(0.1), share=0.5, coming=1.0)
    assert found.verdict.level == "stop"
    assert "observed mean forgetting 50.0 points" in found.verdict.reason
    assert found.row["eval_iimm_other_accuracy"] == 0.4
    assert found.row["eval_iimm_forgetting_observed"] == pytest.approx(0.5)
    assert found.row["drops"] == pytest.approx({"other": 0.5})
    assert found.row["standard_errors"]["forgetting"] > 0


def test_a_score_and_right_images_are_not_compared():
    score = Score(0.9, bits(0.9).astype(float))
    for pair in ((score, bits(0.9)), (bits(0.9), score)):
        with pytest.raises(ValueError, match="measured by the same metric"):
            paired_drop(*pair)
    with pytest.raises(ValueError, match="the same images"):
        paired_drop(score, Score(0.9, np.ones(3)))


def test_forgetting_takes_both_kinds_side_by_side():
    before = {"a": bits(1.0), "b": Score(0.75, np.full(40, 0.75))}
    after = {"a": bits(0.5), "b": Score(0.5, np.full(40, 0.5))}
    found = forgetting(before, after)
    assert found.mean.value == pytest.approx((0.5 + 0.25) / 2)
    assert found.worst_task == "a"


def test_a_look_is_read_back_as_it_was_written():
    there = look(0, 0.5, 0.9, ("other",))
    there.scores["other"] = Score(1 / 3, np.random.default_rng(0).normal(size=40))
    back = Look.from_json(json.loads(json.dumps(there.to_json(), allow_nan=False)))
    assert back.accuracy("other") == 1 / 3
    assert back.scores["other"].images.tolist() == there.scores["other"].images.tolist()
    assert back.accuracy("task") == 0.5
    assert list(back.correct) == ["task", "other"]
