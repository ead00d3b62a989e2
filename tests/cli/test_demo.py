"""`iimm demo`: the README's run, shown while it goes on, and nothing left behind elsewhere."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_cli import RUNNER

from iimm_callbacks import cli
from iimm_callbacks.cli import demo
from iimm_callbacks.records.run_file import read_run
from iimm_callbacks.reports import terminal as report


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A demo of two steps: what it said, its folder, and the user's record."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IIMM_CALLBACKS_STORE", str(folder / "record" / "store.jsonl"))
        patch.chdir(folder)
        result = RUNNER.invoke(cli.app, ["demo", "--output", "new/demo", "--steps", "2"])
    return SimpleNamespace(result=result, folder=folder, output=folder / "new" / "demo")


def test_the_demo_shows_every_look_then_predicted_and_observed(done):
    assert done.result.exit_code == 0, done.result.output
    record = read_run(done.output / "run.json")
    assert record["task"] == "digits"
    assert record["off_target"] == ["letters", "emoji"]
    assert record["forecast"]["base_rate"] is False
    assert len(record["looks"]) > 2
    shown = done.result.stderr.splitlines()
    assert all(report.look_line(row) in shown for row in record["looks"][1:])
    assert report.preflight_table(record) in done.result.stderr
    assert report.summary_table(record) in done.result.stdout
    assert "Traceback" not in done.result.output


def test_the_demo_forecasts_from_no_run_on_its_own_task(done):
    runs = [run for run in demo.sample_outcomes() if run.task == "handwritten_digits"]
    assert runs == []
    assert read_run(done.output / "run.json")["forecast"]["n_outcomes"] > 100


def test_the_demo_writes_a_report_and_names_it(done):
    assert (done.output / "report.html").stat().st_size > 10_000
    (told,) = [x for x in done.result.stdout.splitlines() if x.startswith("Written to ")]
    assert "report.html" in told


def test_the_demo_writes_to_its_folder_alone(done):
    assert not (done.folder / "record").exists()
    assert [path.name for path in done.folder.iterdir()] == ["new"]
    suffixes = {path.suffix for path in done.output.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".html", ".png"}


def test_without_matplotlib_there_is_a_run_file_and_word_of_the_report(monkeypatch, tmp_path):
    def refuse(*_):
        raise ImportError("needs matplotlib: pip install matplotlib")

    monkeypatch.setattr("iimm_callbacks.reports.page.write_report", refuse)
    written, told = demo._report({}, tmp_path, [])
    assert written is None
    assert "no report: needs matplotlib: pip install matplotlib" in told


def look(step, **more):
    return {
        "step": step, "share": step / 10, "level": "continue", "reason": "r",
        "eval_iimm": 0.4, "eval_iimm_inter": 0.3, "eval_iimm_intra": 0.5,
        "eval_iimm_accuracy": 0.5, "eval_iimm_gain_observed": 0.031,
    } | more  # fmt: skip


RECORD = {
    "task": "digits", "off_target": [], "method": "full", "n_images": 300, "n_classes": 10,
    "recipe": {"trainable_share": 1.0}, "ended": "running",
    "limits": {"max_forgetting": None, "limit_on": "mean", "confidence": 0.8},
    "forecast": {"base_rate": False, "basis": "b", "notes": [], "evidence": {}},
}  # fmt: skip
AHEAD = {
    "eval_iimm_forgetting_observed": 0.045, "eval_iimm_forgetting_forecast": 0.07,
    "eval_iimm_forgetting_forecast_low": 0.01, "eval_iimm_forgetting_forecast_high": 0.13,
    "eval_iimm_exceed_probability": 0.83, "level": "stop",
}  # fmt: skip


def cells(table):
    """What a terminal would show of the last row."""
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    rows = [x for x in console.file.getvalue().splitlines() if x.startswith("│")]
    return [cell.strip() for cell in rows[-1].strip("│").split("│")]


def test_the_table_of_looks_is_in_points_with_the_forecast_where_there_is_one():
    shown = demo.looks_table(RECORD | {"looks": [look(0), look(3, **AHEAD)]}, 3, 10)
    assert "step 3 of 10" in shown.title
    assert cells(shown) == [
        "3", "30%", "0.400", "+3.1", "+4.5", "+7.0 [+1.0, +13.0]", "0.83", "stop",
    ]  # fmt: skip
    assert cells(demo.looks_table(RECORD | {"looks": [look(0)]}, 0, 10))[4:7] == ["", "", ""]


def follow(terminal):
    """What is written of a run of three looks."""
    looks = [look(0)]
    guard = SimpleNamespace(monitor=None, record=lambda: RECORD | {"looks": list(looks)})
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, _environ={})
    with demo.Looks(guard, console) as shown:
        shown.update(0, 10)  # the guard could not begin: nothing to show
        assert console.file.getvalue().count("IIMM before training") == 0
        guard.monitor = object()
        for step in (0, 1, 2):
            shown.update(step, 10)
        looks.append(look(3, **AHEAD))
        shown.update(3, 10)
        shown.update(4, 10)
    return console.file.getvalue()


def test_a_terminal_has_a_table_that_follows_the_steps():
    text = follow(terminal=True)
    assert text.count("IIMM before training") == 1
    for step in range(5):
        assert f"step {step} of 10" in text


def test_elsewhere_each_look_is_one_line():
    text = follow(terminal=False)
    assert "\x1b" not in text
    assert text.count("IIMM step 3 (30%)") == 1
    assert text.count("IIMM before training") == 1


def test_a_file_in_the_way_is_an_error_before_any_training(tmp_path):
    (tmp_path / "file").write_text("")
    result = RUNNER.invoke(cli.app, ["demo", "--output", str(tmp_path / "file")])
    assert result.exit_code == 1
    where = f"`--output` needs a folder that can be written to, got '{Path(tmp_path / 'file')}'"
    assert where in result.stderr
