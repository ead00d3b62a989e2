"""`iimm reproduce paper`: the paper's experiment on stand-ins, and its values beside ours."""

import html
import json
import os
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import in_a_fork, on_ranks
from PIL import Image
from scipy import stats
from test_cli import ask, fails, run
from tiny import FAMILIES

from iimm_callbacks import Outcome, iimm, read_outcomes
from iimm_callbacks.models.encoders import find_encoder
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.trainer.paper import experiment, published, results
from iimm_callbacks.trainer.paper.experiment import Found, Part, reproduce
from iimm_callbacks.trainer.paper.published import read_splits
from iimm_callbacks.trainer.paper.training import Setting, measure, tuned

NAMES = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
TASKS = ("dtd", "mnist", "eurosat", "cars")
FAST = ["--epochs", 2, "--train-batch-size", 8, "--device", "cpu", "--learning-rate", 0.01]
FEW = ["--models", "clip", *(x for task in TASKS for x in ("--tasks", task))]


def write_task(folder, noise, seed):
    rng = np.random.default_rng(seed)
    for split, n in (("train", 10), ("test", 6)):
        for name, colour in NAMES.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(n):
                pixels = np.array(colour) + rng.normal(0, noise, (16, 16, 3))
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(place / f"{i}.png")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """Folders named like the Hub's, with tiny models and tasks that differ in their noise."""
    folder = tmp_path_factory.mktemp("mirror")
    for i, name in enumerate(TASKS):
        write_task(folder / published.TASKS[name].hub, 20 + 40 * i, i)
    for key, family in (("clip", "CLIP"), ("siglip", "SigLIP")):
        for part in FAMILIES[family]():
            part.save_pretrained(folder / published.MODELS[key].hub)
    return folder


@pytest.fixture(scope="module")
def model():
    return FAMILIES["CLIP"]()


@pytest.fixture(scope="module")
def splits(mirror):
    return {name: read_splits(name, published.TASKS[name], mirror, None) for name in TASKS}


@pytest.fixture(scope="module")
def found(mirror, tmp_path_factory):
    """What one run of the command printed as JSON, and its folder."""
    output = tmp_path_factory.mktemp("paper")
    asked = [*FEW, *FAST, "--learning-rate", 0.001, "--methods", "full"]
    return ask("reproduce", "paper", "--mirror", mirror, "--output", output, *asked), output


def test_every_task_is_learnt_and_all_others_are_looked_at(found):
    data, output = found
    outcomes = read_outcomes(output / "outcomes.jsonl")
    assert len(outcomes) == len(TASKS) * 2
    assert not data["failed"]
    for o in outcomes:
        assert set(o.drops) == set(TASKS) - {o.task}
        assert o.complete
        assert o.recipe["steps"] == 2 * 4  # 27 images in batches of 8
        assert 1 <= o.recipe["best_epoch"] <= 2
    before = {o.task: o.zero_shot_accuracy for o in outcomes}
    assert all(o.off_target_before == {t: before[t] for t in o.drops} for o in outcomes)
    assert any(o.gain > 0.1 for o in outcomes)


def test_of_the_learning_rates_the_one_of_best_validation_accuracy_counts(found):
    data, output = found
    outcomes = read_outcomes(output / "outcomes.jsonl")
    assert len(data["runs"]) == len(TASKS)
    for row in data["runs"]:
        own = [o for o in outcomes if (o.task, o.method) == (row["task"], row["method"])]
        best = max(own, key=lambda o: o.recipe["validation_accuracy"])
        assert row["final_accuracy"] == best.final_accuracy
        assert row["learning_rate"] == best.recipe["learning_rate"]


def test_the_same_command_again_trains_nothing_and_says_the_same(found, mirror, monkeypatch):
    data, output = found
    monkeypatch.setattr(experiment, "tuned", None)
    monkeypatch.setattr(experiment, "measure", None)
    asked = [*FEW, *FAST, "--learning-rate", 0.001, "--methods", "full"]
    again = ask("reproduce", "paper", "--mirror", mirror, "--output", output, *asked)
    assert again == data


def test_the_page_says_what_was_not_run(found):
    data, output = found
    page = (output / "paper.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "not the paper" in page.lower()
    assert page.count('data-label="so">not run<') == len(data["claims"]) == 33
    assert "2 epochs instead of 30" in page
    assert "without cifar100" in page
    for choice in published.CHOICES[:3]:
        assert choice in html.unescape(page)
    told = run("reproduce", "paper", *FEW, "--help").stdout
    assert "--mirror" in told


def test_a_mirror_with_splits_that_are_no_folders_of_classes(model, mirror, tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(NAMES))})
    files = {
        split: sorted((mirror / "tanganke/dtd" / split).rglob("*.png"))
        for split in ("train", "test")
    }
    DatasetDict({
        split: Dataset.from_dict(
            {"image": [str(p) for p in paths],
             "label": [list(NAMES).index(p.parent.name) for p in paths]}, features=features)
        for split, paths in files.items()
    }).save_to_disk(tmp_path / "tanganke" / "dtd")  # fmt: skip
    about = published.TASKS["dtd"]
    one, other = (read_splits("dtd", about, folder, None).test for folder in (mirror, tmp_path))
    looks = [Probe(task, processor=model[1], progress=False) for task in (one, other)]
    a, b = (look.look(model[0], 0) for look in looks)
    assert a.measurement.iimm == pytest.approx(b.measurement.iimm, abs=1e-6)
    assert a.accuracy("dtd") == b.accuracy("dtd")


def test_the_validation_cut_is_apart_from_what_is_trained_on(splits):
    for of in splits.values():
        assert (len(of.train), len(of.validation), len(of.test)) == (27, 3, 18)
        seen = [im.tobytes() for im in of.train.images(range(27))]
        cut = [im.tobytes() for im in of.validation.images(range(3))]
        assert not set(seen) & set(cut)
        assert len({*seen, *cut}) == 30


def test_class_names_and_prompts_are_those_of_the_authors(tmp_path):
    for split in ("train", "test"):
        for name in ("AnnualCrop", "SeaLake", "River"):
            (tmp_path / "tanganke/eurosat" / split / name).mkdir(parents=True)
            for i in range(10):
                grey = Image.new("RGB", (8, 8), (i, i, i))
                grey.save(tmp_path / "tanganke/eurosat" / split / name / f"{i}.png")
    task = read_splits("eurosat", published.TASKS["eurosat"], tmp_path, None).test
    assert task.prompts([]) == [
        "a centered satellite photo of a annual crop land",
        "a centered satellite photo of a River",
        "a centered satellite photo of a lake or sea",
    ]


def test_what_is_measured_is_what_every_other_entry_measures(model, splits):
    measured = measure(model[0], splits["dtd"], model[1], 8)
    train = Probe(splits["dtd"].train, processor=model[1], progress=False).look(model[0], 0)
    assert measured["iimm"] == pytest.approx(train.measurement.iimm, abs=1e-6)
    assert measured["n_images"] == 27
    test = Probe(splits["dtd"].test, processor=model[1], progress=False).look(model[0], 0)
    assert measured["zero_shot_accuracy"] == test.accuracy("dtd")
    encoder = find_encoder(*model)
    with torch.no_grad():
        texts = encoder.embed_texts(model[0], encoder.tokenize(splits["dtd"].train.prompts([])))
        images = encoder.embed_images(
            model[0], encoder.preprocess(splits["dtd"].train.images(range(27)))
        )
    t, x = (torch.nn.functional.normalize(one.double(), dim=1) for one in (texts, images))
    labels = torch.tensor(splits["dtd"].train.labels(range(27)))
    pairs = [float(t[a] @ t[b]) for a in range(3) for b in range(3) if a != b]
    assert measured["text_text"] == pytest.approx(np.mean(pairs), abs=1e-6)
    own = [float(x[i] @ t[labels[i]]) for i in range(27)]
    assert measured["right_text"] == pytest.approx(np.mean(own), abs=1e-6)
    assert measured["iimm"] == pytest.approx(iimm(x, t, labels).iimm, abs=1e-6)
    json.dumps(measured, allow_nan=False)


@pytest.mark.once
def test_the_interval_of_tau_is_of_resampled_tasks():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    drawn = results._resampled_taus(x, y)
    draws = np.random.default_rng(0).integers(0, 4, (len(drawn), 4))
    for tau, draw in list(zip(drawn, draws, strict=True))[:50]:
        assert tau == pytest.approx(stats.kendalltau(x[draw], y[draw]).statistic, nan_ok=True)


def test_a_run_ends_with_the_weights_of_its_best_epoch(model, splits):
    setting = Setting(epochs=3, batch_size=9, use_cpu=True)
    before = {name: p.clone() for name, p in model[0].named_parameters()}
    seen = []

    class Watching(Probe):
        def look(self, model, step, **settings):
            look = super().look(model, step, **settings)
            weights = {n: p.detach().clone() for n, p in model.named_parameters()}
            seen.append((look.accuracy(self.task.name), weights))
            return look

    from iimm_callbacks.trainer.paper import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Probe", Watching)
        with tuned(model[0], splits["dtd"], model[1], "full", 0.05, setting) as best:
            after = {n: p.detach().clone() for n, p in best.model.named_parameters()}
    accuracies = [accuracy for accuracy, _ in seen]
    assert len(seen) == 3
    assert best.validation_accuracy == max(accuracies)
    assert best.epoch == accuracies.index(max(accuracies)) + 1
    weights = seen[best.epoch - 1][1]
    assert all(torch.equal(weights[name], p) for name, p in after.items())
    assert all(torch.equal(before[name], p) for name, p in model[0].named_parameters())


def part(**more):
    usual = {"models": ["clip"], "tasks": ["dtd", "mnist"], "methods": ["full"], "rates": [0.01]}
    return Part(**(usual | {"setting": Setting(1, 9, use_cpu=True)} | more))


def start(asked, model, mirror, output, **more):
    said = []
    found = reproduce(
        asked, lambda key: model, output=output, mirror=mirror, say=said.append, **more
    )
    return found, said


@pytest.mark.once
def test_a_run_that_diverges_is_told_and_the_others_go_on(model, mirror, tmp_path):
    found, said = start(part(rates=[1e12, 0.01]), model, mirror, tmp_path)
    assert list(found.failed) == [f"CLIP ViT-B/32, {t}, full 1e+12" for t in ("dtd", "mnist")]
    assert all("NotFinite" in why for why in found.failed.values())
    assert len(found.outcomes["clip"]) == 2
    assert sum("gain" in line for line in said) == 2


@pytest.mark.once
def test_without_time_nothing_is_begun_and_that_is_said(model, mirror, tmp_path):
    found, _ = start(part(), model, mirror, tmp_path, budget=0.0)
    assert found.n_left == 2
    assert found.outcomes["clip"] == []
    again, _ = start(part(), model, mirror, tmp_path)
    assert again.n_left == 0
    assert len(again.outcomes["clip"]) == 2


@pytest.mark.once
def test_other_images_or_another_recipe_are_other_runs(model, mirror, tmp_path):
    found, _ = start(part(tasks=["dtd", "mnist"]), model, mirror, tmp_path)
    other, _ = start(part(setting=Setting(2, 9, use_cpu=True)), model, mirror, tmp_path)
    known = {o.run for o in found.outcomes["clip"]}
    assert not known & {o.run for o in other.outcomes["clip"]}
    assert len(read_outcomes(tmp_path / "outcomes.jsonl")) == 4


def reproduce_on_rank(rank, folder, mirror):
    world = int(os.environ["WORLD_SIZE"])
    output = folder / f"out{world}"
    if rank == 0:
        output.mkdir()
    torch.distributed.barrier()
    start(part(setting=Setting(1, 8, use_cpu=True)), FAMILIES["CLIP"](), mirror, output)


@pytest.mark.whole
def test_two_ranks_give_the_outcomes_of_one(mirror, tmp_path):
    (tmp_path / "out1").mkdir()
    start(part(setting=Setting(1, 8, use_cpu=True)), FAMILIES["CLIP"](), mirror, tmp_path / "out1")
    in_a_fork(on_ranks, 2, partial(reproduce_on_rank, folder=tmp_path, mirror=mirror))
    alone, shared = (read_outcomes(tmp_path / f"out{n}" / "outcomes.jsonl") for n in (1, 2))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert (one.run, one.task) == (other.run, other.task)
        assert one.iimm == pytest.approx(other.iimm, abs=1e-6)
        assert one.zero_shot_accuracy == other.zero_shot_accuracy
        assert one.gain == pytest.approx(other.gain, abs=1.5 / 18)  # sums in another order


def test_the_four_architectures(mirror, tmp_path):
    pytest.importorskip("open_clip")
    import tiny_open_clip

    for key, family in (("coca", "CoCa"), ("eva02", "EVA-02-CLIP")):
        folder = tmp_path / published.MODELS[key].hub
        folder.mkdir(parents=True)
        cfg = {"model_cfg": tiny_open_clip.config(family, folder), "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(cfg))
        if key == "eva02":  # the other has no weights
            built = tiny_open_clip.build(family)[0]
            torch.save(built.state_dict(), folder / "open_clip_pytorch_model.bin")
    for place in ("tanganke", "ylecun"):
        (tmp_path / place).symlink_to(mirror / place)
    asked = ["--mirror", tmp_path, "--tasks", "dtd", "--tasks", "mnist", "--output", tmp_path / "o"]
    data = ask("reproduce", "paper", *asked, *FAST, "--models", "eva02")
    methods = list(published.METHODS)
    assert [(r["task"], r["method"]) for r in data["runs"]] == [
        (task, method) for method in methods for task in ("dtd", "mnist")
    ]
    assert not data["failed"]
    told = fails("reproduce", "paper", *asked, *FAST, "--models", "coca")
    assert "weights" in told
    assert "could not be loaded" in told


def planted(slope=1.0, noise=0.0, n=9, seed=0):
    """Nine tasks on which the gain over zero-shot error is a line in IIMM."""
    rng = np.random.default_rng(seed)
    outcomes, measured = [], {}
    for name in list(published.TASKS)[:n]:
        x, before = rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.6)
        share = np.clip(0.5 + slope * (x - 0.5) + rng.normal(0, noise), 0.01, 0.99)
        outcomes.append(
            Outcome(
                model="CLIP ViT-B/32", model_fingerprint="1f", method="full", task=name,
                task_fingerprint="2e", iimm=x, inter=x / 2, intra=x, standard_error=0.01,
                n_images=100, n_classes=10, zero_shot_accuracy=before,
                final_accuracy=before + share * (1 - before), off_target_before={"a": 0.5},
                off_target_after={"a": 0.4}, linear_probe_accuracy=before + 0.1,
                recipe={"validation_accuracy": 0.5, "learning_rate": 0.01, "best_epoch": 1},
            )
        )  # fmt: skip
        measured[name] = asdict(outcomes[-1]) | {
            "text_text": rng.uniform(), "scores": dict.fromkeys(
                ("H-Score", "GBC", "LogME", "TransRate", "EMMS"), x),
        }  # fmt: skip
    return Found({"clip": measured}, {"clip": outcomes})


PAPERS = Part(
    ["clip"], list(published.TASKS), ["full"], list(published.RATES), Setting(30, 128)
)  # fmt: skip


def cell(data, statistic="r2", predictor="iimm"):
    return next(
        row
        for row in data["claims"]
        if (row["model"], row["statistic"], row["predictor"]) == ("clip", statistic, predictor)
    )


def test_a_value_is_reproduced_where_the_published_one_lies_in_a_narrow_interval():
    found = planted(noise=0.035)
    data = results.results(found, PAPERS)
    row = cell(data)
    x = [o.iimm for o in found.outcomes["clip"]]
    y = [o.gain / (1 - o.zero_shot_accuracy) for o in found.outcomes["clip"]]
    assert row["value"] == pytest.approx(stats.pearsonr(x, y).statistic ** 2)
    assert row["low"] < 0.92 < row["high"]
    assert row["high"] - row["low"] < 0.6
    assert row["status"] == "reproduced"
    slope = next(
        c for c in data["cells"]
        if (c["statistic"], c["predictor"], c["target"][:4]) == ("slope", "iimm", "gain")
    )  # fmt: skip
    assert slope["low"] < 1.0 < slope["high"]
    assert slope["published"] is None
    assert cell(data, "tau")["value"] == pytest.approx(stats.kendalltau(x, y).statistic)


def test_a_falling_line_another_value_or_a_wide_interval_is_not_reproduced():
    falling = results.results(planted(slope=-1.0, noise=0.035), PAPERS)
    assert cell(falling)["low"] < 0.92 < cell(falling)["high"]
    assert cell(falling)["status"] == "not reproduced"
    exact = cell(results.results(planted(), PAPERS))
    assert exact["value"] == pytest.approx(1.0)
    assert exact["status"] == "not reproduced"
    wide = cell(results.results(planted(noise=0.12), PAPERS))
    assert wide["high"] - wide["low"] > 0.6
    assert wide["status"] == "not reproduced"


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": list(published.TASKS)[:8]},
        {"setting": Setting(29, 128)},
        {"setting": Setting(30, 64)},
        {"rates": [1e-3]},
        {"most_test": 100},
    ],
)
def test_what_is_not_the_papers_experiment_counts_as_not_run(change):
    data = results.results(planted(noise=0.035), replace(PAPERS, **change))
    assert len(data["departures"]) == 1
    assert {row["status"] for row in data["claims"]} == {"not run"}
    assert cell(data)["value"] is not None  # shown all the same


def test_eight_tasks_of_nine_and_models_without_runs_are_not_run():
    data = results.results(planted(n=8), PAPERS)
    assert {row["status"] for row in data["claims"]} == {"not run"}
    assert {row["model"] for row in data["claims"]} == set(published.MODELS)
    empty = results.results(Found(), PAPERS)
    assert empty["runs"] == []
    assert {c["value"] for c in empty["claims"]} == {None}


def test_a_task_near_the_ceiling_has_no_relative_gain_and_is_left_out():
    found = planted(noise=0.035)
    runs = found.outcomes["clip"]
    runs[0] = replace(runs[0], zero_shot_accuracy=0.97, final_accuracy=0.98)
    data = results.results(found, PAPERS)
    assert cell(data)["n_tasks"] == 8
    assert data["runs"][0]["gain_over_zero_shot_error"] is None


def test_the_published_values_are_those_of_the_record():
    shared = published.CLAIMS
    assert shared["coca", "r2", "iimm"] == 0.92
    assert shared["eva02", "tau", "h_score"] == -0.78
    assert ("eva02", "r2", "intra") not in shared  # not published
    assert all(-1 <= value <= 1 for value in shared.values())
    assert {statistic for _, statistic, _ in shared} == {"r2", "tau"}


def test_a_dry_run_prints_plan_sizes_and_hours_and_reads_nothing(mirror, tmp_path):
    data = ask("reproduce", "paper", "--dry-run")
    assert data["n_runs"] == 4 * 9 * 5 * 4
    assert data["departures"] == []
    n_train = sum(task.n_train for task in published.TASKS.values())
    assert data["hours"] - data["look_hours"] == pytest.approx(80 * 30 * n_train / 400 / 3600)
    half = ask("reproduce", "paper", "--dry-run", "--speed", 800)
    assert half["hours"] == pytest.approx(data["hours"] / 2)
    local = ask("reproduce", "paper", "--dry-run", "--mirror", mirror, *FEW)
    assert {(t["n_train"], t["n_test"]) for t in local["tasks"]} == {(30, 18)}
    assert str(mirror) in local["models"][0]["place"]
    text = re.sub(r"\s+", " ", run("reproduce", "paper", "--dry-run").stdout)
    assert "720 runs" in text
    assert "hours" in text
    assert "73,257" in text
    assert all(f"│ {name} │" in text for name in published.TASKS)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--models", "vit"], "`--models` must be one of clip, siglip, coca, eva02, got 'vit'"),
        (["--tasks", "food"], "`--tasks` must be one of cars"),
        (["--methods", "prompt"], "`--methods` must be one of full"),
        (["--learning-rate", "nan"], "`--learning-rate` must be a positive number"),
        (["--budget", "soon"], "`--budget` must be a time such as"),
        (["--mirror", "nowhere"], "`--mirror` must be a folder, got 'nowhere'"),
        (["--device", "tpu"], "`--device` must be cpu or left out"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(asked, told):
    assert told in fails("reproduce", "paper", *asked)


def test_splits_of_other_classes_are_refused(tmp_path):
    for split, names in (("train", ("a", "b")), ("test", ("a", "c"))):
        for name in names:
            folder = tmp_path / "tanganke/dtd" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(Path(folder) / f"{i}.png")
    with pytest.raises(ValueError, match="the same classes in one order"):
        read_splits("dtd", published.TASKS["dtd"], tmp_path, None)
