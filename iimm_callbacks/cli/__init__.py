"""The `iimm` command."""

from ..trainer.calibration.recipes import METHODS
from .commands import app, main

__all__ = ["METHODS", "app", "main"]
