"""The verdict, case by case."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest

from iimm_callbacks import Forecast, Limits, Verdict
from iimm_callbacks.guard.judging import judge
from iimm_callbacks.measures.results import Drop, Forgetting
from iimm_callbacks.records import verdict
from iimm_callbacks.records.forecast import Prediction

pytestmark = pytest.mark.once


def forecast(mean, scale, worst=None):
    """Predicted mean and worst forgetting, Student-t with 10 degrees of freedom."""
    last = None if worst is None else Prediction(worst, scale, 10)
    return Forecast(None, Prediction(mean, scale, 10), last, "by hand", 12)


def observed(mean, error, worst=None):
    """Observed mean forgetting; the worst task is called "b"."""
    worst = mean if worst is None else worst
    tasks = {"a": Drop(2 * mean - worst, error), "b": Drop(worst, error)}
    return Forgetting(tasks, Drop(mean, error), "b")


LIMITS = Limits(0.05)
WORST = Limits(0.05, limit_on="worst")
ABSENT = Forecast(None, None, None, "no forecast: no saved runs")


@pytest.mark.parametrize(
    ("predicted", "seen", "limits", "level", "probability", "says"),
    [
        (forecast(0.9, 0.01), observed(0.9, 0.01), Limits(None), "continue", None, "no limit set"),
        (None, None, LIMITS, "continue", None, "nothing to judge by yet"),
        (ABSENT, None, LIMITS, "continue", None, "nothing to judge by yet"),
        (forecast(0.9, 0.01), None, WORST, "continue", None, "nothing to judge by yet"),
        # Forecast only: t with 10 degrees of freedom has sf(1) = 0.170, sf(0.5) = 0.314.
        (forecast(0.04, 0.01), None, LIMITS, "continue", 0.170, "forecast mean forgetting 4.0"),
        (forecast(0.05, 0.01), None, LIMITS, "continue", 0.5, "probability 0.50"),
        (forecast(0.055, 0.01), None, LIMITS, "warn", 0.686, "between 3.7 points and 7.3 points"),
        (forecast(0.06, 0.01), None, LIMITS, "stop", 0.830, "limit 5.0 points"),
        (forecast(0.06, 0.01), None, Limits(0.05, confidence=0.9), "warn", 0.830, "0.83"),
        # Observed only, normal: sf(1) = 0.159, cdf(0.5) = 0.691, cdf(1) = 0.841.
        (ABSENT, observed(0.04, 0.01), LIMITS, "continue", 0.159, "observed mean forgetting 4.0"),
        (None, observed(0.055, 0.01), LIMITS, "warn", 0.691, "± 1.0 points"),
        (None, observed(0.06, 0.01), LIMITS, "stop", 0.841, "observed mean forgetting 6.0 points"),
        (None, observed(-0.10, 0.01), LIMITS, "continue", 0.0, "-10.0 points"),
        # Within its own sampling error: over the limit, but less than 1.645 standard errors.
        (None, observed(0.06, 0.05), LIMITS, "continue", 0.5, "± 5.0 points"),
        (None, observed(0.02, 0.015), Limits(0.001), "continue", 0.5, "2.0 points"),
        (None, observed(0.02, 0.010), Limits(0.001), "stop", 0.971, "2.0 points"),
        # The larger of the two counts.
        (forecast(0.02, 0.01), observed(0.06, 0.01), LIMITS, "stop", 0.841, "observed mean"),
        (forecast(0.06, 0.01), observed(0.01, 0.01), LIMITS, "stop", 0.830, "forecast mean"),
        # Mean and worst.
        (forecast(0.01, 0.01, 0.06), None, WORST, "stop", 0.830, "forecast worst forgetting 6.0"),
        (None, observed(0.0, 0.01, worst=0.2), WORST, "stop", 1.0, "worst forgetting on 'b' 20.0"),
        (forecast(0.01, 0.01, 0.2), observed(0.0, 0.01, 0.2), LIMITS, "continue", 0.001, "mean"),
        # Certainty.
        (forecast(0.06, 0.0), None, LIMITS, "stop", 1.0, "probability 1.00"),
        (None, observed(0.06, 0.0), LIMITS, "stop", 1.0, "probability 1.00"),
    ],
)
def test_verdict(predicted, seen, limits, level, probability, says):
    verdict = judge(predicted, seen, limits)
    assert verdict.level == level
    assert verdict.exceed_probability == (
        None if probability is None else pytest.approx(probability, abs=6e-4)
    )
    assert says in verdict.reason


@pytest.mark.parametrize(
    ("now", "before", "worse"),
    [
        ("continue", None, False),
        ("warn", None, True),
        ("warn", "warn", False),
        ("stop", "warn", True),
        ("warn", "stop", False),
        ("continue", "warn", False),
    ],
)
def test_a_verdict_is_worse_only_a_step_up(now, before, worse):
    before = before and Verdict(before, 0.9, "earlier")
    assert Verdict(now, 0.6, "now").worse_than(before) is worse


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (
            {"max_forgetting": 5},
            ValueError,
            "(0, 1], or None for no limit, got 5; write 0.05 for 5",
        ),
        ({"max_forgetting": 0}, ValueError, "got 0"),
        ({"max_forgetting": -0.1}, ValueError, "got -0.1"),
        ({"max_forgetting": float("nan")}, ValueError, "got nan"),
        ({"max_forgetting": 500}, ValueError, "got 500"),
        (
            {"max_forgetting": "0.05"},
            TypeError,
            "`max_forgetting` must be a number or None, got '0",
        ),
        ({"max_forgetting": True}, TypeError, "must be a number or None, got True"),
        ({"confidence": True}, TypeError, "must be a number, got True"),
        ({"limit_on": "median"}, ValueError, "'mean' or 'worst', got 'median'"),
        ({"confidence": 0.4}, ValueError, "[0.5, 1), got 0.4"),
        ({"confidence": 1.0}, ValueError, "[0.5, 1), got 1.0"),
        ({"confidence": 80}, ValueError, "got 80"),
    ],
)
def test_bad_limits_are_refused_by_value(settings, error, says):
    with pytest.raises(error, match=re.escape(says)):
        Limits(**settings)


def test_good_limits_are_kept_as_given():
    assert Limits() == Limits(max_forgetting=0.05, limit_on="mean", confidence=0.8)
    assert Limits(1).max_forgetting == 1
    assert Limits(None).max_forgetting is None


@pytest.mark.parametrize(
    ("value", "watching"),
    [("1", True), ("yes", True), ("0", False), ("false", False), ("False", False), ("", False)],
)
def test_the_environment_takes_the_limit_away_and_says_so_once(
    monkeypatch, caplog, value, watching
):
    verdict._say_watching.cache_clear()
    monkeypatch.setenv(verdict.WATCH, value)
    limits = [Limits(0.05).unless_watching() for _ in range(2)]
    assert [limit.max_forgetting for limit in limits] == [None if watching else 0.05] * 2
    assert [verdict.WATCH in record.message for record in caplog.records] == [True] * watching
    assert Limits(None).unless_watching().max_forgetting is None


def test_limits_are_plain_floats_whatever_they_were_given_as():
    limits = Limits(np.float32(0.25), confidence=np.float64(0.75))
    assert json.loads(json.dumps(asdict(limits))) == {
        "max_forgetting": 0.25, "limit_on": "mean", "confidence": 0.75,
    }  # fmt: skip
    with pytest.raises(TypeError, match=r"`confidence` must be a number, got '0\.9'"):
        Limits(confidence="0.9")
