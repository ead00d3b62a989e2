"""Tasks -> what this rank shows the model of them: preprocessed images and tokenized prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import seed_all
from ..data.tasks import Task
from ..models.encoders import Encoder
from ..records.log import get_logger
from . import ranks
from .kept import Packed
from .reading import FAILED, Batch, Reader, ahead, same_image, sha256_of, some_of
from .texts import Prompts, captions_of, first_of_each, tell_one_text

logger = get_logger(__name__)


@dataclass
class ProbeTask:
    """A task as it is probed, the same on all ranks.

    Attributes:
        task: The task.
        labels: [N], of the images in the probe.
        owners: [T], the image that each caption belongs to; ``None`` where each label has one text.
        prompts: In batches; every rank embeds all of them.
        n_prompts: How many they are.
        fingerprint: Hash of images, labels, prompts and preprocessing.
        digest: [N, 32] of each image.
    """

    task: Task
    labels: Tensor
    owners: Tensor | None
    prompts: Prompts
    n_prompts: int
    fingerprint: str
    digest: Tensor


@dataclass
class Share:
    """What this rank shows the model at every look.

    Attributes:
        encoder: Of the model.
        tasks: All tasks, the one being learnt first.
        batches: Of this rank.
        image, prompt: One of each as model inputs, the same on all ranks.
        draws: Whether reading images draws random numbers.
        threads: That read images which are not in memory, a batch each.
    """

    encoder: Encoder
    tasks: list[ProbeTask]
    batches: list[Batch]
    image: Any
    prompt: Any
    draws: bool
    threads: int

    def shown(
        self, part: float, model: nn.Module, is_needed: Callable[[Batch], bool] = lambda _: True
    ) -> Iterator[tuple[Batch, int, Any, Exception | None]]:
        """The batches with those of their images that are among the first `part` of their task.

        Images that are not in memory are read ahead, by threads.

        Args:
            part: Share of each task's images, in (0, 1].
            model: On whose device kept images are unpacked.
            is_needed: Whether a batch's images are read at all.

        Yields:
            A batch, how many of its images are shown, these as model inputs (None without any), and
            why they cannot be read any more.
        """

        def read(batch: Batch) -> tuple[Batch, int, Any, Exception | None]:
            n_shown = batch.n_shown(len(self.tasks[batch.task].labels), part)
            try:
                inputs = self._inputs(batch, n_shown) if n_shown and is_needed(batch) else None
                return batch, n_shown, inputs, None
            except Exception as error:
                return batch, n_shown, None, error

        device = next((p.device for p in model.parameters()), None)
        is_kept = all(batch.inputs is not None for batch in self.batches)
        threads = 1 if is_kept else self.threads
        for batch, n_shown, inputs, failure in ahead(read, self.batches, threads):
            if isinstance(inputs, Packed):
                inputs = inputs.inputs(device)
            yield batch, n_shown, inputs, failure

    def _inputs(self, batch: Batch, n: int) -> Any:
        if batch.inputs is not None:
            return some_of(batch.inputs, slice(n))
        task = self.tasks[batch.task].task
        images = [same_image(task, position, self.draws) for position in batch.positions]
        if self.draws:
            seed_all(0)
        return some_of(self.encoder.preprocess(images), slice(n))


def read_share(
    tasks: Sequence[Task],
    encoder: Encoder,
    *,
    sizes: Sequence[int],
    batch_size: int,
    cache_limit: int,
    progress: bool,
    embed: Callable[[Encoder, Batch, Any], None] | None = None,
) -> Share:
    """Read and preprocess this rank's share of the probe; all ranks do so together.

    The batches are those of a single process, so that its embeddings are these, bit for bit; ranks
    take them in turns. Images that cannot be read or preprocessed are left out, with a warning.

    Args:
        tasks: The task being learnt, then the off-target tasks.
        encoder: Of the model.
        sizes: Images of each task that was given no `probe_size`.
        batch_size: Images in one forward pass.
        cache_limit: Bytes of preprocessed images kept in memory, on each rank.
        progress: Show a progress bar.
        embed: As `Reader`.

    Raises:
        ValueError: Fewer than two images of a task can be read, or ranks were given other tasks.
        RuntimeError: Another rank failed.
    """
    subsets = _agree_on_subsets(tasks, sizes, batch_size)
    batches = _deal(subsets, batch_size)
    reader = Reader(tasks, encoder, cache_limit, progress, embed)
    digests = [torch.zeros(len(subset), 32, dtype=torch.float64) for subset in subsets]

    ranks.together(lambda: reader.read_all(batches, digests))
    own = torch.cat(digests).flatten()
    added = ranks.add_up(ranks.packed(own, 8))
    sums = ranks.unpacked(added, 8, len(own)).reshape(-1, 32)
    digests = list(torch.split(sums, [len(subset) for subset in subsets]))
    kept = [digest.any(1) for digest in digests]
    _check_readable(tasks, kept, reader.problems)
    first = [
        mask & first_of_each(task, digest) if task.is_captions else mask
        for task, mask, digest in zip(tasks, kept, digests, strict=True)
    ]
    texts = [
        captions_of(task.captions(subset), digest, mask) if task.is_captions else None
        for task, subset, digest, mask in zip(tasks, subsets, digests, first, strict=True)
    ]
    for batch in batches:
        _keep(batch, kept[batch.task], first[batch.task])
    shown = [list(compress(s, mask.tolist())) for s, mask in zip(subsets, first, strict=True)]
    digests = [digest[mask] for digest, mask in zip(digests, first, strict=True)]
    return ranks.together(lambda: _finish(tasks, shown, digests, texts, batches, encoder, reader))


def check_apart(task: ProbeTask, *off_target: ProbeTask) -> None:
    """Raise where an off-target task is the task itself; warn where they share images.

    Raises:
        ValueError: It is.
    """
    for other in off_target:
        if other.fingerprint == task.fingerprint:
            raise ValueError(
                f"`off_target` task {other.task.name!r} is the task itself (same images, "
                "labels and prompts); off-target tasks are those that are not trained on"
            )
        so = "what is learnt of these hides what is forgotten; off-target tasks should share none"
        tell_of_shared(other, task, f"those of task {task.task.name!r}", so)


def tell_of_shared(task: ProbeTask, other: ProbeTask, where: str, so: str) -> None:
    """Warn of images of a task that are images of another one as well.

    Args:
        task: As it is probed.
        other: What it should share none with.
        where: That, in words.
        so: What comes of it, in words.
    """
    same = int(among(task.digest, other.digest).sum())
    if same and ranks.world()[0] == 0:
        size, name = len(task.digest), task.task.name
        logger.warning("%d of %d probe images of %r are among %s: %s", same, size, name, where, so)


def among(digests: Tensor, others: Tensor) -> Tensor:
    """[n] whether an image is one of the others, by [n, 32] and [m, 32] digests."""
    known = {tuple(row) for row in others.tolist()}
    return torch.tensor([tuple(row) in known for row in digests.tolist()], dtype=torch.bool)


def _keep(batch: Batch, kept: Tensor, first: Tensor) -> None:
    """Leave in a batch the `first` of each image; `kept` are those of its task that were read."""
    rows = slice(batch.first, batch.first + len(batch.positions))
    was_read, stays = kept[rows], first[rows]
    if batch.inputs is not None and not torch.equal(was_read, stays):
        batch.inputs = some_of(batch.inputs, stays[was_read].nonzero().flatten().tolist())
    batch.positions = list(compress(batch.positions, stays.tolist()))
    batch.first = int(first[: batch.first].sum())


def _agree_on_subsets(
    tasks: Sequence[Task], sizes: Sequence[int], batch_size: int
) -> list[list[int]]:
    """Positions of each task's images; an error where ranks would show the model other things."""

    def draw() -> tuple[list[list[int]], Tensor]:
        subsets = [task.subset(size) for task, size in zip(tasks, sizes, strict=True)]
        shown = [
            (
                t.name, s, t.labels(s), t.templates,
                t.captions(s) if t.is_captions else t.class_names, t.metric and t.metric.name,
            )
            for t, s in zip(tasks, subsets, strict=True)
        ]  # fmt: skip
        return subsets, sha256_of(repr((shown, batch_size)).encode())

    subsets, digest = ranks.together(draw)
    if not torch.equal(ranks.add_up(digest), digest * ranks.world()[1]):
        raise ValueError(
            "`task`, `off_target` and `batch_size` must be the same on all ranks, got others; "
            "give every rank the whole data set, the guard splits it"
        )
    return subsets


def _deal(subsets: list[list[int]], batch_size: int) -> list[Batch]:
    plan = [
        (task, start, subset[start : start + batch_size])
        for task, subset in enumerate(subsets)
        for start in range(0, len(subset), batch_size)
    ]
    rank, n_ranks = ranks.world()
    plan += [(0, 0, [])] * (-len(plan) % n_ranks)
    return [Batch(*batch) for batch in plan[rank::n_ranks]]


def _check_readable(tasks: Sequence[Task], kept: list[Tensor], problems: dict[int, str]) -> None:
    left_out = [len(mask) - int(mask.sum()) for mask in kept]
    if not any(left_out):
        return
    first = [ranks.first_said(problems.get(number)) for number in range(len(tasks))]
    for task, mask, problem in zip(tasks, kept, first, strict=True):
        if int(mask.sum()) < 2:
            if problem is not None and problem.startswith(FAILED):
                raise ValueError(
                    f"{problem} on images of task {task.name!r} that can be read, on all but "
                    f"{int(mask.sum())} of {len(mask)}; pass the processor of this model"
                )
            raise ValueError(
                f"`dataset` of task {task.name!r} must hold at least 2 images that can be read, "
                f"got {int(mask.sum())} of {len(mask)}: {problem}"
            )
    if ranks.world()[0] == 0:
        logger.warning(
            "%d of the IIMM probe's images cannot be read and are left out of all its "
            "measurements, the first because: %s",
            sum(left_out),
            next(problem for problem in first if problem),
        )


def _finish(
    tasks: Sequence[Task],
    readable: list[list[int]],
    digests: list[Tensor],
    texts: list[list[list[str]] | None],
    batches: list[Batch],
    encoder: Encoder,
    reader: Reader,
) -> Share:
    shown = []
    for task, positions, digest, captions in zip(tasks, readable, digests, texts, strict=True):
        labels, names, owners = task.labels(positions), list(task.class_names), None
        whole = hashlib.sha256()
        if captions is not None:
            names = [caption for own in captions for caption in own]
            if len(names) > len(labels):
                owners = torch.tensor([i for i, own in enumerate(captions) for _ in own])
                whole.update(repr(owners.tolist()).encode())
        prompts = Prompts(names, task, encoder)
        whole.update(f"({labels}, ".encode())  # with what follows the `repr` of a tuple
        for piece in prompts.listed():
            whole.update(piece)
        whole.update(f", {encoder.description!r})".encode())
        whole.update(bytes(digest.flatten().to(torch.uint8).tolist()))
        tell_one_text(task, prompts)
        shown.append(
            ProbeTask(
                task, torch.tensor(labels), owners, prompts, len(prompts),
                whole.hexdigest()[:16], digest,
            )
        )  # fmt: skip
    seed_all(0)
    image = encoder.preprocess(tasks[0].images(readable[0][:1]))
    prompt = encoder.tokenize(tasks[0].fill(shown[0].prompts.names[:1])[:1])
    return Share(encoder, shown, batches, image, prompt, reader.draws, reader.n_ahead)
