"""The untouched model: from a folder or the Hub, or under the adapters of the one that trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .wrappers import adapter_ids, core_of, outermost


def load_pretrained(name: str | Path) -> tuple[Any, list[str]]:
    """The model that transformers reads under this name, and the weights that are missing there.

    Args:
        name: Hub name or folder.

    Raises:
        OSError: There is no model of that name.
        KeyError, ValueError: transformers does not read it.
    """
    import transformers

    if isinstance(name, Path) and not name.exists():  # transformers takes it for a name of the Hub
        raise FileNotFoundError(f"there is no folder {name}; name one with a model")
    kind: Any = transformers.AutoModel
    try:
        architectures = transformers.AutoConfig.from_pretrained(name).architectures
    except (OSError, ValueError):  # an adapter, or nothing that can be read: `AutoModel` knows
        architectures = None
    # `AutoModel` would read e.g. BLIP's retrieval model as another class, with random parts.
    named = getattr(transformers, str((architectures or [""])[0]), None)
    # What a file names is taken for a model only: other classes read other files.
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        kind = named
    model, report = kind.from_pretrained(name, output_loading_info=True)
    return model, sorted(map(str, report["missing_keys"]))


def check_complete(name: str | Path, model: Any, missing: list[str], argument: str) -> None:
    """Raise where weights are missing.

    Args:
        name: As `load_pretrained`.
        model: What it returned.
        missing: Likewise.
        argument: What `name` is called in errors.

    Raises:
        ValueError: Some are.
    """
    if missing:
        raise ValueError(
            f"`{argument}` {str(name)!r} lacks {len(missing)} weights of {type(model).__name__}, "
            f"which would be random: {', '.join(missing[:3])}...; name a complete dual encoder"
        )


def zero_shot_twin(model: nn.Module) -> AbstractContextManager[None] | None:
    """Inside it, a model with adapters is the untouched model again, at any step.

    Args:
        model: Any module.

    Returns:
        A context in which the adapters of peft are switched off; None where that is not exactly the
        model before fine-tuning: no adapters, a merged one, tuned biases, weights that train beside
        them, an initialisation that changed the base weights (PiSSA and the like), or batch norms
        whose statistics move (those that `freeze` stopped do not). Weights that trained and were
        frozen again are not noticed. What adapters learnt before the present run counts as learnt.
    """
    adapted = outermost(model, _has_adapters)
    if not adapted:
        return None
    configs = [config for part in adapted for config in part.peft_config.values()]
    parts = nn.ModuleList([core_of(model), *adapted])  # a tower may have adapters, and another not
    adapters = adapter_ids(parts)
    exact = (
        all(getattr(c, "bias", "none") == "none" for c in configs)
        and all(isinstance(getattr(c, "init_lora_weights", True), bool) for c in configs)
        and not any(getattr(m, "merged", False) for m in parts.modules())
        and all(map(_is_still, parts.modules()))
        and all(id(p) in adapters for p in parts.parameters() if p.requires_grad)
    )
    return _without_adapters(adapted) if exact else None


def find_untouched(
    model: nn.Module, base: nn.Module | str | Path | Callable[[], nn.Module] | None
) -> nn.Module | AbstractContextManager[None]:
    """The untouched model of one that has been trained already.

    Args:
        model: The model that trains.
        base: See `load_untouched`; None: not given.

    Returns:
        `base` loaded; else, see `zero_shot_twin`, the context in which `model` is untouched.

    Raises:
        OSError, TypeError: See `load_untouched`.
        ValueError: It is not available, or see there.
    """
    if base is not None:
        return load_untouched(base, model)
    twin = zero_shot_twin(model)
    if twin is None:
        raise ValueError(
            "the checkpoint was written without the guard, so the untouched model was never "
            "measured; give it as `base_model`"
        )
    return twin


def load_untouched(
    base: nn.Module | str | Path | Callable[[], nn.Module], like: nn.Module
) -> nn.Module:
    """The untouched model, where the model that is training is.

    Args:
        base: The model, its Hub name or folder, or a function that returns it.
        like: The model that trains: device and dtype of its encoder are taken over.

    Returns:
        It; of a model that is given and has another device or dtype a copy.

    Raises:
        OSError: There is no model of that name.
        TypeError: It is no model.
        ValueError: The model of that name lacks weights, which would stay random.
    """
    if isinstance(base, str | Path):
        model, missing = load_pretrained(base)
        check_complete(base, model, missing, "base_model")
    else:
        model = base if isinstance(base, nn.Module) else base()
    if not isinstance(model, nn.Module):
        raise TypeError(
            "`base_model` must be a model, its Hub name or folder, or a function that returns it, "
            f"got {type(model).__name__}"
        )
    parts = core_of(like), like
    first = next(p for m in parts for p in m.parameters() if p.is_floating_point())
    device, dtype = first.device, first.dtype
    if model is base and any(
        t.device != device or (t.is_floating_point() and t.dtype != dtype)
        for t in (*model.parameters(), *model.buffers())
    ):
        model = copy.deepcopy(model)
    return model.to(device, dtype)


def freeze(model: nn.Module) -> None:
    """No parameter trains, and no batch norm moves by its running statistics.

    For that it must be in eval mode, out of which every ``model.train()`` takes it: each goes back
    at its next forward pass, unless its weight is made to train later.

    Args:
        model: Changed in place.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_stay_in_eval_mode)


def _stay_in_eval_mode(module: nn.Module, inputs: Any) -> None:
    if not getattr(module.weight, "requires_grad", False):
        module.eval()


def _is_still(module: nn.Module) -> bool:
    moves = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    return not moves or _stay_in_eval_mode in module._forward_pre_hooks.values()


def _has_adapters(module: nn.Module) -> bool:
    configs = getattr(module, "peft_config", None)
    return isinstance(configs, dict) and bool(configs)


@contextmanager
def _without_adapters(modules: Sequence[Any]) -> Iterator[None]:
    trains = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        with ExitStack() as stack:
            for module in modules:
                if hasattr(module, "disable_adapter"):  # a PeftModel
                    stack.enter_context(module.disable_adapter())
                else:  # a transformers model after `add_adapter`
                    module.disable_adapters()
                    stack.callback(module.enable_adapters)
            yield
    finally:
        for parameter, flag in trains:  # peft wakes all adapters, frozen ones too
            parameter.requires_grad_(flag)
