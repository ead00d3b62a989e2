"""Alerts to trackers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers.integrations import TrackioCallback, WandbCallback

from ..records.verdict import Verdict
from ..reports.words import level_words
from . import host

_SEVERITY = {"continue": "INFO", "warn": "WARN", "stop": "ERROR"}
_LONGEST_TITLE = 63  # that Weights & Biases takes
_NO_WAIT = 1e-3  # seconds; it drops a second alert of one title within a minute, unless told not to


def due(task: str, verdict: Verdict, before: str) -> list[tuple[str, Callable[[], None]]]:
    """The alerts that a verdict calls for, none of them sent yet.

    An alert has the verdict's reason as its text, and goes to Weights & Biases and Trackio, each
    where the Trainer reports to it and its run is open. It comes from within a hook, as
    `host.find_trainer` does. The trackers' modules are those that the Trainer has imported.

    Args:
        task: Name of the task that is being learnt, for the title.
        verdict: At this look.
        before: Level of the verdict at the look before; ``"continue"`` at the first look, so that
            the first one gives an alert only if it is no "continue".

    Returns:
        Pairs of a tracker's name and a call that sends it the alert. The call raises what the
        tracker raises; it says nothing about whether anybody was reached. Empty where the level is
        that of the look before.
    """
    if verdict.level == before:
        return []
    trainer = host.find_trainer()
    callbacks = trainer.callback_handler.callbacks if trainer else []
    title = f"IIMM guard, {level_words(verdict.level)}: {task}"[:_LONGEST_TITLE]
    alert = (title, verdict.reason, _SEVERITY[verdict.level])
    return [
        (name, partial(send, *alert))
        for name, kind, send in (
            ("Weights & Biases", WandbCallback, _to_wandb),
            ("Trackio", TrackioCallback, _to_trackio),
        )
        if any(isinstance(callback, kind) for callback in callbacks)
    ]


def _to_wandb(title: str, text: str, severity: str) -> None:
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.run.alert(title=title, text=text, level=severity, wait_duration=_NO_WAIT)


def _to_trackio(title: str, text: str, severity: str) -> None:
    trackio: Any = sys.modules.get("trackio")
    if not hasattr(trackio, "alert"):  # the first versions have none
        return
    if trackio.context_vars.current_run.get() is not None:
        trackio.alert(title=title, text=text, level=trackio.AlertLevel[severity])
