"""The untouched model's embeddings of a task -> the linear probe on them, and what it learnt from.

Training images where there are any at hand, else leave-one-out inside the task's own probe images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from scipy import optimize
from torch import Tensor, nn

from ..data.tasks import Task
from ..data.training import NoTrainingSetError, OtherLabelsError, training_task
from ..measures.embeddings import autocast_off, unit_rows
from ..measures.probe_accuracy import LinearProbe, linear_probe
from ..models.encoders import Encoder, autocast, undisturbed
from ..models.sharded import inside_forward
from ..models.wrappers import adapt
from ..records.log import get_logger
from ..records.look import Learnable
from . import ranks
from .embedding import Early, runs
from .share import ProbeTask, Share, among, read_share, tell_of_shared

logger = get_logger(__name__)

_TOO_HIGH = "accuracy on images that are trained on is too high: use held-out ones"
CAPTIONS = "captions have no classes, so there is no linear probe"


@dataclass(frozen=True)
class TrainingSet:
    """What the run trains on.

    Attributes:
        data: A `Task` or a data set.
        given: Whether the user named it; what the guard found for itself may be passed over.
    """

    data: Any
    given: bool = True


def read_sample(train: TrainingSet | None, task: Task) -> tuple[Task | None, str]:
    """The training set as a task, on all ranks; and why there is none, in words.

    Raises:
        NoTrainingSetError: The user named it, and it has other classes than the task, or none.
    """
    if train is None:
        return None, "no training set was given"
    try:
        return ranks.together(partial(training_task, train.data, task, given=train.given)), ""
    except NoTrainingSetError as error:
        if train.given:
            raise
        if isinstance(error, OtherLabelsError) and ranks.world()[0] == 0:
            logger.warning(
                "Labels of the training set are not those of task %r: %s. A model that learns "
                "them with this task's prompts learns wrong classes",
                task.name,
                error,
            )
        return None, str(error)
    except Exception as error:
        why_not = f"the training set cannot be used ({type(error).__name__}: {error})"
        if train.given:
            logger.warning("The linear probe: %s; it is cross-validated instead", why_not)
        return None, why_not


def why_none(task: Task) -> str:
    """Why a task has no linear probe; empty where it may have one."""
    if task.is_captions:
        return CAPTIONS
    if task.metric is not None:
        return f"its accuracy would not compare with the task's metric, {task.metric.name}"
    return ""


def learn(
    shown: ProbeTask,
    images: Tensor,
    classes: Tensor,
    scale: float | None,
    embed_training: Callable[[], tuple[ProbeTask, Tensor]] | None,
    n_train: int | None,
    why_not: str,
    off_target: Sequence[ProbeTask] = (),
) -> Learnable:
    """Fit and score the linear probe of a task; the same on all ranks, which must all call it.

    Args:
        shown: The task as it is probed.
        images: [N, D] embeddings of its probe images.
        classes: [C, D] class embeddings.
        scale: Factor on cosines; ``None``: the one of least negative log-likelihood.
        embed_training: Gives the sample of training images as it is probed, and their [M, D]
            embeddings; ``None``: there is none.
        n_train: Images in the training set.
        why_not: Why there is no training sample, in words.
        off_target: As they are probed.
    """
    labels = shown.labels
    if embed_training is not None:
        try:
            train, embeds = embed_training()
            for held_out in (shown, *off_target):
                tell_of_shared(held_out, train, "the training images that were read", _TOO_HIGH)
            new = ~among(train.digest, shown.digest)  # held-out images must not be learnt from
            learnt = ranks.from_first(
                lambda: _fit(embeds[new], classes, train.labels[new], scale, (images, labels))
            )
        except Exception as error:
            why_not = f"the training images cannot be used ({type(error).__name__}: {error})"
            logger.warning("The linear probe: %s; it is cross-validated instead", why_not)
        else:
            same = int((~new).sum())
            besides = f" ({same} of them left out, as they are probe images)" if same else ""
            probe, how = learnt
            return Learnable(
                probe,
                f"fitted to {probe.n_train} of {n_train} training images{besides}, scored on "
                f"{probe.n_scored} held-out ones{how}",
                n_train,
            )
    try:
        probe, how = ranks.from_first(lambda: _fit(images, classes, labels, scale, None))
    except Exception as error:
        return Learnable(None, f"no linear probe: {error}")
    because = f": {why_not}" if why_not else ""
    note = f"cross-validated on {probe.n_train} of the task's own images{how}{because}"
    return Learnable(probe, note, n_train)


@autocast_off()
def _fit(
    images: Tensor,
    classes: Tensor,
    labels: Tensor,
    scale: float | None,
    held_out: tuple[Tensor, Tensor] | None,
) -> tuple[LinearProbe, str]:
    how = ""
    if scale is None:
        scale = _likeliest_scale(images, classes, labels)
        how = f", with logit scale {scale:.3g}, fitted, as the model has none"
    return linear_probe(images, classes, labels, logit_scale=scale, held_out=held_out), how


def _likeliest_scale(images: Tensor, classes: Tensor, labels: Tensor) -> float:
    """Logit scale in [1, 200] of least negative log-likelihood of the zero-shot classifier."""
    cosines = unit_rows(images, "image_embeds") @ unit_rows(classes, "text_embeds").T

    def loss(log_scale: float) -> float:
        logits = (math.exp(log_scale) * cosines).log_softmax(1)
        return float(-logits[torch.arange(len(labels)), labels].mean())

    found = optimize.minimize_scalar(loss, bounds=(0.0, math.log(200)), method="bounded")
    return math.exp(found.x)


def _show(core: nn.Module, share: Share, embeds: Tensor, early: Early) -> Exception | None:
    """Fill this rank's rows of `embeds`; the first failure is returned, as in `Probe._show`."""
    failure = None
    with runs(early, core, share) as (_, run):
        for batch, n_shown, inputs, error in share.shown(
            1.0, early.model, lambda batch: not early.holds(batch)
        ):
            failure = failure or error or run.failure
            if failure or not n_shown:
                run.skip()
                continue
            with autocast(early.model, early.dtype):
                found = early.embed(share.encoder, batch, n_shown, inputs, run)
                found = adapt(early.model, found)
            embeds[batch.first : batch.first + len(found)] = found.detach().cpu().double()
    return failure or run.failure


def embed_sample(
    early: Early,
    core: nn.Module,
    encoder: Encoder,
    sample: Task,
    *,
    size: int,
    width: int,
    batch_size: int,
    cache_limit: int,
    progress: bool,
) -> tuple[ProbeTask, Tensor]:
    """Embed the sample; each rank a share of it, and all of them must call this together.

    Args:
        early: Fresh, of the model as it trains.
        core: The dual encoder in it.
        encoder: Of the model.
        sample: The training set as a task.
        size: Images of it, where it was given no `probe_size`.
        width: Of the embeddings.
        batch_size: As `Probe`.
        cache_limit: As `Probe`; freed when this returns.
        progress: As `Probe`.

    Returns:
        The sample as it is probed, and its embeddings [M, D] float32.

    Raises:
        ValueError: Fewer than two images can be read.
        RuntimeError: Another rank failed.
    """
    model = early.model
    with undisturbed(model):
        share = read_share(
            [sample],
            encoder,
            sizes=[size],
            batch_size=batch_size,
            cache_limit=cache_limit,
            progress=progress,
            embed=early,
        )
    embeds = torch.zeros(len(share.tasks[0].labels), width, dtype=torch.float64)
    try:
        with undisturbed(model):
            failure = inside_forward(model, core, lambda: _show(core, share, embeds, early))
    except Exception as error:
        failure = error
    clear_device_cache()
    added = ranks.add_up(embeds.flatten(), failure).reshape(embeds.shape)
    return share.tasks[0], added.float()
