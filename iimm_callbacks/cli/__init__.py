"""The `iimm` command."""

from .commands import METHODS, app, main

__all__ = ["METHODS", "app", "main"]
