"""Beside the log: alerts to trackers, and our section on the card that the Trainer writes."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers.integrations import TrackioCallback, WandbCallback

from ..models.wrappers import find_dual_encoder
from ..records.verdict import Verdict
from ..reports.words import level_words
from . import host

_SEVERITY = {"continue": "INFO", "warn": "WARN", "stop": "ERROR"}
_LONGEST_TITLE = 63  # that Weights & Biases takes
_NO_WAIT = 1e-3  # seconds; it drops a second alert of one title within a minute, unless told not to


def amend_cards(trainer: Any, key: str, amend: Callable[[Path], None]) -> None:
    """Amend every card that this Trainer writes, and so what `push_to_hub` uploads.

    `Trainer.create_model_card` rewrites the whole ``README.md``, `push_to_hub` calls it right
    before the upload, and no hook of a callback lies between the two (transformers 4.57 and 5.23;
    `on_push_begin` comes before both): so the method is wrapped, on this Trainer alone.

    Args:
        trainer: The Trainer, or one of a subclass with a card of its own.
        key: Whose amendment it is; a later one of the same key replaces it.
        amend: Called with the path of the card, on the first process only.
    """
    wrapper = vars(trainer).get("create_model_card")
    amendments = getattr(wrapper, "_iimm_amendments", None)
    if amendments is None:
        amendments = {}
        trainer.create_model_card = _wrapped(trainer, wrapper, amendments)
    amendments[key] = amend


def _wrapped(
    trainer: Any, own: Callable[..., Any] | None, amendments: dict[str, Callable[[Path], None]]
) -> Callable[..., Any]:
    """`create_model_card`, then the amendments; keeps no Trainer, and with it no model, alive."""
    known = weakref.ref(trainer)
    plain = type(trainer).create_model_card

    @functools.wraps(plain)
    def create_model_card(*args: Any, **settings: Any) -> Any:
        host: Any = known()
        with _with_config(host.model):
            made = plain(host, *args, **settings) if own is None else own(*args, **settings)
        if host.is_world_process_zero():
            for amend in amendments.values():
                amend(Path(host.args.output_dir) / "README.md")
        return made

    shell: Any = create_model_card
    shell.__signature__ = inspect.signature(trainer.create_model_card)  # without `self`
    shell._iimm_amendments = amendments
    return create_model_card


@contextmanager
def _with_config(model: Any) -> Iterator[None]:
    """While it lasts a module without a `config` has one: the Trainer's card asks for its origin.

    It has it for that time only: the Trainer writes the tokenizer's special tokens into what it
    finds there.
    """
    if hasattr(model, "config"):
        yield
        return
    model.config = None
    with suppress(ValueError):  # no family that we know, so nothing to say of its origin
        model.config = getattr(find_dual_encoder(model), "config", None)
    try:
        yield
    finally:
        del model.config


def alerts_due(task: str, verdict: Verdict, before: str) -> list[tuple[str, Callable[[], None]]]:
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
