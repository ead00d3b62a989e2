"""The settings of `IIMMCallback`, which documents them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..data.tasks import Task
from ..guard.schedule import Every
from ..models.encoders import EncodePair
from ..monitor.measured import Verbose
from ..records.ledger import Past
from ..records.verdict import Limits, Verdict

Action = Literal["warn", "stop", "rescue"] | Callable[[Verdict], Any]
FORMER = {
    "limit_on": "use `max_forgetting=Limits(0.05, limit_on=...)`",
    "confidence": "use `max_forgetting=Limits(0.05, confidence=...)`",
    "on_exceed": "use `action='rescue'`",
    "store": "name the file as `outcomes`, or call `append_outcome` with `guard.outcome`",
    "run_file": "the file is always `iimm_<task>.json` in the output folder",
    "method": "it is recognized from the model",
}


class Settings:
    """The settings of a guarded run."""

    task: Task
    off_target: list[Task] | None
    limits: Limits
    action: Action
    rescues: bool
    every: Every
    past: Past
    max_overhead: float | None
    train: Any
    base_model: nn.Module | str | Path | Callable[[], nn.Module] | None
    processor: Any
    encode: EncodePair | None
    batch_size: int
    cache_limit: int
    report: bool
    card: bool
    strict: bool
    verbose: Verbose
    former: dict[str, Any]


def check_action(
    action: Action,
    limits: Limits,
    off_target: Sequence[Task] | None,
    on_exceed: str | None = None,
    **_: Any,
) -> bool:
    """Whether a run over its limit is rescued; raises where there is nothing to act on."""
    if action not in ("warn", "stop", "rescue") and not callable(action):
        raise TypeError(
            f"`action` must be 'warn', 'stop', 'rescue' or a callable of the verdict, got "
            f"{action!r}"
        )
    if on_exceed not in (None, "rescue"):
        raise ValueError(f"`on_exceed` must be 'rescue' or None, got {on_exceed!r}")
    unguarded = off_target is not None and len(off_target) == 0
    rescues = on_exceed == "rescue" or action == "rescue"
    if (limits.max_forgetting is None or unguarded) and (rescues or action == "stop"):
        missing = "`max_forgetting`" if limits.max_forgetting is None else "`off_target` task"
        raise ValueError(
            f"`action={'rescue' if rescues else 'stop'!r}` needs a limit to keep to, got no "
            f"{missing}; give one, or use 'warn'"
        )
    return rescues
