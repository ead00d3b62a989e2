"""When looks are due, and how the budget thins them out."""

import re

import pytest

from iimm_callbacks.schedule import Budget, check_every, is_due


def due(every, total):
    return [step for step in range(1, total + 1) if is_due(every, step, total)]


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [
        (None, 100, [5, 10, 20, 30, 50, 70, 100]),
        (None, 40, [2, 4, 8, 12, 20, 28, 40]),
        (None, 7, [1, 2, 3, 4, 5, 7]),  # rounded up: a share is done, never nearly done
        (None, 3, [1, 2, 3]),
        (None, 2, [1, 2]),
        (None, 1, [1]),
        (3, 10, [3, 6, 9, 10]),
        (1, 3, [1, 2, 3]),
        (50, 10, [10]),
        (0.25, 100, [25, 50, 75, 100]),
        (0.1, 30, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),  # 0.1 * 3 * 30 is 9.000000000000002
        (0.3, 10, [3, 6, 9, 10]),
        (0.4, 3, [2, 3]),
        (0.01, 5, [1, 2, 3, 4, 5]),
        (1e-9, 5, [1, 2, 3, 4, 5]),
        ("epoch", 10, [10]),
        ("evaluate", 10, [10]),
    ],
)
def test_looks_are_due_at(every, total, steps):
    assert due(every, total) == steps


@pytest.mark.parametrize("every", [None, 1, 500, 0.01, 0.999, "epoch", "evaluate"])
def test_good_every_is_accepted(every):
    check_every(every)


@pytest.mark.parametrize("every", [0, -1, 0.0, 1.0, 1.5, True, "steps", "0.1", float("nan"), [5]])
def test_bad_every_is_refused_by_value(every):
    with pytest.raises(ValueError, match=re.escape(f"got {every!r}")):
        check_every(every)


def simulate(budget, *, cost, step_time=1.0, total=200, every=2):
    """(looks taken, dropped, seconds of looks, seconds in all) of a run on a simulated clock."""
    clock, taken, dropped = 0.0, 0, 0
    budget.took(cost, counts=False)
    for step in range(1, total + 1):
        clock += step_time
        if is_due(every, step, total):
            if step < total and not budget.allows(clock, step, total):
                dropped += 1
                continue
            clock += cost
            budget.took(cost)
            taken += 1
    return taken, dropped, budget.spent, clock


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
def test_looks_keep_within_their_share_of_the_wall_time(share):
    budget = Budget(share)
    taken, dropped, spent, clock = simulate(budget, cost=1.5)
    assert spent <= share * clock + 1e-9
    assert spent + 1.5 > share * (clock + 1.5)  # one more would not have fitted
    assert dropped == 100 - taken > 0


def test_the_last_look_is_taken_when_no_other_fits():
    budget = Budget(0.05)
    assert simulate(budget, cost=60)[:2] == (1, 99)


@pytest.mark.parametrize("share", [None, 1.0])
def test_without_a_limit_no_look_is_dropped(share):
    budget = Budget(share)
    assert simulate(budget, cost=0.5)[:2] == (100, 0)


def test_the_measurement_before_training_is_not_counted():
    budget = Budget(0.05)
    budget.took(9.0, counts=False)
    assert budget.spent == 0


@pytest.mark.parametrize("share", [0, -0.1, 1.5, 5, float("nan")])
def test_a_bad_overhead_is_refused_by_value(share):
    with pytest.raises(ValueError, match=re.escape(f"(0, 1], or None for no limit, got {share}")):
        Budget(share)
