"""A rescue's curve -> table; and what it must be when it is read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..guard import LIMIT_ON
from ..report import page, percent, points
from ..storage.checks import (
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

_WIDTH = 96


def rescue_table(rescue: dict[str, Any], task: str, score: str = "accuracy") -> str:
    """The curve from untouched to fine-tuned, what was chosen, and what that is worth.

    Args:
        rescue: `Rescue.to_json`; of ``applied`` None nothing is said.
        task: Name of the task that was learnt.
        score: What stands in for accuracy there.

    Returns:
        Plain text, at most 96 columns; points, with standard errors.
    """
    table = Table(title=f"Rescue: {task}, untouched (α 0) to fine-tuned (α 1)", width=_WIDTH)
    for column in ("α", score, "gain", "forgot, mean", "forgot, worst", "worst task", ""):
        words = column in ("worst task", "")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    *mixes, held_out = curve(rescue)
    for cells in mixes:
        table.add_row(*cells)
    table.add_section()
    table.add_row(*held_out)
    became = {True: " The model is this mix now.", False: " The model was left as it was."}
    chosen, meaning, *notes = explained(rescue)
    chosen += became.get(rescue["applied"], "")
    return page(table, chosen, f"In points, ± standard error. {meaning}", *notes)


def curve(rescue: dict[str, Any]) -> list[list[str]]:
    """The cells of each mix and, last, of the held-out choice: α, score, gain and so on, a note.

    Args:
        rescue: `Rescue.to_json`.
    """
    mixes = [_cells(m, "chosen" if m["alpha"] == rescue["alpha"] else "") for m in rescue["mixes"]]
    return [*mixes, _cells(rescue["held_out"], "held out")]


def explained(rescue: dict[str, Any]) -> list[str]:
    """What was chosen and why, what "held out" means, and the notes, in sentences.

    Args:
        rescue: `Rescue.to_json`.
    """
    return [
        f"Chosen: α = {rescue['alpha']:.3g}, as {rescue['reason']}.",
        "Held out: what choosing like this gave on images that had no part in the choice.",
        *(f"Note: {note}." for note in rescue["notes"]),
    ]


def mixed(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rescue that a run's model was left with; None where it is the fine-tuned one.

    Args:
        record: `IIMMCallback.record`.
    """
    rescue: dict[str, Any] | None = record.get("rescue")
    return rescue if rescue and rescue["applied"] and rescue["alpha"] < 1 else None


def _cells(mix: dict[str, Any], mark: str) -> list[str]:
    said = [*([] if mix["inside"] else ["over"]), *([mark] if mark else [])]
    return [
        f"{mix['alpha']:.2f}",
        percent(mix["accuracy"]),
        *(
            f"{points(mix[key])} ± {points(mix[f'{key}_se']).removeprefix('+')}"
            for key in ("gain", "forgetting", "worst")
        ),
        mix["worst_task"],
        ", ".join(said),
    ]


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
