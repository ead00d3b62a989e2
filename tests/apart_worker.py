"""What `test_apart.py` runs: ranks that raise, are late or die while the others look."""

import os
import signal
import time
from contextlib import suppress

import torch
from forked import on_ranks
from probe_worker import Encode, raised, told

from iimm_callbacks.probing import ranks

LIMIT = 1.0


def run(folder, world, rank):
    encode = Encode()
    probe = encode.probe(batch_size=4)
    found = {"first": told(probe.look(encode.model, 0)), "seconds": [], "errors": []}

    def fails_to_look(step):
        began = time.monotonic()
        found["errors"].append(raised(lambda: probe.look(encode.model, step)))
        found["seconds"].append(time.monotonic() - began)
        (folder / f"{step}-{rank}").touch()

    def away(step):
        """Until all others have ended this look."""
        while len(list(folder.glob(f"{step}-*"))) < world - 1:
            time.sleep(0.01)

    os.environ[ranks.TIMEOUT] = f"{LIMIT}"
    if rank == 1:
        found["errors"].append("")  # its own code raises, so it never comes
        found["seconds"].append(LIMIT)
        away(10)
    else:
        fails_to_look(10)
    os.environ[ranks.TIMEOUT] = "60"
    found["after"] = told(probe.look(encode.model, 20))
    os.environ[ranks.TIMEOUT] = f"{LIMIT}"
    if rank == 0:
        away(30)
    fails_to_look(30)
    os.environ[ranks.TIMEOUT] = "60"
    found["agreed"] = ranks.least(5.0 - rank, "a test"), ranks.any_rank(rank == 1, "a test")
    os.environ[ranks.TIMEOUT] = f"{LIMIT}"
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    fails_to_look(40)
    found["apart"] = ranks.least(5.0, "a test"), ranks.any_rank(True, "a test")
    torch.save(found, folder / f"{rank}.pt")


def main(folder, world):
    """Each rank leaves what it came back with in `<rank>.pt`; the last one dies before it can."""
    with suppress(RuntimeError):  # the last one dies
        on_ranks(world, lambda rank: run(folder, world, rank))
