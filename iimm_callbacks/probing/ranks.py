"""Several processes train one run: what they add up, and what they agree on.

All of it is for every rank at the same time. Before each exchange the ranks report in the process
group's store, without any collective. If one does not come within the time limit, all get one and
the same error, the late one included, and the process group stays as it was.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..measures.embeddings import NotFiniteError
from ..records.log import get_logger

_T = TypeVar("_T")
logger = get_logger(__name__)

TIMEOUT = "IIMM_CALLBACKS_TIMEOUT"  # environment variable: seconds
_DEFAULT_TIMEOUT = 300.0
_INTERRUPTIBLE = 1.0  # seconds: signals are handled between two waits, and others use the store


class RanksApartError(RuntimeError):
    """A rank did not come to an exchange in time; raised on all ranks, with the same words."""


@dataclass
class _Scope:
    """Something that all ranks do together.

    Attributes:
        name: In words, for the error.
        number: How many of that name there have been; of one in another, where in that it came.
        exchanges: In it so far.
    """

    name: str
    number: int | str = 0
    exchanges: int = 0


_scopes = [_Scope("the guard's start or end")]
_entered: Counter[str] = Counter()
_counted_for: Any = None  # weakly, the process group


@contextmanager
def during(what: str) -> Iterator[None]:
    """Name what the exchanges inside are for. Ranks that were apart are together again in the next.

    Args:
        what: Such as "the look at step 40".
    """
    _count_anew()
    outer = _scopes[-1]
    if len(_scopes) > 1:  # whatever each rank did alone before, they are together in this
        number: int | str = f"{outer.name} {outer.number}.{outer.exchanges}"
        outer.exchanges += 1
    else:
        number = _entered[what] = _entered[what] + 1
    _scopes.append(_Scope(what, number))
    try:
        yield
    finally:
        _scopes.pop()


def _count_anew() -> None:
    """Count from the start in another process group: some of its ranks may be new processes.

    Unless its store is that of the former one, where what was reported once stays.
    """
    global _counted_for
    store, group = _store(), distributed.group.WORLD if world()[1] > 1 else None
    if store is None or group is None or (_counted_for is not None and _counted_for() is group):
        return
    _counted_for = weakref.ref(group)
    with suppress(RuntimeError):
        if not store.check([f"iimm/at/{world()[0]}"]):
            _entered.clear()
            for scope in _scopes:
                scope.number = scope.exchanges = 0


def world() -> tuple[int, int]:
    """This process's rank and their number: (0, 1) where it trains alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def time_limit() -> float:
    """Seconds that a rank waits for another: ``$IIMM_CALLBACKS_TIMEOUT``, else half as in training.

    That is half of the process group's own limit, such as the Trainer's ``ddp_timeout``: the other
    rank may wait in a collective of the training, which must not end first; 300 where the group
    does not tell.

    Raises:
        ValueError: The variable is not a positive number.
    """
    said = os.environ.get(TIMEOUT, "")
    with suppress(ValueError):
        if not said:
            return _limit_of_group()
        if float(said) > 0:
            return float(said)
    raise ValueError(f"`{TIMEOUT}` must be seconds, a positive number, got {said!r}")


def _limit_of_group() -> float:
    try:
        group: Any = distributed.distributed_c10d._get_default_group()
        return float(group._get_backend(_device()).options._timeout.total_seconds()) / 2
    except (AttributeError, RuntimeError, ValueError):  # there is none, or of another kind
        return _DEFAULT_TIMEOUT


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
        RanksApartError: A rank did not come.
    """
    if world()[1] == 1:
        if failure is not None:
            raise failure
        return values.cpu()
    diverged = isinstance(failure, NotFiniteError)
    failed = torch.tensor([failure is not None, diverged], dtype=torch.float64)
    sums = _reduce(torch.cat([values.cpu(), failed]))
    if sums[-2] > 0:
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        rank, why = next((r, w) for r, w in enumerate(_all_said(said)) if w is not None)
        kind = NotFiniteError if sums[-1] > 0 else RuntimeError
        raise failure or kind(f"rank {rank} failed ({why})")
    return sums[:-2]


def packed(values: Tensor, bits: int) -> Tensor:
    """Whole numbers [n] in [0, 2**bits), several in one float64 of 52 bits, for `add_up`.

    Where one rank has a number and the others 0, packed numbers add up as they would.
    """
    each = 52 // bits
    rows = torch.nn.functional.pad(values.long(), (0, -len(values) % each)).reshape(-1, each)
    return (rows << bits * torch.arange(each)).sum(1).double()


def unpacked(sums: Tensor, bits: int, n: int) -> Tensor:
    """The n numbers that `packed` was given, as float64."""
    rows = sums.long()[:, None] >> bits * torch.arange(52 // bits)
    return (rows % (1 << bits)).flatten()[:n].double()


def together(make: Callable[[], _T]) -> _T:
    """What each rank makes for itself, if it succeeds on all of them.

    Raises:
        Exception: What `make` raised here.
        RuntimeError: It failed on another rank, or as `add_up`.
    """
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failure = error
    add_up(torch.zeros(0, dtype=torch.float64), failure)
    return made


def any_rank(flag: bool, what: str) -> bool:
    """Whether any rank says so; no, on all, where a rank does not come.

    Args:
        flag: Of this rank.
        what: As `during`.
    """
    return least(-float(flag), what) < 0


def least(number: float, what: str) -> float:
    """The smallest number of any rank; 0, on all, where a rank does not come.

    Args:
        number: Of this rank.
        what: As `during`.
    """
    if world()[1] == 1:
        return number
    mine = torch.tensor([number], dtype=torch.float64)
    try:
        with during(what):
            return float(_reduce(mine, distributed.ReduceOp.MIN))
    except RanksApartError as error:
        logger.warning("The IIMM guard: %s. Training goes on.", error)
        return 0.0


def from_first(make: Callable[[], _T]) -> _T:
    """What the first rank makes, on all ranks; it alone is asked.

    Raises:
        Exception: What `make` raises, on all ranks.
        RanksApartError: As `add_up`; the time that `make` takes counts.
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
    _report()
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
    return next((word for word in _all_said(word) if word is not None), None)


def _all_said(word: str | None) -> list[str | None]:
    words: list[str | None] = [word] * world()[1]
    if len(words) > 1:
        _report()
        distributed.all_gather_object(words, word)
    return words


def _reduce(values: Tensor, op: Any = None) -> Tensor:
    _report()
    values = values.to(_device())
    work = distributed.all_reduce(values, op or distributed.ReduceOp.SUM, async_op=True)
    if values.device.type == "cpu":
        work.wait(timedelta(seconds=time_limit()))  # should a rank die right now
    else:
        work.wait()
    return values.cpu()


def _report() -> None:
    """Wait until all ranks are here; the first to decide decides for all, in the store.

    Raises:
        RanksApartError: They are not, within the time limit.
    """
    store = _store()
    if store is None:
        return
    _count_anew()
    rank, n_ranks = world()
    scope, limit = _scopes[-1], time_limit()
    here = f"{scope.name} ({scope.number}.{scope.exchanges})"
    scope.exchanges += 1
    verdict = f"iimm/{here}/verdict"
    try:
        store.set(f"iimm/at/{rank}", here)
        if store.add(f"iimm/{here}/n", 1) == n_ranks:
            said = store.compare_set(verdict, "", "go")
        else:
            end = time.monotonic() + limit
            while not store.check([verdict]) and (left := end - time.monotonic()) > 0:
                with suppress(RuntimeError):  # it tells no timeout from a lost store
                    store.wait([verdict], timedelta(seconds=min(left, _INTERRUPTIBLE)))
            if not store.check([verdict]):
                missing = _missing(store, here, scope.name, limit)
                store.compare_set(verdict, "", missing)
            said = store.get(verdict)
    except RuntimeError as error:
        raise RanksApartError(
            f"the ranks can no longer reach each other at {scope.name} ({error}); the first rank, "
            "or the launcher, has probably ended: see its output"
        ) from error
    if said != b"go":
        raise RanksApartError(said.decode())


def _missing(store: Any, here: str, name: str, limit: float) -> str:
    """Which ranks are not here, and where they were last, in words."""
    late = []
    for rank in range(world()[1]):
        key = f"iimm/at/{rank}"
        at = store.get(key).decode() if store.check([key]) else ""
        if at != here:
            at = at.rpartition(" (")[0]
            late.append(f"{rank} (last at {at})" if at and at != name else f"{rank}")
    few = ", ".join(late[:8]) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
    return (
        f"of {world()[1]} ranks, {few or 'one'} did not come to {name} within {limit:g} s: it has "
        f"failed, has died or is slow, see its output; `{TIMEOUT}` sets the seconds"
    )


def _store() -> Any:
    """The store of the process group; None where it has none, such as under MPI."""
    try:
        return distributed.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return None


def _device() -> torch.device:
    """Where the process group adds up."""
    backend = str(distributed.get_backend())
    if "gloo" in backend or "mpi" in backend:
        return torch.device("cpu")
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.accelerator.current_accelerator() or torch.device("cpu")
