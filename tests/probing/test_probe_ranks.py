"""The probe on 1, 2, 3 and 7 ranks: the same numbers everywhere, and nobody waits forever."""

import pytest
import torch
from forked import in_a_fork
from probe_worker import main
from torch import nn

from iimm_callbacks.models.sharded import check_measurable
from iimm_callbacks.probing.probe import Probe

pytestmark = [pytest.mark.once, pytest.mark.whole]

SEVERAL = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(scenario, number of ranks) -> what each rank came back with.

    A rank that waits for another is ended by the worker's own timeout, and fails the test.
    """
    folder = tmp_path_factory.mktemp("ranks")
    in_a_fork(main, folder)

    def of(scenario, world):
        paths = [folder / f"{scenario}-{world}-{rank}.pt" for rank in range(world)]
        return [torch.load(path, weights_only=False) for path in paths]

    return of


def assert_close(one, other, atol):
    """Measurements and correct images of two looks."""
    for name in ("iimm", "inter", "intra", "standard_error"):
        ours, theirs = getattr(one[0], name), getattr(other[0], name)
        assert ours == pytest.approx(theirs, rel=0, abs=atol, nan_ok=True)
    assert (one[0].n_images, one[0].n_classes) == (other[0].n_images, other[0].n_classes)
    assert one[1] == other[1]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_every_rank_has_the_numbers_of_one_process(results, world):
    (alone,) = results("equal", 1)
    several = results("equal", world)
    for case, (look, fingerprints) in alone.items():
        for rank in several:
            assert_close(rank[case][0], look, atol=1e-9)
            assert repr(rank[case][0]) == repr(several[0][case][0])  # bit for bit
            assert rank[case][1] == fingerprints


@pytest.mark.parametrize("world", [2, 3, 7])
def test_every_rank_has_the_linear_probe_of_one_process(results, world):
    (((learnt, crossed, broken), part),) = results("linear_probe", 1)
    assert learnt.probe.held_out
    assert not crossed.probe.held_out
    assert "disk on fire" in broken.note
    for (ours, ours_crossed, ours_broken), ours_part in results("linear_probe", world):
        assert (ours, ours_crossed) == (learnt, crossed)
        assert ours_broken.probe == crossed.probe
        assert_close(ours_part, part, atol=1e-9)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_a_metric_gives_every_rank_the_score_of_one_process(results, world):
    ((look, scores, asked, _, shapes),) = results("metrics", 1)
    assert list(scores) == ["colours", "shapes"]
    for rank, (ours, our_scores, we_asked, error, our_shapes) in enumerate(
        results("metrics", world)
    ):
        assert_close(ours, look, atol=1e-9)
        assert our_scores == scores  # bit for bit, though the metric gives each rank another one
        assert asked == {0}
        assert 0 in we_asked or rank  # the check when a task is made is every rank's own
        assert "`metric` 'fails()' of task 'shapes' failed (ZeroDivisionError" in error
        assert our_shapes == shapes


@pytest.mark.parametrize("world", SEVERAL)
def test_ranks_that_were_given_other_metrics_are_told_so(results, world):
    for error in results("one_has_another_metric", world):
        assert error.startswith("ValueError: `task`, `off_target` and `batch_size` must be the")


@pytest.mark.parametrize("world", SEVERAL)
def test_a_look_is_one_all_reduce(results, world):
    assert results("one_reduction", world) == [["all_reduce"]] * world


@pytest.mark.parametrize("world", [2, 3, 7])
def test_images_that_cannot_be_read_are_left_out_on_all_ranks_with_one_warning(results, world):
    (look, fingerprints, messages), *_ = results("bad_images", 1)
    assert look[0].n_images == 37
    assert len(messages) == 1
    assert messages[0].startswith("3 of the IIMM probe's images cannot be read and are left out")
    for rank, (ours, prints, said) in enumerate(results("bad_images", world)):
        assert_close(ours, look, atol=1e-9)
        assert prints == fingerprints
        assert len(said) == (rank == 0)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_no_image_at_all_is_an_error_on_all_ranks(results, world):
    for error in results("no_images", world):
        assert "at least 2 images that can be read, got 0 of 24" in error


@pytest.mark.parametrize("world", SEVERAL)
def test_a_group_that_ends_or_is_made_anew_with_new_ranks_is_measured_as_before(results, world):
    for grouped, alone, anew in results("group_anew", world):
        assert_close(alone, grouped, atol=1e-9)
        assert_close(anew, grouped, atol=1e-9)


@pytest.mark.parametrize("world", SEVERAL)
def test_a_failure_of_one_rank_is_an_error_on_all_and_the_next_look_is_as_before(results, world):
    for rank, (before, error, after) in enumerate(results("one_fails", world)):
        expected = "OSError: disk on fire"
        if rank != 1:
            expected = f"RuntimeError: rank 1 failed ({expected})"
        assert error == expected
        assert_close(before, after, atol=0)


@pytest.mark.parametrize("world", SEVERAL)
def test_all_ranks_know_that_training_diverged_on_one(results, world):
    first, second, *_ = results("one_diverges", world)
    assert second == ("NotFiniteError: training has diverged, which is not forgetting: norm nan")
    assert first == f"NotFiniteError: rank 1 failed ({second})"


@pytest.mark.parametrize("world", SEVERAL)
def test_a_rank_short_of_memory_goes_on_in_smaller_batches(results, world):
    expected = results("one_fails", world)[0][0]
    for look in results("one_has_little_memory", world):
        assert_close(look, expected, atol=1e-6)


@pytest.mark.parametrize("world", SEVERAL)
def test_ranks_that_were_given_other_tasks_are_told_so(results, world):
    for error in results("one_has_another_task", world):
        assert error.startswith("ValueError: `task`, `off_target` and `batch_size` must be the")


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_a_run_sharded_by_fsdp_measures_as_one_that_is_not(results, kind):
    plain, *_ = results("plain_run", 2)
    assert plain["losses"][-1] < plain["losses"][0]
    for rank in results(f"{kind}_run", 2):
        assert rank["failures"] == 0
        assert rank["losses"] == pytest.approx(plain["losses"], abs=1e-4)
        assert rank["fingerprint"][1] == plain["fingerprint"][0]
        assert rank["share"] == plain["share"] == 1.0
        assert (rank["method"], rank["model"]) == ("full", "SiglipModel")
        assert rank["training"]
        assert rank["history"][0] == plain["history"][0]  # the same weights: bit for bit
        assert [row["step"] for row in rank["history"]] == [0, 2, 4]
        for ours, theirs in zip(rank["history"], plain["history"], strict=True):
            assert ours["eval_iimm"] == pytest.approx(theirs["eval_iimm"], abs=1e-4)


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_one_rank_out_of_memory_amid_a_sharded_pass_costs_a_look_and_no_more(results, kind, tower):
    whole, *_ = results(f"{kind}_run", 2)
    said = "CUDA out of memory. Tried to allocate 2 GiB"
    expected = [f"rank 1 failed (OutOfMemoryError: {said})", said]
    for rank, error in zip(results(f"{kind}_{tower}_breaks", 2), expected, strict=True):
        assert (rank["failures"], rank["failure"]) == (1, error)
        assert rank["losses"] == whole["losses"]  # bit for bit: training never noticed
        assert rank["history"] == [row for row in whole["history"] if row["step"] != 2]
        assert rank["training"]


@pytest.mark.parametrize("kind", ["plain", "fsdp1", "fsdp2"])
def test_all_ranks_of_a_run_have_one_name_for_it(results, kind):
    first, second = results(f"{kind}_run", 2)
    assert first["run"] == second["run"] != ""
    assert first["history"] == second["history"]


@pytest.mark.parametrize("kind", ["plain", "fsdp1", "fsdp2"])
def test_an_image_that_vanishes_is_an_error_on_all_ranks_sharded_or_not(results, kind):
    first, second = results(f"{kind}_bad_image", 2)
    assert "cannot be read (UnidentifiedImageError" in second[0]
    assert first[0] == f"RuntimeError: rank 1 failed ({second[0]})"
    assert first[1] == second[1]


def test_a_rank_without_batches_costs_a_look_and_the_last_one_is_of_the_most_steps(results):
    first, second = results("joined", 2)
    assert first == second
    steps, ended, last = first
    assert [step for step, _ in steps] == [0, 2, 4]
    assert steps[-1][1] == last
    assert ended == "stopped early"


def test_a_best_checkpoint_that_is_another_one_on_each_rank_is_none(results):
    assert results("best_apart", 2) == [[4, None], [4, None]]


def test_zero_3_is_refused_with_the_reason(tiny_clip, colour_task, processor):
    model = tiny_clip()
    next(model.parameters()).ds_id = 0  # what DeepSpeed marks its split weights with
    probe = Probe(colour_task, processor=processor, progress=False)
    with pytest.raises(ValueError, match=r"got DeepSpeed ZeRO-3: .*use ZeRO-2 or FSDP"):
        probe.prepare(model)


def test_tensor_parallelism_is_refused_with_the_reason():
    class Split(nn.Parameter):
        placements = ()

    model = nn.Linear(2, 2)
    model.weight = Split(torch.ones(2, 2))
    with pytest.raises(ValueError, match="got 'weight' split by tensor parallelism"):
        check_measurable(model)


def test_data_parallel_is_looked_through(tiny_clip, colour_task, processor):
    model = tiny_clip()
    looks = [
        Probe(colour_task, processor=processor, progress=False).look(m, 0)
        for m in (model, nn.DataParallel(model))
    ]
    assert looks[0].measurement == looks[1].measurement
