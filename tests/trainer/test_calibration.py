"""`calibrate`: plans within a budget, does no run twice, teaches the next forecast."""

import json
import os
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from forked import in_a_fork, on_ranks
from PIL import Image
from test_cli import ask, fails, run
from tiny import FAMILIES

from iimm_callbacks import (
    Forecaster,
    IIMMMonitor,
    Limits,
    Measurement,
    Outcome,
    Recipe,
    Task,
    calibrate,
    read_outcomes,
)
from iimm_callbacks.cli.shell import seconds_of
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.run_file import read_run
from iimm_callbacks.records.verdict import WATCH
from iimm_callbacks.trainer.calibration import calibrate as module
from iimm_callbacks.trainer.calibration import learnt, runs, work
from iimm_callbacks.trainer.calibration.calibrate import most_different
from iimm_callbacks.trainer.calibration.recipes import read_recipes
from iimm_callbacks.trainer.calibration.work import Cost, Job, fit

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
FAST = {"learning_rate": 1e-2, "max_steps": 5, "per_device_train_batch_size": 4}
FULL = Recipe("full", FAST)


def pictures(names, n, seed, size=16):
    """(image, label) pairs of noisy colours."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        colour = np.array(COLOURS[names[i % len(names)]])
        noisy = np.clip(colour + rng.normal(0, 40, (size, size, 3)), 0, 255).astype("uint8")
        pairs.append((Image.fromarray(noisy), i % len(names)))
    return pairs


def lesson(name, names, seed):
    template = "a photo of the {} thing"
    task = Task(name, pictures(names, 24, seed), class_names=names, templates=template)
    train = Task(name, pictures(names, 30, seed + 1), class_names=names, templates=template)
    return task, train


LESSONS = [
    lesson("warm", ["red", "green"], 10),
    lesson("cold", ["green", "blue"], 20),
    lesson("both", ["red", "green", "blue"], 30),
]
KEPT = [lesson("kept", ["blue", "red"], 40)[0]]


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["CLIP"]()


@pytest.fixture
def start(tiny, tmp_path):
    model, processor = tiny
    fixed = {"off_target": KEPT, "store": tmp_path / "store.jsonl", "output": tmp_path / "out"}

    def calibration(tasks=LESSONS, recipes=(FULL,), **settings):
        given = fixed | {"use_cpu": True, "progress": False} | settings
        return calibrate(model, list(tasks), list(recipes), processor=processor, **given)

    return calibration


def test_every_run_is_saved_and_teaches_the_forecast(start, tiny, tmp_path):
    model, processor = tiny
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = start(recipes=[Recipe("full", FAST), Recipe("bitfit", FAST)])
    saved = read_outcomes(tmp_path / "store.jsonl")
    assert saved == found.outcomes
    assert [(o.task, o.method) for o in saved] == [
        (task.name, method) for task, _ in LESSONS for method in ("full", "bitfit")
    ]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    # The very fingerprints that a real run's forecast looks for.
    probe = Probe(LESSONS[0][0], KEPT, processor=processor)
    probe.prepare(model)
    assert saved[0].task_fingerprint == probe.fingerprints["warm"]
    assert {o.model_fingerprint for o in saved} == {model_fingerprint(model)}
    assert all(
        o.complete and o.recipe["steps"] == 5 and "asked_steps" not in o.recipe for o in saved
    )
    assert [look["share"] for look in saved[0].trajectory] == [0.0, 0.2, 0.4, 1.0]  # of 5
    assert [e.n_runs for e in found.errors if e.method == "all"] == [6, 6]
    assert [row["n_tasks"] for row in found.curve] == [0, 1, 2]
    assert [read_run(path)["run"] for path in found.run_files] == [o.run for o in saved]
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.once
def test_the_errors_are_those_of_forecasts_without_the_own_task():
    def made(task, zero_shot, gain, method="full"):
        return Outcome("m", "fp", method, task, "", 0.3, 0.2, 0.4, 0.01, 100, 5, zero_shot,
                       zero_shot + gain, {"x": 0.5}, {"x": 0.5 - gain / 2})  # fmt: skip

    own = [made(f"t{i}", 0.2 + 0.1 * i, 0.4) for i in range(4)]
    errors, found = learnt.grade(own, [])
    gain, drop = (e for e in errors if e.method == "all")
    # All three other runs gained 40 points and lost 20.
    assert gain.own < 0.02 < gain.borrowed
    assert drop.own < 0.02 < drop.borrowed
    curve = [row["gain"] for row in found]
    assert curve[0] == pytest.approx(gain.borrowed)
    assert curve[-1] == pytest.approx(gain.own)
    assert learnt.grade(own[:1], []) == ([], [])


@pytest.mark.once
def test_the_frontier_is_what_nothing_beats_in_both():
    def made(method, gain, drop):
        return Outcome("m", "fp", method, "t", "", None, None, None, None, None, None, 0.4,
                       0.4 + gain, {"x": 0.5}, {"x": 0.5 - drop})  # fmt: skip

    rows = learnt.expected(
        [made("full", 0.3, 0.1), made("lora", 0.2, 0.02), made("bitfit", 0.1, 0.05)]
    )
    assert {row.method: row.is_frontier for row in rows} == {
        "full": True, "lora": True, "bitfit": False,
    }  # fmt: skip


def run_of(task, method, gain, drop, rate=0.1, zero_shot=0.4):
    return Outcome("m", "fp", method, task, "", 0.3, 0.2, 0.4, 0.01, 100, 5, zero_shot,
                   zero_shot + gain, {"x": 0.5}, {"x": 0.5 - drop},
                   recipe={"learning_rate": rate, "steps": 10})  # fmt: skip


@pytest.mark.once
def test_the_choice_gains_most_of_what_likely_stays_within_the_limit():
    ends = {"full": (0.3, 0.1), "lora": (0.2, 0.02), "bitfit": (0.1, 0.0)}
    record = [
        run_of(f"t{i}", method, gain + 0.002 * i, drop + 0.001 * i)
        for i in range(6)
        for method, (gain, drop) in ends.items()
    ]
    known = learnt.recipes_on_record(record, "fp")
    assert {key: len(tasks) for key, tasks in known.items()} == {
        (method, 0.1, 10): 6 for method in ends
    }
    assert learnt.recipes_on_record(record, "other") == {}
    forecaster, measure = Forecaster().fit(record), Measurement(0.3, 0.2, 0.4, 0.01, 100, 5)
    found = [
        learnt.Option(method, {"learning_rate": rate, "steps": steps}, len(tasks),
            forecaster.predict(measure, method=method, zero_shot_accuracy=0.4, model="fp"))
        for (method, rate, steps), tasks in known.items()
    ]  # fmt: skip
    order = [o.method for o in learnt.ranked(found, Limits(0.05))]
    assert order == ["lora", "bitfit", "full"]
    assert learnt.choice(found, Limits(0.05)).method == "lora"
    assert learnt.choice(found, Limits(0.3)).method == "full"
    assert learnt.choice(found, Limits(None)).method == "full"
    assert learnt.choice(found[:1], Limits(0.05)) is None  # full alone
    full, lora, _ = found
    assert learnt.told_apart(full, lora, record, "fp")
    assert not learnt.told_apart(full, lora, record[:6], "fp")  # two tasks in common
    same = [replace(o, method="lora") for o in record if o.method == "full"]
    assert not learnt.told_apart(full, lora, [*record[::3], *same], "fp")
    seen = learnt.observed(lora, run_of("t", "lora", 0.25, 0.07))
    assert (seen.forecast.gain.point, seen.risk(Limits(0.05)), seen.is_tried) == (0.25, 1.0, True)
    assert seen.risk(Limits(0.08)) == 0.0


@pytest.mark.once
@pytest.mark.whole
def test_killed_after_any_run_it_goes_on_to_the_same_outcomes(start, tmp_path, monkeypatch):
    whole = start(store=tmp_path / "whole.jsonl", output=tmp_path / "whole").outcomes
    save = module.append_outcome
    for _ in range(len(whole)):

        def save_and_die(path, outcome):
            save(path, outcome)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "append_outcome", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            start()
    monkeypatch.setattr(module, "append_outcome", lambda *_: pytest.fail("a run was done twice"))
    again = start()
    assert again.outcomes == whole
    assert read_outcomes(tmp_path / "store.jsonl") == whole


@pytest.mark.once
def test_other_images_or_another_recipe_are_other_runs(start, tmp_path):
    start(tasks=LESSONS[:1])
    start(tasks=[lesson("warm", ["red", "green"], 99)])
    start(tasks=LESSONS[:1], recipes=[Recipe("full", FAST | {"weight_decay": 0.1})])
    assert len({o.run for o in read_outcomes(tmp_path / "store.jsonl")}) == 3


@pytest.mark.once
def test_a_training_set_with_other_images_is_another_run(start, tmp_path):
    (task, train), *_ = LESSONS
    start(tasks=[(task, train)])
    pairs = [(image, label) for image, label in train.dataset]
    pairs[0] = (pairs[0][0].transpose(Image.Transpose.ROTATE_90), pairs[0][1])
    turned = Task("warm", pairs, class_names=["red", "green"], templates=list(task.templates))
    start(tasks=[(task, turned)])
    assert len({o.run for o in read_outcomes(tmp_path / "store.jsonl")}) == 2


@pytest.mark.once
def test_a_run_that_is_not_done_in_time_is_ended_and_counts_for_nothing(start, monkeypatch, capsys):
    ticks = iter([*[0.0] * 5, *[1e9] * 99])  # the clock leaps in the first run
    monkeypatch.setattr(module, "perf_counter", lambda: next(ticks))
    late = start(tasks=LESSONS[:2], budget=1e8, progress=True)
    assert late.outcomes == []
    assert late.failed == {}
    said = capsys.readouterr().out
    assert "Out of time: warm, full 0.01, 5 steps was ended, 1 were not begun." in said
    monkeypatch.setattr(module, "perf_counter", lambda: 0.0)
    assert len(start(tasks=LESSONS[:2], budget=1e8).outcomes) == 2


@pytest.mark.once
def test_one_run_that_fails_costs_that_run_only(start, monkeypatch):
    real = work.fine_tune

    def fails(subject, task, *others):
        if task.name == "cold":
            raise RuntimeError("loss is NaN")
        return real(subject, task, *others)

    monkeypatch.setattr(work, "fine_tune", fails)
    found = start()
    assert [o.task for o in found.outcomes] == ["warm", "both"]
    assert found.failed == {"cold, full 0.01, 5 steps": "RuntimeError: loss is NaN"}


@pytest.mark.once
def test_a_task_that_is_learnt_is_not_off_target_of_its_own_runs(start):
    found = start(tasks=LESSONS[:2], off_target=[*KEPT, LESSONS[0][0]])
    assert [set(o.off_target_before) for o in found.outcomes] == [{"kept"}, {"kept", "warm"}]


@pytest.mark.once
def test_an_interruption_says_what_is_left_and_loses_nothing(start, monkeypatch, capsys, tmp_path):
    real = work.Work.run

    def interrupted(self, job, left, tell):
        if job.task == 1:
            raise KeyboardInterrupt
        return real(self, job, left, tell)

    monkeypatch.setattr(work.Work, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(progress=True)
    assert (
        "Interrupted after 1 of 3 runs; the same command does the rest." in capsys.readouterr().out
    )
    assert [o.task for o in read_outcomes(tmp_path / "store.jsonl")] == ["warm"]


@pytest.mark.once
def test_a_full_disk_ends_it_at_once(start, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "append_outcome", full)
    with pytest.raises(OSError, match="No space left"):
        start()


def test_a_recipe_that_cannot_train_the_model_is_told_before_the_first_run(start, tmp_path):
    wrong = Recipe(peft={"peft_type": "LORA", "target_modules": ["nothing_of_this_name"]})
    with pytest.raises(ValueError, match=r"`recipe` 'lora 0.001' must train .*nothing_of_this"):
        start(recipes=[wrong])
    assert not (tmp_path / "store.jsonl").exists()


def test_a_budget_ends_while_tasks_are_measured(start, monkeypatch):
    begun, measured = time.perf_counter(), []
    monkeypatch.setattr(module, "perf_counter", lambda: begun + 60.0 * len(measured))
    lesson = module._lesson
    monkeypatch.setattr(module, "_lesson", lambda *a: measured.append(1) or lesson(*a))
    with pytest.raises(ValueError, match=r"`budget` .* 3 tasks .* got 1 min.* in which 1 were"):
        start(tasks=LESSONS[:3], budget=60.0)


@pytest.mark.once
def test_a_short_budget_makes_runs_shorter_and_marks_them(start, monkeypatch):
    monkeypatch.setattr(work.Work, "time", lambda _: Cost([1.0, 1.0], [100.0]))
    monkeypatch.setattr(module, "perf_counter", lambda: 0.0)
    recipe = Recipe("full", FAST | {"max_steps": 40})
    found = start(tasks=LESSONS[:2], recipes=[recipe], budget=2 + 2 * 100 * 25.0)
    assert [o.recipe["steps"] for o in found.outcomes] == [25, 25]
    assert [o.recipe["asked_steps"] for o in found.outcomes] == [40, 40]
    assert all(o.complete for o in found.outcomes)


@pytest.mark.once
def test_another_plan_in_the_folder_is_not_taken_for_this_one(start, monkeypatch):
    start(tasks=LESSONS[:1])
    monkeypatch.setattr(work.Work, "time", lambda _: Cost([1.0], [100.0]))
    monkeypatch.setattr(module, "perf_counter", lambda: 0.0)
    recipe = Recipe("full", FAST | {"max_steps": 40})
    found = start(tasks=LESSONS[:1], recipes=[recipe], budget=1 + 100 * 25.0)
    assert [o.recipe["steps"] for o in found.outcomes] == [25]


@pytest.mark.once
def test_what_fits():
    jobs, cost = [Job(t, r, 100) for t in range(2) for r in range(2)], Cost([10, 20], [0.1, 0.3])
    assert sum(job.seconds for job in fit(jobs, cost, None)) == pytest.approx(60 + 80)
    assert [job.steps for job in fit(jobs, cost, 100)] == [50] * 4
    few = fit(jobs, cost, 50)  # a fifth of the steps: 12, 16, 22, 26 seconds
    assert [(job.task, job.recipe, job.steps) for job in few] == [
        (0, 0, 20),
        (0, 1, 20),
        (1, 0, 20),
    ]
    with pytest.raises(ValueError, match=r"`budget` must allow a run .* takes 12 s .* got 5 s"):
        fit(jobs, cost, 5)
    for text in ("", "5", "m", "1h 30m", "-5m", "0s"):
        with pytest.raises(ValueError, match="--budget"):
            seconds_of(text)


@pytest.mark.once
def test_the_most_different_are_chosen(start):
    features = [[0.0, 1.0], [0.1, 1.0], [5.0, 1.0], [0.0, 9.0], [0.0, 1.1]]
    assert most_different([[0.0], [5.0], [9.0]], 1) == [1]  # the middle
    assert set(most_different(features, 3)) >= {2, 3}
    assert sorted(most_different(features, 9)) == [0, 1, 2, 3, 4]
    assert most_different([[1.0], [1.0]], 2) == [0, 1]  # no spread at all
    found = start(n_tasks=2)
    assert len(found.tasks) == 2
    assert [o.task for o in found.outcomes] == found.tasks


def test_recipes_of_a_file_and_of_flags(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "method: [full, lora]\nlearning_rate: [1e-5, 0.001]\nmax_steps: 7\nadam_beta2: 0.98"
    )
    found = read_recipes(path)
    assert [r.name for r in found] == ["full 1e-05", "full 0.001", "lora 1e-05", "lora 0.001"]
    assert {r.steps for r in found} == {7}
    assert found[0].training_arguments(tmp_path, 3, True).adam_beta2 == 0.98
    assert [r.name for r in read_recipes(path, methods=["bitfit"], rates=[0.5])] == ["bitfit 0.5"]
    path.write_text("- {method: full, learning_rate: 1e-4}\n- {method: lora, max_steps: 3}")
    assert [(r.name, r.steps) for r in read_recipes(path, max_steps=9)] == [
        ("full 0.0001", 9), ("lora 0.001", 9),
    ]  # fmt: skip
    path = tmp_path / "recipe.json"
    path.write_text('{"peft": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}}')
    assert [r.method for r in read_recipes(path)] == ["lora"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_stepz: 5", "yaml: 'max_stepz' of a recipe must be .* did you mean 'max_steps'"),
        ("method: alchemy", "recipe.yaml: 'method' must be one of full"),
        ("learning_rate: fast", "recipe.yaml: 'learning_rate' must be a finite number, got 'fast'"),
        ("learning_rate: .nan", "'learning_rate' must be a finite number, got nan"),
        ("learning_rate: -1", "'learning_rate' must be a positive number, got -1"),
        ("max_steps: 0", "'max_steps' must be at least 1, got 0"),
        ("max_steps: 1.5", "'max_steps' must be a whole number, got 1.5"),
        ("num_train_epochs: 3", "'num_train_epochs' must be left out .* got 3; give 'max_steps'"),
        ("per_device_train_batch_size: 0", "'per_device_train_batch_size' must be at least 1"),
        ("weight_decay: much", "'weight_decay' must be a finite number, got 'much'"),
        ("bf16: 1", "'bf16' must be true or false, got 1"),
        ("[]", "must hold names and values .* with none"),
        ("save_strategy: epoch", "'save_strategy' must be left out"),
        ("- full", "got .* with 'full'"),
        ("{", "must be a YAML or JSON file"),
        ("peft: {peft_type: ALCHEMY}", "'peft' must be the settings of a peft config"),
        ("peft: 3", "'peft' must be the settings of a config, got 3"),
    ],
)
@pytest.mark.once
def test_a_wrong_recipe_is_named(text, told, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_recipes(path)


def test_a_flag_that_is_wrong_is_named_beside_a_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: 5")
    with pytest.raises(ValueError, match=r"^`method` must be one of .* got 'alchemy'"):
        read_recipes(path, methods=["alchemy"])
    with pytest.raises(ValueError, match=r"^`learning_rate` must be a positive number, got 0"):
        read_recipes(path, rates=[0.0])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tasks": []}, "`tasks` must hold a task"),
        ({"recipes": []}, "`recipes` must hold a recipe"),
        ({"n_tasks": 0}, "`n_tasks` must be a number of at least 1"),
        ({"tasks": [LESSONS[0], LESSONS[0]]}, "warm"),
        ({"script": "nowhere.py"}, "`script` must be a file"),
        ({"tasks": [(LESSONS[0][0], LESSONS[1][1])]}, "other classes than `task`"),
        ({"store": "/dev/null/store.jsonl"}, "`store` must be one that can be written"),
        ({"off_target": None}, "two classes with one prompt"),  # of canaries, by this tokenizer
    ],
)
@pytest.mark.once
def test_wrong_input_is_named(start, settings, told):
    with pytest.raises(ValueError, match=told):
        start(**settings)


def test_a_guard_that_is_told_to_watch_has_no_limit(monkeypatch):
    monkeypatch.setenv(WATCH, "1")
    monitor = IIMMMonitor(LESSONS[0][0], KEPT, max_forgetting=0.01, outcomes=None)
    assert monitor.limits == Limits(None)
    monkeypatch.delenv(WATCH)
    monitor = IIMMMonitor(LESSONS[0][0], KEPT, max_forgetting=0.01, outcomes=None)
    assert monitor.limits == Limits(0.01)


SCRIPT = """
import sys
from pathlib import Path
from transformers import Trainer, TrainingArguments
from test_cli import ask, fails, run
from tiny import FAMILIES
from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, Task

data, folder = Path(sys.argv[1]), sys.argv[2]
model, processor = FAMILIES["CLIP"]()
template = "a photo of the {} thing"
settings = {"name": "mine", "templates": template}
task, train = (Task.from_folder(data / split, **settings) for split in ("test", "train"))
kept = Task.from_folder(data / "train", name="kept", templates="{}")
rows = [(train.images([i])[0], train.labels([i])[0]) for i in range(len(train))]
guard = IIMMCallback(task, kept, max_forgetting=0.0001, action="stop", train=train)
arguments = TrainingArguments(
    folder, max_steps=6, learning_rate=1e-1, per_device_train_batch_size=4, use_cpu=True,
    report_to="none", save_strategy="no", remove_unused_columns=False)
Trainer(PromptClassifier(model, task, processor), arguments, train_dataset=rows,
    data_collator=ImageCollator(processor), callbacks=[guard]).train()
assert not FAIL, "the optimizer is on fire"
"""


@pytest.mark.once
@pytest.mark.whole
def test_a_script_of_ones_own_is_run_for_each_task(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([path for path in sys.path if path]))
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("FAIL", "data.name == 'cold'"))
    found = start(tasks=LESSONS[:2], recipes=[], script=script)
    (outcome,) = found.outcomes
    # Its guard, told to stop at a hundredth of a point, only watched; it read the images it got.
    assert (outcome.task, outcome.complete, outcome.recipe["steps"]) == ("warm", True, 6)
    assert (outcome.n_images, outcome.n_train) == (24, 30)
    assert [read_run(path)["run"] for path in found.run_files if "warm" in path.parent.name] == [
        outcome.run
    ]
    assert "exit code 1: " in found.failed["cold, train.py"]
    assert "the optimizer is on fire" in found.failed["cold, train.py"]


def test_a_script_without_a_guard_is_told(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("pass")
    with pytest.raises(
        RuntimeError, match=r"train.py must save the outcome .* got 0: it must make"
    ):
        runs.run_script(script, tmp_path, tmp_path)
    script.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit code 3: it printed nothing"):
        runs.run_script(script, tmp_path, tmp_path)


@pytest.mark.whole
@pytest.mark.once
def test_a_script_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    script, beside = tmp_path / "train.py", tmp_path / "alive"
    later = f"import time, pathlib; time.sleep(2); pathlib.Path({str(beside)!r}).touch()"
    script.write_text(
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {later!r}])\ntime.sleep(60)\n"
    )
    began = time.perf_counter()
    with pytest.raises(runs.OutOfTimeError):
        runs.run_script(script, tmp_path, tmp_path, seconds=1.0)
    assert time.perf_counter() - began < 30
    time.sleep(2.5)
    assert not beside.exists()


@pytest.mark.once
def test_a_script_is_timed_by_the_looks_of_its_run_file(tmp_path, monkeypatch):
    script, shares = tmp_path / "train.py", iter([None, 0.0, 0.0, 0.1, 0.2, *[0.4] * 1000])
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(runs, "_share", lambda folder: next(shares))
    monkeypatch.setattr(runs, "_EVERY", 0.2)
    told, said = [], []
    pace = module._ScriptTime(3, 20.0, said.append, False)

    def tell(whole, is_sure):
        told.append((whole, is_sure))
        pace(whole * 100, is_sure)  # 2 s at 0.2 s a tenth

    with pytest.raises(runs.OutOfTimeError):
        runs.run_script(script, tmp_path, tmp_path, 40.0, tell)
    assert [sure for _, sure in told] == [False, True]
    assert 1.0 < told[-1][0] < 20.0
    assert len(said) == 1
    assert said[0].endswith("; 0 of 3 fit into 20 s.")
    pace(0.0, True)  # once is enough
    assert len(said) == 1
    module._ScriptTime(3, 20.0, said.append, False)(9.0, True)
    assert said[-1] == "A run takes about 9 s; 2 of 3 fit into 20 s."
    module._ScriptTime(3, None, said.append, False)(9.0, True)
    assert said[-1] == "A run takes about 9 s."


@pytest.mark.once
def test_a_run_is_not_begun_where_the_last_one_took_longer_than_is_left(
    start, tmp_path, monkeypatch, capsys
):
    clock = iter(np.arange(0, 1e6, 40.0).tolist())
    monkeypatch.setattr(module, "perf_counter", lambda: next(clock))
    made = Outcome("m", "fp", "full", "t", "", None, None, None, None, None, None, 0.4, 0.5, {}, {})
    begun = []

    def fake(self, job, left, tell):
        begun.append(job)
        return replace(made, run=self.key(job), task=f"t{job.task}")

    monkeypatch.setattr(work.Work, "run", fake)
    monkeypatch.setattr(work.Work, "run_files", lambda self, job: [])
    script = tmp_path / "train.py"
    script.touch()
    start(tasks=LESSONS[:3], recipes=[], script=script, budget=300.0, progress=True)
    assert len(begun) < 3
    assert "runs were not begun" in capsys.readouterr().out


def calibrate_on_rank(rank, folder, batch):
    model, processor = FAMILIES["CLIP"]()
    recipe = Recipe("full", FAST | {"per_device_train_batch_size": batch})
    fixed = {"processor": processor, "off_target": KEPT, "use_cpu": True, "progress": False}
    store, output = folder / f"{batch}.jsonl", folder / f"out{batch}"
    calibrate(model, LESSONS[:2], [recipe], store=store, output=output, **fixed)


def fail_on_rank(rank, folder):
    def train(*args, **settings):
        if rank == 1:
            raise RuntimeError("the card fell off the bus")
        return fine_tune(*args, **settings)

    fine_tune, work.fine_tune = work.fine_tune, train
    model, processor = FAMILIES["CLIP"]()
    fixed = {"processor": processor, "off_target": KEPT, "use_cpu": True, "progress": False}
    store = folder / "store.jsonl"
    calibrate(model, LESSONS[:2], [FULL], store=store, output=folder / "out", **fixed)


@pytest.mark.whole
@pytest.mark.once
def test_a_run_that_fails_on_one_rank_ends_all_of_them(tmp_path):
    fail = partial(fail_on_rank, folder=tmp_path)
    with pytest.raises(RuntimeError, match="of 2 failed") as error:
        in_a_fork(on_ranks, 2, fail, IIMM_CALLBACKS_TIMEOUT="5")
    assert "the card fell off the bus" in str(error.value)
    assert "RanksApartError" in str(error.value)


@pytest.mark.whole
def test_two_ranks_give_the_outcomes_of_one(tmp_path):
    calibrate_on_rank(0, tmp_path, 4)  # alone
    in_a_fork(on_ranks, 2, partial(calibrate_on_rank, folder=tmp_path, batch=2))
    alone, shared = (read_outcomes(tmp_path / f"{batch}.jsonl") for batch in (4, 2))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert one.recipe == other.recipe  # batch_size counts both ranks
        assert one.zero_shot_accuracy == other.zero_shot_accuracy
        assert one.gain == pytest.approx(other.gain, abs=1.5 / 24)  # sums in another order
        assert one.forgetting == pytest.approx(other.forgetting, abs=1.5 / 24)
        assert (one.run, one.task_fingerprint) == (other.run, other.task_fingerprint)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model and two tasks, as the command line is given them."""
    folder = tmp_path_factory.mktemp("calibration")
    for part in FAMILIES["CLIP"]():
        part.save_pretrained(folder / "model")
    for task, train in LESSONS[:3]:
        work.write_folder(train, folder / task.name / "train")
        work.write_folder(task, folder / task.name / "test")
    return folder


COMMAND = ["--steps", 5, "--train-batch-size", 4, "--template", "a photo of the {} thing",
           "--device", "cpu"]  # fmt: skip


@pytest.mark.whole
def test_the_commands_calibrate_and_plan(folders, tmp_path, monkeypatch):
    store = tmp_path / "store.jsonl"
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(store))
    model, kept = folders / "model", ["--off-target", folders / "both"]
    learnt = ["--task", folders / "warm", "--task", folders / "cold", "--method", "full",
              "--learning-rate", 0.01, "--output", tmp_path / "out", *kept]  # fmt: skip
    found = ask("calibrate", model, *learnt, *COMMAND)
    saved = read_outcomes(store)
    assert [(row["task"], row["run"]) for row in found["runs"]] == [(o.task, o.run) for o in saved]
    assert [o.task for o in saved] == ["warm", "cold"]
    assert all(o.off_target_before.keys() == {"both"} for o in saved)
    assert all((tmp_path / "out" / f"compare{end}").exists() for end in (".png", ".html"))
    text = run("calibrate", model, *learnt, *COMMAND).stdout  # all are there
    assert read_outcomes(store) == saved
    assert "mean forgetting" in text
    assert "Choice: no other recipe gains more" in text

    asked = ["plan", model, folders / "both", "--template", "a photo of the {} thing"]
    planned = ask(*asked, "--max-forgetting", 0.5, "--risk", 0.9)
    assert [row["recipe"] for row in planned["options"]] == [{"learning_rate": 0.01, "steps": 5}]
    assert planned["choice"] == "full 0.01 × 5"
    assert planned["options"][0]["n_tasks"] == 2
    more = ask(*asked, "--max-forgetting", 0.5, "--risk", 0.9, "--steps", 5, "--steps", 9,
               "--method", "full", "--method", "bitfit")  # fmt: skip
    assert {row["name"] for row in more["options"]} == {
        f"{method} 0.01 × {steps}" for method in ("full", "bitfit") for steps in (5, 9)
    }
    text = run(*asked, "--max-forgetting", 0.001, "--risk", 0.01, code=2).stdout
    assert "No choice: every recipe has a risk above 0.01" in text


@pytest.mark.once
def test_a_plan_without_runs_of_the_model_ranks_all_methods(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(tmp_path / "store.jsonl"))
    asked = ["plan", folders / "model", folders / "both", "--template", "a photo of the {} thing"]
    found = ask(*asked, "--risk", 0.9, "--max-forgetting", 0.9)
    names = [row["name"] for row in found["options"]]
    assert sorted(names) == ["attention", "bitfit", "clip_adapter", "full", "lora"]
    assert found["choice"] == names[0]
    assert {row["n_tasks"] for row in found["options"]} == {0}

    # What was tried is known, and the others are still there.
    found = ask(*asked, "--risk", 0.9, "--max-forgetting", 0.9, "--train", folders / "both",
                "--off-target", folders / "warm", "--try")  # fmt: skip
    (tried,) = (row for row in found["options"] if row["tried"])
    assert tried["forecast"]["gain"]["point"] == found["tried"]["gain"]
    assert (tried["method"], tried["recipe"]["steps"], tried["n_tasks"]) == (names[0], 150, 1)
    assert sorted(row["method"] for row in found["options"]) == sorted(names)


@pytest.mark.once
def test_what_plan_tries_is_saved_and_known(folders, tmp_path, monkeypatch):
    store = tmp_path / "store.jsonl"
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(store))
    asked = ["plan", folders / "model", folders / "both", "--train", folders / "both",
             "--method", "full", "--learning-rate", 0.01, "--steps", 5, "--risk", 0.99,
             "--template", "a photo of the {} thing", "--off-target", folders / "warm"]  # fmt: skip
    before = ask(*asked, "--max-forgetting", 0.9)
    assert before["try_seconds"] > 0
    assert before["tried"] is None
    assert "To be surer: --try, about " in run(*asked, "--max-forgetting", 0.9).stdout
    found = ask(*asked, "--try", "--max-forgetting", 0.9)
    assert found["try_seconds"] is None
    (outcome,) = read_outcomes(store)
    assert found["tried"]["gain"] == outcome.gain
    (row,) = found["options"]
    assert outcome.off_target_before.keys() == {"warm"}
    assert row["tried"]
    assert row["forecast"]["gain"]["point"] == outcome.gain
    assert row["forecast"]["gain"]["low"] == row["forecast"]["gain"]["high"] == outcome.gain
    assert (outcome.recipe["learning_rate"], outcome.recipe["steps"]) == (0.01, 5)


SLOW = """
import time
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, *_, **__):
        time.sleep(2)
"""


@pytest.mark.whole
@pytest.mark.once
def test_the_command_tells_what_a_script_takes_once_it_runs(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(tmp_path / "store.jsonl"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([path for path in sys.path if path]))
    script = tmp_path / "train.py"
    written = SLOW + SCRIPT.replace("FAIL", "0").replace("[guard]", "[Slow(), guard]")
    script.write_text(written.replace("train=train)", "train=train, max_overhead=None)"))
    learnt = ["--task", folders / "warm", "--task", folders / "cold", "--script", script]
    text = run("calibrate", folders / "model", *learnt, "--output", tmp_path / "out",
               "--budget", "1h", "--template", "a photo of the {} thing", "--device", "cpu",
               "--off-target", folders / "both").output  # fmt: skip
    assert "how long one takes is known from its first looks on" in text
    assert text.count("A run takes about ") == 1
    assert "; 2 of 2 fit into 1 h" in text or "; 2 of 2 fit into 59 min" in text
    assert len(read_outcomes(tmp_path / "store.jsonl")) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["calibrate", "MODEL", "--budget", "soon"], "`--budget` must be a time"),
        (["calibrate", "MODEL", "--method", "magic"], "`--method` must be one of full"),
        (["calibrate", "MODEL", "--task", "./nowhere"], "`--task` must be a folder or a name"),
        (["calibrate", "MODEL", "--device", "tpu"], "`--device` must be cpu or left out"),
        (["calibrate", "MODEL", "--task", "FOLDER/warm", "--split", "train"], "held-out images"),
        (
            ["calibrate", "MODEL", "--script", __file__, "--method", "full"],
            "`--method` must be left",
        ),
        (["plan", "MODEL", "FOLDER/warm", "--try"], "`--try` needs `--train`"),
        (["plan", "MODEL", "FOLDER/warm", "--learning-rate", "nan"], "`--learning-rate` must be a"),
        (["plan", "MODEL", "FOLDER/warm", "--learning-rate", "0"], "positive number, got 0.0"),
        (["plan", "MODEL", "FOLDER/warm", "--steps", "0"], "Invalid value for '--steps'"),
        (["plan", "MODEL", "FOLDER/warm", "--risk", "2"], "`--risk` must be a probability"),
        (["plan", "MODEL", "FOLDER/warm", "--method", "magic"], "`--method` must be one of"),
    ],
)
def test_a_wrong_option_is_named(arguments, told, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [a.replace("MODEL", str(folders / "model")).replace("FOLDER", str(folders))
             for a in arguments]  # fmt: skip
    where = ["--output", tmp_path / "out"] if given[0] == "calibrate" else []
    assert told in fails(*given, *where)
