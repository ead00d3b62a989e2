"""A model anywhere between untouched and fine-tuned: its weights mixed, its adapters scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.sharded import check_measurable, is_sharded
from ..models.untouched import zero_shot_twin
from ..models.wrappers import ClipAdapter, adapter_ids, core_of, find_head, find_own_head
from .counterparts import Kept, counterparts, weights_of

# Adapter weights -> what they are where the adapter does nothing, and so before training. Its
# effect is linear in them.
_NEUTRAL = {"lora_B": 0.0, "lora_embedding_A": 0.0, "lora_E": 0.0, "ia3_l": 1.0}
_LEFT_ALONE = ("lora_A", "lora_embedding_B")  # the other factors of that effect


class Mixture:
    """Sets a model to ``(1 - α) θ_untouched + α θ_tuned`` (WiSE-FT arXiv 2109.01903), in place.

    Of the dual encoder every floating-point parameter and buffer that differs is mixed, tied
    weights once, in float32 (float64 for those) and cast back; running statistics of batch norms
    too. Integer buffers, and what is outside of the dual encoder, stay. Adapters of peft are scaled
    in their own weights, so that they are saved as they are measured: B of LoRA by α (A in a token
    table, E of AdaLoRA), the factors of IA3 towards 1, copies of whole modules
    (``modules_to_save``) towards the originals. CLIP-Adapter is scaled in ``W₂``, which has the
    cosines of the residual ratio r' with ``r'/(1 - r') = α r/(1 - r)``.

    Both values of all that is mixed are kept on the CPU: the model's device holds one model.

    Args:
        model: The fine-tuned model; it is as it was until `set`.
        untouched: The model before fine-tuning: a module, or a state dict of one, or `Kept`;
            ``None`` where the model has it in itself, under adapters or a CLIP-Adapter.

    Attributes:
        n_tensors: How many are mixed.
        notes: What a reader of the numbers should know, in words.

    Raises:
        TypeError: `untouched` is none of these.
        ValueError: The two differ in names or shapes, or in nothing; weights are spread over ranks,
            quantised or not finite; or the model is tuned in a way that has no mixes.
    """

    def __init__(
        self, model: nn.Module, untouched: nn.Module | Mapping[str, Tensor] | Kept | None = None
    ) -> None:
        _check_mixable(model)
        parts = _own_parts(model)
        if untouched is None:
            _check_has_untouched(model, parts)
        else:
            names = _names(model)
            for tensor, other in counterparts(core_of(model), untouched):
                parts.append(_Part(names[id(tensor)], tensor, other))
        self._parts = [part for part in parts if part.differs()]
        if not self._parts:
            raise ValueError(
                "`base` must be the model before fine-tuning, got one that differs in nothing from "
                "`model`; there is nothing to mix"
            )
        for part in self._parts:
            part.keep_tuned()
        self.n_tensors = len(self._parts)
        self.notes = []
        if any(part.name.endswith(("running_mean", "running_var")) for part in self._parts):
            self.notes.append(
                "running statistics of batch norms are mixed as weights are; they are not those "
                "that the mixed weights would have"
            )

    def set(self, alpha: float) -> None:
        """Make the model the mix of this α: 0 the untouched model, 1 the fine-tuned one, exactly.

        Raises:
            ValueError: α is outside of [0, 1].
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}")
        for part in self._parts:
            part.write(alpha)

    def tuned_weights(self) -> dict[str, Tensor]:
        """Name in the model -> fine-tuned value on the CPU, of all that is mixed.

        ``model.load_state_dict(weights, strict=False)`` brings the fine-tuned model back.
        """
        return {part.name: part.tuned for part in self._parts}


@dataclass
class _Part:
    name: str
    tensor: Tensor  # the model's own
    untouched: Tensor | float
    tuned: Tensor = field(init=False)  # a copy, on the CPU

    def _untouched(self) -> Tensor:
        if isinstance(self.untouched, float):
            return torch.full_like(self.tensor, self.untouched)
        return self.untouched.detach().to(self.tensor.device)

    def differs(self) -> bool:
        return not torch.equal(self._untouched().to(self.tensor.dtype), self.tensor)

    def keep_tuned(self) -> None:
        if not self.tensor.isfinite().all():
            raise ValueError(
                f"`model` must have finite weights, got {self.name!r} with infinity or NaN: "
                "training has diverged, and no mix with it is finite; go back to a checkpoint"
            )
        self.tuned = self.tensor.detach().to("cpu", copy=True)

    @torch.no_grad()
    def write(self, alpha: float) -> None:
        if alpha == 1:
            self.tensor.copy_(self.tuned)
            return
        wide = torch.promote_types(self.tensor.dtype, torch.float32)
        tuned = self.tuned.to(self.tensor.device, wide)
        self.tensor.copy_(torch.lerp(self._untouched().to(wide), tuned, alpha))


def needs_untouched(model: nn.Module) -> bool:
    """Whether a `Mixture` will need the untouched weights from elsewhere.

    Not where only adapters or a CLIP-Adapter train, which have the untouched model in themselves.

    Args:
        model: Ready to be trained, or trained.

    Raises:
        ValueError: The model is tuned in a way that has no mixes, or its weights are spread over
            ranks.
    """
    _check_mixable(model)
    return not _own_parts(model) or not _has_untouched(model)


def check_starts_untouched(model: nn.Module) -> None:
    """Raise unless adapters and a CLIP-Adapter do nothing yet: a `Mixture` takes that for α = 0.

    Args:
        model: Before its first step.

    Raises:
        ValueError: One was trained before, or starts by an initialisation such as PiSSA.
    """
    for part in _own_parts(model):
        if part.differs():
            raise ValueError(
                f"`model` must start with adapters that do nothing yet to be rescued, got "
                f"{part.name!r} with weights of its own (trained before, or an initialisation such "
                "as PiSSA); give `base_model`, the model without them, from which gain and "
                "forgetting then count"
            )


def trained_before(model: nn.Module) -> list[str]:
    """Names of the weights by which adapters on an untouched encoder do something already.

    Looked into are LoRA and its variants, IA3, ``modules_to_save`` and CLIP-Adapter.

    Args:
        model: Before its first step.
    """
    if is_sharded(model) or not _has_untouched(model):
        return []
    return [part.name for part in _own_parts(model, strict=False) if part.differs()]


def keep_untouched(model: nn.Module) -> Kept:
    """The parts of the model that a later `Mixture` needs; call it before the first step.

    It takes as much memory, on the CPU, as what trains and the floating-point buffers; of several
    ranks on each.

    Args:
        model: Ready to be trained, before its first step.
    """
    return Kept(
        {
            weight.names[0]: weight.tensor.detach().to("cpu", copy=True)
            for weight in weights_of(core_of(model))
            if weight.tensor.is_floating_point()
            and (weight.tensor.requires_grad or not isinstance(weight.tensor, nn.Parameter))
        }
    )


def _check_mixable(model: nn.Module) -> None:
    check_measurable(model)
    classifier = _own_classifier(model)
    if classifier is not None:
        raise ValueError(
            f"`model` has a classifier of its own, {type(classifier).__name__}.classify, of which "
            "there is no mix: only the dual encoder would be mixed, under a head trained for "
            "another; train a `PromptClassifier`, or use `action='stop'`"
        )
    if is_sharded(model):
        raise ValueError(
            "`model` must have whole weights to be rescued, got one that FSDP shards; save it, and "
            "rescue what was saved with `iimm rescue`"
        )
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"`model` must have its weights in memory, got {name!r} on the meta device; load "
                "it without offloading"
            )


def _own_classifier(model: nn.Module) -> Any:
    try:
        return find_own_head(model)
    except ValueError:  # no encoder is known: all of the model is mixed
        return None


# --- adapters and heads: they hold the untouched model ---


def _own_parts(model: nn.Module, *, strict: bool = True) -> list[_Part]:
    """What adapters and a CLIP-Adapter are scaled in.

    Args:
        model: Any.
        strict: Raise where something cannot be scaled, else pass it over.
    """
    names, parts = _names(model), []
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names"):
            parts += _adapter_parts(name, module, names, strict)
    head = find_head(model)
    if isinstance(head, ClipAdapter):
        if strict and head.residual_ratio == 1:
            raise ValueError(
                "`model` has a CLIP-Adapter with `residual_ratio` 1, of which no scale is the "
                "untouched model; train it with a smaller one"
            )
        parts.append(_Part(names[id(head.up.weight)], head.up.weight, 0.0))
    elif strict and head is not None:
        raise ValueError(
            f"`model` has a {type(head).__name__}, which off-target tasks do not pass through: "
            "there is nothing to rescue"
        )
    return parts


def _names(model: nn.Module) -> dict[int, str]:
    return {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}


def _adapter_parts(name: str, module: Any, names: dict[int, str], strict: bool) -> list[_Part]:
    """Of one layer of peft, those of its active adapters."""
    active = set(module.active_adapters)
    if strict and getattr(module, "merged", False):
        raise ValueError(
            f"`model` must have its adapters apart, got {name!r} with one merged; unmerge it, or "
            "`merge_and_unload` and give `base`"
        )
    if strict and module.disable_adapters:
        raise ValueError(f"`model` must have its adapters switched on, got {name!r} without")
    parts = []
    for layer in module.adapter_layer_names:
        held: Any = getattr(module, layer, None)
        for adapter in active.intersection(held.keys() if hasattr(held, "keys") else ()):
            tensors = _weights(held[adapter])
            if layer == "lora_B" and hasattr(module, "lora_E"):
                continue  # AdaLoRA's B starts at random
            if layer == "modules_to_save":
                originals: dict[str, Any] = _weights(module.original_module)
            elif layer in _NEUTRAL and not (
                strict and getattr(module, "lora_variant", {}).get(adapter)
            ):
                originals = dict.fromkeys(tensors, _NEUTRAL[layer])
            elif layer in _LEFT_ALONE or not strict:
                continue
            else:
                raise ValueError(
                    f"`model` has an adapter that cannot be scaled, {layer!r} of {name!r}: LoRA "
                    "without variants such as DoRA, IA3 and `modules_to_save` are supported; "
                    "`merge_and_unload` and give `base`"
                )
            parts += [_Part(names[id(t)], t, originals[key]) for key, t in tensors.items()]
    return parts


def _weights(held: Any) -> dict[str, Tensor]:
    """Its parameters and floating-point buffers."""
    if isinstance(held, nn.Parameter):
        return {"": held}
    buffers = {name: b for name, b in held.named_buffers() if b.is_floating_point()}
    return dict(held.named_parameters()) | buffers


def _has_untouched(model: nn.Module) -> bool:
    head = find_head(model)
    if head is None:
        return zero_shot_twin(model) is not None
    encoder = head.dual_encoder
    return not adapter_ids(encoder) and not any(p.requires_grad for p in encoder.parameters())


def _check_has_untouched(model: nn.Module, parts: list[_Part]) -> None:
    if not parts:
        raise ValueError(
            "`base` must be given, as `model` has no adapters under which it is untouched: the "
            "model before fine-tuning, its state dict, Hub name or folder"
        )
    if not _has_untouched(model):
        raise ValueError(
            "`base` must be given: what is under the adapters of `model` is not exactly the model "
            "before fine-tuning (tuned biases, weights that train beside them, an initialisation "
            "that changed the weights, or moving batch norms)"
        )
