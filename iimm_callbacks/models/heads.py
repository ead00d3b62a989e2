"""What CLIP-Adapter and the linear probe put on top of a frozen dual encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_FILE = "head.safetensors"


class Head(nn.Module):
    """A frozen dual encoder with a small trained part on its image embeddings.

    The encoder stays in eval mode whatever the training loop says: neither dropout nor the running
    statistics of a batch norm act in it, so its embeddings are the same at every step.

    Args:
        dual_encoder: Frozen in place, reachable as ``.dual_encoder``.
    """

    method = ""  # what `tuning.detect` calls it

    def __init__(self, dual_encoder: nn.Module) -> None:
        super().__init__()
        self.dual_encoder = dual_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Head:
        """Train or eval mode, of the head alone."""
        super().train(mode)
        self.dual_encoder.eval()
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head's own weights, ``head.safetensors``; the encoder has not changed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self._own_weights(), Path(folder) / _FILE)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what `save_pretrained` wrote into a head that was prepared in the same way.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is of another kind of head, or of other sizes.
        """
        weights, own = load_file(Path(folder) / _FILE), self._own_weights()
        theirs, ours = ({k: list(v.shape) for k, v in w.items()} for w in (weights, own))
        if theirs != ours:
            raise ValueError(f"`folder` must hold a head of {ours}, got {theirs}")
        self.load_state_dict(weights, strict=False)

    def _own_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith("dual_encoder.")}

    def adapt(self, image_embeds: Tensor) -> Tensor:
        """Image embeddings [n, D] of the encoder -> those of the tuned model."""
        return image_embeds

    def classify(self, image_embeds: Tensor) -> Tensor | None:
        """Image embeddings [n, D] -> logits [n, C] on the task being learnt; None: by prompts."""
        return None


class ClipAdapter(Head):
    """CLIP-Adapter (arXiv 2110.04544): a bottleneck on the image embeddings.

    ``x' = r · W₂ relu(W₁ x) + (1 - r) · x`` with ``W₁`` [D/k, D] and ``W₂`` [D, D/k]. ``W₂``
    starts at zero, so training starts from the zero-shot model exactly.

    Args:
        dual_encoder: As `Head`.
        width: D.
        reduction: k, 4 to 32 in arXiv 2407.15731.
        residual_ratio: r.
    """

    method = "clip_adapter"

    def __init__(
        self,
        dual_encoder: nn.Module,
        width: int,
        *,
        reduction: int = 4,
        residual_ratio: float = 0.2,
    ) -> None:
        super().__init__(dual_encoder)
        self.residual_ratio = residual_ratio
        self.down = nn.Linear(width, max(width // reduction, 1), bias=False)
        self.up = nn.Linear(self.down.out_features, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def adapt(self, image_embeds: Tensor) -> Tensor:
        """See the class."""
        wide = image_embeds.to(self.up.weight.dtype)
        bottleneck: Tensor = self.up(self.down(wide).relu())
        return self.residual_ratio * bottleneck + (1 - self.residual_ratio) * wide


class LinearProbe(Head):
    """A linear classifier on normalised image embeddings, started from the zero-shot one.

    ``logits = s · (W x/‖x‖ + b)``, ``W`` [C, D] starting at the class embeddings of the prompts and
    ``b`` at zero, ``s`` the model's logit scale, fixed. It classifies the task being learnt; other
    tasks are classified by prompts, so nothing is forgotten.

    Args:
        dual_encoder: As `Head`.
        class_embeds: [C, D], normalised.
        logit_scale: s.
    """

    method = "linear_probe"
    logit_scale: Tensor

    def __init__(
        self, dual_encoder: nn.Module, class_embeds: Tensor, logit_scale: Any = 100.0
    ) -> None:
        super().__init__(dual_encoder)
        self.classifier = nn.Linear(class_embeds.shape[1], len(class_embeds))
        with torch.no_grad():
            self.classifier.weight.copy_(class_embeds)
            self.classifier.bias.zero_()
        self.register_buffer("logit_scale", torch.as_tensor(logit_scale).detach().float().clone())

    def classify(self, image_embeds: Tensor) -> Tensor | None:
        """See the class."""
        unit = nn.functional.normalize(image_embeds.to(self.classifier.weight.dtype), dim=1)
        logits: Tensor = self.logit_scale * self.classifier(unit)
        return logits
