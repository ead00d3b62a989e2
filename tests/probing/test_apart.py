"""Ranks that raise, are late or die: the others wait for the time limit and no longer."""

import signal
import time
from datetime import timedelta

import pytest
import torch
from apart_worker import LIMIT, main
from forked import in_a_fork
from torch import distributed, nn

from iimm_callbacks.models.sharded import InStep, OutOfStepError
from iimm_callbacks.probing import ranks

pytestmark = pytest.mark.once

TAIL = "within 1 s: it has failed, has died or is slow, see its output; `IIMM_CALLBACKS_TIMEOUT`"


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.whole) for n in (2, 4)])
def apart(request, tmp_path_factory):
    """The number of ranks, and what each came back with but the last, which died."""
    folder = tmp_path_factory.mktemp("apart")
    printed = in_a_fork(main, folder, request.param, seconds=120)
    paths = [folder / f"{rank}.pt" for rank in range(request.param - 1)]
    assert all(path.exists() for path in paths), printed[-4000:]
    return request.param, [torch.load(path, weights_only=False) for path in paths]


def test_a_rank_that_raised_elsewhere_ends_the_look_of_the_others(apart):
    world, found = apart
    for rank, one in enumerate(found):
        if rank != 1:
            error = one["errors"][0]
            assert error.startswith(f"RanksApartError: of {world} ranks, 1 (last at the look ")
            assert f") did not come to the look at step 10 {TAIL}" in error
            assert LIMIT - 0.1 <= one["seconds"][0] < LIMIT + 5


def test_the_next_look_is_as_if_nothing_had_been(apart):
    _, found = apart
    for one in found:
        assert repr(one["after"]) == repr(one["first"]) == repr(found[0]["first"])


def test_a_late_rank_ends_the_look_on_all_ranks_with_the_same_words(apart):
    world, found = apart
    assert {one["errors"][1].partition(" s: it has")[0] for one in found} == {
        f"RanksApartError: of {world} ranks, 0 (last at the look at step 20) did not come to the "
        "look at step 30 within 1"
    }
    assert {one["agreed"] for one in found} == {(6.0 - world, True)}


def test_a_dead_rank_ends_the_look_of_the_others(apart):
    world, found = apart
    for one in found:
        assert (
            f"of {world} ranks, {world - 1} (last at a test) did not come to the look at step 40"
            in (one["errors"][2])
        )
        assert one["seconds"][2] < LIMIT + 5


def test_ranks_that_cannot_agree_do_neither(apart):
    assert {one["apart"] for one in apart[1]} == {(0.0, False)}


@pytest.mark.parametrize("said", ["0", "-1", "ten", "nan"])
def test_a_time_limit_that_is_none_is_refused(monkeypatch, said):
    monkeypatch.setenv(ranks.TIMEOUT, said)
    with pytest.raises(ValueError, match=f"must be seconds, a positive number, got '{said}'"):
        ranks.time_limit()


def test_the_time_limit_is_that_of_the_environment(monkeypatch):
    monkeypatch.delenv(ranks.TIMEOUT, raising=False)
    assert ranks.time_limit() == 300
    limit = timedelta(seconds=77)
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=limit
    )
    try:
        assert ranks.time_limit() == 77 / 2
    finally:
        distributed.destroy_process_group()
    monkeypatch.setenv(ranks.TIMEOUT, "12.5")
    assert ranks.time_limit() == 12.5


class FSDPModule(nn.Module):
    """Counts how often its weights are put together, as FSDP 2 does in its hooks."""

    def __init__(self, fails=lambda: False):
        super().__init__()
        self.entered = 0
        self.fails = fails
        self.register_forward_pre_hook(self._enter)

    def _enter(self, module, inputs):
        if self.fails():
            raise RuntimeError("no memory for whole weights")
        self.entered += 1

    def forward(self, x):
        return x + 1


def test_a_pass_that_fails_still_enters_every_unit_once():
    model = nn.Sequential(FSDPModule(), nn.Linear(2, 2), FSDPModule(), FSDPModule())
    units = [model[0], model[2], model[3]]
    with InStep(model, nn.Identity()).kept() as steps:
        order, made = steps.learn(lambda: model(torch.zeros(1, 2)))
        assert order == units
        assert torch.equal(steps.run(order, lambda: model(torch.zeros(1, 2))), made)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            steps.run(order, lambda: model(torch.zeros(1, 3)))
        steps.skip(order)
        with pytest.raises(OSError, match="before the model"):
            steps.run(order, lambda: (_ for _ in ()).throw(OSError("before the model")))
    assert [unit.entered for unit in units] == [5, 5, 5]
    assert "forward" not in vars(model[0])


def test_a_failure_in_a_unit_within_a_unit_is_told_by_its_own_name():
    class Outer(FSDPModule):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([FSDPModule(), FSDPModule()])

        def forward(self, x):
            for inner in self.inner:
                x = inner(x)
            return x.sum()  # of None, where a unit inside has failed

    model = Outer()
    order = [model, *model.inner]
    with InStep(model, nn.Identity()).kept() as steps:
        assert steps.learn(lambda: model(torch.zeros(1)))[0] == order
        with pytest.raises(TypeError, match="can only concatenate str"):
            steps.run(order, lambda: model("x"))
    assert [unit.entered for unit in order] == [2, 2, 2]


def test_a_signal_is_handled_while_a_rank_waits(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: (0, 2))
    monkeypatch.setattr(ranks, "_store", distributed.HashStore)
    monkeypatch.setenv(ranks.TIMEOUT, "30")
    began = time.monotonic()

    def interrupt(number, frame):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            ranks._report()
    finally:
        signal.signal(signal.SIGALRM, former)
    assert time.monotonic() - began < 10


def test_a_rank_that_cannot_keep_in_step_does_not_train_on():
    broken = [False]
    model = nn.Sequential(FSDPModule(), FSDPModule(lambda: broken[0]))
    with InStep(model, nn.Identity()).kept() as steps:
        order, _ = steps.learn(lambda: model(torch.zeros(1)))
        broken[0] = True
        with pytest.raises(OutOfStepError, match=r"\(no memory for whole weights\), so this rank"):
            steps.run(order, lambda: model(torch.zeros(1)))
    assert not issubclass(OutOfStepError, Exception)  # what forgives failures must not forgive it
