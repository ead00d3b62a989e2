"""Model inputs -> embeddings, one row each, in parts where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.encoders import Encoder, class_embeddings, move
from .share import ProbeTask

Run = Callable[[Callable[[Any], Tensor], Any], Tensor]


def check_rows(embeds: Tensor, n: int, kind: str) -> None:
    """Raise unless there is one row per item.

    Raises:
        ValueError: There are more or fewer.
    """
    if len(embeds) != n:
        raise ValueError(
            f"the model must give one embedding per {kind}, [{n}, D], got {list(embeds.shape)}; "
            "correct `encode`, or the family's entry"
        )


def at_once(embed: Callable[[Any], Tensor], inputs: Any) -> Tensor:
    """`embed(inputs)`, in one piece."""
    return embed(inputs)


def embed_images(model: nn.Module, encoder: Encoder, inputs: Any, run: Run) -> Tensor:
    """[n, D] image embeddings, before what an adapter adds."""
    return run(partial(encoder.embed_backbone, model), move(inputs, model))


def embed_classes(model: nn.Module, encoder: Encoder, shown: ProbeTask, run: Run) -> Tensor:
    """[C, D] class embeddings of a task."""
    embed = partial(encoder.embed_texts, model)
    prompts = torch.cat([run(embed, move(p, model)) for p in shown.prompts])
    check_rows(prompts, shown.n_prompts, "prompt")
    return class_embeddings(prompts, len(shown.task.templates))
