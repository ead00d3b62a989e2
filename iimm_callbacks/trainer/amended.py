"""Adds our section to what `Trainer.create_model_card` and `push_to_hub` write."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..models.wrappers import find_dual_encoder


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
