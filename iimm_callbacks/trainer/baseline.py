"""The baseline from which a run's gain and forgetting count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn
from transformers import TrainerState

from ..models.encoders import undisturbed
from ..models.untouched import load_untouched
from ..models.wrappers import (
    adapter_ids,
    find_head,
    find_own_head,
    model_fingerprint,
    trains_outside,
)
from ..monitor import IIMMMonitor
from ..probing import ranks
from ..records.journal import Journal
from ..records.log import get_logger

logger = get_logger(__name__)


def other_baseline(
    model: nn.Module, base_model: nn.Module | str | Path | Callable[[], nn.Module] | None
) -> nn.Module | None:
    """`base_model`, where the model that is about to train may differ from it; else None.

    Args:
        model: As training begins; of several ranks all call this.
        base_model: As `IIMMCallback`.

    Raises:
        Exception: As `untouched.load_untouched`.
    """
    if base_model is None:
        return None
    with undisturbed(model):
        base = ranks.together(lambda: load_untouched(base_model, model))
    if adapter_ids(model) or find_head(model) is not None:
        return base  # the fingerprint leaves these out, and they may have been trained
    return None if model_fingerprint(base) == model_fingerprint(model) else base


def earlier_journal(
    model: nn.Module, key: str, before: IIMMMonitor | None, ended_as: str
) -> Journal | None:
    """The journal of the run that trained this model, where it is known.

    Args:
        model: As training begins.
        key: Under which checkpoints keep the guard's state.
        before: Of the run that trained this module before, in this process.
        ended_as: Fingerprint of the model when that run ended.
    """
    if before is not None and before.looked_at > 0 and model_fingerprint(model) == ended_as:
        return Journal.from_json(before.state_dict())
    return ranks.from_first(lambda: _journal_of_checkpoint(model, key))


def _journal_of_checkpoint(model: nn.Module, key: str) -> Journal | None:
    """That of the checkpoint that the model was loaded from, by `from_pretrained`."""
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    folder = str(getattr(config, "_name_or_path", None) or "")
    file = Path(folder) / "trainer_state.json"
    if not folder or not file.is_file():  # no folder is not the working directory
        return None
    try:
        saved = TrainerState.load_from_json(file).stateful_callbacks.get(key)
        return None if saved is None else Journal.from_json(saved["attributes"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("The guard's state in %s cannot be read: %s", file, error)
        return None


AS_IT_IS = "Gain and forgetting count from the model as it is now."


def counts_from(untouched: nn.Module | None, monitor: IIMMMonitor) -> str:
    """The baseline in words, before `begin`; `untouched` as `other_baseline` gave it."""
    if untouched is not None:
        return "Gain and forgetting count from `base_model`."
    if monitor.is_later_phase:
        return "Gain and forgetting count from the untouched model of the earlier run."
    return AS_IT_IS


def warn_of_other_heads(model: nn.Module) -> None:
    """Warn of parameters that train outside of the dual encoder, which no look shows."""
    outside = trains_outside(model)
    if outside and find_own_head(model) is None:
        logger.warning(
            "%d parameters that train lie outside of the dual encoder (%s among them): accuracy "
            "and gain are those of its zero-shot classifier, not of what these add. To have them "
            "of your own classifier, give its module a method classify(image_embeds) that returns "
            "logits, one column per class",
            len(outside),
            outside[0],
        )
