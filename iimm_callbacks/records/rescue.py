"""A rescue's curve as a run file has it."""

from __future__ import annotations

from typing import Any

from .checks import (
    DIFFERENCE,
    ERROR,
    FRACTION,
    anything,
    count,
    flag,
    list_of,
    object_of,
    one_of,
    or_none,
    text,
)
from .verdict import LIMIT_ON

_MIX = object_of(
    {
        "alpha": FRACTION, "accuracy": FRACTION, "gain": DIFFERENCE, "gain_se": ERROR,
        "forgetting": DIFFERENCE, "forgetting_se": ERROR, "worst": DIFFERENCE, "worst_se": ERROR,
        "worst_task": text, "inside": flag,
    },
    rest=anything,
)  # fmt: skip
_RESCUE = object_of(
    {
        "mixes": list_of(_MIX), "alpha": FRACTION, "reason": text, "held_out": _MIX,
        "limits": object_of(
            {"max_forgetting": or_none(FRACTION), "limit_on": one_of(*LIMIT_ON)}, rest=anything
        ),
        "n_tensors": count, "applied": flag, "notes": list_of(text), "runtime": ERROR,
    },
    rest=anything,
)  # fmt: skip


def check_rescue(value: Any, name: str) -> dict[str, Any]:
    """`Rescue.to_json` as a run file has it; a check as those of `checks`.

    Raises:
        ValueError: It is not that; the message names the field.
    """
    rescue: dict[str, Any] = _RESCUE(value, name)
    if rescue["alpha"] not in [mix["alpha"] for mix in rescue["mixes"]]:
        raise ValueError(f"`{name}` must hold the mix chosen, got none of α = {rescue['alpha']}")
    return rescue
