"""Model inputs -> embeddings, one row each, in parts where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from ..models.encoders import Encoder, class_embeddings, move
from ..records.log import get_logger
from .reading import some_of
from .share import ProbeTask

logger = get_logger(__name__)


class Halving:
    """Runs batches through a function, in halves, quarters and so on once memory has run out.

    What is out of memory is what accelerate takes for it (`should_reduce_batch_size`).

    Attributes:
        parts: Into how many parts a batch is cut by now.
    """

    def __init__(self) -> None:
        self.parts = 1

    def __call__(self, embed: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """`embed(batch)`, where needed put together from parts.

        Args:
            embed: Model inputs of n items -> [n, D].
            batch: Model inputs: tensors by name, each with the items in its first dimension, or a
                list of items.

        Raises:
            Exception: What `embed` raises, if it is not out of memory, or is so for a single item.
        """
        parts = self.parts
        while True:
            try:
                embeds = torch.cat([embed(part) for part in _split(batch, parts)])
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or parts >= _size(batch):
                    raise
            parts *= 2  # not in `except`, where the traceback holds on to the tensors
            clear_device_cache()
        if parts > self.parts:
            self.parts = parts
            logger.warning(
                "The IIMM probe ran out of memory and continues in batches of %d",
                -(-_size(batch) // parts),
            )
        return embeds


def _split(batch: Any, parts: int) -> Iterator[Any]:
    if parts == 1:
        yield batch
        return
    size = _size(batch)
    step = -(-size // parts)
    for start in range(0, size, step):
        yield some_of(batch, slice(start, start + step))


def _size(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return next((len(v) for v in batch.values() if isinstance(v, Tensor)), 1)
    return len(batch)


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
