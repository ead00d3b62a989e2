"""A batch of the probe's images -> model inputs and digests, by several threads.

Threads read images one after the other, so all of them read the batch that is embedded first; each
batch is preprocessed as a whole, as one process would.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.images import content, seed_all, streams
from ..data.tasks import Task
from ..models.encoders import Encoder
from .kept import Packed, find_levels

_T = TypeVar("_T")
_R = TypeVar("_R")
_MOST = 16  # threads: each holds a batch of pictures
FEWEST = 8  # images of a task that a look shows
FAILED = "`processor` failed"
_FEW = 8  # images that are read to try
_DECODED = 2**32  # bytes of pictures in batches that are read ahead; one batch may have more
_WORTH_THREADS = 2e-3  # seconds an image; below that threads wait for one another


def n_shown(n_images: int, part: float) -> int:
    """How many images of a task of `n_images` a look at `part` of them shows: its first ones."""
    return min(max(math.ceil(part * n_images), FEWEST), n_images)


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
        return min(max(n_shown(n_images, part) - self.first, 0), len(self.positions))


def some_of(batch: Any, rows: slice | list[int]) -> Any:
    """These rows of a batch of model inputs, packed or not."""
    if isinstance(batch, Packed):
        return batch.some(rows)
    if isinstance(batch, Mapping):
        return {k: v[rows] if isinstance(v, Tensor) else v for k, v in batch.items()}
    return batch[rows] if isinstance(rows, slice) else [batch[row] for row in rows]


def same_image(task: Task, position: int, draws: bool) -> Any:
    """An image of a task; the same every time, whatever is read before it.

    Args:
        task: The task.
        position: Of the image in its data set.
        draws: Whether reading draws random numbers.

    Raises:
        ValueError: It cannot be read.
    """
    if draws:
        seed_all(position)
    return task.images([position])[0]


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


class Reader:
    """Reads batches by several threads, and keeps what fits into memory.

    Where data set or processor draw random numbers, one thread reads; the data set draws the same
    for an image every time, and the processor for a batch.

    Args:
        tasks: Their images are read.
        encoder: Of the model.
        room: Bytes of what is kept.
        progress: Show a progress bar.
        embed: Told of each batch and its model inputs, in order, while the next ones are read.

    Attributes:
        draws: Whether they do.
        threads: That read.
        n_ahead: Batches in work at once: as many as threads, fewer where pictures are large.
        problems: Task -> the first one, in words.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        encoder: Encoder,
        room: int,
        progress: bool,
        embed: Callable[[Encoder, Batch, Any], None] | None = None,
    ) -> None:
        self._tasks = tasks
        self._encoder = encoder
        self._room = room
        self._progress = progress
        self._embed = embed
        self._levels = find_levels(encoder.preprocess)
        self.draws, self.threads, self.n_ahead = False, 1, 1
        self._tried: dict[tuple[int, int], Any] = {}  # (task, row) -> image that was read already
        self.problems: dict[int, str] = {}

    def read_all(self, batches: Sequence[Batch], digests: Sequence[Tensor]) -> None:
        """Fill in the `inputs` of batches and the digests of their images, by task."""
        room = self._room
        seed_all(0)
        before = streams()
        an_image = self._try_few(batches[0])
        if streams() == before:
            self.threads = n_threads() if an_image > _WORTH_THREADS else 1
            largest = max((len(content(image)) for image in self._tried.values()), default=1)
            of_batch = largest * max(len(batches[0].positions), 1)
            self.n_ahead = max(min(self.threads, _DECODED // of_batch), 1)
            self._read_all(batches, digests)
        if streams() != before:
            self.draws, self.threads, self.n_ahead = True, 1, 1
            self._room, self.problems, self._tried = room, {}, {}
            self._read_all(batches, digests)

    def _try_few(self, batch: Batch) -> float:
        """Seconds an image; and random streams are other ones after where it draws."""
        began, task, few = time.perf_counter(), self._tasks[batch.task], batch.positions[:_FEW]
        for row, position in enumerate(few):
            with suppress(Exception):  # told of when the batch is read
                self._tried[batch.task, batch.first + row] = task.images([position])[0]
        with suppress(Exception):
            self._encoder.preprocess(list(self._tried.values()))
        return (time.perf_counter() - began) / max(len(few), 1)

    def _read_all(self, batches: Sequence[Batch], digests: Sequence[Tensor]) -> None:
        with (
            tqdm(
                total=sum(len(b.positions) for b in batches),
                desc="IIMM probe: preprocessing",
                unit="image",
                disable=None if self._progress else True,
                leave=False,
                delay=2,
            ) as bar,
            ThreadPoolExecutor(self.threads, thread_name_prefix="iimm image") as pool,
        ):
            each = pool.map if self.threads > 1 else map
            begun = (  # by this thread, so that images come in order, batch after batch
                (b, each(partial(self._read_image, b), range(len(b.positions)))) for b in batches
            )
            for batch, found in zip(batches, ahead(self._read, begun, self.n_ahead), strict=True):
                if found.problem is not None:
                    self.problems.setdefault(batch.task, found.problem)
                digests[batch.task][batch.first : batch.first + len(found.digests)] = found.digests
                self._room -= _n_bytes(found.inputs)
                batch.inputs = found.inputs if self._room >= 0 else None
                if self._embed is not None and self.threads > 1 and found.inputs is not None:
                    self._embed(self._encoder, batch, found.inputs)
                bar.update(len(found.digests))

    def _read(self, begun: tuple[Batch, Iterator[Any]]) -> _Read:
        batch, read = begun
        found = _Read(torch.zeros(len(batch.positions), 32, dtype=torch.float64))
        images = {}
        for row, image in enumerate(read):
            if isinstance(image, Exception):
                found.problem = found.problem or f"{image}"
            else:
                images[row] = image
        try:
            inputs = self._preprocess(images)
        except Exception:
            images = {row: image for row, image in images.items() if self._suits(image, found)}
            inputs = self._preprocess(images)
        for row, image in images.items():
            found.digests[row] = sha256_of(content(image))
        packed = None if self._levels is None else self._levels.pack(inputs)
        found.inputs = packed or inputs
        if isinstance(found.inputs, Packed) and torch.cuda.is_available():
            found.inputs = found.inputs.pinned()
        return found

    def _read_image(self, batch: Batch, row: int) -> Any:
        """The image of a row; or why it cannot be read."""
        if (image := self._tried.pop((batch.task, batch.first + row), None)) is not None:
            return image
        for last_try in (False, True):  # the second where a disk or a network hiccuped
            try:
                return same_image(self._tasks[batch.task], batch.positions[row], self.draws)
            except Exception as error:
                if last_try:
                    return error
        return None

    def _preprocess(self, images: dict[int, Any]) -> Any:
        if self.draws:
            seed_all(0)
        return self._encoder.preprocess(list(images.values())) if images else None

    def _suits(self, image: Any, found: _Read) -> bool:
        try:
            self._preprocess({0: image})
        except Exception as error:
            said = f"{FAILED} ({type(error).__name__}: {error})"
            found.problem = found.problem or said
            return False
        return True


def sha256_of(data: bytes) -> Tensor:
    """[32] SHA-256, as numbers that ranks can add up."""
    return torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.float64)


def _n_bytes(inputs: Any) -> int:
    if isinstance(inputs, Packed):
        return inputs.nbytes
    if isinstance(inputs, dict):
        return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor))
    return sum(len(content(image)) for image in inputs) if isinstance(inputs, list) else 0


def n_threads() -> int:
    """Of this process: the cores that it may use, shared with the other ranks on its machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(min(cores // max(ranks, 1), _MOST), 1)


def ahead(function: Callable[[_T], _R], items: Iterable[_T], threads: int) -> Iterator[_R]:
    """`map(function, items)`, computed ahead by threads: no more than one item for each and one.

    Args:
        function: Threads call it together.
        items: Read by the caller's thread.
        threads: 1: nothing is computed ahead.

    Raises:
        Exception: What `function` raises, at the place of its item; those after it are given up.
    """
    if threads < 2:
        yield from map(function, items)
        return
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="iimm") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
