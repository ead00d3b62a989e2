"""Tasks -> what this rank shows the model of them: preprocessed images and tokenized prompts."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.sources import content
from ..data.tasks import Task
from ..models.encoders import TEXT_BATCH, Encoder
from ..models.undisturbed import seed_all
from ..records.log import get_logger
from . import ranks
from .ahead import ahead, n_threads, streams
from .kept import Packed, find_levels
from .texts import captions_of, first_of_each, tell_one_text

logger = get_logger(__name__)

_WORTH_THREADS = 2e-3  # seconds an image; below that threads wait for one another
FEWEST = 8  # images of a task that a look shows
_FAILED = "`processor` failed"


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
        draws: Whether reading images draws random numbers.
        threads: That read images which are not in memory.
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
        images = self.tasks[batch.task].task.images(batch.positions)
        if self.draws:
            seed_all(0)
        return some_of(self.encoder.preprocess(images), slice(n))


def some_of(batch: Any, rows: slice | list[int]) -> Any:
    """These rows of a batch of model inputs, packed or not."""
    if isinstance(batch, Packed):
        return batch.some(rows)
    if isinstance(batch, Mapping):
        return {k: v[rows] if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch[rows] if isinstance(rows, slice) else [batch[row] for row in rows]


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
    reader = _Reader(tasks, encoder, cache_limit, progress)
    digests = [torch.zeros(len(subset), 32, dtype=torch.float64) for subset in subsets]

    ranks.together(lambda: reader.read_all(batches, digests))
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
    return ranks.together(lambda: _finish(tasks, shown, digests, texts, batches, encoder, reader))


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


@dataclass
class _Read:
    """What came of reading a batch.

    Attributes:
        digests: [n, 32] of every image, zeros where it cannot be read.
        inputs: Of the others, preprocessed, maybe packed; None where there are none.
        problem: The first one, in words.
    """

    digests: Tensor
    inputs: Any = None
    problem: str | None = None


class _Reader:
    """Reads batches by several threads, and keeps what fits into memory.

    Where data set or processor draw random numbers, one thread reads, and the processor draws the
    same for a batch every time.

    Attributes:
        draws: Whether they do.
        threads: That read.
        problems: Task -> the first one, in words.
    """

    def __init__(self, tasks: Sequence[Task], encoder: Encoder, room: int, progress: bool) -> None:
        self._tasks = tasks
        self._encoder = encoder
        self._room = room
        self._progress = progress
        self._levels = find_levels(encoder.preprocess)
        self.draws, self.threads = False, 1
        self.problems: dict[int, str] = {}

    def read_all(self, batches: Sequence[Batch], digests: Sequence[Tensor]) -> None:
        """Fill in the `inputs` of batches and the digests of their images, by task."""
        room = self._room
        seed_all(0)
        before = streams()
        began = time.perf_counter()
        self._read_all(batches[:1], digests)  # alone, to see whether it draws and is worth threads
        an_image = (time.perf_counter() - began) / max(len(batches[0].positions), 1)
        if streams() == before:
            self.threads = n_threads() if an_image > _WORTH_THREADS else 1
            self._read_all(batches[1:], digests)
        if streams() != before:
            self.draws, self.threads, self._room, self.problems = True, 1, room, {}
            self._read_all(batches, digests)

    def _read_all(self, batches: Sequence[Batch], digests: Sequence[Tensor]) -> None:
        with tqdm(
            total=sum(len(b.positions) for b in batches),
            desc="IIMM probe: preprocessing",
            unit="image",
            disable=None if self._progress else True,
            leave=False,
            delay=2,
        ) as bar:
            for batch, found in zip(batches, ahead(self._read, batches, self.threads), strict=True):
                if found.problem is not None:
                    self.problems.setdefault(batch.task, found.problem)
                digests[batch.task][batch.first : batch.first + len(found.digests)] = found.digests
                self._room -= _n_bytes(found.inputs)
                batch.inputs = found.inputs if self._room >= 0 else None
                bar.update(len(found.digests))

    def _read(self, batch: Batch) -> _Read:
        task = self._tasks[batch.task]
        found = _Read(torch.zeros(len(batch.positions), 32, dtype=torch.float64))
        images = {}
        for row, position in enumerate(batch.positions):
            for last_try in (False, True):  # the second where a disk or a network hiccuped
                try:
                    images[row] = task.images([position])[0]
                    break
                except Exception as error:
                    if last_try:
                        found.problem = found.problem or f"{error}"
        try:
            inputs = self._preprocess(images)
        except Exception:
            images = {row: image for row, image in images.items() if self._suits(image, found)}
            inputs = self._preprocess(images)
        for row, image in images.items():
            found.digests[row] = _digest(content(image))
        packed = None if self._levels is None else self._levels.pack(inputs)
        found.inputs = packed or inputs
        if isinstance(found.inputs, Packed) and torch.cuda.is_available():
            found.inputs = found.inputs.pinned()
        return found

    def _preprocess(self, images: dict[int, Any]) -> Any:
        if self.draws:
            seed_all(0)
        return self._encoder.preprocess(list(images.values())) if images else None

    def _suits(self, image: Any, found: _Read) -> bool:
        try:
            self._preprocess({0: image})
        except Exception as error:
            said = f"{_FAILED} ({type(error).__name__}: {error})"
            found.problem = found.problem or said
            return False
        return True


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
    reader: _Reader,
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
    seed_all(0)
    image = encoder.preprocess(tasks[0].images(readable[0][:1]))
    prompt = encoder.tokenize(tasks[0].prompts(readable[0])[:1])
    return Share(encoder, shown, batches, image, prompt, reader.draws, reader.threads)


def _digest(data: bytes) -> Tensor:
    return torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.float64)


def _n_bytes(inputs: Any) -> int:
    if isinstance(inputs, Packed):
        return inputs.nbytes
    if isinstance(inputs, dict):
        return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    return sum(len(content(image)) for image in inputs) if isinstance(inputs, list) else 0
