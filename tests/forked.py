"""A function on each rank of a gloo group: forked from one process that has imported everything."""

import gc
import os
import sys
import traceback
from datetime import timedelta

import torch
from torch import distributed


def on_ranks(world, function, folder, seconds=60):
    """Run `function(rank)` on every rank; a rank that waits longer for another is ended.

    Raises:
        RuntimeError: A rank failed; it has printed why.
    """
    gc.freeze()  # else each `Trainer.train` walks all imports to collect garbage
    children = [_fork(rank, world, function, folder, seconds) for rank in range(world)]
    failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
    if failed:
        raise RuntimeError(f"ranks {failed} of {world} failed")


def _fork(rank, world, function, folder, seconds):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # As under torchrun: accelerate reads these.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
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
