"""A sample of the training set -> its embeddings, on all ranks; nothing of it is kept."""

from __future__ import annotations

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from .. import ranks
from ..data.tasks import Task
from ..models.encoders import Encoder, move
from ..models.sharded import inside_forward, is_sharded
from ..models.wrappers import adapt
from .embedding import Run, at_once, embed_images
from .share import ProbeTask, read_share
from .undisturbed import autocast, undisturbed


def embed_sample(
    model: nn.Module,
    core: nn.Module,
    encoder: Encoder,
    sample: Task,
    *,
    size: int,
    width: int,
    batch_size: int,
    cache_limit: int,
    progress: bool,
    autocast_dtype: torch.dtype | None,
    run: Run,
) -> tuple[ProbeTask, Tensor]:
    """Embed the sample; each rank a share of it, and all of them must call this together.

    Args:
        model: As it trains.
        core: The dual encoder in it.
        encoder: Of the model.
        sample: The training set as a task.
        size: Images of it, where it was given no `probe_size`.
        width: Of the embeddings.
        batch_size: As `Probe`.
        cache_limit: As `Probe`; let go of when this returns.
        progress: As `Probe`.
        autocast_dtype: As `Probe.look`.
        run: How a batch is embedded where the model is not sharded.

    Returns:
        The sample as it is probed, and its embeddings [M, D] float32.

    Raises:
        ValueError: Fewer than two images can be read.
        RuntimeError: Another rank failed.
    """
    with undisturbed(model):
        share = read_share(
            [sample],
            encoder,
            sizes=[size],
            batch_size=batch_size,
            cache_limit=cache_limit,
            progress=progress,
        )
    embeds = torch.zeros(len(share.tasks[0].labels), width, dtype=torch.float64)
    failure: Exception | None = None
    in_step = is_sharded(model)

    def show() -> None:
        nonlocal failure
        for batch in share.batches:
            inputs = None
            try:
                inputs = share.inputs(batch) if batch.positions and not failure else None
            except Exception as error:
                failure = error
            if inputs is None:
                if in_step:
                    encoder.embed_backbone(model, move(share.image, model))
                continue
            with autocast(model, autocast_dtype):
                found = embed_images(model, encoder, inputs, at_once if in_step else run)
                found = adapt(model, found)
            embeds[batch.first : batch.first + len(found)] = found.detach().cpu().double()

    try:
        with undisturbed(model):
            inside_forward(model, core, show)
    except Exception as error:
        failure = error
    clear_device_cache()
    added = ranks.add_up(embeds.flatten(), failure).reshape(embeds.shape)
    return share.tasks[0], added.float()
