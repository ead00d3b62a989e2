"""Every example, shrunk, and every block of the README."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from forked import in_a_fork
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iimm_callbacks import read_outcomes, sample
from iimm_callbacks.records import keys

ROOT = Path(__file__).parent.parent
RUN_FILE = "iimm_handwritten_digits.json"
CONFIGS = ROOT / "examples" / "accelerate_configs"
ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file", CONFIGS / "cpu_2.yaml")

# Other processes lack the operators that the tests declare for an unsuitable torchvision.
bare_processes = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="in the main environment"
)
# The README's code is for machines with and without an accelerator; torch warns on the latter.
no_pin_memory = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


@pytest.fixture
def example(monkeypatch, tmp_path):
    """(name) -> the module of an example; the working folder is a temporary one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


@pytest.fixture
def python(tmp_path):
    """(arguments) -> what Python printed, run in the temporary folder."""

    def run(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def read_looks(folder, name="run.json"):
    """The looks in a run file, without what the clock says."""
    looks = json.loads((folder / name).read_text())["looks"]
    clock = ("time", "eval_iimm_runtime")
    return [{k: v for k, v in look.items() if k not in clock} for look in looks]


def read_weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.whole
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_guarded_finetune_writes_its_record_picture_and_model(
    example, tmp_path, capsys, method
):
    example("guarded_finetune").main(
        ["--smoke", "--method", method, "--task", "printed_digits", "--output_dir", "out"]
    )
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written >= {"iimm_printed_digits.json", "predicted_vs_observed.png", "model"}
    run = json.loads((tmp_path / "out" / "iimm_printed_digits.json").read_text())
    assert [look["step"] for look in run["looks"]] == [0, 1, 2, 3, 4, 6, 8]
    assert run["method"] == method
    printed = capsys.readouterr().out
    assert f"IIMM before training: printed_digits ({method})" in printed
    assert f"Predicted and observed: printed_digits ({method})" in printed
    # The forecast rests on the other tasks' runs.
    others = [o for o in sample.load_outcomes() if o.task != "printed_digits"]
    assert run["forecast"]["basis"].startswith(f"{len(others)} complete runs of this model, ")
    assert set(run["forecast"]) >= {"gain", "forgetting", "worst"}


@pytest.mark.whole
def test_the_guarded_finetune_takes_a_model_and_a_data_set_of_ones_own(
    example, tmp_path, tiny_clip, processor, colours, own_store
):
    tiny_clip().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        colours.to_parquet(tmp_path / "data" / f"{split}.parquet")
    example("guarded_finetune").main(
        ["--smoke", "--model", "model", "--dataset", "data", "--output_dir", "out"]
    )
    run = json.loads((tmp_path / "out" / "iimm_data.json").read_text())
    assert run["task"] == "data"
    assert run["forecast"]["basis"].startswith("base rates: ")
    (outcome,) = read_outcomes(own_store)
    assert (outcome.task, outcome.complete) == ("data", True)


@pytest.mark.whole
@pytest.mark.once
def test_the_guarded_finetune_goes_on_from_the_last_complete_checkpoint(example, tmp_path):
    main, out = example("guarded_finetune").main, tmp_path / "out"
    run = ["--smoke", "--output_dir", "out", "--save_steps", "3"]
    main(run)
    looks, weights = read_looks(out, RUN_FILE), read_weights(out)
    # As a kill leaves it that comes while the last checkpoint is written.
    (out / "checkpoint-8" / "trainer_state.json").write_text('{"best_global')
    (out / RUN_FILE).unlink()
    with pytest.raises(SystemExit, match="checkpoint-6 is of another run: --resume it"):
        main(run)
    main([*run, "--resume"])
    assert read_looks(out, RUN_FILE) == looks
    assert_same_weights(read_weights(out), weights)


@pytest.mark.whole
def test_the_accelerate_loop_tells_the_tracker_and_goes_on_from_its_checkpoint(
    example, tmp_path, capsys
):
    main, out = example("accelerate_loop").main, tmp_path / "out"
    run = ["--smoke", "--output_dir", "out", "--save_steps", "3"]
    main(run)
    looks, weights = read_looks(out), read_weights(out)
    assert [look["step"] for look in looks] == [0, 1, 2, 3, 4, 6, 8]
    assert "Predicted and observed: handwritten_digits (full)" in capsys.readouterr().out
    told = EventAccumulator(str(out / "tracker")).Reload()
    assert [event.step for event in told.Scalars("eval_iimm")] == [0, 1, 2, 3, 4, 6, 8]
    assert [event.step for event in told.Scalars("loss")] == [1, 2, 3, 4, 6, 8]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-6"]
    (out / "checkpoints" / "unfinished").mkdir()  # by a run that was killed
    with pytest.raises(SystemExit, match="checkpoints are of another run: --resume it"):
        main(run)
    monitor = main([*run, "--resume"])
    assert [look["step"] for look in monitor.history] == [0, 1, 2, 3, 4, 6, 8]
    assert read_looks(out) == looks
    assert_same_weights(read_weights(out), weights)


@pytest.mark.whole
@bare_processes
@pytest.mark.once
def test_the_examples_run_on_two_processes_and_a_stop_stops_both(example, python, tmp_path):
    run = ["--smoke", "--learning_rate", "1e-3", "--output_dir"]
    example("accelerate_loop").main([*run, "alone"])
    # A script of its own, to see what the second process has: only the first one writes.
    (tmp_path / "worker.py").write_text(
        "import json, os, pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "import accelerate_loop, guarded_finetune\n"
        "guarded_finetune.main(['--smoke', '--output_dir', 'trainer'])\n"
        "record = accelerate_loop.main(sys.argv[1:]).record()\n"
        "folder = pathlib.Path('rank-' + os.environ['RANK'])\n"
        "folder.mkdir()\n"
        "(folder / 'run.json').write_text(json.dumps(record))\n"
    )
    printed = python(*ACCELERATE, "worker.py", *run, "two")
    assert printed.count("Processes: 2") == 1
    for of_both in ("IIMM before training", "Predicted and observed", "Written to"):
        assert printed.count(of_both) == 2
    trained = json.loads((tmp_path / "trainer" / RUN_FILE).read_text())
    assert [look["step"] for look in trained["looks"]] == [0, 1, 2, 3, 4, 6, 8]
    assert (trained["recipe"]["batch_size"], trained["ended"]) == (2 * 32, "finished")
    alone, first, second = (read_looks(tmp_path / n) for n in ("alone", "rank-0", "rank-1"))
    assert first == second == read_looks(tmp_path / "two")
    assert first[0] == alone[0]
    assert [look["level"] for look in first] == ["warn", "stop"]
    for ours, theirs in zip(first, alone, strict=True):
        assert ours["eval_iimm"] == pytest.approx(theirs["eval_iimm"], abs=1e-5)
    assert read_weights(tmp_path / "two").keys() == read_weights(tmp_path / "alone").keys()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    # It looks not into these, and `accelerate launch` hands on what it has no option for.
    inner = config.fsdp_config | config.deepspeed_config
    options = {action.dest for action in launch_command_parser()._actions}
    assert inner.keys() <= options
    assert config.num_processes == 2
    words = path.read_text()
    assert ("Run here" in words) == (path.stem == "cpu_2")
    assert ("Not run here" in words) == (path.stem != "cpu_2")


@pytest.mark.whole
@pytest.mark.once
def test_nothing_is_lost_by_kills_and_faults(example):
    printed = in_a_fork(example("soak").main, ["--smoke"])
    assert re.search(r"\b1 runs ended as if nothing had been", printed)
    assert "0 runs lost something" in printed
    happened = dict(re.findall(r"│ (.*?) +│ (\d+) ", printed))
    assert int(happened["SIGKILL"]) > 0


def read_run(folder):
    """The record of a guarded run, all its numbers finite, and the training losses."""
    run = json.loads((folder / "run.json").read_text())
    for look in run["looks"]:
        assert all(math.isfinite(v) for v in look.values() if isinstance(v, float))
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return run, log


@pytest.mark.whole
@pytest.mark.once
def test_contrastive_training_on_captions_is_guarded(example, tmp_path, capsys, monkeypatch):
    module = example("contrastive_captions")
    monkeypatch.setattr(module, "CANARIES", ("printed_letters", "emoji_groups"))
    module.main(["--steps", "12", "--output_dir", "out"])
    run, log = read_run(tmp_path / "out")
    first, last = run["looks"][0], run["looks"][-1]
    assert (last["step"], run["method"]) == (12, "full")
    assert run["n_classes"] == run["n_images"] == 200  # every image has a caption of its own
    assert last[keys.ACCURACY] > 2 * first[keys.ACCURACY]
    evaluated = [row["eval_loss"] for row in log if "eval_loss" in row]
    assert len(evaluated) == 2
    assert evaluated[-1] < evaluated[0]
    assert run["off_target"] == ["printed_letters", "emoji_groups"]
    assert "Predicted and observed: captions (full)" in capsys.readouterr().out


@pytest.mark.once
def test_no_drawing_shares_its_caption(example):
    train, test = example("contrastive_captions").make_drawings(200, 100, seed=0)
    captions = [*train["caption"], *test["caption"]]
    assert len(set(captions)) == 300


@pytest.mark.whole
@pytest.mark.once
def test_contrastive_training_takes_a_model_and_a_data_set_of_ones_own(
    example, tmp_path, monkeypatch
):
    module = example("contrastive_captions")
    monkeypatch.setattr(module, "CANARIES", ("emoji_groups",))
    sample.load_model().save_pretrained("model")
    sample.load_processor().save_pretrained("model")
    (tmp_path / "data").mkdir()
    for split, rows in zip(("train", "test"), module.make_drawings(64, 40, seed=0), strict=True):
        rows = rows.rename_columns({"image": "picture", "caption": "words"})
        rows.to_parquet(f"data/{split}.parquet")
    columns = ["--image_column", "picture", "--caption_column", "words"]
    module.main(
        ["--smoke", "--model", "model", "--dataset", "data", *columns, "--method", "bitfit"]
    )
    run, _ = read_run(tmp_path / "output" / "contrastive_captions")
    assert (run["n_images"], run["method"]) == (40, "bitfit")


@pytest.mark.whole
@pytest.mark.once
def test_a_clap_learns_sounds_and_forgets_others(example, tmp_path, capsys):
    example("audio_clap").main(["--steps", "60", "--output_dir", "out"])
    run, log = read_run(tmp_path / "out")
    first, last = run["looks"][0], run["looks"][-1]
    assert (last["step"], run["method"], run["off_target"]) == (60, "full", ["machines"])
    assert last[keys.observed_key("gain")] > 0.2
    assert first[keys.accuracy_key("machines")] > 0.6  # it was taught these first
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert "Predicted and observed: signals (full)" in capsys.readouterr().out


@pytest.mark.whole
@pytest.mark.once
def test_the_clap_example_takes_a_model_of_ones_own(example, tmp_path):
    module = example("audio_clap")
    for part in module.tiny_clap():
        part.save_pretrained("model")
    module.main(["--smoke", "--model", "model", "--method", "lora", "--output_dir", "out"])
    run, _ = read_run(tmp_path / "out")
    assert run["method"] == "lora"


@pytest.mark.parametrize("method", ["full", "lora", "linear_probe", "clip_adapter"])
def test_an_open_clip_model_is_guarded(example, tmp_path, capsys, method):
    pytest.importorskip("open_clip", reason="an environment of its own")
    steps = ["--steps", "40"] if method == "full" else ["--smoke"]
    example("open_clip_finetune").main([*steps, "--method", method, "--output_dir", "out"])
    run, log = read_run(tmp_path / "out")
    assert (run["method"], len(run["off_target"])) == (method, 12)
    assert (tmp_path / "out" / "model.safetensors").exists()
    if method == "full":
        losses = [row["loss"] for row in log if "loss" in row]
        assert losses[-1] < losses[0]
    assert f"Predicted and observed: handwritten_digits ({method})" in capsys.readouterr().out


@pytest.mark.whole
@pytest.mark.once
def test_the_study_does_no_run_twice(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "study"))
    study = importlib.import_module("run")
    monkeypatch.setattr(study, "OFF_TARGET_IMAGES", 16)
    path, seen = tmp_path / "o.jsonl", tmp_path / "s.jsonl"
    arguments = ["--tasks", "printed_digits", "--methods", "clip_adapter", "--scale", "0.03",
                 "--workers", "1", "--output", str(path), "--signals", str(seen)]  # fmt: skip
    study.main([*arguments, "--runs", "1"])
    first = read_outcomes(path)
    job = study.Job("printed_digits", "clip_adapter", 1e-3, 4, 0)
    assert [study.Job.of(o) for o in first] == [job]
    assert all(o.complete and len(o.off_target_before) == 12 for o in first)
    assert (first[0].model, first[0].run) == ("sample/model", "")
    study.main(arguments)
    again = read_outcomes(path)
    assert again[:1] == first
    assert [study.Job.of(o) for o in again] == [job, replace(job, seed=1)]
    # What the looks saw is of the same looks: the first has changed no prediction.
    signals = importlib.import_module("grade_signals").read_signals(seen)
    assert list(signals) == [job, replace(job, seed=1)]
    assert signals[job].shape == (len(again[0].trajectory), 12, 3)
    assert np.all(signals[job][0] == 0)


@pytest.mark.whole
@pytest.mark.once
@no_pin_memory
def test_the_benchmark_at_real_size_prints_every_ratio(example):
    benchmark = example("benchmark")
    settings = benchmark.Settings(size="b32", smoke=True, n_jpegs=8)
    rows = list(benchmark.b32_rows(settings))
    ratios = [
        float(measured.split()[0].rstrip("%"))
        for name, measured, _ in rows
        if "against" in name[:30]
    ]
    assert len(rows) == 11
    assert all(ratio > 0 for ratio in ratios)
    assert rows[-2][1] == "0.151 MB"
    with pytest.raises(ValueError, match="`--size` must be sample, b32 or tasks, got 'l14'"):
        benchmark.main(["--size", "l14"])


@pytest.mark.whole
@pytest.mark.once
def test_the_device_check_keeps_what_it_can_try_here_and_tells_what_it_cannot(example, capsys):
    check = example("device_check")
    settings = check.Settings(cpu=True, steps=4)
    few = (check.numbers_of_the_cpu, check.random_streams, check.memory, check.out_of_memory)
    rows = [row for one in (*few, check.ranks) for row in one(settings)]
    assert [row.state for row in rows] == ["kept"] * 3 + ["needs CUDA"] + ["kept"] * 3


def test_the_device_check_fails_where_a_promise_is_not_kept(example, capsys, monkeypatch):
    check = example("device_check")

    def lost(_):
        yield check.Row("weights", "differ", "equal", kept=False)

    def breaks(_):
        raise RuntimeError("no such kernel")
        yield

    for checks, code in (([lost], 1), ([breaks], 1), ([check.memory], 0)):
        monkeypatch.setattr(check, "CHECKS", checks)
        assert check.main(["--cpu"]) == code
    printed = capsys.readouterr().out
    assert "no such kernel" in printed
    assert printed.count("FAILED") == 2
    assert "needs CUDA" in printed


@pytest.mark.whole
@pytest.mark.once
@bare_processes
@no_pin_memory
def test_the_benchmark_prints_every_figure(example, capsys):
    example("benchmark").main(["--smoke"])
    printed = capsys.readouterr().out
    for figure in (
        "all pairs",
        "plain reads",
        "linear probe",
        "extra memory",
        "bare forward",
        "with the guard",
    ):
        assert figure in printed


@pytest.mark.whole
@pytest.mark.once
@bare_processes
def test_the_benchmark_of_stores_prints_every_figure(example, capsys):
    example("benchmark").main(["--store", "--smoke"])
    printed = capsys.readouterr().out
    for figure in ("20 runs in a file", "20 runs in a folder", "later start", "appending"):
        assert figure in printed


@no_pin_memory
def test_the_readme_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, name in (
        ("flowers/train", "arrow_directions"), ("flowers/test", "arrow_directions"),
        ("cars", "printed_digits"), ("pets", "emoji_groups"),
    ):  # fmt: skip
        task = sample.load_task(name)
        for position, image in enumerate(task.images(range(40))):
            (label,) = task.labels([position])
            path = tmp_path / folder / task.class_names[label] / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    hub, loop = (
        block.replace("openai/clip-vit-base-patch32", str(sample.model_path()))
        .replace("max_steps=100", "max_steps=4")
        .replace("sample.load_task(", "few(")
        for block in blocks
    )
    exec(compile(hub, "README.md", "exec"), names)
    assert "Predicted and observed: test (full)" in capsys.readouterr().out
    assert names["guard"].outcome.complete
    names["few"] = partial(sample.load_task, probe_size=32)
    exec(compile(loop, "README.md", "exec"), names)
    assert "Predicted and observed: printed_digits (full)" in capsys.readouterr().out
    assert names["outcome"].recipe["steps"] == 8


def test_ci_runs_the_readmes_test_commands():
    run = (ROOT / ".ci" / "run").read_text()
    pattern, *files = re.search(r"grep -hE '(.*)' (README.md) (.ci/README.md)", run).groups()
    text = "\n".join((ROOT / file).read_text() for file in files)
    commands = [line for line in text.splitlines() if re.search(pattern, line)]
    assert [command.startswith("python3 -m venv --clear") for command in commands] == [
        True, False, False, False,
    ]  # fmt: skip
    assert ["ruff" in command for command in commands] == [True, False, False, False]
    assert ["constraints-oldest" in command for command in commands] == [False, True, False, False]
    assert ["test-open-clip" in command for command in commands] == [False, False, True, False]
