"""`iimm demo`: the README's run, shown while it goes on, and nothing left behind elsewhere."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from test_cli import RUNNER

from iimm_callbacks import cli
from iimm_callbacks.cli import trying
from iimm_callbacks.records.run_file import read_run
from iimm_callbacks.reports.terminal import look_line, summary_table

pytestmark = [pytest.mark.once, pytest.mark.whole]


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
    record = read_run(done.output / "iimm_digits.json")
    assert record["task"] == "digits"
    assert record["off_target"] == ["letters", "emoji"]
    assert record["forecast"]["base_rate"] is False
    assert len(record["looks"]) > 2
    shown = done.result.stderr.splitlines()
    assert all(look_line(row) in shown for row in record["looks"][1:])
    assert "IIMM before training: digits (full)" in done.result.stderr
    assert summary_table(record) in done.result.stderr
    assert "Traceback" not in done.result.output


def test_the_demo_forecasts_from_no_run_on_its_own_task(done):
    runs = [run for run in trying.sample_outcomes() if run.task == "handwritten_digits"]
    assert runs == []
    assert read_run(done.output / "iimm_digits.json")["forecast"]["n_outcomes"] > 100


def test_the_demo_writes_a_report_and_names_it(done):
    assert (done.output / "report.html").stat().st_size > 10_000
    (told,) = [x for x in done.result.stdout.splitlines() if x.startswith("Written to ")]
    written = {str(p.relative_to(done.output)) for p in done.output.rglob("*") if p.is_file()}
    assert told.endswith(f": {', '.join(sorted(written))}")
    assert written >= {"report.html", "iimm_digits.json"}


def test_the_demo_writes_to_its_folder_alone(done):
    assert not (done.folder / "record").exists()
    assert [path.name for path in done.folder.iterdir()] == ["new"]
    suffixes = {path.suffix for path in done.output.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".html", ".png"}


def test_without_matplotlib_there_is_a_run_file_and_word_of_the_report(monkeypatch, tmp_path):
    def refuse(*_):
        raise ImportError("needs matplotlib: pip install matplotlib")

    monkeypatch.setattr("iimm_callbacks.reports.page.write_report", refuse)
    assert trying._report({}, tmp_path, []) == (
        None,
        "No report was written: needs matplotlib: pip install matplotlib",
    )


def test_a_file_in_the_way_is_an_error_before_any_training(tmp_path):
    (tmp_path / "file").write_text("")
    result = RUNNER.invoke(cli.app, ["demo", "--output", str(tmp_path / "file")])
    assert result.exit_code == 1
    where = f"`--output` needs a folder that can be written to, got '{Path(tmp_path / 'file')}'"
    assert where in result.stderr
