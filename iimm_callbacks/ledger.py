"""A run's place in the store: what to learn from, and its own outcome, written exactly once."""

from __future__ import annotations

import logging
import os
import weakref
from pathlib import Path

import torch

from .outcomes import Outcome
from .store import append_outcome, default_store, read_outcomes

logger = logging.getLogger(__name__)


class Ledger:
    """Reads the store at the start of a run and adds the run's outcome at its end.

    Failing to read or write costs a warning, never the run. The latest `draft` is written by
    `close`, or, as the interrupted run it then is, when the ledger goes away or the process ends
    otherwise than by being killed. Of several ranks the first one writes.

    Args:
        store: JSON-lines file; ``"default"``: `default_store`; ``None``: nothing is read or kept.
    """

    def __init__(self, store: str | Path | None) -> None:
        self.path = default_store() if store == "default" else Path(store) if store else None
        self._drafts: list[Outcome] = []
        self._finalizer = weakref.finalize(self, _write, self.path, self._drafts, os.getpid())

    def read(self) -> list[Outcome]:
        """The outcomes in the store; none where it does not exist or cannot be read."""
        if self.path is None:
            return []
        try:
            return read_outcomes(self.path) if self.path.exists() else []
        except (OSError, ValueError, KeyError) as error:
            logger.warning("The outcomes in %s cannot be learnt from: %s", self.path, error)
            return []

    def draft(self, outcome: Outcome) -> None:
        """The run's outcome as it stands; of several ranks the first keeps it."""
        # Asked here: at the end the process group may be gone, and every rank would be alone.
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not grouped or torch.distributed.get_rank() == 0:
            self._drafts[:] = [outcome]

    def close(self) -> None:
        """Write the draft."""
        self._finalizer()


def _write(path: Path | None, drafts: list[Outcome], pid: int) -> None:
    forked = os.getpid() != pid  # a data loader's worker has a copy of this ledger
    if path is None or not drafts or forked:
        return
    try:
        append_outcome(path, drafts[0])
    except (OSError, ValueError) as error:
        logger.warning("This run's outcome is not on record: %s", error)
