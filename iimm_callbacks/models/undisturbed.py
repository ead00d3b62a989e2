"""Looking at a model in training without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

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
    restore_devices = _keep_device_streams()
    model.eval()
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    try:
        with torch.no_grad(), random_streams_kept():
            yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True
        for module, training in modes:
            module.training = training
        restore_devices()


def _keep_device_streams() -> Callable[[], None]:
    """Puts the random streams of all accelerators back; `torch.manual_seed` seeds them, too."""
    restore: list[Callable[[], None]] = []
    for name in ("cuda", "xpu"):
        many = getattr(torch, name, None)
        if many is not None and many.is_available():
            restore.append(partial(many.set_rng_state_all, many.get_rng_state_all()))
    if torch.backends.mps.is_available():
        restore.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def put_back() -> None:
        for stream in restore:
            stream()

    return put_back


def autocast(
    model: nn.Module, dtype: torch.dtype | None, cache_enabled: bool = True
) -> AbstractContextManager[Any]:
    """`torch.autocast` on the model's device; with ``dtype=None`` that of the caller, if any."""
    if dtype is None:
        return nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype, cache_enabled=cache_enabled)
