"""What a person sees: tables and lines of a small record made by hand, a picture."""

import copy
from pathlib import Path

import pytest

from iimm_callbacks.reports.figures import plot_run
from iimm_callbacks.reports.terminal import (
    look_line,
    preflight_lines,
    preflight_table,
    saved_lines,
    summary_table,
)
from iimm_callbacks.reports.words import page, printable

pytestmark = pytest.mark.once

FIRST = {
    "eval_iimm": 0.4321,
    "eval_iimm_inter": 0.2,
    "eval_iimm_intra": 0.6642,
    "eval_iimm_se": 0.0123,
    "eval_iimm_accuracy": 0.25,
    "eval_iimm_gain_observed": 0.0,
    "eval_iimm_forgetting_observed": 0.0,
    "eval_iimm_forgetting_worst": 0.0,
    "eval_iimm_emoji_accuracy": 0.5,
    "eval_iimm_[v2]_accuracy": 0.75,
    "step": 0,
    "share": 0.0,
    "level": "continue",
    "reason": "nothing to judge by yet",
}
FORECAST = {
    "eval_iimm_gain_forecast": 0.3,
    "eval_iimm_gain_forecast_low": 0.1,
    "eval_iimm_gain_forecast_high": 0.5,
    "eval_iimm_forgetting_forecast": 0.06,
    "eval_iimm_forgetting_forecast_low": -0.01,
    "eval_iimm_forgetting_forecast_high": 0.13,
    "eval_iimm_exceed_probability": 0.623,
    "level": "warn",
}
ABSENT = {
    "basis": "no forecast: no saved runs",
    "notes": [],
    "evidence": {},
    "base_rate": False,
}
PREDICTED = {
    "gain": {"point": 0.3, "low": 0.1, "high": 0.5},
    "forgetting": {"point": 0.06, "low": -0.01, "high": 0.13},
    "basis": "8 complete runs of this model",
    "notes": ["learning rate lies outside the range of the saved runs"],
    "evidence": {
        "gain": {
            "predictors": {"mean": 0.625, "IIMM": 0.3, "zero-shot error": 0.075},
            "n_runs": 8,
            "n_tasks": 4,
            "error": 0.046,
            "error_of_mean": 0.05,
            "error_of_zero_shot": None,
            "coverage": 0.875,
        }
    },
    "base_rate": False,
}
LAST = FIRST | {
    "eval_iimm_gain_observed": 0.415,
    "eval_iimm_forgetting_observed": 0.0312,
    "eval_iimm_forgetting_worst": 0.125,
    "eval_iimm_emoji_accuracy": 0.375,
    "step": 50,
    "share": 0.5,
}
ALONE = [key for key in FIRST if "forgetting" in key or "emoji" in key or "[v2]" in key]


def make_record(forecast=True, off_target=True, limit=0.05):
    """A record of two looks."""
    looks = [row | (FORECAST if forecast else {}) for row in (FIRST, LAST)]
    if not off_target:
        looks = [{k: v for k, v in row.items() if k not in ALONE} for row in looks]
    return {
        "task": "digits",
        "off_target": ["emoji", "[v2]"] if off_target else [],
        "method": "full",
        "recipe": {"trainable_share": 0.0291},
        "limits": {"max_forgetting": limit, "limit_on": "mean", "confidence": 0.8},
        "n_images": 512,
        "n_classes": 10,
        "forecast": copy.deepcopy(PREDICTED if forecast else ABSENT),
        "failures": 0,
        "looks": looks,
        "ended": "finished",
        "looks_dropped": 0,
    }


def lines_with(text, *words):
    """The lines that hold all the words, with single spaces and without table rules."""
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    return [line for line in lines if all(word in line for word in words)]


def test_the_table_before_training_shows_measure_forecast_limit_and_verdict():
    text = preflight_table(make_record())
    assert "IIMM before training: digits (full)" in text
    assert lines_with(text, "trainable 2.91 % of the parameters, method 'full'")
    for line in (
        "IIMM 0.432 ± 0.012 512 images, 10 class prompts",
        "inter-modal 0.200 image to wrong-class text",
        "intra-modal 0.664 image to image",
        "zero-shot accuracy 25.0 % digits",
        "50.0 % emoji (off-target)",
        "75.0 % [v2] (off-target)",
        "gain forecast +30.0 [+10.0, +50.0] points at the end, 90 % interval",
        "forgetting forecast +6.0 [-1.0, +13.0] points at the end, 90 % interval",
        "limit 5.0 points of mean forgetting; stop from 80% sure",
        "verdict warn nothing to judge by yet",
    ):
        assert lines_with(text, line), (line, text)
    for words in (
        "8 complete runs of this model. Learning rate lies outside the range of the saved runs.",
        "gain: from mean 62%, IIMM 30%; leave-one-task-out error 4.6 points over 4 tasks "
        "(predicting the mean: 5.0); 90 % intervals covered 88%",
    ):
        assert words in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 96


def test_an_absent_forecast_is_shown_with_its_reason():
    text = preflight_table(make_record(forecast=False))
    for name in ("gain", "forgetting"):
        assert lines_with(text, f"{name} forecast none")
    assert lines_with(text, "No forecast: no saved runs.")


def test_borrowed_forecasts_are_labelled_and_stand_beside_what_came_out():
    record = make_record()
    record["forecast"] = PREDICTED | {"base_rate": True}
    record["looks"] = [FIRST, LAST]
    text = preflight_table(record)
    assert lines_with(text, "gain borrowed forecast +30.0 [+10.0, +50.0]")
    assert lines_with(summary_table(record), "gain +30.0 [+10.0, +50.0] +41.5")
    assert lines_with(summary_table(record), "predicted, borrowed")


def test_without_a_limit_the_table_says_so():
    assert lines_with(preflight_table(make_record(limit=None)), "limit none only measuring")


def test_an_unknown_standard_error_is_left_out():
    record = make_record()
    del record["looks"][0]["eval_iimm_se"]
    assert lines_with(preflight_table(record), "IIMM 0.432 512 images")


def test_a_metric_of_its_own_is_called_by_its_name():
    record = make_record() | {"metrics": {"digits": "recall@5", "[v2]": "macro f1"}}
    text = preflight_table(record)
    for line in (
        "recall@5 25.0 % digits",
        "zero-shot accuracy 50.0 % emoji (off-target)",
        "macro f1 75.0 % [v2] (off-target)",
    ):
        assert lines_with(text, line), (line, text)
    text = summary_table(record)
    assert lines_with(text, "gain (recall@5) +30.0 [+10.0, +50.0] +41.5")
    assert lines_with(text, "emoji 50.0 % -> 37.5 %")
    assert lines_with(text, "[v2] (macro f1) 75.0 % -> 75.0 %")
    alike = preflight_table(make_record() | {"metrics": {"digits": HOSTILE, "emoji": HOSTILE}})
    assert shows_no_control_code(alike)
    assert lines_with(alike, "50.0 % emoji (off-target)")[0].startswith("50.0 %")


def test_one_look_is_one_line():
    assert look_line(LAST | FORECAST) == (
        "IIMM step 50 (50%): gain +41.5 | forgetting +3.1 | forecast +6.0 [-1.0, +13.0] points"
        " | P(over limit) 0.62 | warn"
    )
    bare = {key: value for key, value in LAST.items() if key not in ALONE}
    assert look_line(bare) == "IIMM step 50 (50%): gain +41.5 points | ok"


def test_a_look_over_the_limit_is_not_called_a_stop():
    assert look_line(LAST | {"level": "stop"}).endswith("| over the limit")
    record = make_record()
    record["looks"][0] |= {"level": "stop"}
    assert lines_with(preflight_table(record), "verdict over the limit")


def test_five_lines_before_training():
    text = preflight_lines(make_record(), "after each epoch, all 512 images each")
    assert text.splitlines()[0] == "IIMM before training: digits (full)"
    for line in (
        "zero-shot accuracy 25.0 % on digits; off target: emoji 50.0 %, [v2] 75.0 %",
        "forecast gain +30.0 [+10.0, +50.0] points at the end, 90 % interval; from 8 complete",
        "forecast forgetting +6.0 [-1.0, +13.0] points at the end, 90 % interval; from 8 complete",
        "limit 5.0 points of mean forgetting; verdict: warn, P(over limit) 0.62",
        "looks after each epoch, all 512 images each",
    ):
        assert lines_with(text, line), (line, text)
    assert max(map(len, text.splitlines())) <= 96
    borrowed = make_record() | {"forecast": PREDICTED | {"base_rate": True}}
    assert "from runs of other models (borrowed)" in " ".join(
        preflight_lines(borrowed, "x").split()
    )
    without = preflight_lines(make_record(forecast=False, off_target=False, limit=None), "x")
    for line in (
        "zero-shot accuracy 25.0 % on digits; no off-target task",
        "forecast gain none: no saved runs",
        "limit none, only measuring",
    ):
        assert lines_with(without, line), (line, without)


def test_many_off_target_tasks_are_shown_by_their_mean_and_the_worst_of_them():
    names = [f"t{i}" for i in range(9)]
    before = {f"eval_iimm_{name}_accuracy": 0.5 for name in names}
    after = {f"eval_iimm_t{i}_accuracy": 0.5 - 0.01 * i for i in range(9)}
    record = make_record() | {"off_target": names, "looks": [FIRST | before, LAST | after]}
    text = preflight_lines(record, "x")
    assert lines_with(text, "off target: 50.0 %, the mean of 9 tasks")
    text = summary_table(record)
    assert lines_with(text, "t8 50.0 % -> 42.0 %")
    assert not lines_with(text, "t4 ")
    assert lines_with(text, "5 tasks that lost less")


def test_what_was_saved_is_named_with_the_command_that_shows_it():
    text = saved_lines(Path("out/iimm_a.json"), Path("store.jsonl"))
    assert text.splitlines() == [
        "Saved: run file out/iimm_a.json; outcome in store.jsonl.",
        "Report: iimm report out/iimm_a.json",
    ]
    assert saved_lines(None, None) == "Saved: no run file; the outcome was not saved."


def test_the_last_look_has_nothing_left_to_forecast():
    assert "forecast" not in look_line(LAST | FORECAST | {"share": 1.0})


def test_the_summary_sets_predicted_beside_observed():
    text = summary_table(make_record())
    for line in (
        "gain +30.0 [+10.0, +50.0] +41.5",
        "forgetting, mean +6.0 [-1.0, +13.0] +3.1",
        "forgetting, worst none +12.5",
        "emoji 50.0 % -> 37.5 %",
        "[v2] 75.0 % -> 75.0 %",
        "Run: finished. Last verdict: warn",
    ):
        assert lines_with(text, line), (line, text)
    assert "dropped" not in text
    assert "failed" not in text


def test_the_summary_without_forecast_and_off_target_shows_the_gain():
    text = summary_table(make_record(forecast=False, off_target=False))
    assert lines_with(text, "gain none +41.5")
    assert "forgetting" not in text


def test_the_summary_owns_up_to_dropped_and_failed_looks():
    text = summary_table(make_record() | {"looks_dropped": 3, "failures": 2})
    assert "3 looks were dropped" in text
    assert "2 looks failed" in text


@pytest.mark.parametrize(
    "settings", [{}, {"forecast": False}, {"off_target": False}, {"limit": None}], ids=str
)
def test_a_plot_is_a_picture_and_leaves_the_record_alone(tmp_path, settings):
    record = make_record(**settings)
    before = copy.deepcopy(record)
    plot_run(record, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert record == before


# --- what comes from anyone's data ---

# Clears the screen, breaks the line, is markup and an emoji code of rich, turns the direction.
HOSTILE = "x\x1b[2J\n[red]:bomb:\u202e\x9b"
SHOWN = r"x\x1b[2J\n[red]:bomb:\u202e\x9b"
RAW = set("\x1b\u202e\x9b")


def hostile_record():
    """`make_record` with every text in it hostile; the off-target tasks and their keys as well."""

    def spoil(value):
        if isinstance(value, dict):
            return {k.replace("emoji", HOSTILE): spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        kept = ("mean", "[v2]", "warn")
        return HOSTILE if isinstance(value, str) and value not in kept else value

    record = spoil(make_record())
    record["forecast"]["notes"] = [f"another {HOSTILE}"]
    record["forecast"]["evidence"]["gain"]["predictors"] = {HOSTILE: 1.0}
    return record


def shows_no_control_code(text):
    return not RAW & set(text) and all(len(line) <= 96 for line in text.splitlines())


def test_names_in_tables_are_shown_as_they_are_written():
    record = hostile_record()
    text = preflight_table(record)
    assert shows_no_control_code(text)
    for line in (
        f"IIMM before training: {SHOWN} ({SHOWN})",
        f"zero-shot accuracy 25.0 % {SHOWN}",
        f"50.0 % {SHOWN} (off-target)",
        f"verdict warn {SHOWN}",
        f"{SHOWN[:1].upper()}{SHOWN[1:]}. Another {SHOWN}.",
        f"gain: from {SHOWN} 100%; leave-one-task-out error 4.6",
    ):
        assert lines_with(text, line), (line, text)


def test_names_in_the_summary_are_shown_as_they_are_written():
    record = hostile_record()
    record["looks"][-1]["level"] = HOSTILE
    text = summary_table(record | {"ended": f"by {HOSTILE}"})
    assert shows_no_control_code(text)
    assert text.splitlines()[-1] == f"Run: by {SHOWN}."
    assert lines_with(text, SHOWN, "50.0 % -> 37.5 %")
    assert f"observed: {SHOWN} ({SHOWN})" in text
    last = summary_table(record | {"ended": "finished"}).splitlines()[-1]
    assert last == f"Run: finished. Last verdict: {SHOWN} ({SHOWN})."


def test_a_look_stays_one_line_whatever_it_holds():
    assert look_line(LAST | {"level": HOSTILE}).endswith(f" | {SHOWN}")


def test_a_plot_is_titled_whatever_the_names(tmp_path):
    record = hostile_record() | {"method": "$\\frac{", "ended": f"stopped {HOSTILE}: why"}
    plot_run(record, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_only_what_a_terminal_would_obey_is_written_out():
    plain = "größe ☃ 数字 👩‍🔬 \\x1b [bold] :smile:"
    assert printable(plain) == plain
    assert printable(HOSTILE) == printable(SHOWN) == SHOWN
    assert printable("\x00\t\x7f\u2028\u2066\udc80") == r"\x00\t\x7f\u2028\u2066\udc80"
    assert page("a\nb", "c") == "a\\nb\nc"
