"""The command `iimm`: what it prints is what was computed, and its exit code can be relied on."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from test_pages import rescued_record
from test_report import (
    HOSTILE,
    PREDICTED,
    RAW,
    SHOWN,
    lines_with,
    make_record,
    shows_no_control_code,
)
from typer.testing import CliRunner

import iimm_callbacks
from iimm_callbacks import Forecaster, Outcome, append_outcome, cli, read_outcomes, sample
from iimm_callbacks.cli import loading, shell, trying
from iimm_callbacks.cli.loading import load_model
from iimm_callbacks.cli.measuring import open_runs
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.catalog import Listed
from iimm_callbacks.records.run_file import save_run
from iimm_callbacks.reports import tables
from iimm_callbacks.sample import OUTCOMES

# click before 8.2 mixes stderr into stdout unless told not to.
MIXES = "mix_stderr" in inspect.signature(CliRunner).parameters
RUNNER = CliRunner(**({"mix_stderr": False} if MIXES else {}))
EMOJI = ["sample:emoji_groups", "--probe-size", "48"]


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The user's own record, which is not there yet."""
    path = tmp_path / "store.jsonl"
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The sample model in a folder of its own: nothing that ships is on its record."""
    folder = tmp_path_factory.mktemp("model")
    sample.load_model().save_pretrained(folder)
    sample.load_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fingerprint():
    return model_fingerprint(sample.load_model())


def run(*arguments, code=0):
    result = RUNNER.invoke(cli.app, [str(a) for a in arguments], prog_name="iimm")
    assert result.exit_code == code, result.output
    return result


def ask(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def fails(*arguments):
    """The one line on stderr of a command that exits with 1."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    told = [line for line in result.stderr.splitlines() if line.startswith("iimm: error: ")]
    assert len(told) == 1
    assert result.stderr.endswith(told[0] + "\n")
    assert "Traceback" not in result.stderr
    return told[0]


def outcome(task, drop=0.05, gain=0.2, *, x=0.4, before=0.5, method="full", model="1f", **more):
    """A run that at 10 % of its steps has half of its gain and forgetting."""
    looks = [
        {"share": s, "gain": k * gain, "forgetting": k * drop, "worst": k * (drop + 0.1)}
        for s, k in ((0.0, 0.0), (0.1, 0.5), (1.0, 1.0))
    ]
    return Outcome(
        model="m", model_fingerprint=model, method=method, task=task, task_fingerprint="2e",
        iimm=x, inter=x, intra=x, standard_error=0.01, n_images=512, n_classes=10,
        zero_shot_accuracy=before, final_accuracy=before + gain,
        off_target_before={"a": 0.5, "b": 0.5},
        off_target_after={"a": 0.4 - drop, "b": 0.6 - drop},
        trajectory=looks, **more,
    )  # fmt: skip


def plant(path, fingerprint, method="full", base=0.1):
    """Eight runs whose mean forgetting scatters about `base`."""
    rng = np.random.default_rng(0)
    for i, x in enumerate(np.linspace(0.3, 0.5, 8)):
        drop, gain = base + 0.005 * rng.normal(), 0.2 + 0.005 * rng.normal()
        planted = outcome(f"task {i}", drop, gain, x=float(x), method=method, model=fingerprint)
        append_outcome(path, planted)


# --- measure ---


def test_measure_prints_what_the_probe_measures():
    task = sample.load_task("emoji_groups", probe_size=48)
    probe = Probe(task, processor=sample.load_processor())
    net = sample.load_model()
    look = probe.look(net, 0)
    found = ask("measure", "sample", *EMOJI)
    assert found["iimm"] == pytest.approx(look.measurement.iimm)
    assert found["standard_error"] == pytest.approx(look.measurement.standard_error)
    assert found["zero_shot_accuracy"] == look.accuracy("emoji_groups")
    assert (found["n_images"], found["n_classes"]) == (48, 12)
    assert found["model_fingerprint"] == model_fingerprint(net)
    assert found["task_fingerprint"] == probe.fingerprints["emoji_groups"]
    shown = run("measure", "sample", *EMOJI).stdout
    m = look.measurement
    for cell in (f"{m.iimm:.3f} ± {m.standard_error:.3f}", f"{m.inter:.3f}", f"{m.intra:.3f}"):
        assert cell in shown
    assert f"{100 * look.accuracy('emoji_groups'):.1f} %" in shown
    assert "48 images, 12 class prompts" in shown


def pictures(folder):
    for colour in ("blue", "red"):
        (folder / colour).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 20), colour).save(folder / colour / f"{i}.png")
    return folder


def test_a_local_model_and_a_folder_of_images_per_class_are_measured(tmp_path, model):
    folder = pictures(tmp_path / "colours")
    templates = ["--template", "a {} thing", "--template", "something {}"]
    found = ask("measure", model, folder, *templates)
    assert (found["task"], found["split"], found["n_images"]) == ("colours", "", 8)
    assert found["n_classes"] == 2
    assert found["templates"] == ["a {} thing", "something {}"]
    assert ask("measure", "sample", folder, *templates)["iimm"] == pytest.approx(found["iimm"])
    assert "`--split` must be left out" in fails("measure", model, folder, "--split", "test")


def test_of_folders_of_splits_the_named_one_or_test_is_measured(tmp_path):
    pictures(tmp_path / "colours" / "test")
    pictures(tmp_path / "colours" / "val")
    (tmp_path / "colours" / "val" / "red" / "0.png").unlink()
    found = ask("measure", "sample", tmp_path / "colours")
    assert (found["task"], found["split"], found["n_images"]) == ("colours", "test", 8)
    assert ask("measure", "sample", tmp_path / "colours", "--split", "val")["n_images"] == 7
    wrong = fails("measure", "sample", tmp_path / "colours", "--split", "dev")
    assert "`--split` must be one of validation, test for" in wrong


def test_a_data_set_saved_to_disk_is_measured(tmp_path, colours):
    folder = tmp_path / "saved"
    colours.save_to_disk(folder)
    found = ask("measure", "sample", folder, "--task-name", "colours", "--seed", 3)
    assert (found["task"], found["split"], found["n_images"]) == ("colours", "", 96)
    assert "`--split` must be left out" in fails("measure", "sample", folder, "--split", "test")
    assert "`--label-column`" in fails("measure", "sample", folder, "--label-column", "no")


# --- rescue ---


@pytest.fixture
def rescued(tmp_path, tiny_clip, processor, colours, shapes, make_trainer):
    """(method) -> BASE, TUNED and options of `iimm rescue` for a model that was just tuned."""
    from iimm_callbacks.models import tuning

    base = tmp_path / "base"
    tiny_clip().save_pretrained(base)
    processor.save_pretrained(base)
    colours.save_to_disk(tmp_path / "colours")
    shapes.save_to_disk(tmp_path / "shapes")
    options = [tmp_path / "colours", "--template", "a {} thing", "--max-forgetting", 1]
    options += ["--off-target", tmp_path / "shapes", "--probe-size", 32]

    def tune(method):
        model = tuning.prepare(tiny_clip(), method)
        trainer = make_trainer(model=model, max_steps=20, learning_rate=2e-3)
        trainer.train()
        model.save_pretrained(tmp_path / "tuned")
        trainer.save_model(tmp_path / "trainer")  # its weights only, by the classifier's names
        return [base, tmp_path / "tuned", *options]

    return tune


def test_rescue_saves_the_mix_with_its_curve(rescued, tmp_path, colour_task):
    arguments = rescued("full")
    to = tmp_path / "rescued"
    found = ask("rescue", *arguments, "--to", to)
    assert 0 < found["alpha"] <= 1
    assert json.loads((to / "rescue.json").read_text()) == found
    mixed, processor = load_model(str(to), device="cpu")  # whole again, with a processor
    probe = Probe(colour_task, processor=processor, progress=False)
    (chosen,) = (m for m in found["mixes"] if m["alpha"] == found["alpha"])
    assert probe.look(mixed, 0).accuracy("colours") == chosen["accuracy"]
    base, tuned, *_ = (load_model(str(a), processor=str(to))[0].state_dict() for a in arguments[:2])
    for name, value in mixed.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, torch.lerp(base[name], tuned[name], found["alpha"])), name
    shown = run("rescue", *arguments).stdout
    assert f"Chosen: α = {found['alpha']:.3g}, as {found['reason']}." in shown
    assert "held out" in shown
    assert "Saved" not in shown
    assert "`--to` must be a folder that is empty or new" in fails("rescue", *arguments, "--to", to)


def test_rescue_reads_what_a_trainer_saved(rescued, tmp_path):
    base, tuned, *options = rescued("full")
    of_trainer = ask("rescue", base, tmp_path / "trainer", *options)
    of_model = ask("rescue", base, tuned, *options)
    assert of_trainer["mixes"] == of_model["mixes"]
    file = ask("rescue", base, tmp_path / "trainer" / "model.safetensors", *options)
    assert file["mixes"] == of_model["mixes"]
    other = fails("rescue", "sample", tmp_path / "trainer", *options)
    assert "`TUNED` must hold weights of `BASE` and no others" in other


def test_rescue_scales_an_adapter_and_saves_it_as_one(rescued, tmp_path):
    from peft import PeftModel

    arguments = rescued("lora")
    to = tmp_path / "rescued"
    found = ask("rescue", *arguments, "--to", to)
    assert {path.name for path in to.iterdir()} >= {"adapter_config.json", "rescue.json"}
    adapters = [
        PeftModel.from_pretrained(load_model(str(arguments[0]))[0], folder).state_dict()
        for folder in (arguments[1], to)
    ]
    for name, value in adapters[0].items():
        scale = found["alpha"] if "lora_B" in name else 1.0
        torch.testing.assert_close(adapters[1][name], scale * value)


def test_rescue_saves_nothing_where_nothing_gains(rescued, tmp_path, monkeypatch):
    nothing = (0.0, "no mix gains anything within 1.0 points of mean forgetting")
    monkeypatch.setattr("iimm_callbacks.rescue.sweep.choose", lambda mixes, limits: nothing)
    to = tmp_path / "rescued"
    found = ask("rescue", *rescued("full"), "--to", to, code=2)
    assert (found["alpha"], found["reason"], found["to"]) == (*nothing, None)
    assert not to.exists()


def test_rescue_refuses_what_is_no_mix_of_the_two(rescued, tmp_path):
    base, tuned, *options = rescued("full")
    told = fails("rescue", base, base, *options)
    assert "differs in nothing" in told
    assert "`base` must have the" in fails("rescue", "sample", tuned, *options)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "head.safetensors").touch()
    assert "residual ratio" in fails("rescue", base, tmp_path / "head", *options)
    too_much = fails("rescue", base, tuned, options[0], "--max-forgetting", 5)
    assert "must be a fraction in (0, 1]" in too_much


@pytest.mark.parametrize("inside", ["", "sub"])
def test_rescue_finds_out_before_the_sweep_that_it_cannot_write(tmp_path, monkeypatch, inside):
    (tmp_path / "afile").touch()
    monkeypatch.setattr("iimm_callbacks.rescue.sweep.rescue", None)
    monkeypatch.setattr("iimm_callbacks.cli.finished.load_model", None)
    to = tmp_path / "afile" / inside
    told = fails("rescue", "sample", "tuned", "sample:emoji_groups", "--to", to)
    assert re.search(f"`--to` (needs|must be) a folder .*, got '{to}'", told)


def test_rescue_leaves_no_folder_where_it_fails(tmp_path):
    (tmp_path / "there").mkdir()
    for to in (tmp_path / "new" / "er", tmp_path / "there"):
        fails("rescue", "sample", tmp_path / "no", "sample:emoji_groups", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_off_target_folders_of_one_name_are_two_tasks(tmp_path, monkeypatch):
    for name in ("food", "cars", "digits"):
        pictures(tmp_path / name / "test")
    seen = {}

    def stand_in(model, base, task, off_target, limits, **settings):
        seen["tasks"] = [task.name, *(t.name for t in off_target)]
        raise ValueError("seen")

    monkeypatch.setattr("iimm_callbacks.rescue.sweep.rescue", stand_in)
    start = ["rescue", "sample", "sample"]
    folders = [tmp_path / name / "test" for name in ("food", "cars", "digits")]
    food, cars, digits = (["--off-target", folder] for folder in folders)
    for options, names in (
        ([folders[2], *food, *cars], ["test", "food/test", "cars/test"]),
        (["sample:emoji_groups", *food], ["emoji_groups", "test"]),
        ([folders[2], "--task-name", "digits", *food, *cars], ["digits", "food/test", "cars/test"]),
    ):
        assert fails(*start, *options) == "iimm: error: seen"
        assert seen["tasks"] == names
    told = fails(*start, "sample:emoji_groups", *food, *digits, *food)
    assert "`--off-target` must be data sets with names of their own" in told
    assert f"got '{folders[0]}' ('food/test') more than once" in told
    for name in ("sample:emoji_groups", folders[0]):  # the task itself
        told = fails(*start, name, "--template", "a {}", "--off-target", name)
        assert f"other than that of `DATASET`, got '{name}' (" in told


def test_errors_of_rescue_name_the_argument_that_is_wrong(tmp_path, monkeypatch):
    no, emoji = tmp_path / "no", "sample:emoji_groups"
    assert f"`BASE` must be a folder or a name on the Hub, got '{no}'" in fails(
        "rescue", no, "sample", emoji
    )
    assert "`TUNED` must be a folder or a name" in fails("rescue", "sample", no, emoji)
    assert "`DATASET` must be a folder or" in fails("rescue", "sample", "sample", no)
    for name in (no, "sample:no"):
        told = fails("rescue", "sample", "sample", emoji, "--off-target", name)
        assert "`--off-target` must be " in told
    file = no.with_suffix(".safetensors")
    assert f"`TUNED` must be a file that exists, got '{file}'" in fails(
        "rescue", "sample", file, emoji
    )
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "`TUNED` 'open_clip:a:b' needs" in fails("rescue", "sample", "open_clip:a:b", emoji)


# --- forecast ---


@pytest.mark.once
def test_forecast_shows_all_five_methods_and_chooses_one(store, model, fingerprint):
    plant(store, fingerprint, "full", base=0.1)
    plant(store, fingerprint, "lora", base=0.01)
    found = ask("forecast", model, *EMOJI)
    assert list(found["forecasts"]) == list(cli.METHODS)
    assert found["forecasts"]["full"]["forgetting"]["point"] == pytest.approx(0.1, abs=0.02)
    assert found["forecasts"]["full"]["exceed_probability"] > 0.9
    assert found["forecasts"]["lora"]["exceed_probability"] < 0.1
    assert found["recommended"] != "full"
    shown = run("forecast", model, *EMOJI).stdout
    for method, row in found["forecasts"].items():
        for quantity in ("gain", "forgetting", "worst"):
            point, low, high = (100 * row[quantity][k] for k in ("point", "low", "high"))
            assert f"{point:+.1f} [{low:+.1f}, {high:+.1f}]" in shown
        assert f"{method}: {row['basis']}." in shown
        for note in row["notes"]:
            assert note in shown
        error = row["evidence"]["gain"]["error"]
        assert f" {100 * error:.1f} │" in shown
    assert f"Choose {found['recommended']}: " in shown
    assert "base rate" not in shown


@pytest.mark.once
def test_forecast_asks_the_forecaster_what_it_was_asked(store, model, fingerprint):
    plant(store, fingerprint)
    plan = ["--learning-rate", "1e-3", "--steps", 50, "--off-target", "a", "--off-target", "b"]
    limits = ["--limit-on", "worst", "--max-forgetting", 0.2]
    found = ask("forecast", model, *EMOJI, "--method", "full", *plan, *limits)
    task = sample.load_task("emoji_groups", probe_size=48)
    probe = Probe(task, processor=sample.load_processor())
    look = probe.look(sample.load_model(), 0)
    expected = (
        Forecaster()
        .fit(read_outcomes(store))
        .predict(
            look.measurement,
            method="full",
            zero_shot_accuracy=look.accuracy(task.name),
            model=fingerprint,
            task=task.name,
            task_fingerprint=probe.fingerprints[task.name],
            recipe={"learning_rate": 1e-3, "steps": 50},
            off_target=["a", "b"],
        )
    )
    (row,) = found["forecasts"].values()
    assert row["basis"] == expected.basis
    assert row["notes"] == list(expected.notes)
    assert row["worst"]["point"] == pytest.approx(expected.worst.point)
    assert row["exceed_probability"] == pytest.approx(expected.worst.probability_above(0.2))


def test_the_shipped_model_has_the_shipped_runs_saved():
    found = ask("forecast", "sample", *EMOJI, "--method", "full")
    (row,) = found["forecasts"].values()
    assert row["n_outcomes"] == len([o for o in sample.load_outcomes() if o.complete])
    assert not row["base_rate"]


def test_of_a_store_only_what_is_relevant_to_the_shipped_model_is_read(store, monkeypatch):
    shipped = sample.load_outcomes()
    for saved in (*shipped[:2], outcome("digits"), outcome("letters", complete=False)):
        append_outcome(store, saved)
    monkeypatch.setattr(Listed, "read", None)
    found = open_runs("sample", None).relevant(shipped[0].model_fingerprint)
    assert len(found) == len(shipped) + 1  # none twice
    assert [o.task for o in found if o not in shipped] == ["digits"]


def test_base_rates_are_labelled_wherever_they_show(model):
    result = run("forecast", model, *EMOJI)
    lines = result.stdout.splitlines()
    assert len([line for line in lines if "(borrowed)" in line and "│" in line]) == 20
    assert any(line.startswith("all: base rates: borrowed from 76") for line in lines)
    assert "Base rates: " in run("forecast", model, *EMOJI, "--method", "full").stdout
    assert re.search(
        r"Choose \w+ \(borrowed\): of the methods that likely stay within 5.0", result.stdout
    )
    assert "no saved runs" in result.stderr
    assert "the shipped runs of other models are used" in result.stderr
    assert ask("forecast", model, *EMOJI, "--method", "full")["forecasts"]["full"]["base_rate"]


# --- preflight ---


def test_preflight_exits_with_2_over_the_limit_and_with_0_below(store, model, fingerprint):
    plant(store, fingerprint, base=0.1)
    flight = ["preflight", model, *EMOJI, "--method", "full"]
    over = ask(*flight, code=2)  # about 10 points, where 5 are the limit
    assert (over["go"], over["verdict"]["level"]) == (False, "stop")
    assert ask(*flight, "--max-forgetting", 0.3)["verdict"]["level"] == "continue"
    # Just under the forecast it is more likely exceeded than not, yet far from 99 %.
    point = over["forecasts"]["full"]["forgetting"]["point"]
    edge = ["--max-forgetting", point - 0.0005, "--confidence", 0.99]
    warned = ask(*flight, *edge, "--require-forecast")
    assert (warned["go"], warned["verdict"]["level"]) == (True, "warn")
    shown = run(*flight, code=2).stdout
    assert f"Verdict: no go (over the limit): {over['verdict']['reason']}." in shown
    assert run(*flight, *edge).stdout.splitlines()[-1].startswith("Verdict: go (warn): ")


def test_preflight_warns_on_what_is_borrowed_and_goes(model):
    flight = ["preflight", model, *EMOJI, "--method", "full", "--max-forgetting", "0.001"]
    found = ask(*flight)
    assert (found["go"], found["verdict"]["level"]) == (True, "warn")
    assert found["verdict"]["reason"].startswith("borrowed forecast mean forgetting")
    assert "needs saved runs of this model" in fails(*flight, "--require-forecast")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["sample"], "Missing argument 'DATASET'"),
        (["sample", *EMOJI], "Missing option '--method'. See 'iimm preflight --help'."),
        (["sample", *EMOJI, "--method", "full", "--no-such"], "No such option"),
        (["sample", *EMOJI, "--method", "full", "--steps", "x"], "--steps"),
        (["sample", *EMOJI, "--method", "all"], "`--method` must be one of full, bitfit,"),
        (
            ["sample", *EMOJI, "--method", "full", "--max-forgetting", "5"],
            "`--max-forgetting`.* write 0.05",
        ),
        (
            ["sample", *EMOJI, "--method", "full", "--limit-on", "x"],
            "`--limit-on` must be 'mean' or 'worst'",
        ),
        (["sample", *EMOJI, "--method", "full", "--confidence", "2"], "`--confidence`"),
        (["sample", *EMOJI, "--method", "full", "--learning-rate", "-1"], "positive number"),
        (["sample", *EMOJI, "--method", "full", "--probe-size", "1"], "`--probe-size` must be"),
        (["sample", *EMOJI, "--method", "full", "--device", "abacus"], "`--device` must be"),
        (["sample", "sample:x", "--method", "full"], "emoji_groups, .* got 'sample:x'"),
        (["sample", "./nowhere", "--method", "full"], "'./nowhere', which does not exist"),
        (["sample", "no/data", "--method", "full"], "`DATASET` must be .* got 'no/data'"),
        (["sample", __file__, "--method", "full"], "a file"),
        (["no/model", *EMOJI, "--method", "full"], "`MODEL` must be .* got 'no/model'"),
        (["/no/model", *EMOJI, "--method", "full"], "'/no/model', which does not exist"),
        (["sample", *EMOJI, "--method", "full", "--processor", "no/p"], "got 'no/p'"),
        (["sample", *EMOJI, "--method", "full", "--template", "a"], "exactly one '{}'"),
        (["sample", *EMOJI, "--method", "full", "--store", "/no/store"], "'?/no/store"),
    ],
)
def test_every_error_of_preflight_exits_with_1_in_one_line(arguments, says):
    told = fails("preflight", *arguments)
    assert re.search(says, told), told


def test_a_damaged_model_is_an_error_and_debug_shows_where(tmp_path, model):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert "`MODEL` must be" in fails("measure", tmp_path, *EMOJI)
    result = run("measure", tmp_path, *EMOJI, "--debug", code=1)
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("iimm: error: ")


def test_a_checkpoint_without_all_weights_is_refused(tmp_path):
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel(sample.load_model().config.vision_config)
    tower.save_pretrained(tmp_path / "tower")
    sample.load_processor().save_pretrained(tmp_path / "tower")
    assert "must be a dual encoder" in fails("measure", tmp_path / "tower", *EMOJI)
    config = sample.load_model().config
    config.save_pretrained(tmp_path / "tower")
    assert "which would be random" in fails("measure", tmp_path / "tower", *EMOJI)


def test_open_clip_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    told = fails("measure", "open_clip:ViT-B-32:openai", *EMOJI)
    assert "pip install 'iimm_callbacks[open-clip]'" in told


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("ViT-B-32:openai", ("ViT-B-32", "openai")),
        ("hf-hub:org/model", ("hf-hub:org/model", None)),
    ],
)
def test_open_clip_is_asked_for_the_model_by_its_own_name(monkeypatch, name, asked):
    model = torch.nn.Linear(1, 1).half().train()
    calls = []

    def create(architecture, pretrained, require_pretrained):
        assert require_pretrained is True  # a folder without weights gives random ones
        calls.append((architecture, pretrained))
        return model, "train transform", "test transform"

    fake = SimpleNamespace(
        create_model_and_transforms=create, get_tokenizer=lambda name: f"tokenizer of {name}"
    )
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    loaded, pair = load_model(f"open_clip:{name}", device="cpu")
    assert calls == [asked]
    assert pair == ("test transform", f"tokenizer of {asked[0]}")
    assert (loaded, loaded.weight.dtype, loaded.training) == (model, torch.float32, False)


def test_an_open_clip_model_without_weights_is_refused(monkeypatch):
    fake = SimpleNamespace(list_pretrained_tags_by_model=lambda name: ["openai", "laion"])
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    told = fails("measure", "open_clip:ViT-B-32", *EMOJI)
    assert "it is random. Tags of 'ViT-B-32': openai, laion" in told
    assert "`--processor` must be left out" in fails(
        "measure", "open_clip:ViT-B-32:openai", *EMOJI, "--processor", "x"
    )


# --- outcomes ---


@pytest.fixture
def record(store):
    """Three saved runs; the second was stopped."""
    runs = [
        outcome("digits", 0.01, 0.2, recipe={"steps": 10}),
        outcome("letters", 0.06, 0.1, method="lora", complete=False, ended="stopped"),
        outcome("digits [x]", 0.03, 0.3, model="2f"),
    ]
    for one in runs:
        append_outcome(store, one)
    return runs


def test_list_shows_each_run_and_filters(record):
    found = ask("outcomes", "list")
    assert [row["task"] for row in found["outcomes"]] == ["digits", "letters", "digits [x]"]
    assert found["outcomes"][0]["forgetting"] == pytest.approx(0.01)
    assert found["outcomes"][0]["worst"] == pytest.approx(0.11)
    (line,) = [x for x in run("outcomes", "list").stdout.splitlines() if "letters" in x]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[:7] == ["m", "lora", "letters", "50.0 %", "+10.0", "+6.0", "+16.0"]
    assert cells[7].startswith("incomplete")
    assert "digits [x]" in run("outcomes", "list").stdout

    def tasks(*filters):
        return [row["task"] for row in ask("outcomes", "list", *filters)["outcomes"]]

    assert tasks("--method", "lora") == ["letters"]
    assert tasks("--model", "2f") == ["digits [x]"]
    assert tasks("--task", "digits*", "--model", "m") == ["digits", "digits [x]"]
    assert tasks("--task", "nothing") == []


def test_an_empty_record_is_listed_and_not_exported(store):
    empty = {"n_outcomes": 0, "n_found": 0, "page": 1, "n_pages": 1, "outcomes": []}
    assert ask("outcomes", "list") == {"store": str(store)} | empty
    assert "0 of 0 runs" in run("outcomes", "list").stdout
    assert "without any" in fails("outcomes", "export", "new.jsonl")
    assert "without any" in fails("grade")
    assert "does not exist" in fails("outcomes", "list", "--store", "elsewhere.jsonl")


def test_the_record_is_listed_in_pages_from_the_newest(record):
    names = [row["task"] for row in ask("outcomes", "list")["outcomes"]]
    pages = [ask("outcomes", "list", "--limit", "2", "--page", str(n)) for n in (1, 2, 3)]
    assert [[row["task"] for row in p["outcomes"]] for p in pages] == [names[1:], names[:1], []]
    assert {(p["n_outcomes"], p["n_found"], p["n_pages"]) for p in pages} == {(3, 3, 2)}
    assert "3 of 3 runs" in run("outcomes", "list", "--limit", "2").stdout
    assert "Page 1 of 2" in run("outcomes", "list", "--limit", "2").stdout
    assert "Page" not in run("outcomes", "list").stdout
    assert "--limit" in fails("outcomes", "list", "--limit", "0")


@pytest.mark.parametrize("target", ["shared.jsonl", "shared"])
def test_what_is_exported_is_imported_once(record, tmp_path, target):
    written = run("outcomes", "export", tmp_path / target).stdout
    assert written.startswith("3 outcomes of ")
    assert "must not exist yet" in fails("outcomes", "export", tmp_path / target)
    other = ["--store", tmp_path / "other.jsonl"]
    first = ask("outcomes", "import", tmp_path / target, *other)
    assert (first["added"], first["skipped"]) == (3, 0)
    assert read_outcomes(tmp_path / "other.jsonl") == record
    again = run("outcomes", "import", tmp_path / target, *other).stdout
    assert again.startswith("0 outcomes added to ")
    assert again.endswith("3 were there already\n")
    assert read_outcomes(tmp_path / "other.jsonl") == record


def test_two_equal_runs_are_two_runs(store, tmp_path):
    for _ in range(2):
        append_outcome(tmp_path / "twins.jsonl", outcome("digits"))
    append_outcome(store, outcome("digits"))
    found = ask("outcomes", "import", tmp_path / "twins.jsonl")
    assert (found["added"], found["skipped"]) == (1, 1)


def test_an_equal_run_is_there_already_whoever_saved_it(store, tmp_path):
    append_outcome(store, outcome("digits", provenance={"who": "Ada", "when": "today"}))
    append_outcome(tmp_path / "hub.jsonl", outcome("digits", provenance={"when": "today"}))
    found = ask("outcomes", "import", tmp_path / "hub.jsonl")
    assert (found["added"], found["skipped"]) == (0, 1)
    assert read_outcomes(store)[0].provenance["who"] == "Ada"


@pytest.mark.parametrize(
    "command",
    [
        ["outcomes", "retire", "RUN", "--why", "x"], ["outcomes", "add", "runs.csv"],
        ["outcomes", "import", "runs.jsonl"], ["calibrate", "sample", "--tasks", "1"],
        ["plan", "sample", *EMOJI, "--train", "sample:emoji_groups", "--try"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_ships_with_the_package_is_never_written_to(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs.csv").write_text(
        "model,method,task,zero_shot_accuracy,final_accuracy\na,full,t,0.5,0.6\n"
    )
    append_outcome("runs.jsonl", outcome("digits"))
    before = OUTCOMES.read_bytes()
    told = fails(*command, "--store", "sample")
    assert "`--store` must be a store to write to, got 'sample', whose runs ship" in told
    assert OUTCOMES.read_bytes() == before
    assert not (tmp_path / "sample").exists()


def test_sync_refuses_what_ships_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "`A` must be a store to write to" in fails("outcomes", "sync", "sample", "b.jsonl")
    assert "`B` must be a store to write to" in fails("outcomes", "sync", "b.jsonl", "sample")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [["--private"], ["--license", "cc0-1.0"]])
def test_what_is_of_the_hub_is_refused_for_a_file(record, tmp_path, given):
    told = fails("outcomes", "export", tmp_path / "new.jsonl", *given)
    assert "`--private` and `--license` are of a data set on the Hub" in told
    assert not (tmp_path / "new.jsonl").exists()


def test_export_names_a_target_that_cannot_be_written(record, tmp_path):
    told = fails("outcomes", "export", tmp_path / "none" / "new.jsonl")
    assert "`TARGET` must be a file that can be written, got " in told
    assert "(No such file or directory); make its folder" in told


@pytest.mark.parametrize("push", [["export", "--push-to-hub"], ["push"]])
@pytest.mark.parametrize("pull", ["import", "pull"])
def test_a_record_goes_to_the_hub_and_comes_back(push, pull, record, tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import DatasetCard

    pushed = {}
    monkeypatch.setattr(
        datasets.Dataset,
        "push_to_hub",
        lambda self, name, private: pushed.update({name: (self, private)}),
    )
    card = DatasetCard("---\nconfigs: []\n---\nBy hand.")
    monkeypatch.setattr(DatasetCard, "load", lambda name: card)
    monkeypatch.setattr(DatasetCard, "push_to_hub", lambda self, name: pushed.update(card=self))
    given = ["--private", "--license", "cc0-1.0"]
    assert ask("outcomes", *push, "us/runs", *given)["n_outcomes"] == 3
    assert pushed["card"].data.license == "cc0-1.0"
    assert "By hand." in card.text
    assert "3 runs of 2 models, 2 complete. `iimm outcomes pull us/runs`" in card.text
    table, private = pushed["us/runs"]
    assert private is True
    loaded = {"us/runs": datasets.DatasetDict(train=table)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **_: loaded[name])
    ask("outcomes", pull, "us/runs", "--store", tmp_path / "back.jsonl")
    assert read_outcomes(tmp_path / "back.jsonl") == record
    loaded["us/runs"] = datasets.DatasetDict(train=datasets.Dataset.from_dict({"x": [1]}))
    assert "`SOURCE` must hold outcomes" in fails("outcomes", pull, "us/runs")


def test_runs_written_down_by_hand_are_added(store, tmp_path):
    rows = tmp_path / "runs.csv"
    rows.write_text(
        "model,method,task,zero_shot_accuracy,final_accuracy,before:a,after:a,gain@0.1\n"
        "ours,full,cars,0.6,0.8,0.9,0.7,0.05\n"
    )
    assert ask("outcomes", "add", rows)["added"] == 1
    (added,) = read_outcomes(store)
    assert added.gain == pytest.approx(0.2)
    assert added.drops == {"a": pytest.approx(0.2)}
    assert added.trajectory == [{"share": 0.1, "gain": 0.05}]
    assert ask("outcomes", "add", rows) == {"store": str(store), "added": 0, "skipped": 1}
    rows.write_text(rows.read_text().replace("0.8", "80"))
    assert "runs.csv line 2: column `final_accuracy`" in fails("outcomes", "add", rows)


def test_a_store_that_cannot_be_written_is_an_error(record, tmp_path, store):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "store.jsonl"
    told = fails("outcomes", "import", store, "--store", below)
    assert "cannot append an outcome" in told
    assert str(below) in told


def test_check_names_the_damaged_line(record, store):
    assert ask("outcomes", "check") == {"store": str(store), "problems": [], "doubts": []}
    assert "no damaged lines" in run("outcomes", "check").stdout
    lines = store.read_text().splitlines()
    lines[1] = lines[1][:-9]
    store.write_text("\n".join([*lines, ""]))
    found = ask("outcomes", "check", code=1)
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith("line 2: ")
    assert f"{store} line 2: " in run("outcomes", "check", code=1).stdout


# --- what comes from anyone's data ---


def test_names_saved_are_listed_as_they_are_written_and_in_json_as_they_are(store):
    hostile = replace(outcome("t", method="m"), task=HOSTILE, model="a\nb", ended="\x1b[31m[b]")
    append_outcome(store, hostile)
    append_outcome(store, replace(hostile, task="b", method=HOSTILE, complete=False))
    shown = run("outcomes", "list").stdout
    assert shows_no_control_code(shown)
    assert lines_with(shown, r"a\nb", r"\x1b[31m[b]")
    rows = ask("outcomes", "list")["outcomes"]
    assert [(row["task"], row["method"]) for row in rows] == [(HOSTILE, "m"), ("b", HOSTILE)]


@pytest.mark.once
def test_grade_shows_methods_as_they_are_written(store):
    for i, drop in enumerate((0.02, 0.04, 0.06, 0.08)):
        append_outcome(store, outcome(f"{HOSTILE}{i}", drop, x=0.3 + 0.02 * i, method=HOSTILE))
    shown = run("grade", "--limit", 0.05, "--method", HOSTILE).stdout
    assert shows_no_control_code(shown)
    told = fails("grade", "--method", "no")
    assert "\x1b" not in told
    assert r"must be one of all, x\x1b[2J [red]:bomb:\u202e\x9b, got 'no'" in told


@pytest.mark.parametrize("methods", [["m\x1b\n[b]"], ["m\x1b\n[b]", "full"]])
def test_the_tables_of_forecasts_show_names_as_they_are_written(methods):
    row = PREDICTED | {"basis": HOSTILE, "notes": [f"note {HOSTILE}"], "exceed_probability": 0.2}
    data = {
        "forecasts": dict.fromkeys(methods, row),
        "limits": {"max_forgetting": 0.05, "limit_on": "mean"},
        "recommended": methods[0],
        "verdict": {"exceed_probability": 0.2, "level": "continue", "reason": HOSTILE},
        "go": True,
    }
    text = tables.forecasts(data)
    assert not RAW & set(text)
    assert lines_with(text, r"m\x1b\n[b]", "+30.0 [+10.0, +50.0]")
    assert len(methods) == 1 or r"Choose m\x1b\n[b]: of the" in text.splitlines()[-1]
    assert tables.verdict(data) == f"Verdict: go (ok): {SHOWN}."


def test_errors_and_tracebacks_are_shown_without_control_codes(tmp_path):
    rows = tmp_path / "runs.csv"
    rows.write_text("model,\x1b[2J\n")
    assert r"unknown column `\x1b[2J`" in fails("outcomes", "add", rows)
    result = run("outcomes", "add", rows, "--debug", code=1)
    assert "Traceback (most recent call last):\n" in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("named", ["AutoTokenizer", "pipeline", "__doc__", 5])
def test_a_class_that_is_no_model_is_never_used_whatever_a_config_names(tmp_path, model, named):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [named]}))
    loaded, _ = load_model(str(folder), device="cpu")
    assert model_fingerprint(loaded) == model_fingerprint(sample.load_model())


def test_data_sets_that_name_files_elsewhere_are_refused(tmp_path, colours):
    folder = tmp_path / "saved"
    colours.save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    elsewhere = {"_data_files": [{"filename": f"../saved/{state['_data_files'][0]['filename']}"}]}
    (folder / "state.json").write_text(json.dumps(state | elsewhere))
    assert "must be the name of a file beside it" in fails("measure", "sample", folder)
    assert "must be the name of a file beside it" in fails("outcomes", "import", folder)


# --- grade ---


@pytest.mark.once
def test_grade_prints_the_hand_checked_errors_of_the_plain_mean(store):
    # Forgetting of 2, 4, 6 and 8 points; the mean of the others misses by 4, 4/3, 4/3 and 4.
    for i, (drop, before) in enumerate(((0.02, 0.5), (0.04, 0.4), (0.06, 0.6), (0.08, 0.5))):
        append_outcome(store, outcome(f"task {i}", drop, 0.2, x=0.3 + 0.02 * i, before=before))
    found = ask("grade", "--limit", 0.03, "--limit", 0.05)
    assert {row["limit"] for row in found["guard"]} == {0.03, 0.05}
    expected = Forecaster().grade(read_outcomes(store), limits=(0.03, 0.05)).to_json()
    assert {k: found[k] for k in expected} == json.loads(json.dumps(expected))
    (before,) = [
        row
        for row in found["forecasts"]
        if (row["quantity"], row["method"], row["share"]) == ("forgetting", "all", 0.0)
    ]
    assert before["error_of_mean"] == pytest.approx((0.04 + 0.04 / 3 + 0.04 / 3 + 0.04) / 4)
    # Nobody stops: all end with 20 points. The oracle stops the two runs over 5 points at their
    # only look before the end, with 10 points.
    policies = {row["policy"]: row for row in found["guard"] if row["limit"] == 0.05}
    assert policies["always finish"]["gain"] == pytest.approx(0.2)
    assert policies["oracle"]["gain"] == pytest.approx((0.2 + 0.2 + 0.1 + 0.1) / 4)
    assert policies["always finish"]["n_over"] == 2
    shown = run("grade", "--limit", 0.05).stdout
    (line,) = [x for x in shown.splitlines() if "mean forgetting" in x and " 0% " in x]
    assert [cell.strip() for cell in line.split("│")][6] == "2.7"
    (line,) = [x for x in shown.splitlines() if "always finish" in x]
    assert " 0/2 " in line
    assert "+20.0" in line
    assert "+15.0" in line


@pytest.mark.once
def test_grade_shows_the_method_that_was_asked_for(store):
    for i, drop in enumerate((0.02, 0.04, 0.06, 0.08)):
        append_outcome(store, outcome(f"task {i}", drop, x=0.3 + 0.02 * i))
        append_outcome(store, outcome(f"task {i}", drop, x=0.3 + 0.02 * i, method="lora"))
    found = ask("grade", "--method", "lora", "--limit", 0.05, "--limit-on", "worst")
    assert {row["method"] for row in found["forecasts"]} == {"lora"}
    assert found["limit_on"] == "worst"
    shown = run("grade", "--method", "lora", "--limit", 0.05).stdout
    assert "…" not in shown  # of a heading that is cut off
    assert "Oracle, best gain: stopped at the last look within the limit" in shown


def test_grade_knows_a_method_that_is_not_there_before_it_replays_any(store, monkeypatch):
    append_outcome(store, outcome("task", 0.02))
    append_outcome(store, outcome("task", 0.02, method="lora"))
    monkeypatch.setattr("iimm_callbacks.forecasting.forecaster.Forecaster.grade", None)
    assert "must be one of all, full, lora, got 'x'" in fails("grade", "--method", "x")
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(store.with_name("none.jsonl")))
    assert "`--store sample` has those that ship" in fails("grade")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "5"], "`--limit` must be a fraction in (0, 1], such as 0.05, got [5.0]"),
        (["--limit-on", "x"], "`--limit-on` must be 'mean' or 'worst', got 'x'"),
        (["--confidence", "2"], "`--confidence` must lie in [0.5, 1), got 2.0"),
    ],
)
def test_grade_refuses_such_limits(record, arguments, says):
    assert says in fails("grade", *arguments)


# --- report, compare ---


def save(path, **more):
    path.parent.mkdir(exist_ok=True)
    save_run(make_record() | {"model_fingerprint": "1f", "run": "own"} | more, path)
    return path


@pytest.mark.once
def test_report_writes_the_page_among_the_past_runs_of_its_model(tmp_path, store):
    path = save(tmp_path / "run.json")
    for i in range(4):
        append_outcome(store, outcome(f"task {i}", x=0.3 + 0.1 * i, run=f"run {i}"))
    append_outcome(store, outcome("task", model="2f"))
    append_outcome(store, outcome("digits", run="own"))
    found = ask("report", path)
    assert found["page"] == str(tmp_path / "run_report" / "report.html")
    assert (found["n_past"], found["store"]) == (4, str(store))
    assert str(tmp_path / "run_report" / "past_gain.png") in found["pictures"]
    html = (tmp_path / "run_report" / "report.html").read_text(encoding="utf-8")
    assert "4 complete runs of these weights" in html
    shown = run("report", path, "--outcomes", "sample", "--to", tmp_path / "here").stdout
    assert "Predicted and observed: digits (full)" in shown
    shipped = len(sample.load_outcomes())
    assert f"Shown among 0 past runs of its model, of {shipped} in " in shown
    assert shown.endswith(f"Written to {tmp_path / 'here' / 'report.html'}.\n")


@pytest.mark.parametrize("more", [{}, {"model_fingerprint": None}])
@pytest.mark.once
def test_report_takes_a_run_of_an_unknown_model(tmp_path, store, more):
    append_outcome(store, outcome("task", model=""))
    save_run(make_record() | more, tmp_path / "run.json")
    found = ask("report", tmp_path / "run.json")
    assert found["n_past"] == 0
    assert (tmp_path / "run_report" / "report.html").exists()


def test_report_refuses_what_is_no_run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert "run.json is no run file: `task` is missing" in fails("report", tmp_path / "run.json")
    path = save(tmp_path / "good.json")
    assert "does not exist" in fails("report", path, "--outcomes", tmp_path / "none.jsonl")
    assert not (tmp_path / "good_report").exists()
    assert "No such file" in fails("report", tmp_path / "none.json")


@pytest.mark.once
def test_report_tells_of_the_rescue_and_that_the_rest_was_before(tmp_path):
    path = tmp_path / "run.json"
    save_run(rescued_record() | {"metrics": {"digits": "recall@5"}}, path)
    shown = run("report", path).stdout
    assert "Rescue: digits, untouched (α 0) to fine-tuned (α 1)" in shown
    assert re.search("α.*recall@5.*gain.*forgot, mean", shown)
    assert lines_with(shown, "0.40 60.0 %", "chosen")
    assert lines_with(shown, "0.37 58.0 %", "held out")
    assert "What was observed, above, is of the fine-tuned model before the rescue." in shown
    other = save(tmp_path / "other.json")
    assert "escue" not in run("report", other).stdout
    told = run("compare", path, other, "--to", tmp_path / "c.svg").stdout
    assert "Rescued at the end, shown as before: run." in told


def test_report_and_compare_name_the_argument_whose_file_is_wrong(tmp_path):
    path, missing = save(tmp_path / "run.json"), tmp_path / "missing.json"
    (tmp_path / "empty").mkdir()
    (tmp_path / "afile").touch()
    for command in (["report"], ["compare", path]):
        for wrong, why in ((missing, "No such file"), (tmp_path / "empty", "Is a directory")):
            told = fails(*command, wrong)
            assert "`RUN.json` must be a run file, as the guard writes one for each run" in told
            assert f", got '{wrong}' ({why}" in told
    told = fails("report", path, "--to", tmp_path / "afile")
    assert f"`--to` needs a folder that can be written to, got '{tmp_path / 'afile'}'" in told
    told = fails("compare", path, path, "--to", tmp_path / "afile" / "c.png")
    assert f"`--to` needs a folder that can be written to, got '{tmp_path / 'afile'}'" in told
    for wrong in (tmp_path / "nosuch", tmp_path / "empty"):
        told = fails("report", path, "--outcomes", wrong)
        assert "`--outcomes` must be a file or folder of outcomes" in told
        assert f"got {wrong}, which" in told
    assert "`--store` must be a file" in fails("grade", "--store", tmp_path / "empty")
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "empty", "afile"}
    run("compare", path, path, "--to", tmp_path / "new" / "c.svg")
    assert (tmp_path / "new" / "c.svg").exists()


@pytest.mark.parametrize("name", ["c", "empty", "c.docx", "c.jpg"])
def test_compare_refuses_what_it_would_not_write_there(tmp_path, name):
    path = save(tmp_path / "run.json")
    (tmp_path / "empty").mkdir()
    told = fails("compare", path, path, "--to", tmp_path / name)
    assert f"`--to` must end in .png, .svg, .pdf or .html, got '{tmp_path / name}'" in told
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "empty"}


@pytest.mark.once
def test_compare_shows_runs_by_the_names_of_their_folders_and_draws_them(tmp_path):
    runs = [
        save(tmp_path / "full" / "run.json"),
        save(tmp_path / "lora" / "run.json", method="lora"),
    ]
    to = tmp_path / "compare.png"
    shown = run("compare", *runs, "--to", to).stdout
    assert "Latest look of each run: digits" in shown
    assert lines_with(shown, "full full 50% +41.5 +3.1 +12.5 warn")
    assert lines_with(shown, "lora lora 50% +41.5 +3.1 +12.5 warn")
    assert "Not complete, from the untouched model to the last planned step: full, lora." in shown
    assert to.read_bytes()[:4] == b"\x89PNG"
    other = save(tmp_path / "lora" / "other.json", task=HOSTILE)
    shown = run("compare", *runs, other, "--to", to).stdout
    assert shows_no_control_code(shown)
    assert lines_with(shown, "lora/other", "full")
    found = ask("compare", *runs, "--to", tmp_path / "compare.html")
    assert [row["name"] for row in found["runs"]] == ["full", "lora"]
    assert found["written"] == str(tmp_path / "compare.html")
    assert "<title>2 runs compared" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_one_run_is_not_compared(tmp_path):
    path = save(tmp_path / "run.json")
    assert f"must be two or more to compare, got {path} alone" in fails("compare", path)
    assert "xyz" in fails("compare", path, path, "--to", tmp_path / "c.xyz")


# --- doctor ---


@pytest.fixture
def packages(monkeypatch):
    """(name, version=..., problem=...) per package that is not as it should be; all others are."""

    def plant(name, **known):
        plain = trying._package

        def package(asked_for, *others):
            return plain(asked_for, *others) | (known if asked_for == name else {})

        monkeypatch.setattr(trying, "_package", package)

    monkeypatch.setattr(trying, "import_problem", lambda modules: None)
    return plant


def test_doctor_finds_nothing_wrong_here_and_writes_nothing(store):
    found = ask("doctor")
    assert found["problems"] == []
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == torch.__version__
    assert versions["iimm_callbacks"]
    assert found["devices"][0].startswith("cpu")
    assert "tensorboard" in found["trackers"]  # an extra of the tests
    assert found["store"]["path"] == str(store)
    assert (found["store"]["writable"], found["store"]["runs"]) == (True, 0)
    assert list(store.parent.iterdir()) == []


def test_doctor_shows_a_table_and_says_that_all_is_well(packages):
    shown = run("doctor").stdout
    (line,) = [x for x in shown.splitlines() if x.startswith("│ transformers ")]
    assert [cell.strip() for cell in line.strip("│").split("│")][2:] == ["always", "ok"]
    assert shown.splitlines()[-1] == "All is well."


def test_doctor_names_missing_extras_with_the_command_and_is_content(packages):
    packages("peft", version=None)
    found = ask("doctor")
    assert found["missing_extras"]["peft"] == "pip install 'iimm_callbacks[peft]'"
    assert "Extra 'peft': pip install 'iimm_callbacks[peft]'" in run("doctor").stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("torch", {"version": None}, "torch is missing: pip install 'torch>=2.4'"),
        ("scipy", {"problem": "OSError: no"}, "scipy .* cannot be imported .OSError: no."),
        ("rich", {"version": "1", "problem": ">=13.0 is needed"}, "rich 1: >=13.0 is needed: pip"),
        ("peft", {"problem": "ImportError: x"}, "peft .* cannot be imported .ImportError: x."),
    ],
)
def test_doctor_says_what_is_wrong_and_exits_with_1(packages, name, known, says):
    packages(name, **known)
    (problem,) = ask("doctor", code=1)["problems"]
    assert re.search(says, problem)
    assert "All is well" not in run("doctor", code=1).stdout


def test_doctor_checks_the_bounds_of_what_is_installed(monkeypatch):
    monkeypatch.setattr(trying, "import_problem", lambda modules: None)
    monkeypatch.setattr(
        trying, "version", lambda name: "4.50.0" if name == "transformers" else version(name)
    )
    (problem,) = ask("doctor", code=1)["problems"]
    assert re.match("transformers 4.50.0: .*4.57.* is needed: pip install 'transformers", problem)


def test_a_broken_torchvision_is_the_cause_of_what_fails_with_it():
    why = "RuntimeError: operator torchvision::nms does not exist"

    def package(name, version, problem=why):
        return {"name": name, "version": version, "problem": problem, "extras": [], "asked": ""}

    broken = [package("transformers", "5.0"), package("peft", "0.2"), package("torchvision", "0.9")]
    (problem,) = trying.package_problems([package("torch", "2.13.0", None), *broken])
    assert problem.startswith(f"torchvision 0.9 cannot be imported ({why}), nor can transformers,")
    assert "the one for torch 2.13.0" in problem
    assert "pip uninstall torchvision" in problem


def test_an_import_that_fails_is_told_by_the_error_at_its_root(tmp_path, monkeypatch):
    (tmp_path / "broken_library.py").write_text(
        "try:\n    raise OSError('no such operator')\n"
        "except OSError as error:\n    raise ImportError('wrapped') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert trying.import_problem(["broken_library"]) == "OSError: no such operator"
    assert trying.import_problem(["no_such_library"]).startswith("ModuleNotFoundError: ")
    assert trying.import_problem(["json", "transformers"]) is None


def test_doctor_counts_runs_and_damaged_lines(record, store, packages):
    with store.open("a") as file:
        file.write("{}\n")
    found = ask("doctor", code=1)
    assert (found["store"]["runs"], found["store"]["damaged"]) == (3, 1)
    assert "`iimm outcomes check` names them" in found["problems"][0]


def test_doctor_sees_a_store_that_cannot_be_written(tmp_path, monkeypatch, packages):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", str(tmp_path / "file" / "store.jsonl"))
    found = ask("doctor", code=1)
    assert found["store"]["writable"] is False
    assert "cannot be written (Not a directory)" in found["problems"][0]
    assert "IIMM_CALLBACKS_STORE" in found["problems"][0]


@pytest.mark.parametrize(
    ("named", "writable", "words"),
    [
        ("{}/team/", True, "{}/team, writable, "),
        ("{}/file/team/", False, "NOT writable"),
        ("memory://doctor", None, "memory://doctor, writing not tested, "),
    ],
)
def test_doctor_looks_at_stores_of_each_kind(
    named, writable, words, tmp_path, monkeypatch, packages
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", named.format(tmp_path))
    code = 1 if writable is False else 0
    assert ask("doctor", code=code)["store"]["writable"] is writable
    assert words.format(tmp_path) in run("doctor", code=code).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_still_shows_its_table_where_the_store_needs_a_package(monkeypatch, packages):
    def missing(text):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", "s3://bucket/team")
    shown = run("doctor", code=1).stdout
    assert "│ transformers" in shown
    assert "Problem: the store s3://bucket/team needs another package: Install s3fs" in shown


# --- help ---

COMMANDS = [
    ["measure"], ["forecast"], ["preflight"], ["grade"], ["report"], ["compare"], ["outcomes"],
    ["demo"], ["doctor"],
    *(["outcomes", name] for name in ("list", "add", "import", "export", "check", "sync", "push")),
    ["outcomes", "pull"],
    ["outcomes", "retire"], ["reproduce"], ["reproduce", "paper"], ["calibrate"], ["plan"],
]  # fmt: skip


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_fits_a_screen(command):
    lines = run(*command, "--help").stdout.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 80
    assert "..." not in "".join(lines[3:])  # no command's line is cut short
    leaf = command not in ([], ["outcomes"], ["reproduce"])
    assert any("--json" in line for line in lines) == leaf


def test_the_first_help_fits_a_terminal_of_24_lines():
    assert len(run("--help").stdout.splitlines()) < 24


def test_the_installed_command_runs_and_helps_without_arguments():
    code = "import sys; sys.argv = ['iimm']; from iimm_callbacks.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: iimm [OPTIONS] COMMAND" in done.stdout


def test_wrong_commands_exit_with_1():
    assert "No such command 'measur'" in fails("measur")
    assert "Missing command" in fails("outcomes")


HEAVY = ("torch", "transformers", "scipy", "matplotlib", "datasets", "numpy", "pyarrow", "PIL")
LIGHT = """
import sys
from iimm_callbacks.cli import main
sys.argv = ["iimm", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["measure", "--help"],
        ["forecast", "sample"],
        ["measure", "sample", "data", "--probe-size", "many"],
        ["outcomes", "list"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_nothing_large(arguments, own_store):
    code = LIGHT.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "Traceback" not in done.stderr


def test_the_check_of_what_is_imported_can_fail(own_store):
    code = "import numpy\n" + LIGHT.format(arguments=["--version"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "['numpy']"


def test_the_version_is_that_of_the_package():
    assert RUNNER.invoke(cli.app, ["--version"]).stdout.strip() == iimm_callbacks.__version__


def test_options_are_grouped_in_the_help():
    lines = run("forecast", "--help").stdout.splitlines()
    groups = [line.rstrip(":") for line in lines if re.fullmatch(r"\w+:", line)]
    assert groups == ["Arguments", "Data", "Recipe", "Limit", "Output"]
    place = {name: next(i for i, x in enumerate(lines) if x == f"{name}:") for name in groups}
    where = {
        option: next(i for i, line in enumerate(lines) if f"--{option} " in line)
        for option in ("split", "learning-rate", "max-forgetting", "json")
    }
    assert place["Data"] < where["split"] < place["Recipe"] < where["learning-rate"]
    assert where["learning-rate"] < place["Limit"] < where["max-forgetting"]
    assert where["max-forgetting"] < place["Output"] < where["json"]


def test_the_shell_completes_commands(monkeypatch):
    code = "from iimm_callbacks.cli import main; main()"
    asked = {"_IIMM_COMPLETE": "complete_bash", "COMP_WORDS": "iimm fo", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == ["forecast"]


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_no_library_takes_the_output_for_a_terminal(monkeypatch, option):
    seen = []

    def look():
        seen.append(sys.stderr.isatty())
        return shell.Answer({}, "done")

    app = typer.Typer(cls=shell.Commands)
    shell.command(app, "look")(look)
    shell.command(app, "other")(look)
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    for arguments in (["look", option], ["look"]):
        RUNNER.invoke(app, arguments)
    assert seen[0] is False


@pytest.mark.parametrize(
    ("name", "argument", "is_model"),
    [("./none", "MODEL", True), ("~/none", "DATASET", False), ("", "DATASET", False)],
)
def test_a_path_is_checked_before_anything_is_loaded(name, argument, is_model):
    with pytest.raises(ValueError, match=f"`{argument}` must be a folder or a name on the Hub"):
        loading.check_name(name, argument, is_model=is_model)


def test_a_name_that_the_hub_lacks_is_an_error_and_a_hub_out_of_reach_none(monkeypatch):
    from huggingface_hub import HfApi, constants, errors

    asked = []

    def ask(self, name, *, repo_type, timeout):
        asked.append((name, repo_type))
        if name == "org/none":
            raise errors.HFValidationError("no such name")
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "repo_info", ask)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="got 'org/none', which the Hub does not have"):
        loading.check_name("org/none", "MODEL")
    loading.check_name("org/data:config", "DATASET", is_model=False)
    assert asked == [("org/none", "model"), ("org/data", "dataset")]
    assert constants.HF_HUB_OFFLINE is True  # what comes after asks no more
    loading.check_name("org/other", "MODEL")
    assert len(asked) == 2


def test_a_column_of_a_folder_of_images_is_refused(model, colours, tmp_path):
    for name in ("red", "blue"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            colours[i]["image"].save(tmp_path / "data" / name / f"{i}.png")
    said = fails("measure", model, tmp_path / "data", "--label-column", "nolabel")
    assert "`--label-column` of task 'data' must be left out, got 'nolabel'" in said


def test_the_first_line_of_doctor_comes_before_torch():
    code = """
import sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit("importing torch")
sys.meta_path.insert(0, Watch())
from iimm_callbacks.cli import main
sys.argv = ["iimm", "doctor"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"iimm_callbacks {iimm_callbacks.__version__}, Python 3.")
    assert "importing torch" in lines[1:]


@pytest.mark.once
def test_the_shipped_runs_count_once_however_they_are_named(store):
    asked = ["forecast", "sample", *EMOJI, "--method", "full"]
    plain = ask(*asked)["forecasts"]
    assert ask(*asked, "--store", "sample")["forecasts"] == plain
    run("outcomes", "import", sample.OUTCOMES)
    assert ask(*asked)["forecasts"] == plain
