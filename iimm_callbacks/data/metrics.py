"""Metrics that replace accuracy on a task: recall@k, any metric of `evaluate`, or a function.

Ranks add up one number per image: what `see` makes of the model's scores. The metric itself is
computed from all of them afterwards, once, so it need not be a mean over images.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..measures.results import Score
from ..records import checks

# Evaluations of a metric per look, for its standard error: `evaluate` takes 5 to 10 ms for each.
_MOST = 128
_ROUNDING = 1e-9  # by which a mean of floats may leave [0, 1]


@dataclass(frozen=True)
class RecallAt:
    """The share of images whose own text is among the k nearest. For k = 1 that is accuracy.

    Attributes:
        k: How many texts count.
    """

    k: int

    @property
    def name(self) -> str:
        """Name for people and for fingerprints."""
        return f"recall@{self.k}"

    def see(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Number of texts nearer than the right one; of equally near ones the first is nearer.

        A model that finds all texts equally near has k images in C right, not all of them.

        Args:
            scores: [n, C]; what is not a number counts as nearer.
            labels: [n], the right text of each image.

        Returns:
            [n] int64 in [0, C].
        """
        labels = labels.to(scores.device)[:, None]
        own = scores.gather(1, labels)
        position = torch.arange(scores.shape[1], device=scores.device)
        later = (scores == own) & (position >= labels)  # the right text itself is one of them
        return (~(scores < own)).sum(1) - later.sum(1)

    def judge(self, seen: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, None]:
        """Which images are right, [n] bool: of these recall is the mean."""
        return seen < self.k, None


@dataclass(frozen=True)
class Metric:
    """A function of all predictions and references.

    Attributes:
        name: For people, and for fingerprints: with its arguments.
        task: Name of the task that it is of, for errors.
        function: (predictions [n], references [n]), both int64 -> a number, or a mapping to them.
            It must not depend on the order of the images.
        n_classes: C of the task.
        key: Of the number in the mapping; ``None``: it has one only.
    """

    name: str
    task: str
    function: Callable[[np.ndarray, np.ndarray], Any]
    n_classes: int
    key: str | None = None

    def see(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The predicted class of each image, [n] int64, from scores [n, C]."""
        return scores.argmax(1)

    def judge(self, seen: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, Score]:
        """Which images are right, [n] bool; and the score.

        The jackknife leaves out one image at a time. Where it would have to evaluate the metric
        more than 128 times it leaves out 128 blocks instead; each image of a block is then said to
        add the same, spread so that the standard error is that of single images.

        Args:
            seen: [n], the predicted classes.
            references: [n], the right ones.

        Raises:
            ValueError: The metric failed, or gave no number in [0, 1].
        """
        n = len(references)
        value = self.value(seen, references)
        # By what stays the same from look to look: before and after are paired image by image.
        n_blocks = n if min(n, self.n_classes**2) <= _MOST else _MOST
        images = np.empty(n)
        known: dict[bytes, float] = {}  # leaving out an equal image leaves an equal score
        for block in np.array_split(np.arange(n), n_blocks):
            pairs = np.sort(references[block] * self.n_classes + seen[block]).tobytes()
            if pairs not in known:
                rest = np.delete(seen, block), np.delete(references, block)
                known[pairs] = self.value(*rest)
            h = n / len(block)
            pseudo = h * value - (h - 1) * known[pairs]
            images[block] = value + math.sqrt(len(block)) * (pseudo - value)
        return seen == references, Score(value, images)

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        """The metric of these, in [0, 1]; what lies outside by rounding alone is moved inside.

        Args:
            predictions: [n] int64.
            references: [n] int64.

        Raises:
            ValueError: It failed, or gave no number in [0, 1].
        """
        try:
            result = self.function(predictions, references)
        except Exception as error:
            raise self._wrong(f"failed ({type(error).__name__}: {error})") from error
        if isinstance(result, Mapping):
            key = next(iter(result)) if self.key is None and len(result) == 1 else self.key
            if key not in result:
                raise self._wrong(
                    f"gave {sorted(map(str, result))}; name the one that is the score: "
                    f"`metric_key`, got {self.key!r}"
                )
            result = result[key]
        try:
            value = float(result)
        except (TypeError, ValueError):
            raise self._wrong(
                f"must give one number, got {result!r:.80}; where it gives one per class, ask for "
                "their mean: metric_kwargs={'average': 'macro'}"
            ) from None
        if not -_ROUNDING <= value <= 1 + _ROUNDING:  # NaN is not
            raise self._wrong(
                f"must lie in [0, 1], got {value}: limits and forecasts are in fractions of the "
                "best score; pass a metric that is, such as 'f1'"
            )
        return min(max(value, 0.0), 1.0)

    def check(self) -> None:
        """Raise unless it works, lies in [0, 1], and is higher where more images are right.

        Raises:
            ValueError: It does not.
        """
        every = np.arange(min(self.n_classes, 1000))  # one image of each class
        right, wrong = self.value(every, every), self.value(np.roll(every, 1), every)
        if not right > wrong:
            raise self._wrong(
                f"must be higher where more images are right, got {right} where all are and "
                f"{wrong} where none is; pass a function that gives 1 minus it"
            )

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"`metric` {self.name!r} of task {self.task!r} {what}")


def as_metric(
    metric: Any, kwargs: Mapping[str, Any] | None, key: str | None, *, task: str, n_classes: int
) -> RecallAt | Metric | None:
    """The metric that a `Task` was given; ``None`` for zero-shot accuracy.

    Args:
        metric: As `Task`.
        kwargs: Keyword arguments of each call.
        key: Of the score in what it gives.
        task: Name of the task, for errors.
        n_classes: C; of captions, how many of them the probe may show at most.

    Raises:
        TypeError: `metric` is none of what it may be, or `kwargs` is no dict.
        ValueError: It cannot be loaded or called, does not lie in [0, 1], or is not higher where
            more images are right.
        ImportError: It is a name, and `evaluate` is not installed.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"`metric_kwargs` of task {task!r} must be a dict of arguments, got {kwargs!r:.80} "
            f"({type(kwargs).__name__}); write e.g. {{'average': 'macro'}}"
        )
    recall = re.fullmatch(r"recall@(\d+)", metric) if isinstance(metric, str) else None
    if (metric is None or recall) and (kwargs is not None or key is not None):
        raise ValueError(
            f"`metric_kwargs` and `metric_key` of task {task!r} go with a metric that takes them, "
            f"got `metric` {metric!r}"
        )
    if metric is None:
        return None
    if recall:
        k = int(recall[1])
        if not 0 < k < n_classes:
            raise ValueError(
                f"`metric` of task {task!r} must be recall@k with k from 1 to {n_classes - 1}, got "
                f"{metric!r}: among all of {n_classes} texts is always the right one"
            )
        return RecallAt(k)
    try:
        given = checks.dict_of(checks.anything)(dict(kwargs or {}), "metric_kwargs")
    except ValueError as error:  # the name, and so the fingerprint, is made of them
        raise ValueError(f"task {task!r}: {error}") from None
    made = _load(metric, task) if isinstance(metric, str) else metric
    function = _as_function(made, given, task)
    ready = Metric(_name(made, given, key), task, function, n_classes, key)
    ready.check()
    return ready


def check_by_images(tasks: Iterable[Any]) -> None:
    """Raise unless the score of each of these `Task`s is a share of its images: it can be rescued.

    A rescue scores held-out images, each under the mix that the others choose. Of a metric that is
    no mean over images that would be another number.

    Raises:
        ValueError: One has a metric other than accuracy and recall@k.
    """
    for task in tasks:
        if isinstance(task.metric, Metric):
            raise ValueError(
                f"`metric` of task {task.name!r} must be accuracy or recall@k for a rescue, got "
                f"{task.metric.name!r}, which is no mean over images; leave `metric` out, or use "
                "`action='stop'`"
            )


def _load(name: str, task: str) -> Any:
    try:
        import evaluate
    except ImportError as error:
        raise ImportError(
            f"`metric` {name!r} of task {task!r} needs evaluate; "
            "pip install iimm_callbacks[evaluate], or pass a function (predictions, references) -> "
            "number"
        ) from error
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:
        raise ValueError(
            f"`metric` {Path(name).name!r} of task {task!r} must be 'recall@k', or what "
            f"evaluate.load loads, got {type(error).__name__}: {error}; without the internet that "
            "is a folder NAME with NAME.py in it"
        ) from error


def _as_function(
    made: Any, kwargs: dict[str, Any], task: str
) -> Callable[[np.ndarray, np.ndarray], Any]:
    compute = getattr(made, "compute", None)
    if callable(compute):
        if getattr(made, "num_process", 1) != 1:
            raise ValueError(
                f"`metric` of task {task!r} must be loaded without `num_process`, got "
                f"{made.num_process}: it is given the predictions of all ranks"
            )
        return lambda predictions, references: compute(
            predictions=predictions, references=references, **kwargs
        )
    if not callable(made):
        raise TypeError(
            f"`metric` of task {task!r} must be a name, a metric of evaluate, or a function "
            f"(predictions, references) -> number, got {type(made).__name__}"
        )
    return lambda predictions, references: made(predictions, references, **kwargs)


def _name(made: Any, kwargs: dict[str, Any], key: str | None) -> str:
    """The same on every machine, so without the folder it was loaded from."""
    name = getattr(made, "name", None) or getattr(made, "__name__", type(made).__name__)
    arguments = ", ".join(f"{k}={json.dumps(kwargs[k], sort_keys=True)}" for k in sorted(kwargs))
    return f"{name}({arguments})" + ("" if key is None else f"[{key!r}]")
