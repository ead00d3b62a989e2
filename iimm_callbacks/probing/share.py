"""Tasks -> what this rank shows the model of them: preprocessed images and tokenized prompts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.sources import content
from ..data.tasks import Task
from ..models.encoders import TEXT_BATCH, Encoder
from ..models.undisturbed import seed_all
from ..records.log import get_logger
from . import ranks
from .texts import captions_of, first_of_each, tell_one_text

logger = get_logger(__name__)

FEWEST = 8  # images of a task that a look shows
_FAILED = "`processor` failed"


class _ProcessorError(Exception):
    """What the processor says to an image that can be read."""


@dataclass
class ProbeTask:
    """A task as it is probed, the same on all ranks.

    Attributes:
        task: The task.
        labels: [N], of the images in the probe.
        owners: [T], the image that each caption belongs to; ``None`` where each label has one text.
        prompts: Tokenized, in batches; every rank embeds all of them.
        n_prompts: How many they are.
        fingerprint: Hash of images, labels, prompts and preprocessing.
        digest: [N, 32] of each image.
    """

    task: Task
    labels: Tensor
    owners: Tensor | None
    prompts: list[Any]
    n_prompts: int
    fingerprint: str
    digest: Tensor


@dataclass
class Batch:
    """One forward pass of this rank.

    Attributes:
        task: Which of the tasks, 0 for the one being learnt.
        first: Which of the task's images in the probe comes first.
        positions: Of its images in the task's data set. None at all where it only keeps step: all
            ranks have equally many batches, see `sharded.inside_forward`.
        inputs: Preprocessed; ``None`` where memory did not suffice.
    """

    task: int
    first: int
    positions: list[int]
    inputs: Any | None = None

    def n_shown(self, n_images: int, part: float) -> int:
        """Images of it among the first `part` of the `n_images` of its task."""
        shown = min(max(math.ceil(part * n_images), FEWEST), n_images)
        return min(max(shown - self.first, 0), len(self.positions))


@dataclass
class Share:
    """What this rank shows the model at every look.

    Attributes:
        encoder: Of the model.
        tasks: All tasks, the one being learnt first.
        batches: Of this rank.
        image, prompt: One of each as model inputs, the same on all ranks.
    """

    encoder: Encoder
    tasks: list[ProbeTask]
    batches: list[Batch]
    image: Any
    prompt: Any

    def inputs(self, batch: Batch) -> Any:
        """The images of a batch as model inputs, read again where they are not in memory.

        Raises:
            ValueError: One cannot be read any more.
        """
        if batch.inputs is not None:
            return batch.inputs
        images = self.tasks[batch.task].task.images(batch.positions)
        return _preprocess(self.encoder, images)


def some_of(batch: Any, rows: slice | list[int]) -> Any:
    """These rows of a batch of model inputs."""
    if isinstance(batch, Mapping):
        return {k: v[rows] if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch[rows] if isinstance(rows, slice) else [batch[row] for row in rows]


def _preprocess(encoder: Encoder, images: list[Any]) -> Any:
    seed_all(0)  # a processor that draws, such as which part of a sound, draws the same every time
    return encoder.preprocess(images)


def read_share(
    tasks: Sequence[Task],
    encoder: Encoder,
    *,
    sizes: Sequence[int],
    batch_size: int,
    cache_limit: int,
    progress: bool,
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

    Raises:
        ValueError: Fewer than two images of a task can be read, or ranks were given other tasks.
        RuntimeError: Another rank failed.
    """
    subsets = _agree_on_subsets(tasks, sizes, batch_size)
    batches = _deal(subsets, batch_size)
    reader = _Reader(tasks, encoder, cache_limit)
    digests = [torch.zeros(len(subset), 32, dtype=torch.float64) for subset in subsets]

    ranks.together(lambda: _read(reader, batches, digests, progress))
    sums = ranks.add_up(torch.cat(digests).flatten()).reshape(-1, 32)
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
    return ranks.together(lambda: _finish(tasks, shown, digests, texts, batches, encoder))


def _read(
    reader: _Reader, batches: Sequence[Batch], digests: Sequence[Tensor], progress: bool
) -> None:
    with tqdm(
        total=sum(len(b.positions) for b in batches),
        desc="IIMM probe: preprocessing",
        unit="image",
        disable=None if progress else True,
        leave=False,
        delay=2,
    ) as bar:
        for batch in batches:
            found = reader.read(batch)
            digests[batch.task][batch.first : batch.first + len(found)] = found
            bar.update(len(found))


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
            (t.name, s, t.labels(s), t.prompts(s), t.metric and t.metric.name)
            for t, s in zip(tasks, subsets, strict=True)
        ]
        return subsets, _digest(repr((shown, batch_size)).encode())

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


class _Reader:
    """Reads batches, notes what cannot be read, and keeps what fits into memory."""

    def __init__(self, tasks: Sequence[Task], encoder: Encoder, room: int) -> None:
        self._tasks = tasks
        self._encoder = encoder
        self._room = room
        self.problems: dict[int, str] = {}  # task -> the first one

    def read(self, batch: Batch) -> Tensor:
        """Fill in `inputs`; a digest of every image [n, 32], zeros where it cannot be read."""
        task = self._tasks[batch.task]
        digests = torch.zeros(len(batch.positions), 32, dtype=torch.float64)
        images = {}
        for row, position in enumerate(batch.positions):
            for last_try in (False, True):  # the second where a disk or a network hiccuped
                try:
                    images[row] = task.images([position])[0]
                    break
                except Exception as error:
                    if last_try:
                        self._note(batch, error)
        try:
            inputs = _preprocess(self._encoder, list(images.values())) if images else None
        except Exception:
            images = {row: image for row, image in images.items() if self._suits(batch, image)}
            inputs = _preprocess(self._encoder, list(images.values())) if images else None
        for row, image in images.items():
            digests[row] = _digest(content(image))
        self._room -= _n_bytes(inputs)
        batch.inputs = inputs if self._room >= 0 else None
        return digests

    def _suits(self, batch: Batch, image: Any) -> bool:
        try:
            _preprocess(self._encoder, [image])
        except Exception as error:
            self._note(batch, _ProcessorError(f"{type(error).__name__}: {error}"))
            return False
        return True

    def _note(self, batch: Batch, error: Exception) -> None:
        said = f"{error}"
        if isinstance(error, _ProcessorError):
            said = f"{_FAILED} ({said})"
        self.problems.setdefault(batch.task, said)


def _check_readable(tasks: Sequence[Task], kept: list[Tensor], problems: dict[int, str]) -> None:
    left_out = [len(mask) - int(mask.sum()) for mask in kept]
    if not any(left_out):
        return
    first = [ranks.first_said(problems.get(number)) for number in range(len(tasks))]
    for task, mask, problem in zip(tasks, kept, first, strict=True):
        if int(mask.sum()) < 2:
            if problem is not None and problem.startswith(_FAILED):
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
) -> Share:
    shown = []
    for task, positions, digest, captions in zip(tasks, readable, digests, texts, strict=True):
        labels, prompts, owners = task.labels(positions), task.prompts(positions), None
        whole = hashlib.sha256()
        if captions is not None:
            prompts = task.fill([caption for own in captions for caption in own])
            if len(prompts) > len(labels) * len(task.templates):
                owners = torch.tensor([i for i, own in enumerate(captions) for _ in own])
                whole.update(repr(owners.tolist()).encode())
        whole.update(repr((labels, prompts, encoder.description)).encode())
        whole.update(bytes(digest.flatten().to(torch.uint8).tolist()))
        tokenized = [
            encoder.tokenize(prompts[i : i + TEXT_BATCH])
            for i in range(0, len(prompts), TEXT_BATCH)
        ]
        fingerprint = whole.hexdigest()[:16]
        tell_one_text(task, prompts, tokenized)
        shown.append(
            ProbeTask(
                task, torch.tensor(labels), owners, tokenized, len(prompts), fingerprint, digest
            )
        )
    image = _preprocess(encoder, tasks[0].images(readable[0][:1]))
    prompt = encoder.tokenize(tasks[0].prompts(readable[0])[:1])
    return Share(encoder, shown, batches, image, prompt)


def _digest(data: bytes) -> Tensor:
    return torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.float64)


def _n_bytes(inputs: Any) -> int:
    if isinstance(inputs, dict):
        return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    return sum(len(content(image)) for image in inputs) if isinstance(inputs, list) else 0
