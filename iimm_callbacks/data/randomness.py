"""Reading a user's data without moving the random streams that a training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

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
