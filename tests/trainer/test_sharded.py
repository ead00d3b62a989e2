"""Weights or optimizer spread over ranks by FSDP or DeepSpeed, under the Trainer and accelerate.

accelerate takes FSDP for accelerators only; the worker tells it that CPUs are some. All else is
what runs on GPUs, with gloo for NCCL.
"""

import importlib.util

import pytest
import torch
from forked import in_a_fork
from sharded_worker import LOADING, OPTIONS, main, parts

from iimm_callbacks.probing.probe import Probe

FSDP = [
    "ddp", "fsdp-plain", "fsdp", "fsdp-resumed", "fsdp-stopped", "fsdp-rescue", "fsdp1",
    "loop-plain", "loop", "loop-resumed",
]  # fmt: skip
FOUR = ["ddp", "fsdp-plain", "fsdp", "fsdp-resumed"]
OPTIONAL = [f"fsdp-{next(iter(option))}" for option in OPTIONS]
MODELS = ["fsdp-accumulating", "fsdp-bf16", "fsdp-frozen", "fsdp-lora"]
SAVED = ["ddp", "ddp-loop", "fsdp", "loop"]
DEALT = ["ddp", *LOADING, "uneven-epochs"]
ZERO = [f"zero{stage}{kind}" for stage in (1, 2) for kind in ("-plain", "", "-resumed")]
pytestmark = [pytest.mark.whole, pytest.mark.once]


def launch(folder, n_ranks, names):
    """Scenario -> what each rank came back with."""
    in_a_fork(main, folder, n_ranks, names)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(n_ranks)]
        for name in names
    }


@pytest.fixture(scope="module")
def launched():
    """Filled by the first test of each number of ranks."""
    return {}


@pytest.fixture
def folder(tmp_path_factory, tiny_clip, processor, colours, shapes):
    """The model and the data of a launch."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny_clip().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    colours.save_to_disk(folder / "colours")
    shapes.save_to_disk(folder / "shapes")
    return folder


@pytest.fixture
def ranks(request, launched, folder):
    n_ranks, names = request.param
    if (key := (n_ranks, *names)) not in launched:
        launched[key] = launch(folder, n_ranks, names)
    return launched[key]


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
two = pytest.mark.parametrize("ranks", [(2, FSDP)], indirect=True, ids=["2"])


def both(*names):
    """These scenarios on two ranks, and some of them on four."""
    cases = [(n, of, name) for n, of in ((2, FSDP), (4, FOUR)) for name in names if name in of]
    return pytest.mark.parametrize(
        ("ranks", "name"),
        [((n, of), name) for n, of, name in cases],
        indirect=["ranks"],
        ids=[f"{name}-{n}" for n, _, name in cases],
    )


def assert_same_run(one, other):
    """The same weights and numbers, bit for bit."""
    assert one["weights"].keys() == other["weights"].keys() != set()
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name


def numbers(row):
    """Of a look, without the clock's."""
    return {k: v for k, v in row.items() if k != "time" and not k.endswith("runtime")}


def assert_measured_as(known, rank):
    """The untouched model to the last digit; later as sums in another order let it train."""
    assert [row["step"] for row in rank["rows"]] == [0, 2, 4, 6]
    assert numbers(rank["rows"][0]) == numbers(known["rows"][0])
    for row, other in zip(rank["rows"], known["rows"], strict=True):
        for name in ("eval_iimm", "eval_iimm_accuracy", "eval_iimm_shapes_accuracy"):
            assert row[name] == pytest.approx(other[name], abs=1e-5)


@both("fsdp", "loop")
def test_fsdp_trains_the_same_with_and_without_the_guard(ranks, name):
    for plain, guarded in zip(ranks[f"{name}-plain"], ranks[name], strict=True):
        assert guarded["wrapper"] == "FSDPPromptClassifier"
        assert guarded["ended"] == "finished"
        assert plain["losses"] == guarded["losses"]
        assert len(plain["losses"]) == 6
        assert_same_run(plain, guarded)


@both("fsdp", "fsdp1")
def test_fsdp_is_measured_as_ddp_is_on_all_ranks(ranks, name):
    for rank in ranks[name]:
        assert_measured_as(ranks["ddp"][0], rank)


@both("fsdp", "loop")
def test_an_fsdp_run_that_goes_on_from_a_checkpoint_has_the_record_of_one_in_one_piece(ranks, name):
    for whole, resumed in zip(ranks[name], ranks[f"{name}-resumed"], strict=True):
        assert [*map(numbers, resumed["rows"])] == [*map(numbers, whole["rows"])]
        assert_same_run(whole, resumed)


@two
def test_an_fsdp_run_stops_on_all_ranks(ranks):
    for rank in ranks["fsdp-stopped"]:
        assert [row["step"] for row in rank["rows"]] == [0, 2]
        assert rank["ended"].startswith("stopped by the guard at step 2")


@two
def test_a_rescue_of_an_fsdp_run_is_refused_before_the_first_step(ranks):
    for rank in ranks["fsdp-rescue"]:
        assert "one that FSDP shards; save it, and rescue what was saved" in rank["error"]
        assert rank["losses"] == []


def alone(folder, weights):
    """A look of one process at a bare model of these weights."""
    model, processor, task, shapes, _ = parts(folder, folder)
    names = {name.replace("_fsdp_wrapped_module.", ""): w for name, w in weights.items()}
    model.load_state_dict({n.partition("dual_encoder.")[2]: w for n, w in names.items()})
    return Probe(task, [shapes], processor=processor, progress=False).look(model, 0)


@both("ddp", "fsdp", "fsdp1", "loop")
def test_a_look_at_spread_weights_is_that_of_one_process_at_the_whole_ones(ranks, name, folder):
    known, last = alone(folder, ranks[name][0]["weights"]), ranks[name][0]["rows"][-1]
    assert last["eval_iimm"] == pytest.approx(known.measurement.iimm, abs=1e-6)
    assert last["eval_iimm_accuracy"] == known.accuracy("colours")
    assert last["eval_iimm_shapes_accuracy"] == known.accuracy("shapes")


@pytest.mark.parametrize("ranks", [(2, ["ddp", *OPTIONAL])], indirect=True, ids=["2"])
@pytest.mark.parametrize("name", OPTIONAL)
def test_whatever_fsdp_is_told_it_is_measured_as_ddp_is(ranks, name):
    for rank in ranks[name]:
        assert rank["wrapper"] == "FSDPPromptClassifier"
        assert_measured_as(ranks["ddp"][0], rank)


@pytest.mark.parametrize("ranks", [(2, MODELS)], indirect=True, ids=["2"])
@pytest.mark.parametrize("name", MODELS)
def test_fsdp_with_accumulation_bf16_a_frozen_tower_or_lora_is_measured(ranks, name, folder):
    first, second = ranks[name]
    assert [numbers(row) for row in first["rows"]] == [numbers(row) for row in second["rows"]]
    assert [row["step"] for row in first["rows"]] == [0, 2, 4, 6]
    assert first["ended"] == "finished"
    if name != "fsdp-lora":  # whose weights have other names
        known = alone(folder, first["weights"]).measurement.iimm
        tolerance = 5e-3 if name == "fsdp-bf16" else 1e-6
        assert first["rows"][-1]["eval_iimm"] == pytest.approx(known, abs=tolerance)
    assert first["rows"][-1]["eval_iimm"] != first["rows"][0]["eval_iimm"]


def test_a_run_goes_on_with_any_other_number_of_ranks(folder):
    before = launch(folder, 2, SAVED)
    for n_ranks in (1, 3, 4):
        after = launch(folder, n_ranks, [f"{name}-resumed" for name in SAVED])
        for name in SAVED:
            known = [numbers(row) for row in before[name][0]["rows"]]
            for rank in after[f"{name}-resumed"]:
                rows = [numbers(row) for row in rank["rows"]]
                assert rows[:2] == known[:2], (name, n_ranks)  # baseline and record
                assert [row["step"] for row in rows] == [0, 2, 4, 6]
                assert rank["ended"] == "finished"
                assert rank["run"] == before[name][0]["run"] != ""
            last = alone(folder, rank["weights"]).measurement.iimm
            assert rows[-1]["eval_iimm"] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("ranks", [(2, DEALT)], indirect=True, ids=["2"])
@pytest.mark.parametrize("name", LOADING)
def test_however_batches_are_dealt_all_ranks_look_at_the_same_steps(ranks, name, folder):
    first, second = ranks[name]
    assert [numbers(row) for row in first["rows"]] == [numbers(row) for row in second["rows"]]
    assert [row["step"] for row in first["rows"]] == [0, 2, 4, 6]
    untouched = numbers(ranks["ddp"][0]["rows"][0])  # its training set is a larger one
    assert first["rows"][0]["eval_iimm"] == untouched["eval_iimm"]
    last = alone(folder, first["weights"]).measurement.iimm
    assert first["rows"][-1]["eval_iimm"] == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("ranks", [(2, DEALT)], indirect=True, ids=["2"])
def test_looks_at_the_end_of_epochs_of_other_lengths_are_refused_before_the_first_step(ranks):
    for rank in ranks["uneven-epochs"]:
        assert "got 'epoch' with 2 to 3 batches" in rank["error"]
        assert rank["losses"] == []


@needs_deepspeed
@pytest.mark.parametrize("ranks", [(2, ["ddp", *ZERO, "zero3"])], indirect=True, ids=["2"])
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_train_measure_and_resume_as_without_them(ranks, stage):
    for plain, guarded, resumed in zip(
        *(ranks[f"zero{stage}{kind}"] for kind in ("-plain", "", "-resumed")), strict=True
    ):
        assert guarded["wrapper"] == "DeepSpeedEngine"
        assert plain["losses"] == guarded["losses"]
        assert_same_run(plain, guarded)
        assert_measured_as(ranks["ddp"][0], guarded)
        assert [*map(numbers, resumed["rows"])] == [*map(numbers, guarded["rows"])]
        assert_same_run(guarded, resumed)


@needs_deepspeed
@pytest.mark.parametrize("ranks", [(2, ["ddp", *ZERO, "zero3"])], indirect=True, ids=["2"])
def test_zero_3_is_refused_before_the_first_step(ranks):
    for rank in ranks["zero3"]:
        assert "got DeepSpeed ZeRO-3" in rank["error"]
        assert rank["losses"] == []
