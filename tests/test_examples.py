"""Every example, shrunk, and every block of the README."""

import importlib
import json
import re
from pathlib import Path

import pytest

from iimm_callbacks import read_outcomes

ROOT = Path(__file__).parent.parent

# The README's code is for machines with and without an accelerator; torch warns on the latter.
no_pin_memory = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """(name) -> the module of an example; the working folder is a temporary one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_guarded_finetune_writes_its_record_picture_and_model(
    example, tmp_path, capsys, method
):
    example("guarded_finetune").main(
        ["--smoke", "--method", method, "--task", "printed_digits", "--output_dir", "out"]
    )
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written >= {"run.json", "predicted_vs_observed.png", "model"}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [look["step"] for look in run["looks"]] == [0, 1, 2, 3, 4, 6, 8]
    assert run["method"] == method
    printed = capsys.readouterr().out
    assert f"IIMM before training: printed_digits ({method})" in printed
    assert f"Predicted and observed: printed_digits ({method})" in printed
    # The forecast rests on the other tasks' runs.
    assert f"runs of this model under method '{method}'" in run["basis"]


def test_the_guarded_finetune_takes_a_model_and_a_data_set_of_ones_own(
    example, tmp_path, tiny_clip, processor, colours
):
    tiny_clip().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        colours.to_parquet(tmp_path / "data" / f"{split}.parquet")
    example("guarded_finetune").main(
        ["--smoke", "--model", "model", "--dataset", "data", "--output_dir", "out"]
    )
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["task"] == "data"
    assert run["basis"].startswith("no forecast")


def test_recorded_outcomes_are_not_recorded_twice(example, tmp_path):
    for _ in range(2):
        example("record_outcomes").main(
            ["--smoke", "--tasks", "printed_digits", "--methods", "full", "--output", "o.jsonl"]
        )
    (outcome,) = read_outcomes(tmp_path / "o.jsonl")
    assert (outcome.task, outcome.method, outcome.complete) == ("printed_digits", "full", True)


@no_pin_memory
def test_the_benchmark_prints_every_figure(example, capsys):
    example("benchmark").main(["--smoke"])
    printed = capsys.readouterr().out
    for figure in ("all pairs", "plain reads", "extra memory", "bare forward", "with the guard"):
        assert figure in printed


@no_pin_memory
def test_the_readme_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block.replace("max_steps=100", "max_steps=4"), "README.md", "exec"), names)
    assert "Predicted and observed: digits (full)" in capsys.readouterr().out
    assert len(names["runs"]) == 1


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"^.*pytest$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert command is not None
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
