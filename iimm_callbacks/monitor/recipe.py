"""The recipe of a run, as the user gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..records.checks import anything, dict_of


def checked(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, with steps that a division made a float, such as 8.0, as a whole number.

    Raises:
        ValueError: A value that a JSON file could not hold; the message names it.
    """
    settings: dict[str, Any] = dict_of(anything)(dict(recipe), "recipe")
    steps = settings.get("steps")
    if isinstance(steps, float) and steps.is_integer():
        settings["steps"] = int(steps)
    return settings
