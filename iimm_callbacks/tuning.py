"""Fine-tuning a dual encoder as a classifier with the plain Trainer; recognising the method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .encoders import class_embeddings, find_dual_encoder, find_encoder, move
from .tasks import Task


class PromptClassifier(nn.Module):
    """A dual encoder that classifies images by class prompts, trainable by the plain Trainer.

    ``logits = exp(logit_scale) · x·t (+ logit_bias)`` over all class prompts, loss = mean
    cross-entropy over the batch (the recipe of arXiv 2407.15731). The prompts are tokenized once
    and held as buffers, so a batch is ``{"pixel_values", "labels"}``. Right under gradient
    accumulation and several ranks: the loss is a mean, and the Trainer is told to divide it.

    Args:
        model: A dual encoder, bare or under PEFT. It is trained in place and stays reachable as
            ``.dual_encoder``; save it with ``classifier.dual_encoder.save_pretrained(folder)``.
        task: Names the classes and the prompts.
        processor: As `encoders.find_encoder`.

    Raises:
        ValueError: `task` has captions instead of classes, or the model cannot be read.

    Example: see ``examples/guarded_finetune.py``.
    """

    # The loss is a plain mean over the batch; with True the Trainer would expect it to be divided
    # by `num_items_in_batch` already.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, task: Task, processor: Any = None) -> None:
        super().__init__()
        if task.is_captions:
            raise ValueError(f"`task` {task.name!r} must have classes, got captions")
        self._encoder = find_encoder(model, processor)
        self.dual_encoder = model
        self.n_templates = len(task.templates)
        self.n_classes = len(task.class_names)
        tokens = self._encoder.tokenize(task.prompts([]))
        self._token_names = list(tokens)
        for name, value in tokens.items():
            self.register_buffer(f"prompt_{name}", value, persistent=False)

    def forward(self, labels: Tensor | None = None, **images: Tensor) -> dict[str, Tensor]:
        """Logits and, with labels, the loss.

        Args:
            labels: [B] integers in [0, C), or None.
            **images: What the processor makes of images, ``pixel_values`` [B, 3, H, W] as a rule.

        Returns:
            ``{"loss": scalar, "logits": [B, C]}``, or the logits alone.
        """
        tokens = {name: getattr(self, f"prompt_{name}") for name in self._token_names}
        texts = self._encoder.embed_texts(self.dual_encoder, tokens)
        texts = class_embeddings(texts, self.n_templates)  # [C, D]
        embeds = self._encoder.embed_images(self.dual_encoder, move(images, self.dual_encoder))
        embeds = nn.functional.normalize(embeds.to(texts.dtype), dim=1)  # [B, D]
        core = find_dual_encoder(self.dual_encoder)
        logits = core.logit_scale.exp() * embeds @ texts.T  # [B, C]
        bias = getattr(core, "logit_bias", None)
        if bias is not None:
            logits = logits + bias
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """What the Trainer calls to trade time for memory; passed on to the dual encoder."""
        self.dual_encoder.activation_checkpointing_enable(**settings)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same under its name in transformers 4."""
        self.dual_encoder.gradient_checkpointing_enable(**settings)  # type: ignore[operator]


class ImageCollator:
    """Collator: rows of a labelled image data set -> ``{"pixel_values", "labels"}``.

    Use it with ``TrainingArguments(remove_unused_columns=False)``, else the Trainer drops the
    image column before it gets here.

    Args:
        processor: The model's processor.
        image_column: Column with the images.
        label_column: Column with the integer labels.
    """

    def __init__(
        self, processor: Any, image_column: str = "image", label_column: str = "label"
    ) -> None:
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch, [B, 3, H, W] float32 and [B] int64."""
        for column in (self.image_column, self.label_column):
            if column not in rows[0]:
                raise ValueError(
                    f"`ImageCollator` needs column {column!r}, got {list(rows[0])}; name the "
                    "column, and set `TrainingArguments(remove_unused_columns=False)`"
                )
        images = [row[self.image_column].convert("RGB") for row in rows]
        inputs = self.processor.image_processor(images=images, return_tensors="pt")
        labels = torch.tensor([row[self.label_column] for row in rows])
        return {**inputs, "labels": labels}


def detect(model: nn.Module) -> str:
    """The fine-tuning method a model is prepared for.

    Args:
        model: Any module.

    Returns:
        The PEFT type in lower case (``"lora"``, ``"ia3"``, ...; ``"dora"`` for LoRA with DoRA),
        else ``"full"`` if every parameter trains, ``"frozen"`` if none does, ``"partial"``
        otherwise. Under DDP and `torch.compile` too.
    """
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and configs:
            config = next(iter(configs.values()))
            if getattr(config, "use_dora", False):
                return "dora"
            kind = config.peft_type
            return str(getattr(kind, "value", kind)).lower()
    trains = [p.requires_grad for p in model.parameters()]
    if all(trains):
        return "full"
    return "partial" if any(trains) else "frozen"
