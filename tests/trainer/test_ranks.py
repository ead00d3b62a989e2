"""The guard on two ranks: same numbers, same verdict, same step, and nobody waits forever."""

import pytest
import torch
from forked import in_a_fork
from ranks_worker import SCENARIOS, main, train

ALONE = ("batch-of-8", "resumed-alone")  # in one process


@pytest.fixture(scope="module")
def launched():
    """Filled by the first test; one launch serves all."""
    return {}


@pytest.fixture
def ranks(launched, tmp_path_factory, tiny_clip, processor, colours, shapes):
    """Scenario -> what rank 0 and rank 1 came back with.

    A rank that waits for the other is ended by the workers' own timeout, and fails the test.
    """
    if launched:
        return launched
    folder = tmp_path_factory.mktemp("ranks")
    tiny_clip().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    colours.save_to_disk(folder / "colours")
    shapes.save_to_disk(folder / "shapes")
    names = [name for name in SCENARIOS if name not in ALONE]
    in_a_fork(main, folder, names)
    for name in names:
        launched[name] = [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]
    for name in ALONE:
        launched[name] = [train(folder, name, folder / f"alone-{name}")]
    return launched


def looks(result, without="runtime"):
    """The logged looks, without the wall times."""
    return [
        {k: v for k, v in row.items() if not k.endswith(("runtime", without))}
        for row in result["log"]
        if "eval_iimm" in row
    ]


def losses(result):
    return [row["loss"] for row in result["log"] if "loss" in row]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in ALONE])
def test_both_ranks_log_the_same_and_end_at_the_same_weights(ranks, scenario):
    first, second = ranks[scenario]
    assert first["world_size"] == second["world_size"] == 2
    assert first["steps"] == second["steps"]
    own = "epoch" if scenario == "uneven" else "runtime"  # the Trainer's: each rank has others
    assert looks(first, own) == looks(second, own)
    assert first["history"] == second["history"]
    assert_same_weights(first["weights"], second["weights"])


def test_the_run_is_bit_identical_with_and_without_the_guard(ranks):
    plain, guarded = ranks["plain"][0], ranks["guarded"][0]
    assert_same_weights(plain["weights"], guarded["weights"])
    assert losses(plain) == losses(guarded)
    assert len(losses(plain)) == 6
    moments = [plain["optimizer"]["state"], guarded["optimizer"]["state"]]
    assert moments[0].keys() == moments[1].keys() != set()
    for one, other in zip(moments[0].values(), moments[1].values(), strict=True):
        assert_same_weights(one, other)
    assert [row["step"] for row in looks(guarded)] == [0, 2, 4, 6]


def test_a_stop_stops_both_at_the_same_step(ranks):
    for rank in ranks["stop"]:
        assert rank["steps"] == 4
        assert rank["ended"].startswith("stopped by the guard at step 4: observed mean forgetting")


def test_a_stop_that_one_rank_asks_for_before_training_holds_both(ranks, tiny_clip):
    for rank in ranks["stop-by-one"]:
        assert rank["history"] == [0]
        assert_same_weights(rank["weights"], tiny_clip().state_dict())


def test_a_look_too_slow_for_one_rank_is_taken_by_none(ranks):
    for rank in ranks["clock"]:
        assert rank["history"] == [0, 6]
        assert rank["dropped"] == 5


def test_a_look_that_fails_on_one_rank_counts_on_none_and_the_run_goes_on(ranks):
    for rank in ranks["failing"]:
        assert rank["steps"] == 6
        assert rank["history"] == [0, 4]


def test_an_action_that_raises_on_one_rank_harms_none(ranks):
    for rank in ranks["raising"]:
        assert rank["steps"] == 6
        assert rank["history"] == [0, 2, 4, 6]
        assert rank["ended"] == "finished"


def test_a_base_model_that_one_rank_cannot_load_turns_the_guard_off_on_both(ranks):
    for rank in ranks["no-base"]:
        assert rank["steps"] == 6
        assert rank["history"] == []


@pytest.mark.parametrize("scenario", ["stream", "dispatched", "split", "uneven"])
def test_uneven_last_batches_of_streams_and_others_are_looked_at_like_any_run(ranks, scenario):
    for rank in ranks[scenario]:
        assert rank["steps"] == 6
        assert rank["history"] == [0, 2, 4, 6]
        first, known = looks(rank)[0], looks(ranks["guarded"][0])[0]  # the same untouched model
        of_training = ("forecast", "linear_probe")  # that learn from the training set, if they can
        assert {k: v for k, v in first.items() if not any(w in k for w in of_training)} == {
            k: v for k, v in known.items() if not any(w in k for w in of_training)
        }


def test_a_run_that_goes_on_with_another_number_of_ranks_keeps_baseline_and_record(ranks):
    saved, (alone,) = ranks["saved"][0], ranks["resumed-alone"]
    assert (saved["world_size"], alone["world_size"]) == (2, 1)
    assert [row["step"] for row in alone["rows"]] == [0, 2, 4, 6]
    assert alone["rows"][:2] == saved["rows"][:2]
    assert alone["ended"] == "finished"


def test_the_first_rank_alone_writes_files(ranks):
    first, second = ranks["guarded"]
    assert first["files"] == ["iimm_colours.json", "store.jsonl"]
    assert second["files"] == []


def test_two_ranks_with_batches_of_4_train_as_one_process_with_batches_of_8(ranks):
    (alone,) = ranks["batch-of-8"]
    assert alone["world_size"] == 1
    for name, value in ranks["batch-of-4"][0]["weights"].items():
        torch.testing.assert_close(value, alone["weights"][name], atol=1e-5, rtol=1e-4, msg=name)
