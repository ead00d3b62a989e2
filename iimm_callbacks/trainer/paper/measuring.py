"""Untouched model + task -> IIMM, its terms, transfer scores, linear probe, zero-shot accuracy."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...data.tasks import Task
from ...data.training import SAMPLE_SIZE
from ...measures.accuracy import zero_shot_accuracy
from ...measures.embeddings import unit_rows
from ...measures.measure import iimm
from ...measures.probe_accuracy import linear_probe
from ...measures.transferability import SCORES, emms
from ...models.encoders import find_encoder, move
from ...models.undisturbed import undisturbed
from ...models.wrappers import find_dual_encoder
from ...probing import ranks
from ...probing.embedding import Halving, embed_classes
from ...probing.learnable import embed_sample
from ...probing.share import ProbeTask
from .tasks import Splits


def measure(model: nn.Module, splits: Splits, processor: Any, batch_size: int) -> dict[str, Any]:
    """All that is measured of a task before training; the same on all ranks.

    Args:
        model: Untouched, on the device that it is to run on.
        splits: Of the task.
        processor: As `IIMMCallback`.
        batch_size: Images in one forward pass.

    Returns:
        JSON-ready. ``iimm``, ``inter``, ``intra``, ``standard_error``, ``n_images``, ``n_classes``
        as `Measurement`, of the training images; ``text_text`` and ``right_text``: mean cosine of
        two class prompts, and of an image and its own; ``scores``: name -> value, see
        `measures.transferability`; ``zero_shot_accuracy`` and ``linear_probe_accuracy`` with
        ``linear_probe_n_train``, a fraction of the test images; fingerprints of the images.

    Raises:
        ValueError: The model cannot be measured on the task.
    """
    encode = partial(_embed, model, processor=processor, batch_size=batch_size)
    train, images, classes, scale = encode(splits.train)
    test, test_images, _, _ = encode(splits.test)
    return ranks.from_first(
        lambda: (
            {
                "train_fingerprint": train.fingerprint,
                "test_fingerprint": test.fingerprint,
            }
            | _numbers(train.labels, images, classes, scale, test.labels, test_images)
        )
    )


def _embed(
    model: nn.Module, task: Task, *, processor: Any, batch_size: int
) -> tuple[ProbeTask, Tensor, Tensor, float]:
    """The task as it is probed, [N, D] images, [C, D] classes, logit scale."""
    encoder = find_encoder(model, processor)
    run = Halving()
    with undisturbed(model), torch.no_grad():
        width = encoder.embed_texts(model, move(encoder.tokenize(["a"]), model)).shape[1]
    shown, images = embed_sample(
        model,
        find_dual_encoder(model),
        encoder,
        task,
        size=len(task),
        width=width,
        batch_size=batch_size,
        cache_limit=0,  # each image is needed once
        progress=True,
        autocast_dtype=None,
        halving=run,
    )
    with undisturbed(model), torch.no_grad():
        classes = embed_classes(model, encoder, shown, run).float().cpu()
    return shown, images, classes, encoder.scale(model) or 1.0


def _numbers(
    labels: Tensor, images: Tensor, classes: Tensor, scale: float, test: Tensor, seen: Tensor
) -> dict[str, Any]:
    found = iimm(images, classes, labels)
    x, t = unit_rows(images, "image_embeds"), unit_rows(classes, "text_embeds")
    n_classes, total = len(t), t.sum(0)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: 4 * SAMPLE_SIZE]
    probe = linear_probe(
        images[some], classes, labels[some], logit_scale=scale, held_out=(seen, test)
    )
    pairs = (x.numpy(), labels.numpy())
    return asdict(found) | {
        "text_text": float((total @ total - n_classes) / (n_classes * (n_classes - 1))),
        "right_text": float((x * t[labels]).sum(1).mean()),
        "scores": {name: score(*pairs) for name, score in SCORES.items()}
        | {"EMMS": emms(*pairs, t.numpy())},
        "zero_shot_accuracy": zero_shot_accuracy(seen, classes, test),
        "linear_probe_accuracy": probe.accuracy,
        "linear_probe_standard_error": probe.standard_error,
        "linear_probe_n_train": probe.n_train,
    }
