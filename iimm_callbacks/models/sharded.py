"""Models whose weights are spread over ranks (FSDP 1 and 2): put together where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

_T = TypeVar("_T")
_FSDP1, _FSDP2 = "FullyShardedDataParallel", "FSDPModule"
_APART = (
    "a forward pass failed in the middle of FSDP's own collectives ({}), so this rank is no longer "
    "in step with the others and would train on wrong weights; end all ranks, and go on from the "
    "last checkpoint with a smaller `batch_size` of the guard"
)


class OutOfStepError(BaseException):
    """A rank has missed a collective of FSDP's; what it would train from here on is wrong.

    No `Exception`: what forgives a failed look must not forgive this.
    """


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards it: its ranks must run equally many forward passes, in step."""
    return any(_kind(module) for module in model.modules())


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is the wrapper of FSDP 1."""
    return _kind(module) == _FSDP1


def check_measurable(model: nn.Module) -> None:
    """Raise for a model whose weights are spread over ranks in a way that cannot be looked through.

    Raises:
        ValueError: DeepSpeed ZeRO-3, or tensor parallelism.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "`model` must have whole weights, or be sharded by FSDP, got DeepSpeed ZeRO-3: it "
                "puts weights together in its engine's own forward only, which embeds no images "
                "alone; use ZeRO-2 or FSDP, or train without the guard"
            )
        if hasattr(parameter, "placements") and not is_sharded(model):
            raise ValueError(
                f"`model` must have whole weights, or be sharded by FSDP, got {name!r} split by "
                "tensor parallelism; train without it, or without the guard"
            )


def inside_forward(model: nn.Module, core: nn.Module, function: Callable[[], _T]) -> _T:
    """`function()`, called where the model's own forward pass would run.

    There FSDP has put together the weights that no unit of its own holds, and modules called from
    there put together theirs. A model that is not sharded is left alone.

    Args:
        model: The model as it trains.
        core: The module in it that `function` calls by other names than `forward`.
        function: Embeds images and texts; on all ranks the same number of times.
    """
    units = [m for m in model.modules() if _kind(m) and any(core is part for part in m.modules())]
    run: Callable[[], Any] = function
    for unit in reversed(units):  # the innermost first
        run = _within(unit, run)
    return run()  # type: ignore[no-any-return]


class InStep:
    """Forward passes of a sharded model that fail on one rank and harm no other.

    Each FSDP unit puts its weights together in a collective when it is entered. A rank whose pass
    fails computes no further, but still enters every unit that the others enter. So its failure is
    its own, until it says so. A model that is not sharded is left alone.

    Args:
        model: The model as it trains.
        core: As `inside_forward`; units around it have been entered already.
    """

    def __init__(self, model: nn.Module, core: nn.Module) -> None:
        units = [m for m in model.modules() if _kind(m)]
        self._units = [u for u in units if not any(core is part for part in u.modules())]
        self._entered: list[nn.Module] = []
        self._failure: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[InStep]:
        """Inside, passes can be run."""
        with ExitStack() as stack:
            for unit in self._units:
                inner: Any = unit.module if is_fsdp1(unit) else unit
                stack.enter_context(_as_forward(inner, self._harmless(unit, inner.forward)))
            yield self

    def learn(self, embed: Callable[[], _T]) -> tuple[list[nn.Module], _T]:
        """The units that a pass enters, in order; and what a small one, `embed()`, returns.

        Raises:
            OutOfStepError: It failed.
        """
        self._entered, self._failure = [], None
        try:
            made = embed()
            if self._failure is not None:
                raise self._failure
        except Exception as error:
            raise OutOfStepError(_APART.format(error)) from error
        return self._entered, made

    def run(self, order: list[nn.Module], embed: Callable[[], _T]) -> _T:
        """`embed()`, a pass that enters the units of `order`.

        Raises:
            Exception: What it raises, after the units have been entered that it left out.
            OutOfStepError: They could not be.
        """
        self._entered, self._failure = [], None
        try:
            made = embed()
        except Exception as error:
            self._failure = self._failure or error
        if self._failure is None:
            return made
        failure = self._failure.with_traceback(None)  # it holds on to tensors
        self.skip(order, len(self._entered))
        raise failure

    def skip(self, order: list[nn.Module], done: int = 0) -> None:
        """Only enter the units of a pass, but for those of the latest pass that are `done`.

        Raises:
            OutOfStepError: They could not be.
        """
        self._failure = failure = self._failure or RuntimeError("left out")
        try:
            if self._entered[:done] != order[:done]:
                raise RuntimeError("its passes enter FSDP's units in another order every time")
            for unit in order[done:]:
                unit()
        except Exception as error:
            raise OutOfStepError(_APART.format(failure)) from error
        finally:
            self._failure = None

    def _harmless(self, unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._entered.append(unit)
            if self._failure is None:
                try:
                    return forward(*args, **kwargs)
                except Exception as error:  # maybe for want of what a unit inside left out
                    self._failure = self._failure or error
            return None

        return run


def full_parameters(
    model: nn.Module, part: nn.Module | None = None
) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Every parameter: its name, itself, and its whole value; on all ranks at once where sharded.

    Args:
        model: The model as it trains.
        part: Only the parameters of this module in it, by their names there.
    """
    part = model if part is None else part
    units: list[Any] = [m for m in model.modules() if is_fsdp1(m)]
    if not units:
        for name, parameter in part.named_parameters():
            whole: Any = parameter
            if hasattr(parameter, "placements"):  # FSDP 2
                whole = whole.full_tensor()
            yield name, parameter, whole
    for unit in units:  # one after the other, to have few of them in memory
        with unit.summon_full_params(unit, recurse=False, writeback=False):
            own = {id(p) for p in unit.parameters()} - {
                id(p) for other in unit.modules() if other is not unit and other in units
                for p in other.parameters()
            }  # fmt: skip
            for name, parameter in part.named_parameters():
                if id(parameter) in own:
                    yield name, parameter, parameter


def _kind(module: nn.Module) -> str:
    # By name: importing FSDP takes time, and FSDP 2 has moved between modules.
    names = {base.__name__ for base in type(module).__mro__}
    return next((kind for kind in (_FSDP1, _FSDP2) if kind in names), "")


def _within(unit: Any, function: Callable[[], _T]) -> Callable[[], _T]:
    def run() -> _T:
        found: list[_T] = []
        inner = unit.module if is_fsdp1(unit) else unit
        with _as_forward(inner, lambda: found.append(function())):
            unit()
        if not is_fsdp1(unit):
            unit.reshard()  # the outermost unit would stay whole until the next backward
        return found[0]

    return run


@contextmanager
def _as_forward(module: nn.Module, function: Callable[[], Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # accelerate puts its autocast there
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
