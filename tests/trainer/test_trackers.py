"""What trackers have of a guarded run, read back with their own means; alerts; all offline.

Each tracker is optional: .ci/README.md has the command that installs them all, in their own
environment, because comet_ml patches what else is imported.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_outcomes import RUN
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import WandbCallback

from iimm_callbacks import IIMMCallback
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.records.verdict import Verdict

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read once, where trackio is imported

# comet_ml 3.58 asks for the machine's address, and leaves the socket to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket.*type=2:ResourceWarning")

FORECAST = {
    f"eval_iimm_{name}_forecast{end}"
    for name in ("gain", "forgetting")
    for end in ("", "_low", "_high")
}
BEST = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "iimm_accuracy",
}
LEVELS = ["continue", "warn", "warn", "stop", "continue", "warn", "warn"]  # at steps 0 to 6
ALERTS = [  # where it is another than before
    ("IIMM guard, warn: colours", "because 1", "WARN"),
    ("IIMM guard, over the limit: colours", "because 3", "ERROR"),
    ("IIMM guard, ok: colours", "because 4", "INFO"),
    ("IIMM guard, warn: colours", "because 5", "WARN"),
]


# What a tracker has: {key as it names it: [(step, value), ...]}


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (board,) = {file.parent for file in folder.glob("board*/**/events.out*")}
    events = EventAccumulator(str(board)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in
            events.Tags()["scalars"]}  # fmt: skip


def wandb_records(folder, kind):
    (run,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [r[kind] for r in map(json.loads, lines) if r["type"] == kind]


def in_wandb(folder):
    import wandb

    wandb.finish()
    return by_key((r["item"] for r in wandb_records(folder, "history")), "train/global_step")


def in_mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs(["0"])
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: [(m.step, m.value) for m in found] for key, found in histories.items()}


def in_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs(folder.name)
    return by_key(SQLiteStorage.get_logs(folder.name, run), "train/global_step")


def in_comet(folder):
    import comet_ml

    comet_ml.get_running_experiment().end()
    (file,) = folder.glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        messages = map(json.loads, archive.read("messages.json").splitlines())
    found = defaultdict(list)
    for metric in (m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"):
        found[metric["metricName"]].append((metric["step"], metric["metricValue"]))
    return found


def by_key(rows, step):
    found = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            found[key].append((row.get(step), value))
    return found


TRACKERS = {
    "tensorboard": ("tensorboard", in_tensorboard),
    "wandb": ("wandb", in_wandb),
    "mlflow": ("mlflow", in_mlflow),
    "trackio": ("trackio", in_trackio),
    "comet_ml": ("comet_ml", in_comet),
}
every_tracker = pytest.mark.parametrize("tracker", TRACKERS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the trackers write; its name is the project's."""
    folder = tmp_path / tmp_path.name.replace("_", "-")
    folder.mkdir()
    for name, value in {
        "TENSORBOARD_LOGGING_DIR": folder / "board",
        "WANDB_MODE": "offline",
        "WANDB_DIR": folder,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": folder,
        "COMET_DISABLE_AUTO_LOGGING": "1",  # it would have MLflow's rows, too, by way of a server
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, str(value))
    return folder


@pytest.fixture
def tracked(make_trainer, folder, colour_task, shape_task, tiny_clip):
    """(tracker, ...) -> a guarded Trainer that reports to it; `guard` has settings of the guard."""
    fingerprint = model_fingerprint(tiny_clip())
    past = [
        replace(
            RUN,
            model_fingerprint=fingerprint,
            task=f"t{i}",
            task_fingerprint=f"f{i}",
            iimm=0.3 + 0.1 * i,
            off_target_before={"shapes": 0.6},
            off_target_after={"shapes": 0.6 - 0.002 * (i % 2)},
            trajectory=[],
            recipe={},
        )
        for i in range(5)
    ]

    def build(tracker, callbacks=(), every=None, guard=(), **arguments):
        if tracker != "none":
            pytest.importorskip(TRACKERS[tracker][0])
        callback = IIMMCallback(
            colour_task,
            [shape_task],
            outcomes=past,
            every=every,
            max_overhead=None,
            verbose=False,
            **dict(guard),
        )
        known = TrainingArguments.__dataclass_fields__
        arguments |= {"project": folder.name, "trackio_space_id": None}
        if "logging_dir" in known:  # since transformers 5 it is TENSORBOARD_LOGGING_DIR
            arguments["logging_dir"] = str(folder / "board")
        return make_trainer([callback, *callbacks], report_to=[tracker], **arguments)

    return build


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # and with it the settings
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].end_run()
        sys.modules["mlflow"].set_tracking_uri(None)
    comet = sys.modules.get("comet_ml")
    if comet and comet.get_running_experiment():
        comet.get_running_experiment().end()


def rows(trainer):
    return [r for r in trainer.state.log_history if "eval_iimm" in r]


def assert_has_every_key(tracker, folder, trainer):
    """Each key of ours, at the steps and with the values of `log_history`, and no other."""
    found = TRACKERS[tracker][1](folder)
    expected = defaultdict(list)
    for row in rows(trainer):
        for key in (k for k in row if k.startswith("eval_iimm")):
            name = key if tracker == "mlflow" else key.replace("eval_", "eval/", 1)
            expected[name].append((row["step"], row[key]))
    assert {key for key in found if "iimm" in key} == set(expected)
    for key, pairs in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in pairs]
        values = [value for _, value in pairs]  # TensorBoard keeps float32
        assert [v for _, v in found[key]] == pytest.approx(values, rel=1e-6, abs=1e-12)


# Numbers


@every_tracker
def test_a_tracker_has_every_key_at_every_look_from_step_0(tracker, tracked, folder):
    trainer = tracked(tracker, max_steps=10)
    trainer.train()
    first, *_ = rows(trainer)
    assert [r["step"] for r in rows(trainer)] == [0, 1, 2, 3, 5, 7, 10]
    assert FORECAST | {"eval_iimm_exceed_probability", "eval_iimm_shapes_accuracy"} <= set(first)
    assert_has_every_key(tracker, folder, trainer)


@every_tracker
@pytest.mark.parametrize("ending", ["stopped by another", "best model loaded"])
def test_a_look_in_on_train_end_belongs_to_the_same_run(tracker, tracked, folder, ending):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    if ending == "best model loaded":
        trainer, steps = tracked(tracker, every=4, max_steps=4, **BEST), [0, 2, 4, 4]
    else:
        trainer, steps = tracked(tracker, [Stop()], every=2, max_steps=8), [0, 2, 3]
    order = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert [r["step"] for r in rows(trainer)] == steps
    assert_has_every_key(tracker, folder, trainer)
    assert trainer.callback_handler.callbacks == order


# Alerts


@pytest.fixture
def scripted(monkeypatch):
    """(levels) -> that is what the looks are judged to be, one after the other."""

    def script(levels):
        verdicts = iter([Verdict(level, 0.5, f"because {i}") for i, level in enumerate(levels)])
        monkeypatch.setattr("iimm_callbacks.guard.judging.judge", lambda *_: next(verdicts))

    return script


class Wandb(WandbCallback):
    """What `report_to="wandb"` makes, without wandb."""

    def __init__(self):
        self._wandb = None
        self._log_model = None


@pytest.fixture
def stand_in(monkeypatch):
    """Alerts of a module that has what we use of wandb."""
    sent = []

    def alert(**alert):
        sent.append((alert["title"], alert["text"], alert["level"]))

    module = SimpleNamespace(run=SimpleNamespace(alert=alert), teardown=lambda: None, sent=sent)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_an_alert_is_sent_where_the_verdict_changes(tracked, scripted, stand_in):
    scripted(LEVELS)
    tracked("none", [Wandb()], every=1, max_steps=6).train()
    assert stand_in.sent == ALERTS


@pytest.mark.parametrize(("level", "sent"), [("continue", 0), ("warn", 1), ("stop", 1)])
def test_the_first_look_alerts_unless_all_is_well(tracked, scripted, stand_in, level, sent):
    scripted([level] * 3)
    tracked("none", [Wandb()], every=1, max_steps=2).train()
    assert len(stand_in.sent) == sent


def test_a_resumed_run_alerts_only_of_what_is_new(tracked, scripted, stand_in, tmp_path):
    scripted(["warn", "warn", "warn", "stop", "stop"])
    for resume in (None, str(tmp_path / "out" / "checkpoint-2")):
        trainer = tracked(
            "none", [Wandb()], every=1, max_steps=2, save_strategy="steps", save_steps=2
        )
        trainer.args.max_steps = 4 if resume else 2
        trainer.train(resume_from_checkpoint=resume)
    titles = [title for title, *_ in stand_in.sent]
    assert titles == ["IIMM guard, warn: colours", "IIMM guard, over the limit: colours"]


def test_no_alert_without_the_trainers_tracker_or_an_open_run(tracked, scripted, stand_in):
    scripted(LEVELS)
    tracked("none", every=1, max_steps=6).train()
    stand_in.run = None
    scripted(LEVELS)
    tracked("none", [Wandb()], every=1, max_steps=6).train()
    assert stand_in.sent == []


def test_only_the_main_process_alerts(tracked, scripted, stand_in):
    class Elsewhere(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    scripted(LEVELS)
    trainer = tracked("none", [Wandb()], every=1, max_steps=6)
    trainer.callback_handler.callbacks.insert(0, Elsewhere())
    trainer.train()
    assert stand_in.sent == []


def test_a_failing_alert_costs_one_warning(tracked, scripted, stand_in, caplog):
    def refuse(**alert):
        raise ConnectionError("quota used up")

    stand_in.run.alert = refuse
    scripted(LEVELS)
    trainer = tracked("none", [Wandb()], every=1, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
    assert caplog.text.count("an alert to Weights & Biases raised ConnectionError: quota used") == 1


def test_a_failing_alert_raises_if_strict(tracked, scripted, stand_in):
    stand_in.run.alert = None
    scripted(LEVELS)
    trainer = tracked("none", [Wandb()], every=1, max_steps=6, guard={"strict": True})
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        trainer.train()


def test_weights_and_biases_has_the_alerts(tracked, scripted, folder):
    scripted(LEVELS)
    tracked("wandb", every=1, max_steps=6).train()
    importlib.import_module("wandb").finish()
    found = [(a["title"], a["text"], a["level"]) for a in wandb_records(folder, "alert")]
    assert found == ALERTS


def test_trackio_has_the_alerts(tracked, scripted, folder):
    scripted(LEVELS)
    tracked("trackio", every=1, max_steps=6).train()
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    found = [(a["title"], a["text"], a["level"].upper()) for a in storage.get_alerts(folder.name)]
    assert sorted(found, key=lambda alert: alert[1]) == ALERTS


def test_a_title_is_no_longer_than_weights_and_biases_takes(monkeypatch):
    from iimm_callbacks.trainer import outlets

    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[Wandb()]))
    monkeypatch.setattr(outlets.host, "find_trainer", lambda: trainer)
    ((name, send),) = outlets.alerts_due("x" * 100, Verdict("stop", 0.9, "why"), "warn")
    assert (name, len(send.args[0])) == ("Weights & Biases", 63)
    assert outlets.alerts_due("x", Verdict("stop", 0.9, "why"), "stop") == []


def test_readback_notices_a_key_that_is_missing(tracked, folder):
    trainer = tracked("tensorboard", max_steps=2)
    trainer.train()
    trainer.state.log_history[0]["eval_iimm_more"] = 0.5
    with pytest.raises(AssertionError, match="eval/iimm_more"):
        assert_has_every_key("tensorboard", folder, trainer)
