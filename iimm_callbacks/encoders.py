"""Model -> image and text embeddings; alone knows the quirks of model families and wrappers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
EncodePair = tuple[
    Callable[[nn.Module, list[Any]], Tensor], Callable[[nn.Module, list[str]], Tensor]
]

# The families (`config.model_type`) whose text tower was trained on text padded to its full length
# and reads the padding; every other family masks it.
_READS_PADDING = ("siglip", "siglip2")
# Settings of an image processor that do nothing to the pixels of an RGB image, and differ between
# versions of transformers.
_NOT_PREPROCESSING = (
    "image_processor_type",
    "processor_class",
    "_processor_class",
    "do_convert_rgb",
)


@dataclass(frozen=True)
class Encoder:
    """The four functions a probe needs of a dual encoder.

    Attributes:
        preprocess: PIL images -> model inputs, e.g. ``pixel_values`` [n, 3, H, W].
        tokenize: Prompts -> model inputs, e.g. ``input_ids`` [n, L].
        embed_images: (model, preprocessed images) -> [n, D], not normalised.
        embed_texts: (model, tokenized prompts) -> [n, D], not normalised.
        description: Of the preprocessing, for fingerprints.
    """

    preprocess: Callable[[list[Any]], Any]
    tokenize: Callable[[list[str]], Any]
    embed_images: Callable[[nn.Module, Any], Tensor]
    embed_texts: Callable[[nn.Module, Any], Tensor]
    description: str


def find_encoder(
    model: nn.Module, processor: Any = None, encode: EncodePair | None = None
) -> Encoder:
    """The `Encoder` for a model: from its own feature functions, or from `encode`.

    Args:
        model: A transformers dual encoder with ``get_image_features`` and ``get_text_features``,
            bare, under PEFT, DDP or `torch.compile`, or inside a user's `nn.Module`.
        processor: Its processor (image processor and tokenizer in one). ``None``: loaded with
            `AutoProcessor` from where the model came from.
        encode: ``(encode_images, encode_texts)`` for any other model: each takes the model and a
            list (RGB PIL images; prompts) and returns embeddings [n, D].

    Returns:
        The `Encoder`.

    Raises:
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
        return Encoder(list, list, images, texts, f"user functions {names}")
    core = find_dual_encoder(model)
    config = getattr(core, "config", None)
    processor = _find_processor(config, processor)
    text_options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
    if getattr(config, "model_type", "") in _READS_PADDING:
        length = core.config.text_config.max_position_embeddings
        text_options |= {"padding": "max_length", "max_length": length}

    def preprocess(batch: list[Any]) -> Inputs:
        return dict(processor.image_processor(images=batch, return_tensors="pt"))

    def tokenize(prompts: list[str]) -> Inputs:
        return dict(processor.tokenizer(prompts, **text_options))

    return Encoder(
        preprocess,
        tokenize,
        lambda m, inputs: _features(m, "get_image_features", inputs),
        lambda m, inputs: _features(m, "get_text_features", inputs),
        _describe(processor.image_processor),
    )


def find_dual_encoder(model: nn.Module) -> Any:
    """The outermost module, in `model` or inside it, that has both feature functions.

    Args:
        model: Any module; DDP, `torch.compile` and a user's wrappers are looked through.

    Returns:
        The module with ``get_image_features`` and ``get_text_features``.

    Raises:
        ValueError: There is none.
    """
    for module in _breadth_first(model):
        if callable(getattr(module, "get_image_features", None)) and callable(
            getattr(module, "get_text_features", None)
        ):
            return module
    raise ValueError(
        f"`model` must be a dual encoder with a joint space, got {type(model).__name__}: neither "
        "it nor any module inside has `get_image_features` and `get_text_features`; pass "
        "`encode=(encode_images, encode_texts)`, two functions of (model, list) that return "
        "embeddings [n, D]"
    )


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
    adapters = {
        id(parameter)
        for module in model.modules()
        for layer in getattr(module, "adapter_layer_names", ())  # of every PEFT layer
        if isinstance(getattr(module, layer, None), nn.Module)
        for parameter in getattr(module, layer).parameters()
    }
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


def _breadth_first(model: nn.Module) -> Iterator[nn.Module]:
    queue: Sequence[nn.Module] = [model]
    while queue:
        yield from queue
        queue = [child for module in queue for child in module.children()]


def _features(model: nn.Module, function: str, inputs: Inputs) -> Tensor:
    output = getattr(find_dual_encoder(model), function)(**inputs)
    if not isinstance(output, Tensor):  # transformers 5; a tuple with `config.return_dict=False`
        output = output[1] if isinstance(output, tuple) else output.pooler_output
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"`model`'s `{function}` must return one joint-space vector per input, [n, D], got "
            f"{got} from {type(find_dual_encoder(model)).__name__}; pass "
            "`encode=(encode_images, encode_texts)`"
        )
    embeds: Tensor = output
    return embeds


def _describe(image_processor: Any) -> str:
    # As JSON: a processor made in code has tuples and enums where one read from a file has not.
    settings = {
        key: value
        for key, value in image_processor.to_dict().items()
        if value is not None and key not in _NOT_PREPROCESSING
    }
    return json.dumps(settings, sort_keys=True, default=str)


def _find_processor(config: Any, processor: Any) -> Any:
    def complete(candidate: Any) -> bool:
        return hasattr(candidate, "image_processor") and hasattr(candidate, "tokenizer")

    if complete(processor):
        return processor
    source = getattr(config, "_name_or_path", "")
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
    raise ValueError(
        "`processor` must have an `image_processor` and a `tokenizer`, got "
        f"{got}, and {problem}; pass `IIMMCallback(processor=...)` or "
        "`Trainer(processing_class=...)`, e.g. `AutoProcessor.from_pretrained(model_name)`"
    )
