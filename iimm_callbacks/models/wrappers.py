"""The dual encoder in whatever training puts on top of it and around it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .families import family_of, why_not
from .sharded import full_parameters

# One of them may be around another one of its kind.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|base_model\.model|base_layer|original_module"
    r"|token_adapter)\."
)
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


def find_dual_encoder(model: nn.Module) -> Any:
    """The outermost module, in `model` or inside it, that is a dual encoder of a known family.

    Beside others, such as a frozen teacher, it is the only one that trains.

    Args:
        model: Any module; DDP, `torch.compile` and a user's wrappers are looked through.

    Returns:
        The module.

    Raises:
        ValueError: There is none; says why, where the model is of a kind that cannot be one. Or
            there are several, of which none or more than one trains.
    """
    found = outermost(model, lambda module: family_of(module) is not None)
    training = [m for m in found if len(found) == 1 or any(p.requires_grad for p in m.parameters())]
    if len(training) == 1:
        return training[0]
    if found:
        names = {id(module): name for name, module in model.named_modules()}
        raise ValueError(
            f"`model` {type(model).__name__} must have one dual encoder that trains, got "
            f"{len(training)} of {[names[id(m)] for m in found]}; freeze the others, pass the one "
            "to be measured, or `encode=(encode_images, encode_texts)`"
        )
    reasons = ((module, why_not(module)) for module in breadth_first(model))
    module, reason = next((found for found in reasons if found[1]), (model, None))
    raise ValueError(
        f"`model` must be a dual encoder with a joint space, got {type(module).__name__}: "
        + (
            reason
            or "neither it nor any module inside has `get_image_features` and "
            "`get_text_features`, or `encode_image`, `encode_text` and `visual`"
        )
        + "; pass `encode=(encode_images, encode_texts)`, two functions of (model, list) that "
        "return embeddings [n, D], or teach its family with `register_encoder`"
    )


def find_head(model: nn.Module) -> Head | None:
    """The `Head` on the dual encoder, in `model` or inside it, if there is one."""
    return next((module for module in breadth_first(model) if isinstance(module, Head)), None)


def adapt(model: nn.Module, backbone_embeds: Tensor) -> Tensor:
    """Embeddings of the backbone -> those of the tuned model: through its `Head`, if it has one.

    Args:
        model: Any module.
        backbone_embeds: [n, D].

    Returns:
        [n, D].
    """
    head = find_head(model)
    return backbone_embeds if head is None else head.adapt(backbone_embeds)


def find_own_head(model: nn.Module) -> Any:
    """A classifier of the user's own around the dual encoder; None where there is none.

    It is the outermost module with a method ``classify(image_embeds [n, D]) -> logits [n, C]``,
    where parameters train outside of the dual encoder.
    """
    for module in breadth_first(model):
        found = not isinstance(module, Head) and callable(getattr(module, "classify", None))
        if found and trains_outside(model):
            return module
    return None


def trains_outside(model: nn.Module) -> list[str]:
    """Names of parameters that train and belong neither to the dual encoder nor to its `Head`.

    Args:
        model: The model that trains.
    """
    inside = {id(p) for p in find_dual_encoder(model).parameters()}
    head = find_head(model)
    if head is not None:
        inside |= {id(p) for p in head.parameters()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]


def model_fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights: a few values of every parameter.

    PEFT adapters and wrapper prefixes do not count, so a model has one fingerprint bare, under
    PEFT and wrapped. Not a checksum: it tells models apart, it does not prove that two files are
    equal.

    Args:
        model: Any module.

    Returns:
        16 hexadecimal digits.
    """
    core = core_of(model)
    adapters = adapter_ids(core)
    values = {}
    for name, parameter, whole in full_parameters(model, core):
        if id(parameter) in adapters:
            continue
        some = whole.detach().flatten()[:16].float().cpu()
        some = some.clone()  # numpy would keep FSDP from freeing `whole`
        values[bare_name(name)] = some.numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name])
    return digest.hexdigest()[:16]


def outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Any]:
    """The modules that are wanted and lie inside of none that is; the outermost first."""
    found: dict[int, nn.Module] = {}
    queue = [model]
    while queue:
        found |= {id(module): module for module in queue if wanted(module)}
        queue = [child for m in queue if id(m) not in found for child in m.children()]
    return list(found.values())


def core_of(model: nn.Module) -> nn.Module:
    """The dual encoder in a model; all of the model if no encoder is known."""
    try:
        return find_dual_encoder(model)  # type: ignore[no-any-return]
    except ValueError:
        return model


def breadth_first(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, the outermost first."""
    queue: Sequence[nn.Module] = [model]
    while queue:
        yield from queue
        queue = [child for module in queue for child in module.children()]


def bare_name(name: str) -> str:
    """A weight's name without what wrappers and PEFT put into it.

    Example:
        >>> bare_name("base_model.model.text_model.q_proj.base_layer.weight")
        'text_model.q_proj.weight'
    """
    return _WRAPPERS.sub("", name)


def adapter_ids(model: nn.Module) -> set[int]:
    """Identities (`id`) of the weights of all PEFT adapters, `modules_to_save` included.

    They are parameters, and buffers such as the running statistics of a copied batch norm.
    """
    return {
        id(tensor)
        for module in model.modules()
        for names in ("adapter_layer_names", "other_param_names")  # of every PEFT layer
        for layer in getattr(module, names, ())
        if isinstance(getattr(module, layer, None), nn.Module)
        for tensor in (*getattr(module, layer).parameters(), *getattr(module, layer).buffers())
    }


def model_name(model: nn.Module) -> str:
    """What to call a model: its Hub name, else its class.

    Of a folder of the user's machine only the last two parts are told.
    """
    try:
        core = find_dual_encoder(model)
    except ValueError:
        return type(model).__name__
    path = getattr(getattr(core, "config", None), "_name_or_path", "")
    # FSDP 2 makes a class of its own of a module's.
    return "/".join(Path(path).parts[-2:]) if path else type(core).__name__.removeprefix("FSDP")
