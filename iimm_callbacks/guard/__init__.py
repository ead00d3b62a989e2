"""Forecast, look, limits and time -> verdict and next look; pure functions."""

from ..records.verdict import Limits, Verdict
from .judging import judge, recommend

__all__ = ["Limits", "Verdict", "judge", "recommend"]
