"""A run's files: its run file while it runs, its line in the store when it ends."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .catalog import Catalog, Listed
from .log import get_logger
from .objects import Address, as_store
from .outcomes import Outcome
from .run_file import process, save_run, sweep
from .store import append_outcome, as_outcomes, default_store, open_store

logger = get_logger(__name__)


@dataclass(frozen=True)
class Past:
    """The runs that a run learns from, and the store that its own outcome is added to.

    Attributes:
        runs: `Outcome` records, or a file or data set of them; ``None``: those in `store`.
        store: As `Ledger`.
    """

    runs: str | Path | Address | Iterable[Outcome] | None
    store: str | Path | Address | None

    @classmethod
    def of(
        cls, outcomes: str | Path | Address | Iterable[Outcome] | Past | None, **former: Any
    ) -> Past:
        """From `outcomes` of `IIMMCallback`, and from the former `store`.

        Raises:
            TypeError: `outcomes` holds something else.
            ValueError: It is an empty text.
        """
        if isinstance(outcomes, Past):
            return outcomes
        if isinstance(outcomes, str) and not outcomes.strip():
            raise ValueError(
                f"`outcomes` must name a store, got {outcomes!r}; None learns and saves nothing"
            )
        has_store = "store" in former
        if isinstance(outcomes, str | Path | Address):
            runs = outcomes if has_store and outcomes != "default" else None
            return cls(runs, former.get("store", outcomes))
        runs_given = None if has_store and outcomes is None else as_outcomes(outcomes)
        return cls(runs_given, former.get("store"))


class Ledger:
    """Reads the store at the start of a run, keeps the run's file, adds its outcome at its end.

    Failing to read or write costs a warning, never the run. The latest `draft` is written to the
    store by `close`, or, as the interrupted run it then is, when the ledger goes away or the
    process ends otherwise than by being killed.

    Args:
        store: File, folder or address; ``"default"``: `default_store`; ``None``: nothing is read or
            kept.
        run_file: JSON file; ``None``: none.
    """

    def __init__(
        self, store: str | Path | Address | None, run_file: str | Path | None = None
    ) -> None:
        self.path = default_store() if store == "default" else as_store(store) if store else None
        self.run_file = None if run_file is None else Path(run_file)
        self._begun = self._warned = self._is_written = self._is_stored = False
        self._drafts: list[Outcome] = []
        self._finalizer = weakref.finalize(self, _write, self.path, self._drafts, os.getpid())

    def catalog(self) -> Catalog:
        """The runs in the store; none where it does not exist or cannot be read."""
        if self.path is None:
            return Listed([])
        try:
            return open_store(self.path)
        except (OSError, TypeError, ValueError, KeyError) as error:
            logger.warning("The saved runs in %s cannot be read: %s", self.path, error)
            return Listed([])

    def draft(self, outcome: Outcome, record: dict[str, Any] | None = None) -> None:
        """The run as it stands: its outcome, kept for the store, and its record for the run file.

        Of several ranks only the first calls this; at the end their process group may be gone.
        """
        self._drafts[:] = [outcome]
        if record is None or self.run_file is None:
            return
        try:
            if not self._begun:
                self.run_file.parent.mkdir(parents=True, exist_ok=True)
                sweep(self.run_file)
            self._begun = True
            save_run(record | process(record), self.run_file)
            self._is_written = True
        except (OSError, ValueError) as error:
            self._is_written = False
            if not self._warned:
                logger.warning("The run file %s is not up to date: %s", self.run_file, error)
            self._warned = True

    def close(self) -> None:
        """Write the draft."""
        self._is_stored = bool(self._finalizer()) or self._is_stored  # it runs once

    @property
    def saved(self) -> tuple[Path | None, Path | Address | None]:
        """The run file and the store, each only if it has the run; after `close`."""
        run_file = self.run_file if self._is_written else None
        return run_file, self.path if self._is_stored else None

    def drop(self) -> None:
        """Forget the draft: another ledger goes on with the run."""
        self._drafts.clear()


def _write(path: Path | Address | None, drafts: list[Outcome], pid: int) -> bool:
    """Whether the outcome is in the store now."""
    forked = os.getpid() != pid  # a data loader's worker has a copy of this ledger
    if path is None or not drafts or forked:
        return False
    try:
        append_outcome(path, drafts[0])
    except (OSError, ValueError) as error:
        logger.warning("The outcome of this run was not saved: %s", error)
        return False
    return True
