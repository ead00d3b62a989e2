"""The settings of `IIMMCallback`, which documents them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..data.tasks import Task
from ..guard.schedule import Every
from ..models.encoders import EncodePair
from ..records.outcomes import Outcome
from ..records.verdict import Limits, Verdict

Action = Literal["warn", "stop"] | Callable[[Verdict], Any]


class Settings:
    """What a run is guarded by."""

    task: Task
    off_target: Sequence[Task] | None
    limits: Limits
    action: Action
    on_exceed: Literal["rescue"] | None
    every: Every
    max_overhead: float | None
    outcomes: str | Path | Iterable[Outcome] | None
    store: str | Path | None
    run_file: str | Path | None
    base_model: nn.Module | str | Path | Callable[[], nn.Module] | None
    report: bool
    card: bool
    method: str | None
    processor: Any
    encode: EncodePair | None
    batch_size: int
    cache_limit: int
    train: Any
    strict: bool
    verbose: bool


def check(
    action: Action,
    on_exceed: str | None,
    max_forgetting: float | None,
    off_target: Sequence[Task] | None,
) -> None:
    """Raise where the settings leave nothing to act on."""
    if action not in ("warn", "stop") and not callable(action):
        raise TypeError(
            f"`action` must be 'warn', 'stop' or a callable of the verdict, got {action!r}"
        )
    if on_exceed not in (None, "rescue"):
        raise ValueError(f"`on_exceed` must be 'rescue' or None, got {on_exceed!r}")
    unguarded = off_target is not None and len(off_target) == 0
    if max_forgetting is None or unguarded:
        missing = "no `max_forgetting`" if max_forgetting is None else "no `off_target` task"
        if action == "stop":
            raise ValueError(
                f"`action='stop'` has nothing to judge by: {missing}; give one, or use 'warn'"
            )
        if on_exceed == "rescue":
            raise ValueError(
                f"`on_exceed='rescue'` has no limit to keep to: {missing}; give one, or None"
            )
