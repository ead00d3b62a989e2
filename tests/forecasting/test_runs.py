"""Which runs are taken, what is read from them, and how far a question lies outside them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_forecast import EARLY, bare, planted, run, scattered

from iimm_callbacks.forecasting.runs import Ask, Run, Runs, choose, of_a_kind, saved_name
from iimm_callbacks.forecasting.tabulate import beyond, tabulate

pytestmark = pytest.mark.once

ASK = Ask("full", "1f", 0.4, 0.3, 0.2, 0.4, 512)


def runs(outcomes, own=True):
    return Runs([Run(o) for o in outcomes], "", own, False, ())


def chosen(outcomes, published=(), ask=ASK):
    return choose([Run(o) for o in outcomes], [Run(o) for o in published], ask)


PUBLISHED = planted(4, model_fingerprint="published:x", iimm=None, inter=None, intra=None)


@pytest.mark.parametrize(
    ("outcomes", "method", "n", "own", "base_rate", "label"),
    [
        (planted(3), "full", 3, True, False, "3 complete runs of this model, 3 of them under meth"),
        (planted(3), "lora", 3, True, False, "3 complete runs of this model, 0 of them under meth"),
        # Runs of other models join in only where its own are too few.
        (planted(3) + planted(5, model_fingerprint="2"), "full", 3, True, False, "3 complete"),
        (planted(2) + planted(5, model_fingerprint="2"), "full", 11, False, False,
         "2 complete runs of this model, pooled with 9 complete runs of 2 other models"),
        (planted(5, model_fingerprint="2"), "full", 9, False, True, "of 2 other models"),
        # Tasks count, not runs.
        ([run("t")] * 4, "full", 8, False, False, "4 complete runs of this model, pooled with 4"),
        ([run("t"), run("u", model_fingerprint="2"), run("v", model_fingerprint="3")], "full", 7,
         False, False, "6 complete runs of 3 other models"),
        ([], "full", 4, False, True, "base rates: borrowed from 4 complete runs of 1 other model,"),
        ([], "lora", 4, False, True, "with other recipes"),
    ],
)  # fmt: skip
def test_the_models_own_runs_come_first_then_all_then_base_rates(
    outcomes, method, n, own, base_rate, label
):
    found = chosen(outcomes, PUBLISHED, replace(ASK, method=method))
    assert (len(found.rows), found.own, found.base_rate) == (n, own, base_rate)
    assert label in found.label


def test_with_nothing_to_go_by_the_reason_is_given():
    found = chosen([])
    assert found.rows == []
    assert found.label == "no forecast: no complete run of this model is saved"


def test_numbers_of_another_kind_are_not_borrowed():
    recall = replace(ASK, task="captions", recipe={"metrics": {"captions": "recall@1"}})
    rows = [Run(o) for o in (run("t"), run("t", model_fingerprint="2"))]
    assert of_a_kind(rows, recall, "gain") == rows[:1]
    assert of_a_kind(rows, replace(recall, off_target=("a",)), "forgetting") == rows
    assert of_a_kind(rows, ASK, "gain") == rows


def test_a_task_is_found_by_its_fingerprint_under_another_name():
    rows = [Run(run("folder", task_fingerprint="9c")), Run(run("other"))]
    assert saved_name(rows, replace(ASK, task="mine", task_fingerprint="9c")) == "folder"
    assert saved_name(rows, replace(ASK, task="mine", task_fingerprint="77")) == "mine"
    assert saved_name(rows, replace(ASK, task="mine")) == "mine"


def test_a_run_is_read_between_its_looks():
    read = Run(run("t", gain=0.4, drop=0.1, worst=0.2, curve=EARLY))
    assert read.at("gain", 0.1) == pytest.approx(0.5 * 0.4)
    assert read.at("forgetting", 0.4) == pytest.approx(0.85 * 0.1)  # half way from 0.8 to 0.9
    assert read.at("worst", 0.025) == pytest.approx(0.2 * 0.2)
    assert read.at("worst", 0.0) == 0
    assert [read.at(q, 1.0) for q in ("gain", "forgetting", "worst")] == pytest.approx(
        [0.4, 0.1, 0.2]
    )


def test_the_end_is_the_final_accuracy_whatever_the_looks():
    read = Run(replace(run("t", gain=0.4, curve=EARLY), final_accuracy=0.5))
    assert read.at("gain", 1.0) == pytest.approx(0.2)


LOOKS = run("t", drop=0.1, curve=EARLY).trajectory


@pytest.mark.parametrize(
    ("trajectory", "share", "value"),
    [
        ([], 0.1, None),
        (LOOKS[:3], 0.1, 0.05),
        (LOOKS[:3], 0.11, None),  # no look so late
        (LOOKS[2:], 0.05, 0.025),  # from 0 at the start
        (LOOKS[2:], 0.1, 0.05),
        ([*LOOKS[:3], *LOOKS[2:]], 0.1, 0.05),  # a share twice
        ([{"share": 0.1, "gain": 0.1}], 0.1, None),  # looks without off-target tasks
        ([{"share": 0.05, "gain": 0.1}, *LOOKS[2:]], 0.05, 0.025),
        (LOOKS[::-1], 0.1, 0.05),
    ],
)
def test_what_a_run_cannot_tell_is_none(trajectory, share, value):
    found = Run(replace(run("t", drop=0.1), trajectory=trajectory)).at("forgetting", share)
    assert found == (None if value is None else pytest.approx(value))


def test_the_noise_is_that_of_the_nearest_look():
    looks = [{"share": s, "gain": 0.0, "gain_se": e} for s, e in ((0.1, 0.03), (0.5, 0.02))]
    read = Run(replace(run("t"), trajectory=looks))
    assert [read.noise_at("gain", s) for s in (0.0, 0.1, 0.29, 0.4, 0.9)] == [0.03] * 3 + [0.02] * 2
    assert read.noise_at("worst", 0.1) is None
    assert Run(run("t")).noise_at("gain", 0.1) is None


def test_runs_without_off_target_tasks_have_no_forgetting():
    read = Run(bare(run("t", curve=EARLY)))
    assert [read.at(q, s) for q in ("forgetting", "worst") for s in (0.1, 1.0)] == [None] * 4
    assert read.at("gain", 0.1) is not None


def test_the_table_holds_what_the_runs_hold():
    outcomes = [run(f"t{i}", 0.1 * i, 0.1 + 0.1 * i, before=0.2) for i in range(4)]
    table, question, rows = tabulate(runs(outcomes), ASK, "gain", 1.0)
    np.testing.assert_allclose(table.target, [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(table.features["zero_shot_error"], 0.8)
    np.testing.assert_allclose(table.features["iimm"], [0.0, 0.1, 0.2, 0.3])
    assert [r.outcome for r in rows] == outcomes
    assert list(table.tasks) == ["t0", "t1", "t2", "t3"]
    assert question.features == {
        "zero_shot_error": pytest.approx(0.6), "iimm": 0.3, "inter": 0.2, "intra": 0.4,
    }  # fmt: skip
    assert (question.method, question.model) == ("full", "1f")


def test_iimm_of_other_models_is_not_a_feature():
    table, question, _ = tabulate(runs(planted(), own=False), ASK, "gain", 1.0)
    assert set(table.features) == set(question.features) == {"zero_shot_error"}


@pytest.mark.parametrize(("measured", "rows", "used"), [(2, 6, 0), (3, 6, 1), (3, 7, 0), (4, 7, 1)])
def test_iimm_is_used_where_half_the_tasks_have_it(measured, rows, used):
    outcomes = [replace(o, iimm=None, inter=None, intra=None) for o in planted(rows)]
    outcomes[:measured] = planted(rows)[:measured]
    table, _, kept = tabulate(runs(outcomes), ASK, "gain", 1.0)
    assert ("iimm" in table.features) == bool(used)
    assert len(kept) == (measured if used else rows)


def test_a_share_before_the_end_reads_the_looks():
    table, _, rows = tabulate(runs([*planted(3, curve=EARLY), run("x")]), ASK, "worst", 0.2)
    assert len(rows) == 3  # the run without looks is left out
    np.testing.assert_allclose(table.target, [0.7 * o.worst for o in planted(3)])


def test_runs_with_the_same_off_target_tasks_are_preferred():
    like = {"off_target_before": {"z": 0.5}, "off_target_after": {"z": 0.4}}
    # Every task guarded by all others of one suite: the same set, the task itself counted in.
    suite = [replace(run("new"), **like), replace(run("z"), off_target_before={"new": 0.5},
             off_target_after={"new": 0.3})]  # fmt: skip
    ask = replace(ASK, task="new", off_target=("z",))
    outcomes = [*planted(4), *suite]
    assert len(tabulate(runs(outcomes), ask, "forgetting", 1.0)[2]) == 6  # two tasks are too few
    third = replace(run("q"), off_target_before={}, off_target_after={})
    assert len(tabulate(runs([*outcomes, third]), ask, "gain", 1.0)[2]) == 7


def test_one_fixed_off_target_set_is_preferred_too():
    like = {"off_target_before": {"z": 0.5}, "off_target_after": {"z": 0.4}}
    outcomes = [*planted(4), *(replace(run(f"u{i}"), **like) for i in range(3))]
    ask = replace(ASK, task="new", off_target=("z",))
    assert len(tabulate(runs(outcomes), ask, "forgetting", 1.0)[2]) == 3


def test_a_learning_rate_counts_within_its_method():
    rates = {"full": [1e-6, 1e-4], "lora": [1e-3, 1e-1]}
    outcomes = [
        run(f"t{i}", method=m, recipe={"learning_rate": r})
        for m, own in rates.items() for i, r in enumerate(own)
    ]  # fmt: skip
    ask = replace(ASK, recipe={"learning_rate": 1e-5, "steps": 10})
    table, question, _ = tabulate(runs(outcomes), ask, "gain", 1.0)
    ten = math.log(10)
    np.testing.assert_allclose(table.features["log_learning_rate"], [-ten, ten, -ten, ten])
    assert question.features["log_learning_rate"] == pytest.approx(0)
    assert "log_steps" not in table.features
    unseen = replace(ask, method="bitfit")
    assert "log_learning_rate" not in tabulate(runs(outcomes), unseen, "gain", 1.0)[0].features


@pytest.mark.parametrize("known", [True, False])
def test_other_methods_on_the_same_task_count_above_their_means(known):
    # Above the mean of the method on other tasks, by hand: lora a 0.1 - 0.4, b 0.2 - 0.35,
    # c 0.6 - 0.15; bitfit a 0 - 0.2, c 0.2 - 0; full was seen on b alone.
    outcomes = [run(t, gain=g, method="lora") for t, g in (("a", 0.1), ("b", 0.2), ("c", 0.6))]
    outcomes += [run(t, gain=g, method="bitfit") for t, g in (("a", 0.0), ("c", 0.2))]
    outcomes += [run("b", gain=0.5)]
    ask = replace(ASK, task="c", task_fingerprint="2e" if known else "other")
    table, question, _ = tabulate(runs(outcomes), ask, "gain", 1.0)
    assert ("same_task" in table.features) == known
    if known:
        assert question.features["same_task"] == pytest.approx((0.45 + 0.2) / 2)
        np.testing.assert_allclose(
            table.features["same_task"], [-0.2, 0.0, 0.2, -0.3, 0.45, -0.15], atol=1e-12
        )


@pytest.mark.parametrize("repeated", [2, 3])
def test_the_same_task_under_the_same_method_is_preferred_where_3_tasks_were_repeated(repeated):
    gains = [("a", 0.1), ("a", 0.2), ("b", 0.5), ("b", 0.4), ("c", 0.3), ("c", 0.3)]
    outcomes = [run(t, gain=g) for t, g in gains[: 2 * repeated]]
    outcomes += [run("a", gain=0.9, method="lora"), run("d", gain=0.1, method="lora")]
    ask = replace(ASK, task="a", task_fingerprint="2e")
    table, question, _ = tabulate(runs(outcomes), ask, "gain", 1.0)
    if repeated == 3:  # on other tasks than a: 0.375; than b: 0.225; than c: 0.3
        values, asked = [-0.175, -0.275, 0.175, 0.275, 0, 0, 0, 0], (-0.275 - 0.175) / 2
    else:  # other methods, for the rows; for the question all there is
        values, asked = [0.8, 0.8, 0, 0, -0.3, 0], (-0.35 - 0.25 + 0.8) / 3
    np.testing.assert_allclose(table.features["same_task"], values, atol=1e-12)
    assert question.features["same_task"] == pytest.approx(asked)


@pytest.mark.parametrize(
    ("x", "factor", "says"),
    [
        (0.3, 1.0, []),
        (0.1, 1.0, []),
        (0.5, 1.0, []),
        (0.6, 1.5, ["IIMM lies outside the range of the saved runs"]),  # half of the half-range 0.2
        (0.0, 1.5, ["IIMM lies outside the range of the saved runs"]),
        (1.4, 5.5, ["IIMM lies outside the range of the saved runs"]),
        (1.6, math.inf, ["IIMM lies outside the range of the saved runs"]),
    ],
)
def test_beyond_the_range_intervals_widen_by_half_ranges(x, factor, says):
    table, question, _ = tabulate(runs(planted()), replace(ASK, iimm=x), "gain", 1.0)
    found, words = beyond(table, question)
    assert found == pytest.approx(factor)
    assert words == says


def test_a_range_of_nothing_is_taken_as_its_unit():
    rows = [replace(o, iimm=0.3, recipe={"learning_rate": 1e-5}) for o in scattered()]
    ask = replace(ASK, iimm=0.35, recipe={"learning_rate": 4e-5})
    found, words = beyond(*tabulate(runs(rows), ask, "gain", 1.0)[:2])
    assert found == pytest.approx(1 + 0.05 / 0.05 + 2)  # twice doubled
    assert len(words) == 2


def test_the_range_is_that_of_the_method_where_it_has_one():
    rows = [*planted(), *(replace(o, iimm=0.9, method="lora") for o in planted())]
    for method, factor in (("full", 3.0), ("lora", 1.0), ("bitfit", 1.0)):
        ask = replace(ASK, method=method, iimm=0.9)
        assert beyond(*tabulate(runs(rows), ask, "gain", 1.0)[:2])[0] == pytest.approx(factor)
