"""Looking at a model in training: no trace is left, and what is frozen is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import random_streams_kept


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate inside, and leave no trace: no gradients, modes and random streams restored.

    Train mode is restored module by module, because ``model.train()`` would wake submodules that
    were frozen in eval mode. `no_grad`, not `inference_mode`: a tensor that a model caches under
    the latter cannot be saved for backward. The 4-bit layers of bitsandbytes on some CPUs repack
    their weights in place at the first evaluation, and cannot be trained after: not in here.

    Args:
        model: The model that is put in eval mode for the while.
    """
    modes = [(module, module.training) for module in model.modules()]
    packing: list[Any] = [
        m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)
    ]
    model.eval()
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    try:
        with torch.no_grad(), _device_streams_kept(), random_streams_kept():
            yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True
        for module, training in modes:
            module.training = training


@contextmanager
def _device_streams_kept() -> Iterator[None]:
    """The random streams of all accelerators as before; `torch.manual_seed` seeds them, too."""
    with ExitStack() as after:
        for many in (torch.cuda, torch.xpu):
            if many.is_available():
                after.callback(many.set_rng_state_all, many.get_rng_state_all())
        if torch.backends.mps.is_available():
            after.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


def autocast(
    model: nn.Module, dtype: torch.dtype | None, cache_enabled: bool = True
) -> AbstractContextManager[Any]:
    """`torch.autocast` on the model's device; with ``dtype=None`` that of the caller, if any."""
    if dtype is None:
        return nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype, cache_enabled=cache_enabled)


class FrozenPart:
    """Keeps what a part of a model returned for as long as that part cannot have changed.

    At every look `update` embeds one item with gradients on, unless everything trains or what
    trains is what trained when gradients last reached that item. What is kept stays valid only if

    1. no gradient reaches that embedding: nothing that trains takes part in it;
    2. it is bit for bit what it was: what swaps or merges weights, or writes
       to them through ``.data``, changes it;
    3. no frozen tensor of the model was written to in place: not thawed, trained and frozen again
       between two looks, no running statistics of a batch norm moved.

    A write through ``.data`` to what that one item does not use (other rows of a token table) is
    the one change that goes unseen.

    Args:
        keep_on: Device that keeps them; ``None``: the model's.

    Attributes:
        is_frozen: Whether the part was frozen at the latest `update`.
    """

    def __init__(self, keep_on: str | None = None) -> None:
        self.keep_on = keep_on
        self.is_frozen = False
        self._trains: list[bool] = []  # which parameters did at the latest embedding
        self._witness: Tensor | None = None
        self._versions: list[tuple[int, int]] = []
        self._kept: dict[Any, Tensor] = {}

    def update(self, model: nn.Module, embed: Callable[[], Tensor]) -> None:
        """Forget what was kept if the part can have changed; call it before each round of `get`.

        Args:
            model: The model in its present state, in eval mode.
            embed: Embeds one item, always the same. Run it outside of autocast's cache: a cast
                weight from there has no gradient.
        """
        trains = [p.requires_grad for p in model.parameters()]
        if all(trains) or (trains == self._trains and not self.is_frozen):
            self.is_frozen = False  # as before, and then nothing is kept
            self._kept.clear()
            return
        self._trains = trains
        with torch.enable_grad():
            embeds = embed()
        self.is_frozen = not embeds.requires_grad
        self._device = embeds.device
        witness, versions = embeds.detach().cpu(), _versions(model)
        same = _equal(witness, self._witness)
        if not (self.is_frozen and same and versions == self._versions):
            self._kept.clear()
        self._witness, self._versions = witness, versions

    def holds(self, key: Any) -> bool:
        """Whether `get` needs not compute."""
        return key in self._kept

    def get(self, key: Any, compute: Callable[[], Tensor], *, keep: bool = True) -> Tensor:
        """The value kept under a key, else `compute()`, kept if the part is frozen and `keep`."""
        if key in self._kept:
            return self._kept[key].to(self._device)
        value = compute()
        if keep and self.is_frozen:
            self._kept[key] = value if self.keep_on is None else value.to(self.keep_on)
        return value


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    # Every write in place counts a tensor's version up; inference tensors have none.
    tensors = [*model.parameters(), *model.buffers()]
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors if not t.requires_grad]
