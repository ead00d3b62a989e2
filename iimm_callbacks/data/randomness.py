"""The random streams that a training draws from: kept, seeded, compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Inside, anything may draw random numbers; after, the streams of the CPU are as before.

    Those of accelerators are left alone: to ask for them would start the accelerator.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def seed_all(seed: int) -> None:
    """Seed every random stream; `random_streams_kept` and `undisturbed` restore them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def streams() -> tuple[Any, ...]:
    """The state of all random streams of the CPU, to be compared."""
    own = np.random.get_state(legacy=False)
    state = own["state"]
    return (
        random.getstate(),
        (state["key"].tobytes(), state["pos"], own["has_gauss"], own["gauss"]),
        torch.get_rng_state().numpy().tobytes(),
    )
