"""Another metric in the place of accuracy: its values, its standard errors, and what is refused."""

import json
import logging
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from iimm_callbacks import IIMMCallback, IIMMMonitor, Task
from iimm_callbacks.data.metrics import Metric, RecallAt, as_metric
from iimm_callbacks.measures.results import paired_drop
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.probing.probe import Probe

FOLDER = '''
import datasets
import evaluate
import numpy as np


class FewestRight(evaluate.Metric):
    """Share of right images in the class that has the fewest, and in all."""

    def _info(self):
        features = {name: datasets.Value("int32") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, power=1):
        right = np.array(predictions) == np.array(references)
        classes = [right[np.array(references) == c].mean() for c in set(references)]
        return {"fewest": float(min(classes)) ** power, "all": float(right.mean())}
'''


def accuracy(predictions, references):
    return (predictions == references).mean()


def macro_f1(predictions, references):
    """2·right / (predicted + present), averaged over the classes there are."""
    classes = set(predictions) | set(references)
    f1 = [
        2 * sum((predictions == c) & (references == c))
        / (sum(predictions == c) + sum(references == c))
        for c in classes
    ]  # fmt: skip
    return sum(f1) / len(f1)


def metric_of(function, n_classes=3):
    return Metric("m", "t", function, n_classes)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("evaluate")
    path = tmp_path / "fewest_right"
    path.mkdir()
    (path / "fewest_right.py").write_text(FOLDER)
    return str(path)


@pytest.fixture
def tasks(colours, shapes):
    """(metric, off-target metric) -> the colour task and the shape task."""

    def build(metric=None, other=None, **settings):
        task = Task("colours", colours, templates="a {} thing", probe_size=32, metric=metric,
                    **settings)  # fmt: skip
        return task, [Task("shapes", shapes, templates="a {}", probe_size=24, metric=other)]

    return build


@pytest.fixture
def make_monitor(tasks, processor):
    def build(*metrics, **settings):
        settings = {"processor": processor, "verbose": False, "outcomes": None} | settings
        return IIMMMonitor(*tasks(*metrics), **settings)

    return build


def spoil(model, seed):
    """Another model than before, the same for the same seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        nn.init.normal_(model.visual_projection.weight)
        nn.init.normal_(model.text_projection.weight)
    return model


def told(row):
    wall = ("time", "eval_iimm_runtime")
    # Other models' runs tell of accuracies, and so does the linear probe.
    borrowed = ("forecast", "linear_probe", "exceed", "level", "reason")
    return {k: v for k, v in row.items() if k not in wall and not any(b in k for b in borrowed)}


# Values


def test_macro_f1_by_hand():
    # class 0: 2·1/(2+1), class 1: 2·1/(1+2), class 2: 2·1/(1+1)
    found = metric_of(macro_f1).value(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]))
    assert found == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


@pytest.mark.parametrize(
    ("given", "value"),
    [(1.0000000000000002, 1.0), (1 + 9e-10, 1.0), (-2e-16, 0.0), (1 - 1e-12, 1 - 1e-12)],
)
def test_what_rounding_puts_beyond_the_limits_is_moved_inside(given, value):
    assert metric_of(lambda p, r: given).value(np.arange(3), np.arange(3)) == value


def test_recall_at_k_counts_the_right_text_among_the_k_nearest():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    seen = RecallAt(2).see(scores, torch.tensor([0, 1, 2]))
    assert seen.tolist() == [0, 1, 2]
    right, score = RecallAt(2).judge(seen.numpy(), np.arange(3))
    assert right.tolist() == [True, True, False]
    assert score is None


def test_recall_equals_a_sorted_list_of_scores():
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(200, 9, generator=g), torch.randint(9, (200,), generator=g)
    order = scores.argsort(1, descending=True)
    for k in range(1, 9):
        expected = [int(y) in row[:k].tolist() for y, row in zip(labels, order, strict=True)]
        right, _ = RecallAt(k).judge(RecallAt(k).see(scores, labels).numpy(), labels.numpy())
        assert right.tolist() == expected
    nearest = RecallAt(1).judge(RecallAt(1).see(scores, labels).numpy(), labels.numpy())[0]
    assert nearest.tolist() == (scores.argmax(1) == labels).tolist()


def test_a_collapsed_or_diverged_model_recalls_no_more_than_chance():
    seen = RecallAt(2).see(torch.zeros(8, 8), torch.arange(8))
    assert RecallAt(2).judge(seen.numpy(), np.arange(8))[0].mean() == 2 / 8
    seen = RecallAt(2).see(torch.full((8, 8), torch.nan), torch.arange(8))
    assert not RecallAt(2).judge(seen.numpy(), np.arange(8))[0].any()


def test_a_probe_scores_by_its_metric_and_captions_by_recall(tiny_clip, processor, tasks, colours):
    pairs = [(row["image"], f"a {i} thing") for i, row in enumerate(colours.select(range(12)))]
    captions = Task("captions", pairs, metric="recall@5")
    task, _ = tasks(macro_f1)
    seen = {}

    def watched(predictions, references):
        seen.setdefault("first", (predictions.copy(), references.copy()))
        return macro_f1(predictions, references)

    watching, _ = tasks(watched)
    seen.clear()  # of the check
    look = Probe(watching, [captions], processor=processor, progress=False).look(tiny_clip(), 0)
    predictions, references = seen["first"]
    assert references.tolist() == task.labels(task.subset())
    assert look.accuracy("colours") == macro_f1(predictions, references)
    assert look.correct["colours"].tolist() == (predictions == references).tolist()
    nearest = Probe(Task("captions", pairs), [], processor=processor, progress=False)
    at_1 = nearest.look(tiny_clip(), 0).accuracy("captions")
    assert at_1 <= look.accuracy("captions") == look.correct["captions"].mean() < 1
    assert look.accuracy("captions") > at_1  # of twelve texts, five
    assert list(look.scores) == ["colours"]


def test_a_linear_probe_is_scored_by_its_logits(tiny_clip, processor, tasks):
    task, others = tasks(macro_f1, macro_f1)
    model = prepare(tiny_clip(), "linear_probe", task=task, processor=processor)
    probe = Probe(task, others, processor=processor, progress=False)
    before = probe.look(model, 0)
    head = next(m for m in model.modules() if type(m).__name__ == "LinearProbe")
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    after = probe.look(model, 1)
    share = np.mean(np.array(task.labels(task.subset())) == 2)
    assert after.accuracy("colours") == pytest.approx(2 * share / (1 + share) / 4)
    assert after.accuracy("shapes") == before.accuracy("shapes")


# Standard errors


def test_what_each_image_adds_is_its_jackknife_pseudo_value():
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(3, size=40), rng.integers(3, size=40)
    _, score = metric_of(macro_f1).judge(predictions, references)
    expected = []
    for i in range(40):
        rest = [j for j in range(40) if j != i]
        expected.append(
            40 * macro_f1(predictions, references)
            - 39 * macro_f1(predictions[rest], references[rest])
        )
    assert score.images == pytest.approx(expected, abs=1e-12)


def test_equal_images_are_left_out_once():
    calls = []

    def counted(predictions, references):
        calls.append(len(predictions))
        return accuracy(predictions, references)

    references = np.arange(3000) % 3
    metric_of(counted).judge(np.roll(references, 1), references)
    assert calls == [3000, 2999, 2999, 2999]


@pytest.mark.parametrize("n", [50, 128])
def test_of_accuracy_they_are_the_images_that_are_right(n):
    rng = np.random.default_rng(1)
    references = rng.integers(100, size=n)
    predictions = np.where(rng.random(n) < 0.7, references, 0)
    correct, score = metric_of(accuracy, 100).judge(predictions, references)
    assert score.images == pytest.approx(correct.astype(float), abs=1e-9)


def test_the_standard_error_equals_the_spread_over_draws():
    rng = np.random.default_rng(0)
    drops = []
    for _ in range(150):
        references = rng.choice(3, size=240, p=[0.7, 0.2, 0.1])
        before = np.where(rng.random(240) < 0.7, references, rng.integers(3, size=240))
        after = np.where(rng.random(240) < 0.85, before, rng.integers(3, size=240))
        scores = [metric_of(macro_f1).judge(p, references)[1] for p in (before, after)]
        drops.append(paired_drop(*scores))
    typical = np.mean([drop.standard_error for drop in drops])
    assert typical == pytest.approx(np.std([drop.value for drop in drops]), rel=0.15)


def test_many_classes_and_images_take_128_evaluations_and_give_nearly_the_same_error():
    rng = np.random.default_rng(0)
    calls = []

    def counted(predictions, references):
        calls.append(len(predictions))
        return accuracy(predictions, references)

    references = rng.integers(100, size=1000)
    before, after = (
        np.where(rng.random(1000) < p, references, rng.integers(100, size=1000)) for p in (0.8, 0.5)
    )
    scores = [metric_of(counted, 100).judge(p, references)[1] for p in (before, after)]
    assert len(calls) <= 2 * 129
    exact = paired_drop(before == references, after == references)
    found = paired_drop(*scores)
    assert found.value == pytest.approx(exact.value)
    assert found.standard_error == pytest.approx(exact.standard_error, rel=0.2)


# What can be given


def test_a_folder_an_object_and_a_function_are_the_same_metric(folder):
    import evaluate

    references, predictions = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    function = evaluate.load(folder, keep_in_memory=True)
    for given in (folder, evaluate.load(folder)):
        made = as_metric(given, {"power": 2}, "fewest", task="t", n_classes=2)
        assert made.value(predictions, references) == 0.25
        assert made.name == "fewest_right(power=2)['fewest']"  # nothing of the folder
    by_hand = as_metric(
        lambda p, r, power: function.compute(predictions=p, references=r, power=power)["fewest"],
        {"power": 2}, None, task="t", n_classes=2,
    )  # fmt: skip
    assert by_hand.value(predictions, references) == 0.25


def test_several_metrics_of_evaluate_are_one_of_them_by_its_key(folder):
    import evaluate

    both = evaluate.combine([evaluate.load(folder, keep_in_memory=True)] * 2)
    made = as_metric(both, None, "fewest_right_0_all", task="t", n_classes=4)
    assert made.value(np.array([0, 0, 1]), np.array([0, 1, 1])) == pytest.approx(2 / 3)


def correlation(predictions, references):
    return 1.0 if (predictions == references).all() else -0.3


def error_rate(predictions, references):
    return (predictions != references).mean()


class Distributed:
    num_process = 2

    def compute(self, predictions, references):
        return None


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"metric": correlation}, ValueError, "`metric` 'correlation()' of task 't' must lie in "
         "[0, 1], got -0.3"),
        ({"metric": error_rate}, ValueError, "higher where more images are right, got 0.0 where "
         "all are and 1.0 where none is"),
        ({"metric": lambda p, r: {"a": 1.0, "b": 0.5}}, ValueError, "gave ['a', 'b']; name the"),
        ({"metric": lambda p, r: {"a": 1.0}, "metric_key": "b"}, ValueError, "got 'b'"),
        ({"metric": lambda p, r: [0.5, 0.5]}, ValueError, "must give one number, got [0.5, 0.5]"),
        ({"metric": lambda p, r: None}, ValueError, "must give one number, got None"),
        ({"metric": lambda p, r: float("nan")}, ValueError, "got nan"),
        ({"metric": lambda p, r: accuracy(p, r) + 1e-6}, ValueError, "in [0, 1], got 1.000001"),
        ({"metric": accuracy, "metric_kwargs": 5}, TypeError, "`metric_kwargs` of task 't' must be "
         "a dict of arguments, got 5 (int)"),
        ({"metric": accuracy, "metric_kwargs": []}, TypeError, "a dict of arguments, got [] (lis"),
        ({"metric_kwargs": "average"}, TypeError, "a dict of arguments, got 'average' (str)"),
        ({"metric": lambda p, r: 1 / 0}, ValueError, "failed (ZeroDivisionError: division by"),
        ({"metric": accuracy, "metric_kwargs": {"average": 1}}, ValueError, "failed (TypeError"),
        ({"metric": accuracy, "metric_kwargs": {"a": {1, 2}}}, ValueError,
         "`metric_kwargs['a']` must be a JSON value"),
        ({"metric": Distributed()}, ValueError, "must be loaded without `num_process`, got 2"),
        ({"metric": 0.5}, TypeError, "a function (predictions, references) -> number, got float"),
        ({"metric": "recall@0"}, ValueError, "recall@k with k from 1 to 2, got 'recall@0'"),
        ({"metric": "recall@3"}, ValueError, "among all of 3 texts is always the right one"),
        ({"metric": "recall@1", "metric_kwargs": {"k": 2}}, ValueError, "got `metric` 'recall@1'"),
        ({"metric_key": "f1"}, ValueError, "got `metric` None"),
    ],
)  # fmt: skip
def test_what_is_no_such_metric_is_refused_before_training(colours, given, error, says):
    pairs = [(row["image"], row["label"] % 3) for row in colours.select(range(9))]
    with pytest.raises(error, match=re.escape(says)):
        Task("t", pairs, class_names=["a", "b", "c"], **given)


def test_what_evaluate_cannot_load_is_told_with_what_it_says(tmp_path):
    pytest.importorskip("evaluate")
    with pytest.raises(ValueError, match=r"'no_such' of task 't' must be 'recall@k', or what"):
        as_metric(str(tmp_path / "no_such"), None, None, task="t", n_classes=3)


def test_without_evaluate_a_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match=r"pip install iimm_callbacks\[evaluate\]"):
        as_metric("f1", None, None, task="t", n_classes=3)
    assert as_metric(macro_f1, None, None, task="t", n_classes=3).name == "macro_f1()"


# Whole runs


def run(monitor, model, steps=(1, 2)):
    monitor.begin(model, recipe={"steps": 2})
    for step in steps:
        monitor.check(spoil(model, step), step, 2)
    return monitor


def test_accuracy_as_a_metric_gives_the_numbers_of_no_metric(tiny_clip, make_monitor):
    plain = run(make_monitor(), tiny_clip())
    ours = run(make_monitor(accuracy, accuracy), tiny_clip())
    assert len(ours.history) == len(plain.history) == 3
    for one, other in zip(ours.history, plain.history, strict=True):
        one, other = told(one), told(other)
        assert one.pop("drops", {}) == pytest.approx(other.pop("drops", {}))
        errors = one.pop("standard_errors"), other.pop("standard_errors")
        assert errors[0] == pytest.approx(errors[1], abs=1e-12)
        assert one == pytest.approx(other, abs=1e-12)
    assert ours.probe.fingerprints.keys() == plain.probe.fingerprints.keys()
    assert not set(ours.probe.fingerprints.values()) & set(plain.probe.fingerprints.values())


def test_baseline_gain_and_forgetting_are_in_the_metrics_units(tiny_clip, make_monitor):
    monitor = run(make_monitor(macro_f1, macro_f1), tiny_clip())
    probe = make_monitor(macro_f1, macro_f1).probe
    looks = [probe.look(tiny_clip(), 0), probe.look(spoil(tiny_clip(), 2), 2)]
    gain = looks[1].accuracy("colours") - looks[0].accuracy("colours")
    drop = looks[0].accuracy("shapes") - looks[1].accuracy("shapes")
    assert looks[0].accuracy("shapes") != looks[0].correct["shapes"].mean()
    last = monitor.history[-1]
    assert last["eval_iimm_gain_observed"] == pytest.approx(gain)
    assert last["eval_iimm_forgetting_observed"] == pytest.approx(drop)
    errors = {
        "gain": paired_drop(*(look.seen("colours") for look in looks)).standard_error,
        "forgetting": paired_drop(*(look.seen("shapes") for look in looks)).standard_error,
    }
    assert errors.items() <= last["standard_errors"].items()
    outcome = monitor.end(tiny_clip(), 2)
    assert outcome.zero_shot_accuracy == looks[0].accuracy("colours")
    assert outcome.off_target_after == {"shapes": looks[1].accuracy("shapes")}


def test_a_resumed_run_repeats_the_history_in_the_metrics_units(tiny_clip, make_monitor):
    whole = run(make_monitor(macro_f1, macro_f1), tiny_clip())
    model = tiny_clip()
    half = run(make_monitor(macro_f1, macro_f1), model, steps=(1,))
    state = json.loads(json.dumps(half.state_dict(), allow_nan=False))
    again = make_monitor(macro_f1, macro_f1)
    again.load_state_dict(state)
    run(again, model, steps=(2,))
    assert [told(row) for row in again.history] == [told(row) for row in whole.history]


@pytest.mark.parametrize("other", [None, accuracy])
def test_a_run_does_not_go_on_with_another_metric(tiny_clip, make_monitor, other):
    first = run(make_monitor(None, macro_f1), tiny_clip(), steps=())
    again = make_monitor(None, other)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(ValueError, match=r"\['shapes'\] have other images, prompts, prepr"):
        again.begin(tiny_clip())


def test_the_task_by_another_metric_is_no_off_target_task(tiny_clip, processor, tasks, colours):
    task, _ = tasks(macro_f1)
    again = Task("again", colours, templates="a {} thing", probe_size=32, metric="recall@2")
    with pytest.raises(ValueError, match="'again' is the task itself"):
        Probe(task, [again], processor=processor, progress=False).prepare(tiny_clip())


def test_fingerprints_tell_metrics_and_their_arguments_apart(tiny_clip, processor, tasks):
    def power(predictions, references, power=1):
        return accuracy(predictions, references) ** power

    def fingerprint(metric, **settings):
        task, _ = tasks(metric, **settings)
        probe = Probe(task, [], processor=processor, progress=False)
        probe.prepare(tiny_clip())
        return probe.fingerprints["colours"]

    squared = {"metric_kwargs": {"power": 2}}
    found = [fingerprint(None), fingerprint("recall@2"), fingerprint("recall@3"),
             fingerprint(power), fingerprint(power, **squared)]  # fmt: skip
    assert len(set(found)) == 5
    assert fingerprint(power, **squared) == found[-1]


def test_a_checkpoint_without_scores_is_read_as_before(tiny_clip, make_monitor):
    state = run(make_monitor(), tiny_clip(), steps=()).state_dict()
    assert state["baseline"].keys() == {"measurement", "correct", "learnable", "parts"}
    del state["baseline"]["parts"]  # of looks at fewer images: earlier versions had none
    again = make_monitor()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.begin(tiny_clip()).level != "stop"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value": 1.5}, r"`baseline\['scores'\]\['shapes'\]\['value'\]` must be a frac"),
        ({"images": [0.5]}, r"`scores` and `correct` of 'shapes' do not match"),
        ({"images": [None] * 24}, "must be a finite number, got None"),
        ({"images": "1"}, "must be a list"),
    ],
)
def test_scores_that_are_none_are_refused(tiny_clip, make_monitor, change, says):
    state = run(make_monitor(None, macro_f1), tiny_clip(), steps=()).state_dict()
    state["baseline"]["scores"]["shapes"] |= change
    with pytest.raises(ValueError, match=says):
        make_monitor(None, macro_f1).load_state_dict(state)


def test_scores_of_a_task_that_is_not_there_are_refused(tiny_clip, make_monitor):
    state = run(make_monitor(None, macro_f1), tiny_clip(), steps=()).state_dict()
    state["baseline"]["scores"]["else"] = state["baseline"]["scores"]["shapes"]
    with pytest.raises(ValueError, match="`scores` and `correct` of 'else' do not match"):
        make_monitor(None, macro_f1).load_state_dict(state)


class Failing:
    """Accuracy, until it is told to do otherwise."""

    __name__ = "failing"
    now = None

    def __call__(self, predictions, references):
        if self.now is not None:
            return self.now()
        return accuracy(predictions, references)


@pytest.mark.parametrize("now", [lambda: 1 / 0, lambda: float("nan"), lambda: -0.1])
def test_a_metric_that_fails_is_an_error_before_training_and_a_failed_look_after(
    tiny_clip, make_monitor, caplog, now
):
    metric = Failing()
    early = make_monitor(None, metric)
    late = make_monitor(None, metric)
    model = tiny_clip()
    late.begin(model)
    metric.now = now
    with pytest.raises(ValueError, match=r"`metric` 'failing\(\)' of task 'shapes'"):
        early.begin(model)
    with caplog.at_level(logging.WARNING):
        late.check(model, 1, 3)
        late.check(model, 2, 3)
    warned = [r.getMessage() for r in caplog.records if "could not measure" in r.getMessage()]
    assert len(warned) == 1
    assert "'failing()' of task 'shapes'" in warned[0]
    assert late.failures == 2
    metric.now = None
    late.check(model, 3, 3)
    assert [row["step"] for row in late.history] == [0, 3]


def test_a_metric_that_draws_at_random_does_not_disturb_training(tiny_clip, make_monitor):
    def drawing(predictions, references):
        np.random.rand(), torch.rand(1)
        return accuracy(predictions, references)

    monitor, model = make_monitor(None, drawing), tiny_clip()
    monitor.begin(model)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    monitor.check(model, 1, 2)
    assert torch.rand(1) == expected


def test_a_mean_over_different_metrics_is_warned_of_once(
    tiny_clip, processor, tasks, shapes, caplog
):
    task, _ = tasks(macro_f1)
    mixed = [Task("shapes", shapes, probe_size=12, metric=macro_f1),
             Task("top two", shapes, probe_size=12, metric="recall@2")]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        Probe(task, mixed[:1], processor=processor, progress=False).look(tiny_clip(), 0)
        assert not caplog.records
        probe = Probe(task, mixed, processor=processor, progress=False)
        probe.look(tiny_clip(), 0)
        probe.look(tiny_clip(), 1)
    (record,) = caplog.records
    assert "mixes units" in record.getMessage()
    assert "(shapes: macro_f1(), top two: recall@2)" in record.getMessage()


def test_the_trainer_logs_the_metric_in_accuracys_place(make_trainer, tasks, folder):
    task, others = tasks(folder, "recall@2", metric_key="fewest")
    guard = IIMMCallback(
        task, others, max_forgetting=None, every=2, verbose=False, max_overhead=None
    )
    trainer = make_trainer([guard], max_steps=4)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_iimm_accuracy" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    look = Probe(task, others, processor=trainer.processing_class, progress=False).look(
        trainer.model.eval(), 4
    )
    assert rows[-1]["eval_iimm_accuracy"] == look.scores["colours"].value
    assert rows[-1]["eval_iimm_shapes_accuracy"] == look.correct["shapes"].mean()
    assert guard.outcome.final_accuracy == look.scores["colours"].value
