"""Fine-tuning a dual encoder as a classifier by class prompts, with the plain Trainer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import as_image
from ..data.labels import as_integer
from ..data.tasks import Task
from .encoders import TEXT_BATCH, Encoder, FrozenPart, class_embeddings, find_encoder, move
from .processors import read_images
from .wrappers import find_dual_encoder, find_head


class PromptClassifier(nn.Module):
    """A dual encoder that classifies images by class prompts, trainable by the plain Trainer.

    ``logits = exp(logit_scale) · x·t (+ logit_bias)`` over all class prompts, loss = mean
    cross-entropy over the batch (the recipe of arXiv 2407.15731); with a linear probe, its own
    logits. The prompts are tokenized once and held as buffers, so a batch is
    ``{"pixel_values", "labels"}``. Right under gradient accumulation and several ranks: the loss is
    a mean, and the Trainer is told to divide it.

    Args:
        model: A dual encoder, bare or as `tuning.prepare` returns it. It is trained in place and
            stays reachable as ``.dual_encoder``; a transformers model is saved with
            ``classifier.dual_encoder.save_pretrained(folder)``, any with ``trainer.save_model()``.
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
        self.dual_encoder = model
        self.processor = processor
        self._frozen_texts = FrozenPart()
        self.n_templates = len(task.templates)
        self.n_classes = len(task.class_names)
        tokens = self.encoder.tokenize(task.prompts([]))
        self._token_names = list(tokens)
        for name, value in tokens.items():
            self.register_buffer(f"prompt_{name}", value, persistent=False)

    @cached_property
    def encoder(self) -> Encoder:
        """How the dual encoder is read."""
        return find_encoder(self.dual_encoder, self.processor)

    @cached_property
    def config(self) -> Any:
        """A copy of the dual encoder's configuration, for the Trainer to read.

        A copy, since the Trainer writes the tokenizer's special tokens into what it finds here.

        Raises:
            AttributeError: It has none.
        """
        return copy.deepcopy(find_dual_encoder(self.dual_encoder).config)

    def __getstate__(self) -> dict[str, Any]:
        own = self.__dict__.items()  # the encoder's functions cannot be pickled; it is made again
        return {name: value for name, value in own if name != "encoder"}

    def forward(self, labels: Tensor | None = None, **images: Tensor) -> dict[str, Tensor]:
        """Logits and, with labels, the loss.

        Args:
            labels: [B] integers in [0, C), or None.
            **images: What the processor makes of images, ``pixel_values`` [B, 3, H, W] as a rule.

        Returns:
            ``{"loss": scalar, "logits": [B, C]}``, or the logits alone.
        """
        model = self.dual_encoder
        embeds = self.encoder.embed_images(model, move(images, model))  # [B, D]
        head = find_head(model)
        logits = None if head is None else head.classify(embeds)
        if logits is None:
            texts = self._class_embeddings()  # [C, D]
            scale, bias = self.encoder.logit_scale(model)
            # Autocast would round cosines to three digits, and a logit scale of 100 with them.
            with torch.autocast(embeds.device.type, enabled=False):
                unit = nn.functional.normalize(embeds.to(texts.dtype), dim=1)
                logits = scale * unit @ texts.T  # [B, C]
                if bias is not None:
                    logits = logits + bias
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def _class_embeddings(self) -> Tensor:
        tokens = {name: getattr(self, f"prompt_{name}") for name in self._token_names}

        def embed(start: int, end: int) -> Tensor:
            chosen = {name: value[start:end] for name, value in tokens.items()}
            return self.encoder.embed_texts(self.dual_encoder, chosen)

        def embed_all() -> Tensor:
            n = self.n_classes * self.n_templates
            return torch.cat([embed(i, i + TEXT_BATCH) for i in range(0, n, TEXT_BATCH)])

        if torch.compiler.is_compiling() or getattr(self, "_is_replica", False):
            # Nothing to be traced; and the replicas of `DataParallel` would share what is kept, on
            # different devices.
            return class_embeddings(embed_all(), self.n_templates)
        # Where the text tower is frozen no step need embed the prompts again.
        self._frozen_texts.update(self, lambda: embed(0, 1))
        prompts = self._frozen_texts.get("prompts", embed_all)
        return class_embeddings(prompts, self.n_templates)

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """What the Trainer calls to trade time for memory; passed on to the dual encoder."""
        self._enable_checkpointing("activation_checkpointing_enable", settings)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same under its name in transformers 4."""
        self._enable_checkpointing("gradient_checkpointing_enable", settings)

    def _enable_checkpointing(self, function: str, settings: dict[str, Any]) -> None:
        core = find_dual_encoder(self.dual_encoder)
        if settings.get("gradient_checkpointing_kwargs", 0) is None:
            # The default of transformers 4 is the reentrant kind, in which nothing trains where the
            # embeddings at the bottom are frozen.
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        if hasattr(core, "set_grad_checkpointing"):  # open_clip
            core.set_grad_checkpointing()
        else:
            getattr(core, function)(**settings)


class ImageCollator:
    """Collator: rows of a labelled image data set -> ``{"pixel_values", "labels"}``.

    Use it with ``TrainingArguments(remove_unused_columns=False)``, else the Trainer drops the
    image column before it gets here. Sounds and videos likewise, for models that read those.

    Args:
        processor: The model's processor, or the pair (transform, tokenizer) of open_clip; a
            transform for training is welcome here.
        image_column: Column with the images, where rows are dicts and not (image, label) pairs.
        label_column: Column with the integer labels; truth values are 0 and 1, as in `Task`.

    Raises:
        TypeError: A label is no integer.
        ValueError: A row has no such column, or there is no row.
    """

    def __init__(
        self, processor: Any, image_column: str = "image", label_column: str = "label"
    ) -> None:
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """One batch: ``pixel_values`` [B, 3, H, W] float32 or the like, ``labels`` [B] int64."""
        if not rows:
            raise ValueError("`ImageCollator` needs at least 1 row, got an empty batch")
        images, labels = zip(*map(self._pair, rows), strict=True)
        inputs = read_images(self.processor)([as_image(image) for image in images])
        return {**inputs, "labels": torch.tensor([self._whole(label) for label in labels])}

    def _whole(self, label: Any) -> int:
        value = as_integer(label)
        if value is None:
            raise TypeError(
                f"`ImageCollator` needs integers in column {self.label_column!r}, got "
                f"{label!r:.80} ({type(label).__name__}); encode them, such as by `datasets`' "
                "`class_encode_column`, in the order of the task's `class_names`"
            )
        return value

    def _pair(self, row: Any) -> tuple[Any, Any]:
        if isinstance(row, tuple | list):
            return row[0], row[1]
        for column in (self.image_column, self.label_column):
            if column not in row:
                raise ValueError(
                    f"`ImageCollator` needs column {column!r}, got {list(row)}; name the "
                    "column, and set `TrainingArguments(remove_unused_columns=False)`"
                )
        return row[self.image_column], row[self.label_column]
