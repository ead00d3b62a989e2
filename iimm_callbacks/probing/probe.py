"""Model + tasks -> looks: IIMM and zero-shot accuracies now, training left undisturbed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from ..data.tasks import TASK_PROBE_SIZE, Task
from ..data.training import SAMPLE_SIZE
from ..measures.embeddings import NotFiniteError, autocast_off
from ..measures.results import Measurement
from ..models.encoders import EncodePair, FrozenPart, autocast, find_encoder, move, undisturbed
from ..models.sharded import check_measurable, inside_forward
from ..models.wrappers import adapt, find_dual_encoder
from ..records.log import get_logger
from ..records.look import Learnable, Look
from ..records.outcomes import OFF_TARGET_PROBE_SIZE
from . import ranks
from .embedding import Early, Halving, check_rows, embed_classes, own_logits, runs, width_of
from .learnable import TrainingSet, embed_sample, learn, read_sample, why_none
from .scoring import Sums, accumulate, fingerprint, measure_parts, score, warn_of_mixed_units
from .share import Share, check_apart, read_share
from .texts import KeptTexts

logger = get_logger(__name__)


class Probe:
    """The fixed images and prompts of a run, ready to be shown to the model again and again.

    Of several ranks each shows its model a share of the images; only sums travel, in one
    all-reduce per look, and all ranks have the same `Look`. All of them must look together. Towers
    that are frozen are run once: see `encoders.FrozenPart`. A task's own metric is computed by
    the first rank, which tells the others.

    Args:
        task: The task being learnt; its IIMM and accuracy are measured.
        off_target: Tasks that must not be forgotten; their accuracy is measured.
        processor: See `encoders.find_encoder`.
        encode: See `encoders.find_encoder`.
        batch_size: Images in one forward pass; halved where memory does not suffice.
        cache_limit: Bytes of preprocessed images kept in memory on each rank; what is beyond it
            is preprocessed again at each look.
        progress: Show a progress bar while preprocessing for the first time.
        train: What the run trains on, for the linear probe; ``None``: it is cross-validated.

    Attributes:
        off_target_size: Images of each off-target task that was given no `probe_size`. Like
            `training_size` it may be changed before `prepare`.
        training_size: Training images that the linear probe learns from.
        overlaps: Whether the first look embeds while threads still read; ``None``: where the model
            is not on the CPU. Embeddings are the same bit for bit.
        seconds: Wall time of the latest look, the linear probe apart.
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
        train: TrainingSet | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a whole number from 1, got {batch_size!r}")
        self.task = task
        self.off_target = list(off_target)
        self.processor = processor
        self.encode = encode
        self.batch_size = batch_size
        self.cache_limit = cache_limit
        self.progress = progress
        self.train = train
        self.off_target_size = OFF_TARGET_PROBE_SIZE
        self.training_size = SAMPLE_SIZE
        self.overlaps: bool | None = None
        self.seconds = 0.0
        self._share: Share | None = None
        self._world = (0, 1)  # rank and ranks that it is a share for
        self._width = 0  # of the embeddings
        self._largest = 0  # batch of the probe
        # On the CPU: a look leaves nothing on the device.
        self._frozen_images, self._frozen_texts = FrozenPart("cpu"), FrozenPart("cpu")
        self._halving = Halving()

    @property
    def fingerprints(self) -> dict[str, str]:
        """Task name -> hash of its images, labels, prompts, preprocessing and metric.

        Two measurements compare only where these are equal. Empty before `prepare`.
        """
        return {t.task.name: fingerprint(t) for t in self._share.tasks} if self._share else {}

    def prepare(self, model: nn.Module, early: Early | None = None) -> None:
        """Find the model's encoder, then read and preprocess the images; once for a group of ranks.

        Args:
            model: As it trains.
            early: Of the look that is waiting for this.

        Raises:
            ValueError: No encoder or processor for the model, fewer than two images of a task can
                be read, or an off-target task holds the images of the task itself.
            RuntimeError: Another rank failed.
        """
        if self._share is not None and self._world == ranks.world():
            return
        then, self._world = self.fingerprints, ranks.world()
        check_measurable(model)
        with undisturbed(model):
            encoder = ranks.together(lambda: find_encoder(model, self.processor, self.encode))
            share = read_share(
                [self.task, *self.off_target],
                encoder,
                sizes=[TASK_PROBE_SIZE, *[self.off_target_size] * len(self.off_target)],
                batch_size=self.batch_size,
                cache_limit=self.cache_limit,
                progress=self.progress,
                embed=early,
            )
            check_apart(*share.tasks)
            self._width = ranks.together(lambda: width_of(model, self._core(model), share))
        self._share = share
        self.check_fingerprints(then or self.fingerprints)
        self._largest = max(len(batch.positions) for batch in share.batches)
        warn_of_mixed_units(self.off_target)

    @property
    def _may_overlap(self) -> bool | None:
        return self.overlaps if self.encode is None else False  # theirs may draw random numbers

    def _core(self, model: nn.Module) -> nn.Module:
        return model if self.encode is not None else find_dual_encoder(model)

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
                "other images, prompts, preprocessing or another metric now, so the recorded "
                "baseline does not compare; restore them, or start a new run"
            )

    def look(
        self,
        model: nn.Module,
        step: int,
        autocast_dtype: torch.dtype | None = None,
        *,
        linear_probe: bool = False,
        part: float = 1.0,
    ) -> Look:
        """Show the model every probe image and class prompt once.

        Weights, gradients, train mode of every module and all random streams are as before.

        Args:
            model: The model as it trains; moved nowhere.
            step: Optimizer steps taken so far.
            autocast_dtype: Run under `torch.autocast` with this dtype, as a mixed-precision
                training does.
            linear_probe: Fit a linear probe of the task as well, see `learnable`; where it cannot
                be, the look tells why.
            part: Share of each task's images that is shown, in (0, 1]: its first ones, the same at
                every look, and no fewer than `reading.FEWEST`. All where a task has its own metric.

        Returns:
            The same on all ranks, and as a single process would have it to 1e-9.

        Raises:
            ValueError: An image cannot be read any more, an embedding is zero, or a metric failed
                or left [0, 1].
            NotFiniteError: An embedding is not finite.
            RuntimeError: Another rank failed, or did not come: `ranks.RanksApartError`.
            OutOfStepError: Where FSDP shards the model: training cannot go on.
        """
        with ranks.during(f"the look at step {step}" if step else "the look before training"):
            early = Early(model, self._halving, autocast_dtype, self._may_overlap)
            self.prepare(model, early)
            return self._look(early, step, linear_probe, part)

    def _look(self, early: Early, step: int, linear_probe: bool, part: float) -> Look:
        start, model = time.perf_counter() - early.seconds, early.model
        share = self._share
        assert share is not None
        sums = Sums.zeros(share.tasks, self._width, keep=linear_probe)
        if any(shown.task.metric is not None for shown in share.tasks):
            part = 1.0
        failure: Exception | None = None
        classes = torch.zeros(0)
        try:
            with undisturbed(model):
                classes, failure = inside_forward(
                    model, self._core(model), lambda: self._show(early, share, sums, part, step)
                )
        except Exception as error:
            failure = error
        if isinstance(failure, NotFiniteError) and step:
            failure = NotFiniteError(f"training has diverged, which is not forgetting: {failure}")
        clear_device_cache()  # of what the look took
        sums.seconds[ranks.world()[0]] = time.perf_counter() - start
        sums = sums.of_all_ranks(failure)
        accumulator = accumulate(classes.cpu(), share.tasks[0])
        accumulator.state = sums.state
        n_shown = sums.n_shown.long().tolist()
        seen = [numbers[:n] for numbers, n in zip(sums.seen, n_shown, strict=True)]
        scored = score(share.tasks, seen)
        runtime = self.seconds = float(sums.seconds.max()) + scored.seconds
        learnable = None
        parts: tuple[Measurement, ...] = ()
        if linear_probe:
            start = time.perf_counter()
            parts = measure_parts(classes.cpu(), share.tasks[0], sums.embeds)
            learnable = self._learn(early, share, sums.embeds, classes.cpu())
            runtime += time.perf_counter() - start
        return Look(
            step, accumulator.compute(), scored.correct, runtime, scored.scores, learnable, parts
        )

    def _learn(self, early: Early, share: Share, images: Tensor, classes: Tensor) -> Learnable:
        """The linear probe on [N, D] embeddings of the task's images."""
        if reason := why_none(self.task):
            return Learnable(None, reason)
        model = early.model
        with undisturbed(model):  # items of the training set may draw random numbers
            sample, why_not = read_sample(self.train, self.task)
        scale = None  # the functions of `encode` tell none
        if self.encode is None:
            scale = ranks.from_first(lambda: share.encoder.scale(model))
        embed = None
        if sample is not None:
            size = self.batch_size
            if self._halving.parts > 1:  # no larger than what has fitted into memory
                size = max(self._largest // self._halving.parts, 1)
            embed = partial(
                embed_sample, Early(model, self._halving, early.dtype, self._may_overlap),
                self._core(model), share.encoder, sample,
                size=self.training_size, width=self._width, batch_size=size,
                cache_limit=self.cache_limit, progress=self.progress,
            )  # fmt: skip
        n_train = None if sample is None else len(sample)
        task, *others = share.tasks
        return learn(task, images.float(), classes, scale, embed, n_train, why_not, others)

    def _show(
        self, early: Early, share: Share, sums: Sums, part: float, step: int
    ) -> tuple[Tensor, Exception | None]:
        """Add what this rank sees to `sums`.

        Returns:
            The class embeddings of the task, [C, D]; and the first failure. It is not raised here:
            where the model is sharded this rank's forward passes must go on beside the others'.
        """
        encoder, model, dtype = share.encoder, early.model, early.dtype
        core, held = self._core(model), self._frozen_images.holds
        with runs(early, core, share) as (run_texts, run):
            with autocast(model, dtype):
                more: dict[str, Any] = {"progress": self.progress and ranks.world()[0] == 0}
                if run is self._halving:
                    self._find_frozen(early, share)
                    if self.encode is None and not step:  # later texts may have been trained
                        more["kept"] = KeptTexts(core, dtype)
                embed_task = partial(embed_classes, model, encoder, run=run_texts, **more)
                classes = [
                    self._frozen_texts.get(t.task.name, partial(embed_task, shown=t))
                    for t in share.tasks
                ]
            failure = run_texts.failure
            for batch, n_shown, inputs, error in share.shown(
                part, model, lambda b: not (held((b.task, b.first)) or early.holds(b))
            ):
                key = (batch.task, batch.first)
                is_whole = n_shown == len(batch.positions)
                is_kept = held(key)
                failure = failure or error
                if failure or not n_shown:
                    run.skip()
                    continue
                try:
                    with autocast(model, dtype):
                        embed = partial(early.embed, encoder, batch, n_shown, inputs, run)
                        kept = self._frozen_images.get(key, embed, keep=is_whole)
                        images = adapt(model, kept[:n_shown] if is_kept else kept)
                    if run.failure is not None:
                        raise run.failure
                    check_rows(images, n_shown, "image")
                    texts, shown = classes[batch.task], share.tasks[batch.task]
                    with autocast_off():  # also that of a caller
                        logits = None
                        if batch.task == 0:
                            named = self.encode is None
                            logits = own_logits(model, images, shown.task, len(texts), named)
                        sums.add(batch, images, texts, shown, logits)
                except Exception as error:
                    failure = error
        return classes[0], failure

    def _find_frozen(self, early: Early, share: Share) -> None:
        if self.encode is not None:
            return  # a user's functions may hide gradients, and all would look frozen
        encoder, model = share.encoder, early.model
        image, prompt = move(share.image, model), move(share.prompt, model)
        # Autocast's cache holds casts made without gradients, which would look frozen.
        with autocast(model, early.dtype, cache_enabled=False):
            self._frozen_images.update(model, lambda: encoder.embed_backbone(model, image))
            self._frozen_texts.update(model, lambda: encoder.embed_texts(model, prompt))
