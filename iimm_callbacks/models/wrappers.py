"""The dual encoder in whatever training puts around it; the untouched model under adapters."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .families import family_of, why_not
from .heads import Head
from .pretrained import check_complete, load_pretrained
from .sharded import full_parameters

# One of them may be around another one of its kind.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|base_model\.model|base_layer|original_module"
    r"|token_adapter)\."
)


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
    found = _outermost(model, lambda module: family_of(module) is not None)
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
    adapted = _outermost(model, _has_adapters)
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
    if isinstance(head, nn.Module):
        inside |= {id(p) for p in head.parameters()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside]


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


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[Any]:
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
