"""Model + tasks -> looks: IIMM and zero-shot accuracies now, training left undisturbed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .accuracy import zero_shot_correct
from .encoders import TEXT_BATCH, EncodePair, Encoder, class_embeddings, find_encoder, move
from .frozen import FrozenPart
from .measure import Measurement, iimm
from .sources import content
from .tasks import OFF_TARGET_PROBE_SIZE, TASK_PROBE_SIZE, Task
from .undisturbed import autocast, seed_all, undisturbed
from .wrappers import adapt, find_head


@dataclass(frozen=True)
class Look:
    """What one probe of a model saw.

    Attributes:
        step: Optimizer steps taken before it.
        measurement: IIMM of the task being learnt.
        correct: Task name -> [n] bool, which of its probe images are classified right; the task
            being learnt comes first, then the off-target tasks.
        runtime: Wall time of the probe without the first preprocessing, seconds.
    """

    step: int
    measurement: Measurement
    correct: dict[str, np.ndarray]
    runtime: float

    def accuracy(self, task: str) -> float:
        """Zero-shot accuracy on a task, a fraction."""
        return float(self.correct[task].mean())

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, without step and runtime: the baseline of a run, for a checkpoint."""
        measurement = asdict(self.measurement)
        if math.isnan(measurement["standard_error"]):  # JSON has no NaN
            measurement["standard_error"] = None
        bits = {name: "".join("01"[int(c)] for c in row) for name, row in self.correct.items()}
        return {"measurement": measurement, "correct": bits}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Look:
        """The baseline that `to_json` gave."""
        measurement = dict(data["measurement"])
        if measurement["standard_error"] is None:
            measurement["standard_error"] = math.nan
        correct = {k: np.array([b == "1" for b in bits]) for k, bits in data["correct"].items()}
        return cls(0, Measurement(**measurement), correct, 0.0)


@dataclass
class _Prepared:
    task: Task
    positions: list[int]
    labels: Tensor
    prompts: list[Any]  # tokenized, in batches
    batches: list[Any] | None  # preprocessed images; None where memory did not suffice
    witness: tuple[Any, Any]  # one preprocessed image and one tokenized prompt
    fingerprint: str


class Probe:
    """The fixed images and prompts of a run, ready to be shown to the model again and again.

    Towers that are frozen are run once: see `frozen.FrozenPart`.

    Args:
        task: The task being learnt; its IIMM and accuracy are measured.
        off_target: Tasks that must not be forgotten; their accuracy is measured.
        processor: See `encoders.find_encoder`.
        encode: See `encoders.find_encoder`.
        batch_size: Images in one forward pass.
        cache_limit: Bytes of preprocessed images kept in memory; tasks beyond it are preprocessed
            anew at each look.
        progress: Show a progress bar while preprocessing for the first time.
    """

    def __init__(
        self,
        task: Task,
        off_target: Sequence[Task] = (),
        *,
        processor: Any = None,
        encode: EncodePair | None = None,
        batch_size: int = 64,
        cache_limit: int = 2**31,
        progress: bool = True,
    ) -> None:
        self.task = task
        self.off_target = list(off_target)
        self.processor = processor
        self.encode = encode
        self.batch_size = batch_size
        self.cache_limit = cache_limit
        self.progress = progress
        self._encoder: Encoder | None = None
        self._prepared: list[_Prepared] = []
        self._frozen_images, self._frozen_texts = FrozenPart(), FrozenPart()

    @property
    def fingerprints(self) -> dict[str, str]:
        """Task name -> hash of its images, labels, prompts and preprocessing.

        Two measurements compare only where these are equal. Empty before `prepare`.
        """
        return {p.task.name: p.fingerprint for p in self._prepared}

    def prepare(self, model: nn.Module) -> None:
        """Find the model's encoder, then read and preprocess every probe image; done once.

        Raises:
            ValueError: No encoder or processor for the model, an image cannot be read, or an
                off-target task holds the very images of the task.
        """
        if self._prepared:
            return
        with undisturbed(model):
            self._encoder = find_encoder(model, self.processor, self.encode)
            sizes = [TASK_PROBE_SIZE] + [OFF_TARGET_PROBE_SIZE] * len(self.off_target)
            tasks = [self.task, *self.off_target]
            subsets = [task.subset(size) for task, size in zip(tasks, sizes, strict=True)]
            with tqdm(
                total=sum(map(len, subsets)),
                desc="IIMM probe: preprocessing",
                unit="image",
                disable=None if self.progress else True,
                leave=False,
                delay=2,
            ) as bar:
                room = self.cache_limit
                prepared = []
                for task, positions in zip(tasks, subsets, strict=True):
                    prepared.append(self._prepare_task(task, positions, room, bar))
                    room -= _n_bytes(prepared[-1].batches)
        for other in prepared[1:]:
            if other.fingerprint == prepared[0].fingerprint:
                raise ValueError(
                    f"`off_target` task {other.task.name!r} is the task itself (same images, "
                    "labels and prompts); off-target tasks are those that are not trained on"
                )
        self._prepared = prepared

    def check_fingerprints(self, then: dict[str, str]) -> None:
        """Raise unless images, prompts and preprocessing are those of an earlier probe.

        Args:
            then: Its `fingerprints`.

        Raises:
            ValueError: They are not.
        """
        now = self.fingerprints
        if then != now:
            changed = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
            raise ValueError(
                f"`task` and `off_target` must be those the run began with, but {changed} have "
                "other images, prompts or preprocessing now, so the recorded baseline does not "
                "compare; restore them, or start a new run"
            )

    def look(self, model: nn.Module, step: int, autocast_dtype: torch.dtype | None = None) -> Look:
        """Show the model every probe image and class prompt once.

        Weights, gradients, train mode of every module and all random streams are as before.

        Args:
            model: The model as it trains; moved nowhere.
            step: Optimizer steps taken so far.
            autocast_dtype: Run under `torch.autocast` with this dtype, as a mixed-precision
                training does.

        Raises:
            ValueError: An image cannot be read, or embeddings are zero or non-finite.
        """
        self.prepare(model)
        start = time.perf_counter()
        correct: dict[str, np.ndarray] = {}
        measurement = None
        with undisturbed(model):
            with autocast(model, autocast_dtype):
                self._find_frozen(model, autocast_dtype)
            for prepared in self._prepared:
                with autocast(model, autocast_dtype):
                    images, texts = self._embed(model, prepared)
                # Not in autocast, which would round cosines until classes tie.
                name = prepared.task.name
                logits = None
                if measurement is None:  # the task being learnt
                    measurement = iimm(images, texts, prepared.labels)
                    logits = self._classify(model, images, len(texts))
                correct[name] = (
                    zero_shot_correct(images, texts, prepared.labels)
                    if logits is None
                    else (logits.argmax(1).cpu() == prepared.labels).numpy()
                )
        assert measurement is not None
        return Look(step, measurement, correct, time.perf_counter() - start)

    def _find_frozen(self, model: nn.Module, autocast_dtype: torch.dtype | None) -> None:
        encoder = self._encoder
        assert encoder is not None
        if self.encode is not None:
            return  # a user's functions may hide gradients, and all would look frozen
        image, prompt = (move(one, model) for one in self._prepared[0].witness)
        # Autocast's cache holds casts made without gradients, which would look frozen.
        with autocast(model, autocast_dtype, cache_enabled=False):
            self._frozen_images.update(model, lambda: encoder.embed_backbone(model, image))
            self._frozen_texts.update(model, lambda: encoder.embed_texts(model, prompt))

    def _classify(self, model: nn.Module, images: Tensor, n_classes: int) -> Tensor | None:
        head = find_head(model)
        logits = None if head is None else head.classify(images)
        if logits is not None and logits.shape[1] != n_classes:
            raise ValueError(
                f"`task` {self.task.name!r} must have the {logits.shape[1]} classes of the model's "
                f"linear probe, got {n_classes}"
            )
        return logits

    def _embed(self, model: nn.Module, prepared: _Prepared) -> tuple[Tensor, Tensor]:
        encoder = self._encoder
        assert encoder is not None

        def embed_texts() -> Tensor:
            prompts = [encoder.embed_texts(model, move(p, model)) for p in prepared.prompts]
            return class_embeddings(torch.cat(prompts), len(prepared.task.templates))

        def embed_images() -> Tensor:
            batches = self._read_again(prepared) if prepared.batches is None else prepared.batches
            return torch.cat([encoder.embed_backbone(model, move(b, model)) for b in batches])

        name = prepared.task.name
        backbone = self._frozen_images.get(name, embed_images)
        return adapt(model, backbone), self._frozen_texts.get(name, embed_texts)  # [N, D], [C, D]

    def _read_again(self, prepared: _Prepared) -> Iterator[Any]:
        for start in range(0, len(prepared.positions), self.batch_size):
            chunk = prepared.positions[start : start + self.batch_size]
            yield self._preprocess(prepared.task.images(chunk))

    def _preprocess(self, images: list[Any]) -> Any:
        assert self._encoder is not None
        # A processor may draw, e.g. which part of a long sound it takes: the same at every look.
        seed_all(0)
        return self._encoder.preprocess(images)

    def _prepare_task(self, task: Task, positions: list[int], room: int, bar: Any) -> _Prepared:
        encoder = self._encoder
        assert encoder is not None
        labels, prompts = task.labels(positions), task.prompts(positions)
        digest = hashlib.sha256(repr((labels, prompts, encoder.description)).encode())
        batches: list[Any] | None = []
        one = None
        for start in range(0, len(positions), self.batch_size):
            images = task.images(positions[start : start + self.batch_size])
            for image in images:
                digest.update(content(image))
            one = one or self._preprocess(images[:1])
            if batches is not None:
                batches.append(self._preprocess(images))
                room -= _n_bytes(batches[-1:])
                if room < 0:
                    batches = None
            bar.update(len(images))
        tokenized = [
            encoder.tokenize(prompts[i : i + TEXT_BATCH])
            for i in range(0, len(prompts), TEXT_BATCH)
        ]
        return _Prepared(
            task,
            positions,
            torch.tensor(labels),
            tokenized,
            batches,
            (one, encoder.tokenize(prompts[:1])),
            digest.hexdigest()[:16],
        )


def _n_bytes(batches: list[Any] | None) -> int:
    tensors = [
        value
        for batch in batches or []
        for value in (batch.values() if isinstance(batch, dict) else [])
        if isinstance(value, Tensor)
    ]
    images = [image for b in batches or [] if isinstance(b, list) for image in b]
    return sum(t.nbytes for t in tensors) + sum(len(content(image)) for image in images)
