"""When looks are due, and how the budget thins them out."""

import re

import pytest

from iimm_callbacks.guard.pace import PARTS, Budget, Pace, first_look
from iimm_callbacks.guard.schedule import check_every, is_due, is_needed, looks_to_come, next_needed

pytestmark = pytest.mark.once


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
        ([0.02, 0.1, 0.5], 150, [3, 15, 75, 150]),
        ((0.5, 0.02, 1), 10, [1, 5, 10]),
        ("epoch", 10, [10]),
        ("evaluate", 10, [10]),
    ],
)
def test_looks_are_due_at(every, total, steps):
    assert due(every, total) == steps


@pytest.mark.parametrize(
    "every", [None, 1, 500, 0.01, 0.999, [0.02, 1.0], [0.5, 1], "epoch", "evaluate"]
)
def test_good_every_is_accepted(every):
    check_every(every)


@pytest.mark.parametrize(
    "every", [0, -1, 0.0, 1.0, 1.5, True, "steps", "0.1", float("nan"), [5], [], [0.5, 0.0], [True]]
)
def test_bad_every_is_refused_by_value(every):
    with pytest.raises(ValueError, match=re.escape(f"got {every!r}")):
        check_every(every)


def simulate(budget, *, cost, first=0.0, step_time=1.0, total=200, every=2, guarded=False):
    """(parts of the images shown at each look, dropped, seconds in all) on a simulated clock."""
    clock, parts, dropped = 0.0, [], 0
    budget.began(first, cost)
    for step in range(1, total):
        clock += step_time
        if is_due(every, step, total):
            part = budget.part(
                clock,
                step,
                total,
                looks_to_come(every, step, total),
            )
            if not part and guarded and is_needed(step, total, len(parts)):
                part = PARTS[-1]
            if not part:
                dropped += 1
                continue
            clock += part * cost
            budget.took(part * cost, part)
            parts.append(part)
    return parts, dropped, clock + step_time


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
@pytest.mark.parametrize("first", [0.0, 2.0])
@pytest.mark.parametrize("every", [None, 2, 0.1])
def test_looks_keep_within_their_share_of_the_wall_time(share, first, every):
    budget = Budget(share)
    parts, dropped, clock = simulate(budget, cost=1.5, first=first, every=every)
    assert first + budget.spent <= share * clock + first + 1e-9
    if budget.spent:
        assert first + budget.spent <= share * (clock + first) + 1e-9
    assert len(parts) + dropped == len([s for s in range(1, 200) if is_due(every, s, 200)])


@pytest.mark.parametrize(
    ("step", "looks", "share"), [(0, 0, 0.05), (5, 1, 0.1), (5, 3, 0.3), (70, 6, 1.0), (99, 6, 1.0)]
)
def test_the_next_look_that_will_come_whatever_it_costs(step, looks, share):
    assert next_needed(step, 100, looks) == share


def test_the_first_look_is_as_large_as_the_run_can_pay_for():
    assert first_look(None, 100, 500, 9) == (256, 1024)
    assert first_look(0.05, 0, 500, 9) == (256, 1024)  # length not known
    assert first_look(0.05, 10**6, 512, 10) == (256, 1024)
    assert first_look(0.05, 1, 512, 10) == (48, 192)
    # half of 4 · 30,000 · 5 % = 3,000; less the task's 500: a third of 2,500 = 833, and 1,667 / 9
    assert first_look(0.05, 30_000, 500, 9) == (185, 833)
    assert first_look(0.05, 30_000, 500, 0) == (256, 833)


@pytest.mark.parametrize(
    ("every", "max_overhead", "size", "said"),
    [
        (None, None, 256, "at 5, 10, 20, 30, 50, 70 and 100 % of the steps, all 800 images each"),
        (
            50,
            0.05,
            256,
            "every 50 steps, 100 to 800 images each to stay within 5 % of the run",
        ),
        ([0.5, 0.025], None, 256, "at 2.5, 50 and 100 % of the steps"),
        (0.1, 0.02, 48, "every 10 %, 100 to 800 images each to stay within 2 % of"),
        ("epoch", 0.05, 48, "48 images of each off-target task instead of 256"),
    ],
)
def test_the_plan_of_looks_in_words(every, max_overhead, size, said):
    text = Pace(every, max_overhead, guarded=True).plan(800, size)
    assert said in text
    assert ("short" in text) == (size < 256)


@pytest.mark.parametrize(
    ("steps", "guarded", "share"),
    [
        # 800 images, 192 of the training set and six times 100: 1,592 passes beside 4 · 320.
        (20, True, "55 %"),
        (20, False, "44 %"),  # no look is needed in training: 992
        (100, True, "20 %"),
        (2000, True, ""),
        (None, True, ""),
    ],
)
def test_a_run_too_short_for_its_looks_is_told_their_share(steps, guarded, share):
    pace = Pace(None, 0.05, guarded=guarded)
    recipe = {"batch_size": 16} | ({} if steps is None else {"steps": steps})
    pace.first_look(recipe, 512, 10)
    text = pace.plan(800, 48)
    said = "100 images each and all 800 in the last one; the run is too short for 5 % of its time,"
    assert (f"{said} looks may take {share}" in text) == bool(share)
    assert ("to stay within 5 %" in text) != bool(share)


@pytest.mark.parametrize("asked", [range(1, 101), [100]])
def test_a_loop_that_asks_at_epochs_only_has_no_more_time_for_looks(asked):
    pace = Pace("epoch", 0.05, guarded=False)
    pace.began(1.0, 60.0, resumed=False)
    due = [pace.is_scheduled(step, 1000, "epoch" if step == 100 else None) for step in asked]
    assert due == [step == 100 for step in asked]
    # 10 seconds for 100 of 1,000 steps: 100 in all, of which looks may have 5.3; an eighth of one
    # takes 7.5.
    assert not pace.pays(10.0, 100, 1000, 0, float)
    assert pace.pays(20.0, 100, 1000, 0, float)
    assert pace.part == 0.125


def test_a_resumed_run_counts_the_steps_from_its_first_question():
    pace = Pace(10, 0.05, guarded=False)
    pace.began(0.0, 1.0, resumed=True)
    assert not pace.is_scheduled(501, 1000, None)
    assert pace.is_scheduled(510, 1000, None)
    # 2 seconds for 10 steps: 100 for the 500 left, 5.3 for 49 looks, 0.11 each; an eighth takes
    # 0.125.
    assert not pace.pays(2.0, 510, 1000, 0, float)
    assert pace.pays(3.0, 510, 1000, 0, float)
    assert pace.part == 0.125


@pytest.mark.parametrize("killed_at", [(), (500,), (100, 300, 500, 900)])
@pytest.mark.parametrize("look", [0.2, 1.0, 6.0])
def test_a_resumed_run_stays_within_its_share_too(killed_at, look):
    total, in_looks, begun = 1000, 0.0, 0
    for end in (*killed_at, total):
        pace, clock = Pace(10, 0.05, guarded=False), 0.0
        pace.began(0.0, look, resumed=begun > 0)
        for step in range(begun + 1, end + 1):
            clock += 0.5
            scheduled = pace.is_scheduled(step, total, None)
            if step < total and scheduled and pace.pays(clock, step, total, 0, float):
                seconds = look * pace.part
                pace.budget.took(seconds, pace.part)
                clock += seconds
                in_looks += seconds
        begun = end
    assert 0.01 < in_looks / (in_looks + 0.5 * total) <= 0.05


@pytest.mark.parametrize(("every", "steps"), [(None, [9]), (4, [9, 12, 16]), (0.5, [9, 12, 16])])
def test_beyond_the_last_step_the_schedule_holds(every, steps):
    pace = Pace(every, 0.05, guarded=False)
    pace.began(0.0, 60.0, resumed=False)
    due = [step for step in range(9, 18) if pace.is_scheduled(step, 8, None)]
    assert due == steps
    assert pace.pays(1.0, 9, 8, 0, float)
    assert not pace.pays(1.0, 12, 8, 0, float)


def test_images_are_saved_before_looks():
    few, dropped, _ = simulate(Budget(0.05), cost=4.0, every=None)
    assert (len(few), dropped) == (6, 0)
    assert max(few) < 1
    plenty, _, _ = simulate(Budget(0.5), cost=4.0, every=None)
    assert plenty == [1.0] * 6
    assert simulate(Budget(0.05), cost=100.0, every=None)[:2] == ([], 6)


def test_with_a_limit_six_looks_are_taken_whatever_they_cost():
    parts, dropped, _ = simulate(Budget(0.05), cost=60.0, every=None, guarded=True)
    assert (parts, dropped) == ([PARTS[-1]] * 6, 0)
    often, _, _ = simulate(Budget(0.05), cost=60.0, every=1, guarded=True)
    assert len(often) == 6


@pytest.mark.parametrize("share", [None, 1.0])
def test_without_a_limit_no_look_is_dropped(share):
    parts, dropped, _ = simulate(Budget(share), cost=0.5)
    assert (parts, dropped) == ([1.0] * 99, 0)


def test_the_look_before_training_counts():
    free, paid = (
        sum(simulate(Budget(0.05), cost=1.0, first=first, every=None)[0]) for first in (0.0, 8.0)
    )
    assert free > paid


@pytest.mark.parametrize(
    ("every", "step", "total", "n"),
    [(None, 5, 100, 6), (None, 70, 100, 1), (None, 71, 100, 0), (10, 10, 100, 9), (10, 90, 100, 1),
     (0.25, 25, 100, 3), ([0.02, 0.5], 2, 100, 2), ("epoch", 3, 100, 1), (1, 1, 5, 4)],
)  # fmt: skip
def test_looks_to_come(every, step, total, n):
    assert looks_to_come(every, step, total) == n


@pytest.mark.parametrize(
    ("step", "looks", "needed"),
    [(4, 0, False), (5, 0, True), (5, 1, False), (10, 1, True), (69, 5, False), (70, 5, True),
     (99, 4, True)],
)  # fmt: skip
def test_a_look_is_needed_where_fewer_were_taken_than_moments_went_by(step, looks, needed):
    assert is_needed(step, 100, looks) == needed


@pytest.mark.parametrize("share", [0, -0.1, 1.5, 5, float("nan")])
def test_a_bad_overhead_is_refused_by_value(share):
    with pytest.raises(ValueError, match=re.escape(f"(0, 1], or None for no limit, got {share}")):
        Budget(share)


@pytest.mark.parametrize("share", ["5%", True, [0.05]])
def test_an_overhead_that_is_no_number_is_refused(share):
    with pytest.raises(TypeError, match=re.escape(f"(0, 1], or None for no limit, got {share!r}")):
        Budget(share)
