"""Model -> image and text embeddings; looks through whatever training puts around a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family, family_of, image_part, why_not
from .heads import Head
from .sources import kind

EncodePair = tuple[
    Callable[[nn.Module, list[Any]], Tensor], Callable[[nn.Module, list[str]], Tensor]
]

# Settings of a processor that do nothing to the pixels of an RGB image, and differ between
# versions of transformers.
_NOT_PREPROCESSING = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_processor_class",
    "do_convert_rgb",
)


@dataclass(frozen=True)
class Encoder:
    """The functions a probe needs of a dual encoder.

    Attributes:
        preprocess: Images -> model inputs, e.g. ``pixel_values`` [n, 3, H, W].
        tokenize: Prompts -> model inputs, e.g. ``input_ids`` [n, L].
        embed_backbone: (model, preprocessed images) -> [n, D], not normalised, before any `Head`.
        embed_texts: (model, tokenized prompts) -> [n, D], not normalised.
        logit_scale: model -> (scale, bias or None) of ``logits = scale · cosine + bias``.
        description: Of the preprocessing, for fingerprints.
    """

    preprocess: Callable[[list[Any]], Any]
    tokenize: Callable[[list[str]], Any]
    embed_backbone: Callable[[nn.Module, Any], Tensor]
    embed_texts: Callable[[nn.Module, Any], Tensor]
    logit_scale: Callable[[nn.Module], tuple[Any, Any]]
    description: str

    def embed_images(self, model: nn.Module, inputs: Any) -> Tensor:
        """(model, preprocessed images) -> [n, D], not normalised, as the model is tuned now."""
        return adapt(model, self.embed_backbone(model, inputs))


def find_encoder(
    model: nn.Module, processor: Any = None, encode: EncodePair | None = None
) -> Encoder:
    """The `Encoder` for a model: by its entry in `families`, or from `encode`.

    Args:
        model: A dual encoder of a family in `families`, bare, under PEFT, DDP or `torch.compile`,
            or inside a user's `nn.Module`.
        processor: Its processor (image processor and tokenizer in one), or for open_clip the pair
            ``(transform, tokenizer)``. ``None``: that of the `PromptClassifier` the model is in,
            or loaded with `AutoProcessor` from where the model came from.
        encode: ``(encode_images, encode_texts)`` for any other model: each takes the model and a
            list (RGB PIL images; prompts) and returns embeddings [n, D].

    Returns:
        The `Encoder`.

    Raises:
        TypeError: `encode` is not two functions.
        ValueError: The model has no readable joint space, or no processor was to be found.
    """
    if encode is not None:
        for function in encode:
            if not callable(function):
                raise TypeError(
                    "`encode` must be two functions (encode_images, encode_texts) of (model, "
                    f"list), got {function!r}"
                )
        images, texts = encode
        names = ", ".join(getattr(f, "__qualname__", type(f).__name__) for f in encode)
        return Encoder(list, list, images, texts, lambda m: (1.0, None), f"user functions {names}")
    own = next((e for m in _breadth_first(model) if (e := _encoder_of(m)) is not None), None)
    if processor is None and own is not None:
        return own
    core = find_dual_encoder(model)
    family = family_of(core)
    assert family is not None
    processor = _find_processor(core, family, processor)
    read = family.preprocess(processor)

    def preprocess(images: list[Any]) -> Any:
        wrong = next((k for k in map(kind, images) if k != family.reads), None)
        if wrong is not None:
            raise ValueError(
                f"`dataset` must hold {family.reads}s for {type(core).__name__}, got {wrong}s"
            )
        return read(images)

    return Encoder(
        preprocess,
        family.tokenize(core, processor),
        lambda m, inputs: _vectors(m, family, "embed_images", inputs),
        lambda m, inputs: _vectors(m, family, "embed_texts", inputs),
        lambda m: family.logit_scale(find_dual_encoder(m)),
        _describe(processor),
    )


def find_dual_encoder(model: nn.Module) -> Any:
    """The outermost module, in `model` or inside it, that is a dual encoder of a known family.

    Args:
        model: Any module; DDP, `torch.compile` and a user's wrappers are looked through.

    Returns:
        The module.

    Raises:
        ValueError: There is none; says why, where the model is of a kind that cannot be one.
    """
    for module in _breadth_first(model):
        if family_of(module) is not None:
            return module
    reasons = ((module, why_not(module)) for module in _breadth_first(model))
    module, reason = next((found for found in reasons if found[1]), (model, None))
    raise ValueError(
        f"`model` must be a dual encoder with a joint space, got {type(module).__name__}: "
        + (
            reason
            or "neither it nor any module inside has `get_image_features` and "
            "`get_text_features`, or `encode_image` and `encode_text`"
        )
        + "; pass `encode=(encode_images, encode_texts)`, two functions of (model, list) that "
        "return embeddings [n, D], or teach its family with `register_encoder`"
    )


def find_head(model: nn.Module) -> Head | None:
    """The `Head` on the dual encoder, in `model` or inside it, if there is one."""
    return next((module for module in _breadth_first(model) if isinstance(module, Head)), None)


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
        model before fine-tuning: no adapters, a merged one, tuned biases, weights unfrozen by hand,
        or an initialisation that changed the base weights (PiSSA and the like).
    """
    for module in _breadth_first(model):
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, dict) or not configs:
            continue
        adapters = _adapters(module)
        exact = (
            all(getattr(c, "bias", "none") == "none" for c in configs.values())
            and all(
                isinstance(getattr(c, "init_lora_weights", True), bool) for c in configs.values()
            )
            and not any(getattr(m, "merged", False) for m in module.modules())
            and all(id(p) in adapters for p in module.parameters() if p.requires_grad)
        )
        return _without_adapters(module) if exact else None
    return None


@contextmanager
def _without_adapters(module: Any) -> Iterator[None]:
    trains = [(p, p.requires_grad) for p in module.parameters()]
    try:
        if hasattr(module, "disable_adapter"):  # a PeftModel
            with module.disable_adapter():
                yield
        else:  # a transformers model after `add_adapter`
            module.disable_adapters()
            try:
                yield
            finally:
                module.enable_adapters()
    finally:
        for parameter, flag in trains:  # peft wakes all adapters, frozen ones too
            parameter.requires_grad_(flag)


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
    try:
        model = find_dual_encoder(model)
    except ValueError:
        pass  # a model with functions of its own: all its parameters count
    adapters = _adapters(model)
    values = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapters:
            continue
        for wrapper in ("module", "_orig_mod", "base_model.model", "base_layer", "original_module"):
            name = f".{name}".replace(f".{wrapper}.", ".")[1:]
        values[name] = parameter.detach().flatten()[:16].float().cpu().numpy().tobytes()
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(name.encode() + values[name])
    return digest.hexdigest()[:16]


def move(inputs: Any, model: nn.Module) -> Any:
    """Model inputs on the model's device, floating ones in its dtype; anything else as it is."""
    if not isinstance(inputs, Mapping):
        return inputs
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return inputs
    return {
        k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype, non_blocking=True)
        if isinstance(v, Tensor)
        else v
        for k, v in inputs.items()
    }


def class_embeddings(prompt_embeds: Tensor, n_templates: int) -> Tensor:
    """Several templates per class -> one text embedding per class, the CLIP convention.

    Normalise each template's embedding, average over the templates, normalise again.

    Args:
        prompt_embeds: [C * T, D], all templates of class 0 first.
        n_templates: T.

    Returns:
        [C, D], in the dtype of the input, float32 at least.
    """
    wide = prompt_embeds.to(torch.promote_types(prompt_embeds.dtype, torch.float32))
    unit = nn.functional.normalize(wide, dim=1)
    per_class = unit.reshape(-1, n_templates, unit.shape[1])  # [C, T, D]
    return nn.functional.normalize(per_class.mean(1), dim=1)


def _encoder_of(module: nn.Module) -> Encoder | None:
    encoder = getattr(module, "encoder", None)
    return encoder if isinstance(encoder, Encoder) else None


def _breadth_first(model: nn.Module) -> Iterator[nn.Module]:
    queue: Sequence[nn.Module] = [model]
    while queue:
        yield from queue
        queue = [child for module in queue for child in module.children()]


def _adapters(model: nn.Module) -> set[int]:
    return {
        id(parameter)
        for module in model.modules()
        for layer in getattr(module, "adapter_layer_names", ())  # of every PEFT layer
        if isinstance(getattr(module, layer, None), nn.Module)
        for parameter in getattr(module, layer).parameters()
    }


def _vectors(model: nn.Module, family: Family, function: str, inputs: Any) -> Tensor:
    core = find_dual_encoder(model)
    output = getattr(family, function)(core, inputs)
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"`model` must give one joint-space vector per input, [n, D], got {got} from "
            f"`{function}` of {type(core).__name__}; pass `encode=(encode_images, encode_texts)`, "
            "or teach its family with `register_encoder`"
        )
    embeds: Tensor = output
    return embeds


def _describe(processor: Any) -> str:
    part = image_part(processor)
    if not hasattr(part, "to_dict"):
        return repr(part)
    # As JSON: a processor made in code has tuples and enums where one read from a file has not.
    settings = {
        key: value
        for key, value in part.to_dict().items()
        if value is not None and key not in _NOT_PREPROCESSING
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _find_processor(core: nn.Module, family: Family, processor: Any) -> Any:
    def complete(candidate: Any) -> bool:
        if isinstance(candidate, tuple):
            return len(candidate) == 2 and all(map(callable, candidate))
        return image_part(candidate) is not None and hasattr(candidate, "tokenizer")

    if complete(processor):
        return processor
    source = getattr(getattr(core, "config", None), "_name_or_path", "")
    problem = "the model does not say where it was loaded from"
    if source:
        from transformers import AutoProcessor

        try:
            loaded = AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, ImportError) as error:
            problem = f"loading one from {source!r} failed ({error})"
        else:
            if complete(loaded):
                return loaded
            problem = f"{source!r} has {type(loaded).__name__} only"
    got = "none" if processor is None else type(processor).__name__
    if family.name == "open_clip":
        raise ValueError(
            "`processor` must be the pair (transform, tokenizer) for an open_clip model, got "
            f"{got}; pass `processor=(preprocess, open_clip.get_tokenizer(model_name))`, with "
            "`preprocess` the validation transform of `open_clip.create_model_and_transforms`"
        )
    raise ValueError(
        "`processor` must have an `image_processor` (or `feature_extractor`) and a `tokenizer`, "
        f"got {got}, and {problem}; pass `IIMMCallback(processor=...)` or "
        "`Trainer(processing_class=...)`, e.g. `AutoProcessor.from_pretrained(model_name)`"
    )
