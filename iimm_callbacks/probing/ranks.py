"""Several processes train one run: what they add up, and what they agree on.

All of it is for every rank at the same time: a rank that stays away lets the others wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..measures.embeddings import NotFiniteError

_T = TypeVar("_T")


def world() -> tuple[int, int]:
    """This process's rank and their number: (0, 1) where it trains alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def add_up(values: Tensor, failure: Exception | None = None) -> Tensor:
    """The sum over all ranks, in one all-reduce; or, if one of them failed, an error on all.

    Args:
        values: [n] float64, n the same on all ranks; what a rank that failed has in it is lost.
        failure: Why this rank failed, if it did.

    Returns:
        [n] float64 on the CPU, bit for bit the same on all ranks.

    Raises:
        Exception: `failure`, where it happened.
        RuntimeError: On the other ranks; names the first rank that failed, and why. It is a
            `NotFiniteError` where that is why.
    """
    rank, n_ranks = world()
    if n_ranks == 1:
        if failure is not None:
            raise failure
        return values.cpu()
    failed = torch.zeros(n_ranks, dtype=torch.float64)
    failed[rank] = (failure is not None) + isinstance(failure, NotFiniteError)
    sums = torch.cat([values.cpu(), failed]).to(_device())
    distributed.all_reduce(sums)
    sums, failed = torch.split(sums.cpu(), [len(values), n_ranks])
    if failed.any():
        why = first_said(None if failure is None else f"{type(failure).__name__}: {failure}")
        kind = NotFiniteError if failed.max() == 2 else RuntimeError
        raise failure or kind(f"rank {int(failed.nonzero()[0])} failed ({why})")
    return sums


def together(make: Callable[[], _T]) -> _T:
    """What each rank makes for itself, if it succeeds on all of them.

    Raises:
        Exception: What `make` raised here.
        RuntimeError: It failed on another rank.
    """
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failure = error
    add_up(torch.zeros(0, dtype=torch.float64), failure)
    return made


def any_rank(flag: bool) -> bool:
    """Whether any rank says so."""
    return bool(add_up(torch.tensor([float(flag)], dtype=torch.float64)).item())


def least(number: float) -> float:
    """The smallest number of any rank; ``number`` is not negative."""
    rank, n_ranks = world()
    said = torch.zeros(n_ranks, dtype=torch.float64)
    said[rank] = number
    return float(add_up(said).min())


def from_first(make: Callable[[], _T]) -> _T:
    """What the first rank makes, on all ranks; it alone is asked.

    Raises:
        Exception: What `make` raises, on all ranks.
    """
    rank, n_ranks = world()
    if n_ranks == 1:
        return make()
    made: list[Any] = [None, None]
    if rank == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = _sendable(error)
    distributed.broadcast_object_list(made, device=_device())
    if made[1] is not None:
        raise made[1]
    return made[0]  # type: ignore[no-any-return]


def _sendable(error: Exception) -> Exception:
    """The exception, or one that says the same where the others might not be able to receive it."""
    builtin = type(error).__module__ == "builtins"
    if builtin and all(isinstance(part, str | int | None) for part in error.args):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def first_said(word: str | None) -> str | None:
    """The value of the first rank that has one; None if none has."""
    words: list[str | None] = [word]
    if world()[1] > 1:
        words *= world()[1]
        distributed.all_gather_object(words, word)
    return next((word for word in words if word is not None), None)


def _device() -> torch.device:
    """Where the process group adds up."""
    backend = str(distributed.get_backend())
    if "gloo" in backend or "mpi" in backend:
        return torch.device("cpu")
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.accelerator.current_accelerator() or torch.device("cpu")
