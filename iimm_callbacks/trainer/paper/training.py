"""A model and a task of the paper -> what is measured before training, and the tuned model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from ...data.tasks import Task
from ...data.training import SAMPLE_SIZE
from ...measures.embeddings import NotFiniteError, unit_rows, zero_shot_accuracy
from ...measures.measure import iimm
from ...measures.probe_accuracy import linear_probe
from ...measures.transferability import SCORES, emms
from ...models.encoders import find_encoder, move, undisturbed
from ...models.tuning import prepare
from ...models.wrappers import find_dual_encoder
from ...probing import ranks
from ...probing.embedding import Early, Halving, embed_classes
from ...probing.learnable import embed_sample
from ...probing.probe import Probe
from ...probing.share import ProbeTask
from ..calibration.runs import trainer_of
from .published import METHODS, MOMENTUM, WEIGHT_DECAY, Splits


@dataclass(frozen=True)
class Setting:
    """How each run is trained; the defaults of `published` are the paper's.

    Attributes:
        epochs: Over the training images.
        batch_size: Of all processes together.
        seed: Of the order of the images and of what a method draws.
        use_cpu: Whether to keep off a GPU.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    use_cpu: bool = False


@dataclass(frozen=True)
class Tuned:
    """What a run came to.

    Attributes:
        model: With the weights of its best epoch.
        epoch: That epoch, from 1.
        validation_accuracy: After it.
        steps: Optimizer steps of the whole run.
    """

    model: nn.Module
    epoch: int
    validation_accuracy: float
    steps: int


class BestEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Keeps the weights of the epoch with the best validation accuracy, the first of equals.

    A run that diverges later ends there, with its best epoch before.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._weights: dict[str, Tensor] = {}
        self.accuracy, self.epoch = -1.0, 0

    def on_epoch_end(self, _: Any, state: Any, control: Any, model: Any = None, **__: Any) -> None:
        """Look at the validation images."""
        try:
            look = self._probe.look(model, state.global_step)
        except NotFiniteError:
            if not self._weights:
                raise
            control.should_training_stop = True
            return
        accuracy = look.accuracy(self._probe.task.name)
        if accuracy > self.accuracy:
            self.accuracy, self.epoch = accuracy, round(state.epoch)
            self._weights = {name: p.detach().cpu().clone() for name, p in _trained(model)}

    def restore(self, model: nn.Module) -> None:
        """Give the model those weights."""
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(self._weights[name])


@contextmanager
def tuned(
    model: nn.Module,
    splits: Splits,
    processor: Any,
    method: str,
    rate: float,
    setting: Setting,
) -> Iterator[Tuned]:
    """Train a copy of the model; it and what it took are given back at the end.

    SGD with momentum and weight decay at a constant learning rate, as in the authors' code.

    Args:
        model: Untouched; it is left as it was.
        splits: Of the task.
        processor: As `IIMMCallback`.
        method: Of `published.METHODS`.
        rate: Learning rate.
        setting: Else.

    Raises:
        NotFiniteError: It diverged in its first epoch.
        Exception: Training fails.
    """
    options: dict[str, Any] = dict(METHODS[method])
    if method == "clip_adapter":
        options["processor"] = processor
    with tempfile.TemporaryDirectory() as folder:  # the Trainer asks for one; nothing is saved
        arguments = _arguments(folder, rate, setting)
        set_seed(setting.seed)
        copied = prepare(copy.deepcopy(model), method, **options).to(arguments.device)
        best = BestEpoch(Probe(splits.validation, processor=processor, progress=False))
        sgd = torch.optim.SGD(
            [p for p in copied.parameters() if p.requires_grad],
            lr=rate,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )
        task = splits.train
        with trainer_of(copied, task, task, processor, arguments, [best], sgd) as trainer:
            trainer.train()
            classifier = trainer.model
            best.restore(classifier)
            yield Tuned(classifier, best.epoch, best.accuracy, trainer.state.global_step)


def _arguments(folder: str, rate: float, setting: Setting) -> TrainingArguments:
    n_ranks = ranks.world()[1]
    if setting.batch_size % n_ranks:
        raise ValueError(
            f"`batch_size` must be a multiple of the {n_ranks} processes, got {setting.batch_size}"
        )
    bf16 = not setting.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return TrainingArguments(
        output_dir=folder,
        num_train_epochs=setting.epochs,
        per_device_train_batch_size=setting.batch_size // n_ranks,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # no clipping
        seed=setting.seed,
        use_cpu=setting.use_cpu,
        bf16=bf16,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


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
    embed = partial(_embed, model, processor=processor, batch_size=batch_size)
    train, images, classes, scale = embed(splits.train)
    test, seen, _, _ = embed(splits.test)

    def numbers() -> dict[str, Any]:
        labels = train.labels
        x, t = unit_rows(images, "image_embeds"), unit_rows(classes, "text_embeds")
        n_classes, total = len(t), t.sum(0)
        seeded = torch.Generator().manual_seed(0)
        some = torch.randperm(len(x), generator=seeded)[: 4 * SAMPLE_SIZE]
        probe = linear_probe(
            images[some], classes, labels[some], logit_scale=scale, held_out=(seen, test.labels)
        )
        pairs = (x.numpy(), labels.numpy())
        return asdict(iimm(images, classes, labels)) | {
            "train_fingerprint": train.fingerprint,
            "test_fingerprint": test.fingerprint,
            "text_text": float((total @ total - n_classes) / (n_classes * (n_classes - 1))),
            "right_text": float((x * t[labels]).sum(1).mean()),
            "scores": {name: score(*pairs) for name, score in SCORES.items()}
            | {"EMMS": emms(*pairs, t.numpy())},
            "zero_shot_accuracy": zero_shot_accuracy(seen, classes, test.labels),
            "linear_probe_accuracy": probe.accuracy,
            "linear_probe_standard_error": probe.standard_error,
            "linear_probe_n_train": probe.n_train,
        }

    return ranks.from_first(numbers)


def _embed(
    model: nn.Module, task: Task, *, processor: Any, batch_size: int
) -> tuple[ProbeTask, Tensor, Tensor, float]:
    """The task as it is probed, [N, D] images, [C, D] classes, logit scale."""
    encoder = find_encoder(model, processor)
    run = Halving()
    with undisturbed(model), torch.no_grad():
        width = encoder.embed_texts(model, move(encoder.tokenize(["a"]), model)).shape[1]
    shown, images = embed_sample(
        Early(model, run, None, None),
        find_dual_encoder(model),
        encoder,
        task,
        size=len(task),
        width=width,
        batch_size=batch_size,
        cache_limit=0,  # each image is needed once
        progress=True,
    )
    with undisturbed(model), torch.no_grad():
        classes = embed_classes(model, encoder, shown, run).float().cpu()
    return shown, images, classes, encoder.scale(model) or 1.0
