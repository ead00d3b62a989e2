"""What `test_rescue.py` runs on one and on two ranks: in one process that forks, which is fast."""

import copy
from functools import partial

import torch
from forked import on_ranks
from shared_fixtures import make_dataset
from tiny import FAMILIES
from torch import distributed

from iimm_callbacks import Task
from iimm_callbacks.probing import ranks
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.verdict import Limits
from iimm_callbacks.rescue import sweep as module
from iimm_callbacks.rescue.mixing import Mixture
from iimm_callbacks.rescue.sweep import sweep

COLOURS, SHAPES = make_dataset("colour", 40, seed=1), make_dataset("shape", 30, seed=2)


class FailsOnRank1(Probe):
    def _show(self, *arguments):
        self.looks = getattr(self, "looks", 0) + 1
        if self.looks == 3 and distributed.get_rank() == 1:
            raise OSError("disk on fire")
        return super()._show(*arguments)


class SetFailsOnRank1(Mixture):
    def set(self, alpha):
        if alpha == 0.3 and distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().set(alpha)


class Odd(Exception):
    """Cannot be pickled, and so not be sent to other ranks."""

    def __reduce__(self):
        raise TypeError("no")


def raise_odd():
    raise Odd("the disk is full")


def probe_of(kind=Probe):
    task = Task("colours", COLOURS, templates="a {} thing", probe_size=24)
    other = Task("shapes", SHAPES, templates="a photo of the {}", probe_size=15)
    return kind(task, [other], processor=FAMILIES["CLIP"]()[1], progress=False)


def told(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank, folder, base, tuned):
    model = copy.deepcopy(tuned)
    result = {"tuned": copy.deepcopy(model.state_dict())}
    if rank is not None:
        failing = copy.deepcopy(tuned)
        result["error"] = told(lambda: sweep(failing, base, probe_of(FailsOnRank1), Limits(1.0)))
        result["after failure"] = failing.state_dict()
        module.Mixture = SetFailsOnRank1
        result["set"] = told(lambda: sweep(failing, base, probe_of(), Limits(1.0), alphas=[0.3]))
        module.Mixture = Mixture
        result["after set"] = failing.state_dict()
        result["odd"] = told(lambda: ranks.from_first(raise_odd))
        result["no base"] = told(
            lambda: sweep(failing, base if rank == 0 else None, probe_of(), Limits(1.0))
        )
    found = sweep(model, base, probe_of(), Limits(1.0), alphas=[0.3, 0.6])
    result |= {"alpha": found.alpha, "mixes": found.mixes, "mixed": model.state_dict()}
    torch.save(result, folder / ("alone.pt" if rank is None else f"{rank}.pt"))


def main(folder):
    """Leaves what each rank came back with in `alone.pt`, `0.pt` and `1.pt`."""
    base, _ = FAMILIES["CLIP"]()
    for seed in range(20):  # until it gains, by luck
        tuned = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        if sweep(tuned, base, probe_of(), Limits(1.0), alphas=[0.3, 0.6], apply=False).alpha:
            break
    work(None, folder, base, tuned)
    on_ranks(2, partial(work, folder=folder, base=base, tuned=tuned))
