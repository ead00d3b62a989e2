"""A new model -> a forecast one can act on: a few guarded fine-tunes, planned and saved."""

from .calibrate import Calibration, calibrate
from .recipes import Recipe

__all__ = ["Calibration", "Recipe", "calibrate"]
