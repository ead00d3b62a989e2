"""What a run's gain and forgetting count from, checked and said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..models.undisturbed import undisturbed
from ..models.wrappers import load_untouched, model_fingerprint, trains_outside, zero_shot_twin
from ..probing import ranks

logger = logging.getLogger(__name__)


def other_baseline(
    model: nn.Module, base_model: nn.Module | str | Path | Callable[[], nn.Module] | None
) -> nn.Module | None:
    """`base_model`, where the model that is about to train may differ from it; else None.

    Args:
        model: As training begins; of several ranks all call this.
        base_model: As `IIMMCallback`.

    Raises:
        Exception: As `wrappers.load_untouched`.
    """
    if base_model is None:
        return None
    with undisturbed(model):
        base = ranks.together(lambda: load_untouched(base_model, model))
    # The fingerprint leaves adapters out, which may have been trained.
    same = model_fingerprint(base) == model_fingerprint(model) and zero_shot_twin(model) is None
    return None if same else base


def counts_from(untouched: nn.Module | None) -> str:
    """The baseline in words; `untouched` as `other_baseline` gave it."""
    baseline = "the model as it is now" if untouched is None else "`base_model`"
    return f"Gain and forgetting count from {baseline}."


def warn_of_trained() -> None:
    """Tell that the model of a finished run is taken as untouched."""
    logger.warning(
        "This model was trained by the run before, and gain and forgetting count from the model as "
        "it is now; give the one before that as `base_model` to count from there"
    )


def warn_of_other_heads(model: nn.Module) -> None:
    """Tell of parameters that train outside of the dual encoder, which no look shows."""
    outside = trains_outside(model)
    if outside:
        logger.warning(
            "%d parameters that train lie outside of the dual encoder (%s among them): accuracy "
            "and gain are those of its zero-shot classifier, not of what these add",
            len(outside),
            outside[0],
        )
