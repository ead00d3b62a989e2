"""A function on each rank of a gloo group: forked from one process that has imported everything."""

import gc
import os
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
from torch import distributed


def on_ranks(world, function, seconds=60):
    """Run `function(rank)` on every rank; a rank that waits longer for another is ended.

    Raises:
        RuntimeError: A rank failed; it has printed why.
    """
    gc.freeze()  # else each `Trainer.train` walks all imports to collect garbage
    keeper, port = _fork_store()
    children = [_fork(rank, world, function, port, seconds) for rank in range(world)]
    failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    if failed:
        raise RuntimeError(f"ranks {failed} of {world} failed")


def _fork_store():
    """The process that has the ranks' store, and its port: its thread here would break forks."""
    parent, (ours, theirs) = os.getpid(), os.pipe()
    keeper = os.fork()
    if not keeper:
        try:
            store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(theirs, str(store.port).encode())
            os.close(theirs)
            while os.getppid() == parent:
                time.sleep(1)
        finally:
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        return keeper, int(pipe.read())


def _fork(rank, world, function, port, seconds):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # As under torchrun: accelerate reads these.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        torch.set_num_threads(1)
        limit = timedelta(seconds=seconds)
        store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=limit
        )
        function(rank)
        distributed.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
