"""Model + task + method + learning rate -> the model tuned by the paper's recipe."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from ...measures.embeddings import NotFiniteError
from ...models.tuning import prepare
from ...probing import ranks
from ...probing.probe import Probe
from ..calibration.runs import trainer_of
from .published import METHODS, MOMENTUM, WEIGHT_DECAY
from .tasks import Splits


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
