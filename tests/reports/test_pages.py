"""A run's page: all that was measured, for every reader, whatever the record holds."""

import copy
import html
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import ABSENT, HOSTILE, PREDICTED, RAW, make_record
from test_untrusted import PLACES, change_at, json_values

from iimm_callbacks import Outcome
from iimm_callbacks.monitor import IIMMMonitor
from iimm_callbacks.records import keys
from iimm_callbacks.records.run_file import check_run, read_run, save_run
from iimm_callbacks.reports import facts
from iimm_callbacks.reports.compare import compare_runs
from iimm_callbacks.reports.drawing import (
    DARK,
    LIGHT,
    MARKS,
    SERIES,
    Picture,
    as_svg,
    drawing,
    label,
    new_figure,
)
from iimm_callbacks.reports.figures import run_pictures
from iimm_callbacks.reports.page import PICTURES, fit_line, past_runs, write_report
from iimm_callbacks.reports.terminal import summary_table
from iimm_callbacks.reports.words import printable

pytestmark = pytest.mark.once

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "br", "path", "use", "rect"}
BEHIND = ("paper", "panel")
TEXT = LIGHT.keys() - {*BEHIND, "rule", "edge"}
FETCHING = {"src", "srcset", "data", "poster", "action", "background", "ping", "formaction"}


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours by WCAG 2.2, from 1 (the same) to 21 (black on white)."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


class Page(HTMLParser):
    """A page as a browser takes it: its elements, and the text that is shown."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open, self.headings = [], "", [], []
        self.html = source
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"
        self.text += " " * (tag in ("td", "th", "caption", "dt", "dd"))

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def shows(self, words):
        return " ".join(words.split()) in " ".join(self.text.split())


def report(record, tmp_path, outcomes=(), drawn=False):
    """Its page; unless `drawn` its pictures are made but not drawn, which takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr("iimm_callbacks.reports.page.save_picture", lambda picture, path: None)
            patch.setattr("iimm_callbacks.reports.drawing.as_svg", undrawn)
        written = write_report(record, tmp_path / "out", outcomes)
    return Page(written.read_text(encoding="utf-8"))


def undrawn(picture):
    return f'<svg role="img" aria-label="{html.escape(printable(picture.alt))}"></svg>'


def outcome(task, iimm, gain=0.1, drop=0.05, **more):
    """A complete run of the model "1f"."""
    fields = {
        "model": "m", "model_fingerprint": "1f", "method": "full", "task": task,
        "task_fingerprint": "2e", "iimm": iimm, "inter": iimm, "intra": iimm,
        "standard_error": 0.01, "n_images": 512, "n_classes": 10, "zero_shot_accuracy": 0.5,
        "final_accuracy": 0.5 + gain, "off_target_before": {"a": 0.5},
        "off_target_after": {"a": 0.5 - drop},
    }  # fmt: skip
    return Outcome(**(fields | more))


PAST = [outcome(f"t{i}", 0.3 + 0.05 * i, gain=0.1 + 0.04 * i, drop=0.02 * i) for i in range(5)]


def full_record():
    """`make_record`, with all that a real run has besides."""
    record = make_record() | {"model": "m", "model_fingerprint": "1f", "run": "ab"}
    record["looks"][1] |= {
        "share": 1.0, "standard_errors": {"gain": 0.03, "forgetting": 0.011}, "time": 1.8e9,
    }  # fmt: skip
    record["recipe"] |= {"steps": 50, "learning_rate": 1e-4, "seed": 3, "betas": [0.9, 0.99]}
    record["fingerprints"] = {"digits": "c0ffee"}
    return record


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of `full_record` among `PAST`, drawn."""
    return report(full_record(), tmp_path_factory.mktemp("page"), PAST, drawn=True)


# --- what it says ---


def test_the_page_shows_forecast_and_observed_and_whether_they_agree(page):
    for words in (
        "digits: gained 41.5 points, forgot 3.1, within the limit of 5",
        "Method full. Verdict: ",
        "Run: finished; latest look after 50 of 50 steps (100% done).",
        "+30.0 [+10.0, +50.0] +41.5 ± 3.0 inside the interval",
        "+6.0 [-1.0, +13.0] +3.1 ± 1.1 inside the interval",
        "worst task none +12.5 nothing was forecast",
    ):
        assert page.shows(words), words


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        (0.5, "inside the interval"),
        (0.6, "outside: 10.0 points above the interval"),
        (0.05, "outside: 5.0 points below the interval"),
    ],
)
def test_a_forecast_that_missed_is_said_to_have_missed(tmp_path, gain, says):
    record = full_record()
    record["looks"][1]["eval_iimm_gain_observed"] = gain
    assert report(record, tmp_path).shows(f"{100 * gain:+.1f} ± 3.0 {says}")


LATER = "finished, as a later phase of its training"
STOPPED = "stopped by the guard at step 50: x"


@pytest.mark.parametrize("ended", ["running", STOPPED, "finished", LATER])
def test_a_run_that_did_not_go_to_its_end_is_not_held_against_the_forecast(tmp_path, ended):
    record = full_record() | {"ended": ended}
    if ended == "finished":
        record["looks"][1]["share"] = 0.5
    page = report(record, tmp_path)
    assert page.shows("does not compare: this run is not complete")
    said = "from the untouched model to the last planned step, and this one is not"
    assert page.shows(said)
    assert said in " ".join(summary_table(record).split())
    assert not page.shows("inside the interval")
    assert page.shows("still running when this was written") == (ended == "running")


def test_the_grade_says_where_simpler_forecasts_were_better(tmp_path):
    record = full_record()
    record["forecast"]["evidence"]["gain"] |= {
        "error": 0.046, "error_of_mean": 0.042, "error_of_zero_shot": 0.05,
    }  # fmt: skip
    page = report(record, tmp_path)
    assert page.shows("4.6 4.2 5.0 0.4 worse than the plain mean; 0.4 better than the zero-shot")
    assert page.shows("88% 8 runs, 4 tasks 30% mean 62%, IIMM 30%, zero-shot error 8%")
    assert page.shows("learning rate lies outside the range of the saved runs")


def test_the_grade_says_what_was_left_out(tmp_path):
    record = full_record()
    evidence = record["forecast"]["evidence"]
    assert report(record, tmp_path).shows("mean error in points, leave-one-task-out, beside")
    evidence["worst"] = evidence["gain"] | {"left_out": "model"}
    both = "leave-one-model-out and leave-one-task-out, beside"
    assert report(record, tmp_path).shows(both)
    del evidence["gain"]
    assert report(record, tmp_path).shows("mean error in points, leave-one-model-out, beside")


def test_base_rates_are_said_to_be_of_what_they_are_of(tmp_path):
    record = full_record()
    basis = "base rates: borrowed from 143 complete runs of 1 other model, with other recipes"
    record["forecast"] |= {"base_rate": True, "basis": basis}
    page = report(record, tmp_path)
    assert page.shows(f"The forecast rests on {basis}. IIMM does not compare across models")
    assert not page.shows("published figures")


def test_every_off_target_task_is_there_and_how_many_lost_more_than_the_limit(page):
    assert page.shows("emoji 50.0 % 37.5 % +12.5 yes [v2] 75.0 % 75.0 % +0.0 no")
    assert page.shows("1 of 2 off-target tasks have lost more than 5.0 points; the limit of")


def test_the_forecast_of_each_off_target_task_stands_beside_its_drop(tmp_path):
    record = full_record()
    record["forecast"]["off_target"] = {"emoji": {"point": 0.1, "low": 0.02, "high": 0.18}}
    page = report(record, tmp_path, PAST)
    assert page.shows(
        "emoji 50.0 % 37.5 % +12.5 +10.0 [+2.0, +18.0] yes [v2] 75.0 % 75.0 % +0.0 none"
    )
    assert page.shows("The table has the forecast of each.")
    assert not page.shows("There is no forecast for single tasks.")
    save_run(record, tmp_path / "run.json")
    assert read_run(tmp_path / "run.json") == record
    record["forecast"]["off_target"]["emoji"]["low"] = "<b>"
    save_run(record, tmp_path / "run.json")
    with pytest.raises(ValueError, match=r"off_target.*'low'.* must be a finite number, got '<b>'"):
        read_run(tmp_path / "run.json")


def test_the_measure_the_verdicts_and_the_recipe_are_there(page):
    for words in (
        "IIMM 0.432 ± 0.012 0.432 ± 0.012 mean of the two terms",
        "inter-modal 0.200 0.200",
        "step 0: ▲ warn, nothing to judge by yet",
        "50 100% 0.432 +41.5 ± 3.0 +3.1 ± 1.1 +12.5 +30.0 [+10.0, +50.0] +6.0 [-1.0, +13.0] 0.62",
        "trainable 2.91 % of the parameters",
        "learning_rate 0.0001",
        "betas [0.9, 0.99]",
        "fingerprint of digits c0ffee",
        "latest look 2027-01-15 08:00:00 UTC",
        "2 taken, 0 dropped to keep to the overhead allowed, 0 failed",
    ):
        assert page.shows(words), words


def test_a_model_that_knows_the_task_is_said_to_be_near_the_ceiling(tmp_path):
    record = full_record()
    assert "ceiling" not in report(record, tmp_path).text
    record["looks"][0]["eval_iimm_accuracy"] = 0.97
    assert report(record, tmp_path).shows("Zero-shot accuracy is 97.0 %: so near the ceiling")


def test_metrics_are_called_by_their_names(tmp_path, page):
    assert page.shows("zero-shot accuracy 25.0 % 25.0 % on the task being learnt")
    assert page.shows("Each off-target task, zero-shot accuracy largest drop first")
    record = full_record() | {"metrics": {"digits": "recall@5", "[v2]": "macro f1"}}
    record["looks"][0]["eval_iimm_accuracy"] = 0.97
    page = report(record, tmp_path)
    for words in (
        "recall@5 97.0 % 25.0 % on the task being learnt",
        "Recall@5 is 97.0 %: so near the ceiling",
        "Rise of recall@5 on the task since before training.",
        "Mean drop of zero-shot accuracy or macro f1 over the off-target tasks",
        "[v2] (macro f1) 75.0 % 75.0 %",
        "Gain: recall@5 on the task now",
    ):
        assert page.shows(words), words
    assert "accuracy on the task" not in page.text
    record = full_record() | {"metrics": dict.fromkeys(("digits", "emoji", "[v2]"), "recall@5")}
    assert "accuracy" not in report(record, tmp_path).text


# --- rescued ---


def rescued_record(alpha=0.4, applied=True):
    """`full_record`, at its end the mix of this α."""
    numbers = {"gain_se": 0.02, "forgetting_se": 0.01, "worst_se": 0.03, "worst_task": "emoji"}
    mixes = [
        {"alpha": a, "accuracy": 0.25 + g, "gain": g, "forgetting": f, "worst": 2 * f,
         "inside": f <= 0.05} | numbers
        for a, g, f in ((0.0, 0.0, 0.0), (0.4, 0.35, 0.02), (1.0, 0.415, 0.07))
    ]  # fmt: skip
    held = mixes[1] | {"alpha": 0.37, "accuracy": 0.58, "gain": 0.33, "forgetting": 0.023}
    rescue = {
        "mixes": mixes, "alpha": alpha, "reason": "it gains most within the limit",
        "held_out": held, "limits": {"max_forgetting": 0.05, "limit_on": "mean"}, "n_tensors": 9,
        "applied": applied, "notes": ["norms are not mixed"], "runtime": 1.0,
    }  # fmt: skip
    return full_record() | {"rescue": rescue}


def test_a_rescued_run_shows_what_the_model_is_now_and_that_all_else_was_before(tmp_path, page):
    assert "Rescue" not in page.text
    rescued = report(rescued_record(), tmp_path)
    for words in (
        "Rescued at its end: these numbers are of the fine-tuned model before that.",
        "The model is a mix of 0.4 fine-tuned and 0.6 untouched now. All else on this page is of "
        "the fine-tuned model before that",
        "0.40 60.0 % +35.0 ± 2.0 +2.0 ± 1.0 +4.0 ± 3.0 emoji chosen",
        "1.00 66.5 % +41.5 ± 2.0 +7.0 ± 1.0 +14.0 ± 3.0 emoji over",
        "0.37 58.0 % +33.0 ± 2.0 +2.3 ± 1.0 +4.0 ± 3.0 emoji held out",
        "Chosen: α = 0.4, as it gains most within the limit.",
        "Held out: what choosing like this gave",
        "Note: norms are not mixed.",
    ):
        assert rescued.shows(words), words
    assert rescued.open == []
    untouched = report(rescued_record(0.0), tmp_path)
    assert untouched.shows("The model is the untouched one again now.")


@pytest.mark.parametrize("kept", [{"alpha": 1.0}, {"applied": False}])
def test_a_rescue_that_left_the_fine_tuned_model_says_so(tmp_path, kept):
    page = report(rescued_record(**kept), tmp_path)
    assert page.shows("The model is as it was fine-tuned, and so is all on this page.")
    assert not page.shows("Rescued at its end")


# --- for every reader ---


def test_the_page_needs_nothing_beside_it_and_runs_nothing(page):
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes in page.elements:
        assert not FETCHING & set(attributes), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#"), (tag, attributes)
    assert "@import" not in page.html
    assert set(re.findall(r"url\((.)", page.html)) <= {"#"}
    (policy,) = [m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'")


def test_the_page_is_made_of_headings_captions_scopes_and_told_pictures(page):
    assert page.open == []
    assert page.all("html") == [{"lang": "en"}]
    assert [m for m in page.all("meta") if m.get("name") == "viewport"]
    assert len(page.all("title")) == len(page.all("main")) == len(page.all("h1")) == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.all("caption")) == len(page.all("table")) == 6
    assert {th.get("scope") for th in page.all("th")} == {"col", "row"}
    pictures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == len(page.all("figure")) == len(PICTURES)
    assert len(page.all("figcaption")) == len(PICTURES)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    links = [a["href"][1:] for a in page.all("a") + page.all("use")]
    assert set(named + links) <= set(ids)


def test_the_pictures_are_told_with_their_numbers(page):
    gain, forgetting, tasks, measure, past_gain, past_forgetting, probability = (
        svg["aria-label"] for svg in page.all("svg")
    )
    assert "Observed at step 0: +0.0; step 50: +41.5" in gain
    assert (
        "Forecast of the end, with its 90 % interval, made at step 0: +30.0 [+10.0, +50.0]" in gain
    )
    assert "step 50: +3.1" in forgetting
    assert "emoji +12.5 (50.0 % to 37.5 %)" in tasks
    assert "step 0: 0.432, 0.200 and 0.664" in measure
    assert "from +10.0 to +26.0; 5 of them, on 5 tasks, under this method" in past_gain
    assert "This run has IIMM 0.432, forecast +30.0 [+10.0, +50.0], observed +41.5" in past_gain
    assert "rises by 4.0 points per 0.1 of IIMM and explains 100.0 %" in past_forgetting
    assert "step 50: 0.62, warn" in probability


def test_a_thousand_looks_are_told_in_a_few(tmp_path):
    record = full_record()
    last = record["looks"][1]
    record["looks"] = [record["looks"][0], *(last | {"step": i} for i in range(1, 1000))]
    label = report(record, tmp_path).all("svg")[0]["aria-label"]
    assert "Observed at step 0: +0.0; step 111: +41.5; " in label
    assert "step 999: +41.5 (990 looks between these are in the table)" in label


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_as_wcag_asks(colours):
    for behind in BEHIND:
        worst = min(TEXT, key=lambda name: contrast(colours[name], colours[behind]))
        assert contrast(colours[worst], colours[behind]) >= 4.5, (worst, behind)
        assert contrast(colours["edge"], colours[behind]) >= 3
    assert set(SERIES) <= set(TEXT)
    assert len(MARKS) == len(SERIES)


def test_contrast_is_that_of_the_standard():
    # 0.05 + the luminance of a grey of 0x77, ((0x77/255 + 0.055) / 1.055) ** 2.4 = 0.184475
    assert contrast("#777777", "#ffffff") == pytest.approx(1.05 / 0.234475, rel=1e-4)
    assert contrast("#ffffff", "#777777") == contrast("#777777", "#ffffff")
    assert contrast("#123456", "#123456") == 1


def test_pictures_take_the_colours_of_the_page(page):
    for name in LIGHT:
        assert page.html.count(f"--{name}: {LIGHT[name]}") == 1
        assert page.html.count(f"--{name}: {DARK[name]}") == 1
    assert "prefers-color-scheme: dark" in page.html
    assert "@media print" in page.html
    drawn = page.html[page.html.index("<svg") :]
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) == set()
    assert "var(--blue)" in drawn


# --- files ---


def test_pictures_are_written_beside_the_page_and_old_ones_removed(tmp_path):
    folder = tmp_path / "out"
    assert write_report(full_record(), folder, PAST) == folder / "report.html"
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.html", *(f"{name}.png" for name in PICTURES)}
    assert all((folder / f"{name}.png").read_bytes()[:8] == PNG for name in PICTURES)
    (folder / "mine.png").write_bytes(b"")
    write_report(make_record(forecast=False, off_target=False), folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.html", "gain.png", "measure.png", "mine.png"}


def test_the_same_run_gives_the_same_page_and_stays_as_it_was(tmp_path, page):
    record = full_record()
    before = copy.deepcopy(record)
    assert report(record, tmp_path, PAST, drawn=True).html == page.html
    assert record == before


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (lambda: write_report(full_record(), tmp_path / "out"),
                 lambda: compare_runs([full_record()], tmp_path / "c.png")):  # fmt: skip
        with pytest.raises(ImportError, match="pip install matplotlib"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_record_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="`looks` must hold a look, got none"):
        write_report(full_record() | {"looks": []}, tmp_path / "out")
    with pytest.raises(ValueError, match="`forecast` must be an object, got None"):
        write_report(full_record() | {"forecast": None}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- runs in any state ---


def one_look(record):
    record["looks"] = record["looks"][:1]


def base_rates(record):
    record["forecast"] = PREDICTED | {"base_rate": True, "evidence": {}}
    for look in record["looks"]:
        for key in [key for key in look if "_forecast" in key]:
            del look[key]


def captions(record):
    record["n_classes"] = record["n_images"]


STATES = {
    "running": lambda r: r.update(ended="running"),
    "stopped before its first step": lambda r: (one_look(r), r.update(ended="stopped at step 0")),
    "diverged": lambda r: r.update(ended="training diverged", failures=2),
    "one look": one_look,
    "base rates": base_rates,
    "captions": captions,
    "no limit": lambda r: r["limits"].update(max_forgetting=None),
    "limit on the worst": lambda r: r["limits"].update(limit_on="worst"),
    "of an old version": lambda r: [r.pop(k, None) for k in ("run", "model", "fingerprints")],
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("past", [(), PAST], ids=["none", "past"])
def test_a_run_in_any_state_has_a_page(tmp_path, state, past):
    record = full_record()
    STATES[state](record)
    page = report(json.loads(json.dumps(record)), tmp_path, past)
    assert page.open == []
    assert page.shows("How to read this")
    if state == "base rates":
        assert page.shows("borrowed forecast")
        assert page.shows("There is no forecast of it.")  # at the looks, which have none here


@pytest.mark.parametrize(("forecast", "off_target"), [(False, True), (True, False), (False, False)])
def test_a_run_without_forecast_or_off_target_tasks_has_a_page(tmp_path, forecast, off_target):
    record = make_record(forecast=forecast, off_target=off_target)
    page = report(record, tmp_path, PAST)
    assert page.shows(ABSENT["basis"]) != forecast
    assert page.shows("no off-target task was given, so it was not measured") != off_target
    assert page.shows("It has no grade") != forecast


def test_a_real_run_has_a_page_at_every_moment(
    tmp_path, tiny_clip, processor, colour_task, shape_task
):
    monitor = IIMMMonitor(
        colour_task, [shape_task], processor=processor, verbose=False, outcomes=PAST,
    )  # fmt: skip
    model = tiny_clip()
    monitor.begin(model, recipe={"steps": 2})
    assert report(monitor.record(), tmp_path).shows("still running when this was written")
    for step in (1, 2):
        monitor.check(model, step, 2)
    own = monitor.end(model, 2)
    page = report(monitor.record(), tmp_path, [own, *PAST])
    assert page.shows("Run: finished; latest look after 2 of 2 steps (100% done).")
    assert page.shows("no complete run of these weights")  # its own outcome is no past one


# --- among past outcomes ---


def test_past_runs_are_complete_ones_of_these_weights_once_and_not_the_run_itself():
    record = full_record()
    good = outcome("t", 0.4, run="cd")
    others = [
        outcome("t", 0.4, run="cd", complete=False), outcome("t", 0.4, complete=False),
        outcome("t", 0.4, model_fingerprint="2f"), outcome("t", 0.4, run="ab"),
        outcome("t", None),
    ]  # fmt: skip
    assert past_runs(record, [*others, good, good]) == [good]
    assert past_runs(make_record(), [good]) == []  # whose weights are not known


def test_the_line_is_the_least_squares_line_and_its_band_the_prediction_band():
    x, y = [0.2, 0.3, 0.5, 0.6], [0.1, 0.2, 0.2, 0.3]
    line = fit_line([outcome(f"t{i}", v) for i, v in enumerate(x)], y)
    # Means 0.4 and 0.2; Sxx = 0.04 + 0.01 + 0.01 + 0.04 = 0.1, Sxy = 0.02 + 0 + 0 + 0.02 = 0.04
    assert line.slope == pytest.approx(0.4)
    assert line.intercept == pytest.approx(0.04)
    assert line.r2 == pytest.approx(0.04**2 / (0.1 * 0.02))
    # Residuals -0.02, 0.04, -0.04, 0.02: s² = 0.004 / 2; t(0.95, 2) = 2.919986
    middle, half = line.at(np.array([0.4, 0.6]))
    assert middle == pytest.approx([0.2, 0.28])
    spread = 2.919986 * np.sqrt(0.002)
    assert half == pytest.approx([spread * np.sqrt(1.25), spread * np.sqrt(1.25 + 0.4)])


def test_two_tasks_or_one_iimm_make_no_line(tmp_path):
    assert fit_line([outcome("a", 0.3), outcome("b", 0.4)] * 3, [0.1] * 6) is None
    assert fit_line([outcome(f"t{i}", 0.3) for i in range(5)], [0.1] * 5) is None
    level = fit_line(PAST, [0.1] * 5)
    assert (level.slope, level.r2, level.p_value) == (0, 0, 1)
    page = report(full_record(), tmp_path, PAST[:2])
    assert page.shows("No line: that takes runs of this method on 3 tasks.")


def test_only_runs_of_the_method_make_the_line(tmp_path):
    others = [outcome(f"t{i}", 0.3 + 0.1 * i, gain=-0.1 * i, method="lora") for i in range(3)]
    page = report(full_record(), tmp_path, [*PAST, *others], drawn=True)
    assert page.shows("8 complete runs of these weights, from -20.0 to +26.0; 5 of them, on 5")
    assert page.shows("other methods (3)")
    assert page.shows("this method (5)")
    assert page.shows("Their line rises by 8.0 points per 0.1 of IIMM and explains 100.0 %")


def test_past_runs_of_another_kind_are_counted(tmp_path):
    record = full_record()
    tasks = {name: 0.5 for name in record["off_target"]}
    canaries = tasks | {record["task"]: 0.5}
    alike, canary = (
        outcome(name, 0.3, off_target_before=probed, off_target_after=probed)
        for name, probed in (("t0", tasks), ("t1", canaries))
    )
    recall = outcome("t2", 0.4, off_target_before=tasks, off_target_after=tasks,
                     recipe={"metrics": {"t2": "recall@5"}})  # fmt: skip
    told = "than this run had {}: these do not compare with it."
    assert not report(record, tmp_path, [alike, canary]).shows("than this run had")
    page = report(record, tmp_path, [alike, canary, recall, *PAST])
    assert page.shows("Another metric " + told.format(1))
    assert page.shows("Other off-target tasks or metrics " + told.format(5))


def test_a_line_that_is_none_is_said_to_be_chance(tmp_path):
    noise = [outcome(f"t{i}", 0.3 + 0.05 * i, gain=g) for i, g in enumerate((0.1, 0.3, 0, 0.2))]
    assert report(full_record(), tmp_path, noise).shows("not more than chance gives (p = ")


# --- what comes from anyone's data ---

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</svg></style></title><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}&lt;b&gt;&#60;",
    "]]><!--<!DOCTYPE x [<!ENTITY y 'z'>]>&y;",
    "$\\frac{1}{0}$",
    "\ufffe\uffff\x0b\x00",
    HOSTILE,
]


def spoiled(evil):
    """`full_record` with `evil` for every text that may be any text, names of settings too."""

    def spoil(value):
        if isinstance(value, dict):
            return {k.replace("emoji", evil): spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        kept = ("mean", "warn", "continue", "1f")
        return evil if isinstance(value, str) and value not in kept else value

    record = spoil(full_record())
    record["off_target"] = [evil, "[v2]"]
    record["recipe"] |= {evil: evil, "nested": {evil: [evil]}}
    record["forecast"]["evidence"]["gain"]["predictors"] = {evil: 1.0}
    record["forecast"]["evidence"][evil] = record["forecast"]["evidence"]["gain"]
    return record


def test_each_cell_of_a_page_names_its_column_for_a_narrow_screen(tmp_path):
    page = write_report(full_record(), tmp_path, []).read_text(encoding="utf-8")
    tables = re.findall(r"<thead>(.*?)</thead>\s*<tbody>(.*?)</tbody>", page, re.DOTALL)
    assert len(tables) >= 4
    for head, body in tables:
        columns = re.findall(r"<th [^>]*>(.*?)</th>", head)
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL):
            assert re.findall(r'<(?:th|td)[^>]* data-label="(.*?)"', row) == columns


@pytest.mark.parametrize(
    ("gain", "drop", "worst", "limits", "title"),
    [
        (0.325, 0.093, 0.2, (0.05, "mean"), "gained 32.5 points, forgot 9.3, over the limit of 5"),
        (-0.01, -0.02, 0.0, (0.05, "mean"), "lost 1.0 points, forgot -2.0, within the limit of 5"),
        (0.1, 0.02, 0.2, (0.05, "worst"),
         "gained 10.0 points, forgot 2.0 (+20.0 on the worst task), over the limit of 5"),
        (0.1, 0.02, 0.2, (None, "mean"), "gained 10.0 points, forgot 2.0"),
        (0.1, None, None, (None, "mean"), "gained 10.0 points"),
    ],
)  # fmt: skip
def test_the_title_says_what_happened(gain, drop, worst, limits, title):
    row = {keys.observed_key("gain"): gain}
    if drop is not None:
        row |= {keys.observed_key("forgetting"): drop, keys.WORST: worst}
    limits = dict(zip(("max_forgetting", "limit_on"), limits, strict=True))
    assert facts.title({"task": "t", "looks": [row], "limits": limits}) == f"t: {title}"


def test_two_looks_are_two_points_and_no_curve():
    run = full_record()
    assert len(run["looks"]) == 2
    steps = [row["step"] for row in run["looks"]]
    with drawing():
        pictures = run_pictures(check_run(run))
    lines = [x for p in pictures for axis in p.figure.axes for x in axis.get_lines()]
    shown = [x for x in lines if list(x.get_xdata()) == steps]
    assert len(shown) > 3
    assert {x.get_linestyle() for x in shown} == {"None"}


@pytest.mark.parametrize("evil", EVIL)
def test_texts_are_shown_and_never_obeyed(tmp_path, page, evil):
    past = [outcome(evil, 0.3 + 0.1 * i, method=evil, ended=evil) for i in range(4)]
    shown = report(spoiled(evil), tmp_path, past, drawn=evil == EVIL[0])
    assert {tag for tag, _ in shown.elements} <= {tag for tag, _ in page.elements}
    obeys_nothing(shown)
    if printable(evil) == evil:
        assert evil in shown.text
    assert f"{printable(evil)}: gained 41.5 points" in shown.text
    assert f"Method {printable(evil)}. " in shown.text


def obeys_nothing(page):
    assert page.open == []
    assert not RAW & set(page.html)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "src"]


def picture_of(text):
    """A picture with `text` wherever there can be any."""
    with drawing():
        figure, (axis,) = new_figure(1)
        axis.plot([0, 1], label=f"a {label(text)}")
        axis.set_title(label(text))
        axis.legend()
    return Picture("name", text, text, text, figure)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(EVIL) | st.text(st.characters(codec="utf-8"), max_size=12))
def test_texts_in_a_picture_are_shown_and_never_obeyed(text):
    page = Page(as_svg(picture_of(text)))
    obeys_nothing(page)
    assert page.all("svg")[0]["aria-label"] == printable(text)
    assert f"a {label(text)}" in page.text


def test_texts_in_a_comparison_are_shown_and_never_obeyed(tmp_path):
    record = spoiled("".join(EVIL))
    data = compare_runs([record, record], tmp_path / "c.html", names=EVIL[:2])
    obeys_nothing(Page((tmp_path / "c.html").read_text(encoding="utf-8")))
    assert data["runs"][0]["method"] == "".join(EVIL)


extremes = st.sampled_from([0, -1, 1, 1e308, -1e308, 10**308, 2**63 - 1, "", "x", [], {}, None])
LOOSE = [("looks", 1, key) for key in ("time", "standard_errors", "share", "step")] + [
    ("recipe", "steps"), ("model",), ("model_fingerprint",), ("run",), ("fingerprints",),
    ("forecast", "n_outcomes"), ("looks", 1, "eval_iimm_se"),
    ("forecast", "evidence", "gain", "n_runs"),
]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(PLACES) | st.sampled_from(LOOSE), json_values | extremes)
def test_any_record_that_can_be_read_has_a_page(tmp_path_factory, place, value):
    record = full_record()
    change_at(record, place, value)
    try:
        record = check_run(record)
    except ValueError:
        return
    assert report(record, tmp_path_factory.mktemp("any"), PAST[:3]).open == []


@pytest.mark.parametrize("far", [1e308, -1e308])
def test_numbers_that_no_axis_holds_can_be_drawn(tmp_path, far):
    record = full_record()
    for look in record["looks"]:
        for key in look:
            look[key] = far if "_forecast" in key else look[key]
        look["eval_iimm_se"] = 1e308
        look["standard_errors"] = {"gain": 1e308, "forgetting": 1e308, "worst": 1e308}
    record["looks"][1]["step"] = 2**62
    record["forecast"]["gain"] = {"point": far, "low": -far, "high": far}
    assert report(record, tmp_path, PAST, drawn=True).open == []
    compare_runs([record], tmp_path / "c.svg")


def test_a_point_outside_its_interval_can_be_drawn(tmp_path):
    record = full_record()
    one_look(record)
    record["looks"][0] |= {"eval_iimm_gain_forecast": 0.9, "eval_iimm_forgetting_forecast": -0.9}
    assert report(record, tmp_path, drawn=True).open == []


# --- several runs ---


def runs_to_compare():
    """Two complete runs of one method, one of another that was stopped."""
    one, two, three = full_record(), full_record(), full_record()
    two["looks"][1]["eval_iimm_gain_observed"] = 0.315
    two["recipe"]["seed"] = 4
    three |= {"method": "lora", "ended": "stopped by the guard at step 50: over"}
    return [one, two, three]


def test_runs_are_compared_in_numbers_and_in_a_picture(tmp_path):
    data = compare_runs(runs_to_compare(), tmp_path / "c.png", names=["a", "b", "c"])
    assert (tmp_path / "c.png").read_bytes()[:8] == PNG
    assert [row["gain"] for row in data["runs"]] == [0.415, 0.315, 0.415]
    assert [row["seed"] for row in data["runs"]] == [3, 4, 3]
    assert [row["complete"] for row in data["runs"]] == [True, True, False]
    full, lora = data["groups"]
    assert (full["method"], full["n_runs"]) == ("full", 2)
    assert full["gain"] == {"mean": pytest.approx(0.365), "low": 0.315, "high": 0.415}
    assert (lora["n_runs"], lora["gain"]) == (0, None)
    assert data["notes"] == ["Not complete, from the untouched model to the last planned step: c."]
    json.dumps(data, allow_nan=False)


def test_the_page_of_several_runs_has_picture_tables_and_numbers(tmp_path):
    compare_runs(runs_to_compare(), tmp_path / "c.html", names=["a", "b", "c"])
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert page.shows("digits full 2 +36.5 (+31.5 to +41.5) +3.1 +12.5")
    assert page.shows("b digits full 4 0.0001 100% +31.5 ± 3.0 +3.1 ± 1.1 +12.5 ▲ warn finished")
    (svg,) = page.all("svg")
    assert (
        "full on digits gain +31.5, forgetting +3.1; lora on digits gain +41.5" in svg["aria-label"]
    )
    assert "not complete" in svg["aria-label"]
    assert page.open == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "x"}, "The runs learn different tasks"),
        ({"model_fingerprint": "2f"}, "The runs start from different weights"),
        ({"fingerprints": {"digits": "other"}}, "Images, prompts or preprocessing of a task"),
        (
            {"fingerprints": {"digits": "other"}, "off_target": ["emoji"]},
            "Images, prompts or preprocessing of a task",
        ),
        (make_record(off_target=False), "Without off-target tasks, and not in the picture: b"),
    ],
)
def test_what_does_not_compare_is_said(tmp_path, change, says):
    records = [full_record(), full_record() | change]
    notes = compare_runs(records, tmp_path / "c.svg", names=["a", "b"])["notes"]
    assert any(note.startswith(says) for note in notes), notes


def test_rescued_runs_are_compared_as_before_that_and_named(tmp_path):
    records = [full_record(), rescued_record(), rescued_record(1.0)]
    notes = compare_runs(records, tmp_path / "c.svg", names=["a", "b", "c"])["notes"]
    assert notes == ["Rescued at the end, shown as before: b."]


@pytest.mark.parametrize("name", ["c", "c.docx", "c.png"])
def test_a_comparison_is_not_written_where_nobody_would_find_it(tmp_path, name):
    (tmp_path / "c.png").mkdir()
    says = re.escape(f"`path` must end in .png, .svg, .pdf or .html, got '{tmp_path / name}'")
    with pytest.raises(ValueError, match=says):
        compare_runs([full_record()], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]


def test_other_off_target_tasks_do_not_compare(tmp_path):
    other = full_record()
    other["off_target"] = ["emoji"]
    notes = compare_runs([full_record(), other], tmp_path / "c.png")["notes"]
    assert notes == ["Their off-target tasks differ: mean and worst forgetting do not compare."]


def test_runs_without_off_target_tasks_give_an_empty_picture_that_says_so(tmp_path):
    record = make_record(off_target=False)
    data = compare_runs([record, record], tmp_path / "c.html")
    assert data["runs"][0]["forgetting"] is None
    page = Page((tmp_path / "c.html").read_text(encoding="utf-8"))
    assert page.shows("no run has off-target tasks")


def test_nothing_to_compare_or_wrong_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one run, got none"):
        compare_runs([], tmp_path / "c.png")
    with pytest.raises(ValueError, match="must name all 2 runs, got 1 names"):
        compare_runs([full_record()] * 2, tmp_path / "c.png", names=["a"])
    with pytest.raises(ValueError, match="xyz"):
        compare_runs([full_record()] * 2, tmp_path / "c.xyz")
