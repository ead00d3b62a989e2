"""The weights of a fine-tuned dual encoder, each beside its untouched value."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models.wrappers import adapter_ids, bare_name, core_of


@dataclass(frozen=True)
class Kept:
    """The untouched values of the weights that train, on the CPU.

    Attributes:
        weights: Name within the dual encoder, without wrappers -> value.
    """

    weights: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path) -> Kept:
        """What `save_weights` wrote of one.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no file of safetensors.
        """
        try:
            return cls(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} holds no weights: {error}") from error


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write weights as safetensors; a crash leaves the old file or the new one.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{path.name}.{secrets.token_hex(4)}.unfinished"
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished)
        os.replace(unfinished, path)
    except SafetensorError as error:  # of a disk that is full, say
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@dataclass
class Weight:
    """A parameter or buffer of a dual encoder.

    Attributes:
        tensor: The model's own.
        names: Its names within the dual encoder, without wrappers; several where it is tied.
        is_saved: Whether it is in the state dict.
    """

    tensor: Tensor
    names: list[str]
    is_saved: bool


# What peft puts into the names of its weights, beside the layers of the model at hand.
_ADAPTERS = {
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "ia3_l",
    "modules_to_save",
}


def weights_of(core: nn.Module) -> list[Weight]:
    """All parameters and buffers of a dual encoder but those of adapters."""
    adapters, saved = adapter_ids(core), core.state_dict().keys()
    found: dict[int, Weight] = {}
    for name, tensor in (
        *core.named_parameters(remove_duplicate=False),
        *core.named_buffers(remove_duplicate=False),
    ):
        if id(tensor) not in adapters:
            weight = found.setdefault(id(tensor), Weight(tensor, [], False))
            weight.names.append(bare_name(name))
            weight.is_saved |= name in saved
    return list(found.values())


def state_of(state: Mapping[str, Any], core: nn.Module) -> dict[str, Tensor]:
    """A state dict with names relative to the dual encoder; other entries are left out.

    Args:
        state: Of the dual encoder, whatever wraps it.
        core: The dual encoder.
    """
    bare = {bare_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    names = [name for weight in weights_of(core) for name in weight.names]
    prefixes = {n[: -len(own)] for n in bare for own in names if f".{n}".endswith(f".{own}")}
    counts = {p: sum(f"{p}{name}" in bare for name in names) for p in prefixes}
    prefix = max(counts, key=lambda p: (counts[p], -len(p)), default="")
    return {n.removeprefix(prefix): v for n, v in bare.items() if n.startswith(prefix)}


def counterparts(
    core: nn.Module, untouched: nn.Module | Mapping[str, Tensor] | Kept
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each floating-point weight of a dual encoder, its own tensor, and its untouched value.

    Args:
        core: As `core_of` gives it.
        untouched: A module, whatever wraps it; a state dict of one; or `Kept`, which need not have
            what cannot have changed. Adapters in it do not count.

    Raises:
        TypeError: `untouched` is none of these.
        ValueError: Names or shapes are others, one ties what the other does not, or a weight is
            quantised.
    """
    weights = weights_of(core)
    own = {name: weight.tensor for weight in weights for name in weight.names}
    if isinstance(untouched, Kept):
        theirs = untouched.weights
    elif isinstance(untouched, nn.Module):
        theirs = {n: w.tensor for w in weights_of(core_of(untouched)) for n in w.names}
    elif isinstance(untouched, Mapping):
        theirs = state_of(untouched, core)
    else:
        raise TypeError(
            "`base` must be a model, a state dict, a Hub name or a folder, got "
            f"{type(untouched).__name__}"
        )
    layers = {n for m in core.modules() for n in getattr(m, "adapter_layer_names", ())} | _ADAPTERS
    theirs = {n: t for n, t in theirs.items() if layers.isdisjoint(n.split("."))}
    extra = [n for n, t in theirs.items() if n not in own and t.is_floating_point()]
    missing = [] if isinstance(untouched, Kept) else _missing(weights, theirs)
    for names, problem in ((missing, "lacks"), (extra, "has beside them")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"`base` must have the weights of `model`, but {problem} {names[0]!r}{more}; give "
                "the model that was fine-tuned"
            )
    for weight in weights:
        known = [theirs[name] for name in weight.names if name in theirs]
        if known:
            yield from _pair(weight, known)
        elif isinstance(untouched, Kept) and weight.tensor.requires_grad:
            raise ValueError(
                f"`base` must be given, as {weight.names[0]!r} began to train later and was not "
                "kept; give the model before fine-tuning"
            )


def _pair(weight: Weight, known: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    name, tensor, there = weight.names[0], weight.tensor, known[0]
    if there.shape != tensor.shape:
        raise ValueError(
            f"`base` must have the shapes of `model`, {name!r} is {list(tensor.shape)} there, got "
            f"{list(there.shape)}; pass the model that was fine-tuned"
        )
    if any(not torch.equal(there, other) for other in known[1:]):
        raise ValueError(
            f"`base` must tie the weights that `model` ties, got values of their own for "
            f"{', '.join(weight.names)}"
        )
    if tensor.is_floating_point():
        return [(tensor, there)]
    if isinstance(tensor, nn.Parameter) and not torch.equal(tensor, there.to(tensor.device)):
        raise ValueError(
            f"`model` must have floating-point weights, got {name!r} in {tensor.dtype}, which "
            "cannot be mixed; load both models unquantised"
        )
    return []


def _missing(weights: list[Weight], theirs: Mapping[str, Tensor]) -> list[str]:
    return [
        weight.names[0]
        for weight in weights
        if weight.is_saved
        and weight.tensor.is_floating_point()
        and not any(name in theirs for name in weight.names)
    ]
