"""Who saved a run, when and by what; and which saved runs are worth a look."""

import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from test_cli import ask, run
from test_outcomes import RUN

from iimm_callbacks import IIMMCallback, append_outcome, read_outcomes, sample
from iimm_callbacks.forecasting.forecaster import Forecaster
from iimm_callbacks.forecasting.runs import about, measured
from iimm_callbacks.records import outcomes as module
from iimm_callbacks.records.as_dataset import from_dataset, to_dataset
from iimm_callbacks.records.audit import contradicted, doubts
from iimm_callbacks.records.catalog import Listed
from iimm_callbacks.records.outcomes import parse_outcome, provenance


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A script in a repository, being run; (arguments) -> what git says there."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    script = tmp_path / "train.py"
    script.write_text("pass\n")
    monkeypatch.setattr(sys, "argv", [str(script)])
    return git


def test_it_tells_who_when_and_by_which_version_of_the_script(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("IIMM_CALLBACKS_AUTHOR", "Ada")
    assert "commit" not in provenance()  # git does not know the script yet
    repository("add", "train.py")
    repository("commit", "-qm", "first")
    found = provenance()
    assert (found["who"], found["script"]) == ("Ada", "train.py")
    assert found["commit"] == repository("rev-parse", "--short=12", "HEAD")
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["when"])
    assert timedelta(0) <= age + timedelta(seconds=1) < timedelta(minutes=1)
    (tmp_path / "train.py").write_text("changed\n")
    assert provenance()["commit"] == f"{found['commit']}+"


@pytest.mark.parametrize("argv", ["", "-c", "/no/such/script.py"])
def test_what_is_not_known_is_left_out(argv, monkeypatch):
    def nobody():
        raise KeyError("uid not found")

    monkeypatch.delenv("IIMM_CALLBACKS_AUTHOR", raising=False)
    monkeypatch.setattr(module.getpass, "getuser", nobody)
    monkeypatch.setattr(sys, "argv", [argv])
    assert set(provenance()) == {"when"}


def test_without_git_a_script_has_no_commit(repository, monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", no_git)
    assert "commit" not in provenance()


def test_a_guarded_run_says_where_it_comes_from(make_trainer, colour_task, own_store, monkeypatch):
    monkeypatch.setenv("IIMM_CALLBACKS_AUTHOR", "Ada")
    make_trainer([IIMMCallback(colour_task, [], verbose=False, card=False)]).train()
    (saved,) = read_outcomes(own_store)
    assert saved.provenance["who"] == "Ada"
    assert from_dataset(to_dataset([saved]))[0].provenance == saved.provenance


def test_records_from_before_have_none_and_it_makes_no_difference():
    old = {k: v for k, v in RUN.__dict__.items() if k != "provenance"}
    assert parse_outcome(old).provenance == {}
    assert parse_outcome(old) == replace(RUN, provenance={"who": "Ada"})


def test_to_the_hub_goes_nothing_of_who_it_was(monkeypatch, tmp_path):
    from datasets import Dataset
    from huggingface_hub import DatasetCard

    pushed = []
    monkeypatch.setattr(DatasetCard, "load", lambda name: DatasetCard("---\n{}\n---\n"))
    monkeypatch.setattr(DatasetCard, "push_to_hub", lambda self, name: pushed.append(self.content))
    monkeypatch.setattr(Dataset, "push_to_hub", lambda self, *_, **__: pushed.append(self))
    known = {"who": "Ada", "when": "2026-01-01T00:00:00+00:00"}
    append_outcome(tmp_path / "runs.jsonl", replace(RUN, provenance=known))
    ask("outcomes", "export", "--push-to-hub", "org/runs", "--store", tmp_path / "runs.jsonl")
    (outcome,) = from_dataset(pushed[0])
    assert outcome.provenance == {"when": known["when"]}
    assert "Ada" not in pushed[1]


# --- doubts


def group(n=10, **more):
    return [
        replace(RUN, task=f"task {i}", task_fingerprint=f"{i}", run=f"{i}",
                final_accuracy=0.5 + 0.01 * i, **more)
        for i in range(n)
    ]  # fmt: skip


def test_of_the_shipped_runs_those_are_told_that_forgot_most():
    found = sample.load_outcomes()
    told = doubts(found)
    most = sorted(found, key=lambda o: -o.forgetting)[: len(told)]
    assert 0 < len(told) <= 0.04 * len(found)
    for o in most:
        run, drop = f"{o.task}, {o.method} ", f"forgetting {100 * o.forgetting:+.1f} points"
        assert [line for line in told if run in line and drop in line]


def test_doubles_are_told_and_whether_they_agree():
    a, b = group(2)
    assert doubts([a, b, a]) == [f"{RUN.model}: task 0, full (0): there 2 times"]
    (told,) = doubts([a, b, replace(a, final_accuracy=0.6)])
    assert told.endswith("there 2 times, with other results; the last one counts")
    unknown = replace(a, run="")
    assert doubts([unknown, unknown]) == []
    assert doubts([a, replace(a, complete=False)]) == []  # interrupted, then resumed


def test_one_model_has_one_zero_shot_accuracy_on_the_same_images():
    a, b = group(2)
    other = replace(b, task_fingerprint=a.task_fingerprint, zero_shot_accuracy=0.4)
    (told,) = doubts([a, other])
    assert "zero-shot accuracies of 0.300 and 0.400" in told
    assert doubts([a, replace(other, model_fingerprint="2e")]) == []
    assert doubts([a, replace(other, zero_shot_accuracy=0.31)]) == []


def test_a_start_that_most_runs_contradict_is_left_out_of_forecasts(caplog):
    start = replace(RUN, task_fingerprint="f")
    same = [replace(start, run=f"{i}", method=f"m{i}", final_accuracy=0.5) for i in range(5)]
    wrong = [replace(start, run="w", zero_shot_accuracy=0.9), replace(start, run="v", iimm=-0.2)]
    runs = [*same[:2], wrong[0], *same[2:], wrong[1]]
    assert contradicted(runs) == {
        2: "zero-shot accuracy 0.900, where 6 other runs of the model on the same images have "
        "0.300",
        6: "IIMM -0.200, where 6 other runs of the model on the same images have 0.400",
    }
    assert [line for line in doubts(runs) if "forecasts leave it out" in line] == doubts(runs)
    assert Listed(runs).relevant(RUN.model_fingerprint) == same
    assert "2 of 7 saved runs are left out of forecasts" in caplog.text
    one_each = [same[0], wrong[0]]  # which of them is right?
    assert contradicted(one_each) == contradicted([*one_each, same[1], wrong[0]]) == {}
    assert contradicted([replace(o, task_fingerprint="") for o in runs]) == {}
    assert contradicted([*same, replace(start, iimm=None)]) == {}


def random_records(good, seed):
    rng = np.random.default_rng(seed)
    return [
        replace(
            good[i], run=f"wrong{i}", zero_shot_accuracy=rng.random(), final_accuracy=rng.random(),
            iimm=rng.uniform(-1, 1), linear_probe_accuracy=rng.random(), trajectory=[],
            off_target_after={name: rng.random() for name in good[i].off_target_after},
        )
        for i in rng.choice(len(good), round(0.05 * len(good)), replace=False)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_random_records_on_known_images_change_no_forecast(seed):
    """5 % of them; how the good runs ended is no reason to leave one out."""
    good = sample.load_outcomes()
    wrong = random_records(good, seed)
    model = good[0].model_fingerprint
    assert Listed([*wrong, *good]).relevant(model) == Listed(good).relevant(model)


@pytest.mark.once
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.whole), 2])
def test_random_records_of_new_tasks_hardly_move_the_gain(seed):
    """5 % of them, which nothing contradicts, each of a task of its own."""
    good = sample.load_outcomes()
    wrong = [replace(o, task=o.run, task_fingerprint=o.run) for o in random_records(good, seed)]
    tasks = sorted({o.task for o in good})[::3]

    def off(runs):
        errors, widths = [], []
        for task in tasks:
            others = [o for o in runs if o.task != task]
            forecaster = Forecaster().fit(others, base_rates=False)
            for o in good:
                if o.task == task:
                    gain = forecaster.predict(measured(o), **about(o)).gain
                    errors.append(abs(gain.point - o.gain))
                    widths.append(gain.width)
        return np.mean(errors), np.mean(widths)

    error, width = np.divide(off([*good, *wrong]), off(good))
    assert error < 1.1
    assert width < 2.2


def test_an_accuracy_far_below_chance_is_told():
    (run_,) = group(1)
    (told,) = doubts([replace(run_, final_accuracy=0.04)])
    assert "final accuracy 0.040, less than half of chance with 10 classes" in told
    assert doubts([replace(run_, final_accuracy=0.04, n_images=20)]) == []
    assert doubts([replace(run_, final_accuracy=0.04, n_images=None, n_classes=None)]) == []


def test_a_run_far_from_those_like_it_is_told():
    runs = [replace(o, task="one", off_target_before={}, off_target_after={}) for o in group()]
    assert doubts(runs) == []
    far = replace(runs[3], final_accuracy=0.99)
    (told,) = doubts([*runs[:3], far, *runs[4:]])
    assert "one, full (3): gain +69.0 points, where the median of 10 runs like it is +25" in told
    assert doubts([*runs[:3], far]) == []  # four runs tell nothing of what is usual
    assert doubts([*runs[:3], replace(far, task="two"), *runs[4:]]) == []  # tasks differ in gain
    lost = {"off_target_before": {"a": 0.9}, "off_target_after": {"a": 0.2}}
    kept = {"off_target_before": {"a": 0.9}, "off_target_after": {"a": 0.89}}
    runs = [replace(o, task=f"task {i}", **kept) for i, o in enumerate(runs)]
    (told,) = doubts([*runs[:3], replace(runs[3], **lost), *runs[4:]])
    assert "task 3, full (3): forgetting +70.0 points" in told


def test_the_check_names_them_and_is_no_failure(own_store):
    (one,) = group(1)
    append_outcome(own_store, one)
    append_outcome(own_store, one)
    assert len(ask("outcomes", "check")["doubts"]) == 1
    text = run("outcomes", "check").stdout
    assert "no damaged lines" in text
    assert "To look at: " in text
