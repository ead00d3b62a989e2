"""Calls of other people's code: an exception costs a warning, never the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..records.log import get_logger

logger = get_logger(__name__)


class Forgiving:
    """Calls functions of others: trackers, the terminal, what a user handed over.

    Args:
        strict: Let exceptions through; otherwise they cost one warning for each kind of call.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self._warned: set[str] = set()

    def __call__(self, what: str, do: Callable[[], Any]) -> Any:
        """`do()`, or None where it raises.

        Args:
            what: Who is called, for the warning.
            do: Calls it.
        """
        try:
            return do()
        except Exception as error:
            if self.strict:
                raise
            if what not in self._warned:
                logger.warning(
                    "%s raised %s: %s. Training goes on; further errors of it are not shown.",
                    what,
                    type(error).__name__,
                    error,
                )
            self._warned.add(what)
            return None
