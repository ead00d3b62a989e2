"""Loggers whose messages name the package where nothing else does."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any


class _Named(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic from Python 3.11 on
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        # Without a handler Python prints the bare message. Any handler has its own format.
        return msg if self.logger.hasHandlers() else f"iimm_callbacks: {msg}", kwargs


def get_logger(name: str) -> _Named:
    """The logger of this name, as `logging.getLogger` has it; no handler is added."""
    return _Named(logging.getLogger(name), {})
