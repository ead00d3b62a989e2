"""What all ranks saw of the probed tasks -> which images are right, and scores by metric."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..data.metrics import Metric
from ..data.tasks import Task
from ..measures.embeddings import zero_shot_correct, zero_shot_scores
from ..measures.measure import GROUPS, IIMMAccumulator
from ..measures.results import Measurement, Score
from ..models.encoders import undisturbed
from ..records.log import get_logger
from ..records.look import PARTS
from . import ranks
from .reading import Batch, n_shown
from .share import ProbeTask

logger = get_logger(__name__)


@dataclass
class Scored:
    """What `score` makes of what is seen.

    Attributes:
        correct, scores: As `Look`.
        seconds: That the metrics took.
    """

    correct: dict[str, np.ndarray] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    seconds: float = 0.0


def score(tasks: Sequence[ProbeTask], seen: Sequence[Tensor]) -> Scored:
    """Which images of each task are right, and the score by its metric.

    A metric is anybody's code: the first rank computes it and tells the others, so what it fails
    on or draws at random is the same on all ranks. They must all call this together.

    Args:
        tasks: As they are probed.
        seen: Of each task [N] float64 numbers: 1 where an image is right, or what its metric sees.

    Raises:
        ValueError: A metric failed, or left [0, 1]; on all ranks.
    """
    if not any(isinstance(shown.task.metric, Metric) for shown in tasks):
        return _score(tasks, seen)
    with undisturbed(nn.Identity()):  # for the random streams: a metric may draw from them
        return ranks.from_first(lambda: _score(tasks, seen))


def accumulate(texts: Tensor, shown: ProbeTask, offset: int = 0) -> IIMMAccumulator:
    """The accumulator of IIMM for a task.

    Args:
        texts: [T, D] embeddings of its classes or captions.
        shown: The task.
        offset: Which of its images comes first.
    """
    owners = None if shown.owners is None else shown.owners.to(texts.device)
    return IIMMAccumulator(texts, offset=offset, owners=owners)


def measure_parts(texts: Tensor, shown: ProbeTask, images: Tensor) -> tuple[Measurement, ...]:
    """`Look.parts`.

    Args:
        texts: As `accumulate`.
        shown: The task.
        images: [N, D] embeddings of all its images.
    """
    found = []
    for size in [n_shown(len(images), part) for part in PARTS if part < 1]:
        accumulator = accumulate(texts, shown)
        accumulator.update(images[:size], shown.labels[:size])
        found.append(accumulator.compute())
    return tuple(found)


def _best_own(scores: Tensor, owners: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Any of an image's captions is right: the nearest stays for it, its others leave the contest.

    Args:
        scores: [n, T] of images and captions.
        owners: [T], the image that each caption belongs to.
        labels: [n], which images they are.

    Returns:
        [n, T], the others' scores -inf; and [n], the nearest of each image's own captions.
    """
    own = owners.to(scores.device) == labels.to(scores.device)[:, None]
    best = scores.masked_fill(~own, -torch.inf).argmax(1)
    others = own & (torch.arange(scores.shape[1], device=scores.device) != best[:, None])
    return scores.masked_fill(others, -torch.inf), best


def _score(tasks: Sequence[ProbeTask], seen: Sequence[Tensor]) -> Scored:
    found = Scored()
    for shown, numbers in zip(tasks, seen, strict=True):
        name, metric = shown.task.name, shown.task.metric
        if metric is None:
            found.correct[name] = numbers.numpy() > 0.5
            continue
        start = time.perf_counter()
        found.correct[name], by_metric = metric.judge(
            numbers.numpy().astype(np.int64), shown.labels.numpy()
        )
        if by_metric is not None:
            found.scores[name] = by_metric
        found.seconds += time.perf_counter() - start
    return found


def fingerprint(shown: ProbeTask) -> str:
    """Of a task's images, labels, prompts and preprocessing, and of its metric if it has one."""
    if shown.task.metric is None:
        return shown.fingerprint
    both = f"{shown.fingerprint} {shown.task.metric.name}"
    return hashlib.sha256(both.encode()).hexdigest()[:16]


def warn_of_mixed_units(off_target: Sequence[Task]) -> None:
    """Warn, on the first rank, if the mean over these tasks mixes different metrics."""
    units = {t.name: "accuracy" if t.metric is None else t.metric.name for t in off_target}
    if len(set(units.values())) > 1 and ranks.world()[0] == 0:
        logger.warning(
            "The mean forgetting mixes units, the off-target tasks being measured by different "
            "metrics (%s): read each task's own, or set the limit on the worst task",
            ", ".join(f"{name}: {unit}" for name, unit in units.items()),
        )


@dataclass
class Sums:
    """What the ranks add up: of the task `IIMMAccumulator.state`; of each task [N] numbers.

    These are 1 where an image is right, or what the task's metric sees of it.
    """

    state: Tensor
    seen: list[Tensor]
    bits: list[int]  # that such a number has, by task
    seconds: Tensor  # [ranks]
    embeds: Tensor  # [N, D] of the task, where they are asked for; else [0, D]
    n_shown: Tensor  # [T] images of each task

    @classmethod
    def zeros(cls, tasks: Sequence[ProbeTask], width: int, *, keep: bool) -> Sums:
        """Of nothing yet.

        Args:
            tasks: As they are probed.
            width: Of the embeddings.
            keep: Whether the embeddings of the task being learnt are kept.
        """
        return cls(
            torch.zeros(GROUPS, width + 2, dtype=torch.float64),
            [torch.zeros(len(t.labels), dtype=torch.float64) for t in tasks],
            [1 if t.task.metric is None else 26 for t in tasks],  # a class is below 2**26
            torch.zeros(ranks.world()[1], dtype=torch.float64),
            torch.zeros(len(tasks[0].labels) if keep else 0, width, dtype=torch.float64),
            torch.zeros(len(tasks), dtype=torch.float64),
        )

    def of_all_ranks(self, failure: Exception | None) -> Sums:
        """The sums over all ranks; raises what failed on one of them, on all."""
        return self.read(ranks.add_up(self.message(), failure))

    def message(self) -> Tensor:
        """What travels: `read` of the sum of all ranks' has their sums.

        At D = 512 it has 132 kB whatever the number of images, of which these are a bit each; where
        a task has a metric, 4 bytes. A look at step 0 has embeddings of the task as well.
        """
        return torch.cat([self.state.flatten(), *self._numbers(), self.seconds,
                          self.embeds.flatten(), self.n_shown])  # fmt: skip

    def read(self, added: Tensor) -> Sums:
        """The sums from the sum of all ranks' messages."""
        numbers = self._numbers()
        sizes = [self.state.numel(), *map(len, numbers), len(self.seconds), self.embeds.numel()]
        state, *seen, seconds, embeds, n_shown = torch.split(added, [*sizes, len(self.n_shown)])
        return Sums(
            state.reshape(self.state.shape),
            [
                ranks.unpacked(packed, bits, len(own))
                for packed, bits, own in zip(seen, self.bits, self.seen, strict=True)
            ],
            self.bits,
            seconds,
            embeds.reshape(self.embeds.shape),
            n_shown,
        )

    def _numbers(self) -> list[Tensor]:
        return [ranks.packed(own, bits) for own, bits in zip(self.seen, self.bits, strict=True)]

    def add(
        self, batch: Batch, images: Tensor, texts: Tensor, shown: ProbeTask, logits: Tensor | None
    ) -> None:
        """Add what a batch shows.

        Args:
            batch: The batch.
            images: [n, D] embeddings of its first images.
            texts: [C, D] class embeddings of its task.
            shown: Its task.
            logits: [n, C] of the model's own linear probe; ``None`` where it has none.
        """
        rows = slice(batch.first, batch.first + len(images))
        labels, metric = shown.labels[rows], shown.task.metric
        if batch.task == 0:
            accumulator = accumulate(texts, shown, batch.first)
            accumulator.update(images, labels)
            self.state += accumulator.state.cpu()
            if len(self.embeds):
                self.embeds[rows] = images.detach().cpu().double()
        if shown.owners is not None:
            logits, labels = _best_own(zero_shot_scores(images, texts), shown.owners, labels)
        if metric is not None:
            scores = zero_shot_scores(images, texts) if logits is None else logits
            seen = metric.see(scores, labels).cpu()
            if shown.owners is not None and isinstance(metric, Metric):
                seen = shown.owners[seen]  # references are images, not captions
        elif logits is not None:
            seen = (logits.argmax(1) == labels.to(logits.device)).cpu()
        else:
            seen = torch.from_numpy(zero_shot_correct(images, texts, labels))
        self.seen[batch.task][rows] = seen.double()
        self.n_shown[batch.task] += len(seen)
