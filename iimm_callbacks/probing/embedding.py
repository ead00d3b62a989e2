"""Model inputs -> embeddings, one row each, in parts where memory does not suffice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.tasks import Task
from ..models.encoders import Encoder, autocast, class_embeddings, move
from ..models.sharded import InStep, inside_forward, is_sharded
from ..models.wrappers import find_head, find_own_head
from ..records.log import get_logger
from .kept import Packed
from .reading import Batch, some_of
from .share import ProbeTask, Share
from .texts import WORTH, KeptTexts

logger = get_logger(__name__)


class Halving:
    """Runs batches through a function, in halves, quarters and so on once memory has run out.

    What is out of memory is what accelerate takes for it (`should_reduce_batch_size`).

    Attributes:
        parts: Into how many parts a batch is cut by now.
        failure: None; it raises.
    """

    def __init__(self) -> None:
        self.parts = 1
        self.failure: Exception | None = None

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

    def skip(self) -> None:
        """Nothing: the others need not this rank for their batches."""


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


class Sharded:
    """Runs batches of a sharded model in one piece; a failure is kept, as all ranks must go on.

    Args:
        steps: Of the model.
        embed: One batch.
        item: Model inputs of a single item, the same on all ranks.

    Attributes:
        failure: The first one.

    Raises:
        OutOfStepError: As `InStep`, here and when called.
    """

    def __init__(self, steps: InStep, embed: Callable[[Any], Tensor], item: Any) -> None:
        self.failure: Exception | None = None
        self._steps = steps
        self._order, self._like = steps.learn(partial(embed, item))

    def __call__(self, embed: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """`embed(batch)`; rows of no meaning from the first failure on."""
        if self.failure is not None:
            self.skip()
        else:
            try:
                return self._steps.run(self._order, partial(embed, batch))
            except Exception as error:
                self.failure = error
        return self._like[:1].expand(_size(batch), -1)

    def skip(self) -> None:
        """Take part in a batch of the others."""
        self._steps.skip(self._order)


Run = Halving | Sharded


@contextmanager
def runs(early: Early, core: nn.Module, share: Share) -> Iterator[tuple[Run, Run]]:
    """How batches of prompts and of images are embedded inside.

    Args:
        early: Of the look; halves of a sharded model's batches would fall out of step.
        core: The dual encoder in its model.
        share: Has one of each.
    """
    model = early.model
    if not is_sharded(model):
        yield early.halving, early.halving
        return
    encoder = share.encoder
    with InStep(model, core).kept() as steps:
        with autocast(model, early.dtype):
            texts = Sharded(steps, partial(encoder.embed_texts, model), move(share.prompt, model))
            images = Sharded(
                steps, partial(encoder.embed_backbone, model), move(share.image, model)
            )
        yield texts, images


class Early:
    """Embeds batches of one look while threads read the next, where an accelerator computes.

    Args:
        model: As it trains.
        halving: Runs them.
        dtype: Of autocast.
        overlaps: Whether to; ``None``: where the model is not on the CPU, whose cores read.

    Attributes:
        model, halving, dtype: As given.
        seconds: Spent.
    """

    def __init__(
        self, model: nn.Module, halving: Halving, dtype: torch.dtype | None, overlaps: bool | None
    ) -> None:
        self.model, self.halving, self.dtype = model, halving, dtype
        first = next(model.parameters(), torch.zeros(0))
        wanted = first.device.type != "cpu" if overlaps is None else overlaps
        self._overlaps = wanted and not is_sharded(model)  # whose ranks embed in step
        self.seconds = 0.0
        self._found: dict[int, Tensor] = {}

    def __call__(self, encoder: Encoder, batch: Batch, inputs: Any) -> None:
        """Embed a batch; one that fails is left to the look."""
        self._found.pop(id(batch), None)  # it may be read a second time
        if not self._overlaps:
            return
        start = time.perf_counter()
        with suppress(Exception):  # the look embeds it again, and tells
            if isinstance(inputs, Packed):
                inputs = inputs.inputs(next((p.device for p in self.model.parameters()), None))
            with autocast(self.model, self.dtype):
                found = embed_images(self.model, encoder, inputs, self.halving)
            found[:1].cpu()  # until it is done, for the clock; threads read on
            self._found[id(batch)] = found
        self.seconds += time.perf_counter() - start

    def holds(self, batch: Batch) -> bool:
        """Whether it has the embeddings of all images of a batch, and of no others.

        Of a batch that lost images since it was read it has not: bit for bit these would be others.
        """
        found = self._found.get(id(batch))
        return found is not None and len(found) == len(batch.positions)

    def embed(self, encoder: Encoder, batch: Batch, n_shown: int, inputs: Any, run: Run) -> Tensor:
        """[n, D] as `embed_images`, of a batch as `Share.shown` gives it."""
        if self.holds(batch):
            return self._found.pop(id(batch))[:n_shown]
        return embed_images(self.model, encoder, inputs, run)


def width_of(model: nn.Module, core: nn.Module, share: Share) -> int:
    """D, by embedding a prompt."""
    prompt = move(share.prompt, model)
    return inside_forward(model, core, lambda: share.encoder.embed_texts(model, prompt).shape[1])


def embed_images(model: nn.Module, encoder: Encoder, inputs: Any, run: Run) -> Tensor:
    """[n, D] image embeddings, before what an adapter adds."""
    return run(partial(encoder.embed_backbone, model), move(inputs, model))


def embed_classes(
    model: nn.Module,
    encoder: Encoder,
    shown: ProbeTask,
    run: Run,
    *,
    kept: KeptTexts | None = None,
    progress: bool = False,
) -> Tensor:
    """[C, D] class embeddings of a task.

    Args:
        model: As it trains.
        encoder: Of the model.
        shown: The task as it is probed.
        run: How a batch is embedded.
        kept: Where to keep those of many prompts, and to have them from.
        progress: Show a progress bar where it takes long.
    """
    embed, each = partial(encoder.embed_texts, model), len(shown.task.templates)
    path = None
    if kept is not None and shown.n_prompts >= WORTH:
        path = kept.path(shown.prompts, each, shown.prompts.told())
    classes: list[Tensor] = []
    n_seen = 0
    first = rest = torch.zeros(0)
    with tqdm(
        total=shown.n_prompts,
        desc=f"IIMM probe: texts of {shown.task.name}",
        unit="prompt",
        disable=None if progress else True,
        leave=False,
        delay=2,
    ) as bar:
        for batch in shown.prompts:
            rows = run(embed, move(batch, model))
            if not classes and kept is not None and path is not None:
                first = rows
                if (found := kept.read(path, first)) is not None:
                    return found
            rest = torch.cat([rest, rows]) if len(rest) else rows
            whole = len(rest) // each * each  # not all prompts at once in memory
            classes.append(class_embeddings(rest[:whole], each))
            rest = rest[whole:]
            n_seen += len(rows)
            bar.update(len(rows))
    check_rows(torch.zeros(n_seen), shown.n_prompts, "prompt")
    if kept is not None and path is not None:
        kept.write(path, first, torch.cat(classes))
    return torch.cat(classes)


def own_logits(
    model: nn.Module, images: Tensor, task: Task, n_classes: int, searches: bool
) -> Tensor | None:
    """Logits of the model's own classifier [n, C]; None where it has none.

    Args:
        model: As it trains.
        images: [n, D] embeddings.
        task: The one being learnt.
        n_classes: C.
        searches: Whether a head that is not ours counts as well.

    Raises:
        ValueError: It has other classes than the task.
    """
    head = find_head(model) or (find_own_head(model) if searches else None)
    logits = None if head is None else head.classify(images)
    if logits is not None and logits.shape[1] != n_classes:
        raise ValueError(
            f"`task` {task.name!r} must have the {logits.shape[1]} classes of the model's own "
            f"classifier, got {n_classes}"
        )
    return logits
