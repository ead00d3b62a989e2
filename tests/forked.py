"""Functions in processes of their own, and on ranks of a gloo group.

They are forked from a process that has imported everything, which takes a new one six seconds.
"""

import gc
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import distributed


def in_a_fork(function, *arguments, seconds=300, **environment):
    """Run a function in a process of its own, which ends with all that it forked; what it printed.

    Raises:
        RuntimeError: It failed or took longer than `seconds`; with what it printed.
    """
    gc.freeze()
    with tempfile.TemporaryFile("w+") as output:
        with warnings.catch_warnings():
            # From Python 3.12 on a fork beside threads, such as xdist's, warns.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _become(function, arguments, output, seconds, environment)
        status = os.waitpid(child, 0)[1]
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        output.seek(0)
        printed = output.read()
    if status:
        raise RuntimeError(f"status {status} of {function.__qualname__}: {printed[-100_000:]}")
    return printed


def _become(function, arguments, output, seconds, environment):
    """This fork is as a process that was started anew: without pytest's hooks and past runs."""
    with _ending():
        os.setpgid(0, 0)
        signal.alarm(seconds)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        warnings.resetwarnings()
        logging.getLogger().handlers.clear()
        os.environ |= environment
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        function(*arguments)


@contextmanager
def _ending():
    """A fork ends with what is inside, which prints why where it fails."""
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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
    with _ending():
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
