"""The shipped model, tasks and outcomes."""

import importlib
from pathlib import Path

import pytest

from iimm_callbacks import sample
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.probing.probe import Probe

STUDY = Path(__file__).parents[2] / "examples" / "study"
CANARIES = [task.name for task in sample.canaries("", probe_size=2)]
CARD_COLUMNS = (
    ("full", 1e-4), ("attention", 1e-4), ("lora", 1e-3), ("bitfit", 1e-3), ("clip_adapter", 1e-3),
    ("full", 3e-4), ("attention", 3e-4),
)  # fmt: skip


def test_tasks_have_enough_pictures_to_learn_from_and_to_measure_with():
    names = sample.task_names()
    sizes = {n: [len(sample.load_dataset(n, s)) for s in ("train", "test")] for n in names}
    assert 10 <= len(sizes) <= 14
    assert sum(train >= 585 and test >= 300 for train, test in sizes.values()) >= 10


@pytest.mark.parametrize("name", sample.task_names())
def test_train_and_test_of_a_task_have_no_picture_in_common(name):
    train, test = (sample.load_dataset(name, split) for split in ("train", "test"))
    assert train.features == test.features
    seen = {image.tobytes() for image in train["image"]}
    assert not [image for image in test["image"] if image.tobytes() in seen]


@pytest.fixture(scope="module")
def looks():
    """Task -> a probe of it alone, and its look at the shipped model."""
    model, processor = sample.load_model(), sample.load_processor()
    tasks = {name: sample.load_task(name) for name in sample.task_names()}
    probes = {
        name: Probe(task, processor=processor, progress=False) for name, task in tasks.items()
    }
    return {name: (probe, probe.look(model, 0)) for name, probe in probes.items()}


@pytest.mark.once
@pytest.mark.whole
def test_zero_shot_accuracy_is_above_chance_on_most_tasks_and_far_from_perfect(looks):
    accuracies = {name: look.accuracy(name) for name, (_, look) in looks.items()}
    tasks = [sample.load_task(name) for name in accuracies]
    clearly_above = [t for t in tasks if accuracies[t.name] > 1.5 / len(t.class_names)]
    assert len(clearly_above) > len(tasks) / 2
    assert max(accuracies.values()) < 0.95


def test_the_recorded_runs_are_of_the_shipped_model_and_gain_and_forget():
    outcomes = sample.load_outcomes()
    fingerprint = model_fingerprint(sample.load_model())
    assert {o.model_fingerprint for o in outcomes} == {fingerprint}
    for method in ("full", "attention", "lora"):
        runs = [o for o in outcomes if o.method == method]
        assert {o.task for o in runs} == set(sample.task_names())
        gains = [max(o.gain for o in runs if o.task == task) for task in sample.task_names()]
        assert sum(gain >= 0.1 for gain in gains) >= 8
        assert min(gains) < 0.05  # and on some there is nothing to gain
    full = [o.forgetting for o in outcomes if o.method == "full"]
    assert sum(full) / len(full) > 0.01


def test_every_recorded_run_was_measured_on_the_canaries():
    assert set(CANARIES) < set(sample.task_names())
    for o in sample.load_outcomes():
        assert set(o.off_target_before) == set(CANARIES) - {o.task}


def test_the_data_card_has_the_recorded_gains_and_forgetting():
    card = (Path(sample.__file__).parent / "DATA_CARD.md").read_text(encoding="utf-8")
    runs = {
        (o.task, o.method, o.recipe["learning_rate"]): o
        for o in sample.load_outcomes()
        if o.recipe["steps"] == 150
    }
    for name in sample.task_names():
        row = [runs.get((name, *column)) for column in CARD_COLUMNS]
        cells = [f"{100 * o.gain:+.0f} / {100 * o.forgetting:.1f}" if o else "-" for o in row]
        worst = max(row[0].drops, key=row[0].drops.get)
        cells = [f"`{name}`", *cells, f"`{worst}` {100 * row[0].drops[worst]:.0f}"]
        assert f"| {' | '.join(cells)} |" in card


@pytest.mark.once
@pytest.mark.whole
def test_the_recorded_runs_are_of_the_tasks_as_they_are_probed_now(looks):
    """Else the forecast would take its own past tasks for others of the same name."""
    first = {outcome.task: outcome for outcome in sample.load_outcomes()}
    for name, outcome in first.items():
        probe, look = looks[name]
        assert probe.fingerprints == {name: outcome.task_fingerprint}
        assert look.accuracy(name) == pytest.approx(outcome.zero_shot_accuracy, abs=0.01)
        assert look.measurement.iimm == pytest.approx(outcome.iimm, abs=1e-4)


@pytest.mark.once
def test_the_recorded_linear_probes_are_those_of_the_tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    study = importlib.import_module("linear_probe")
    found = study.probe_tasks(study.Settings(tasks=["handwritten_digits", "flag_regions"]))
    recorded = sample.load_outcomes()
    for name, (before, probe) in found.items():
        n_train = len(sample.load_dataset(name, "train"))
        for run in (o for o in recorded if o.task == name):
            # One image of 300 may tip on another processor.
            assert run.zero_shot_accuracy == pytest.approx(before, abs=0.011)
            assert run.linear_probe_accuracy == pytest.approx(probe.accuracy, abs=0.011)
            assert run.linear_probe_standard_error == pytest.approx(probe.standard_error, abs=1e-3)
            assert (run.n_train, run.linear_probe_n_train, probe.n_train) == (n_train,) * 3
            note = run.images["linear_probe_accuracy"]
            assert note.startswith(f"fitted to {n_train} of {n_train} training images")


def test_every_recorded_run_has_a_linear_probe_and_one_for_each_task():
    probes = {}
    for o in sample.load_outcomes():
        found = (o.linear_probe_accuracy, o.linear_probe_standard_error, o.n_train)
        assert None not in found
        probes.setdefault(o.task, set()).add(found)
    assert [len(found) for found in probes.values()] == [1] * len(sample.task_names())


def test_no_recorded_run_names_a_folder_of_anyones_machine():
    assert {o.model for o in sample.load_outcomes()} == {"sample/model"}


@pytest.mark.parametrize(
    ("arguments", "message"), [(("cats",), "got 'cats'"), (("emoji_groups", "dev"), "got 'dev'")]
)
def test_an_unknown_task_or_split_names_the_choices(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample.load_dataset(*arguments)


def test_the_processor_saved_with_the_model_is_found_without_being_given():
    probe = Probe(sample.load_task("printed_digits", probe_size=16), progress=False)
    assert probe.look(sample.load_model(), 0).measurement.n_images == 16
