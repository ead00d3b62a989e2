"""How the models of each family are read: one table, one entry a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from .processors import Inputs, Read, keeps_case, read_images, read_prompts


def exponential_scale(model: Any) -> tuple[Any, Any]:
    """``exp(logit_scale)`` and ``logit_bias``, None where there is none."""
    return model.logit_scale.exp(), getattr(model, "logit_bias", None)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one family are read. `register_encoder` adds one.

    Attributes:
        name: For tables and errors.
        embed_images: (model, what `preprocess` made) -> embeddings [n, D], normalised or not. Both
            must let gradients through: what no gradient reaches is taken for frozen.
        embed_texts: (model, what `tokenize` made) -> embeddings [n, D], normalised or not.
        preprocess: processor -> a function of a list of images that returns model inputs.
        tokenize: (model, processor) -> a function of a list of prompts that returns model inputs.
        logit_scale: model -> (scale, bias or None), ``logits = scale · cosine + bias``.
        towers: Names of the submodules in which fine-tuning methods act; not all need exist.
        reads: What an "image" is to it.
    """

    name: str
    embed_images: Callable[[Any, Any], Tensor]
    embed_texts: Callable[[Any, Any], Tensor]
    preprocess: Callable[[Any], Read] = read_images
    tokenize: Callable[[Any, Any], Read] = read_prompts
    logit_scale: Callable[[Any], tuple[Any, Any]] = exponential_scale
    towers: tuple[str, ...] = ("vision_model", "text_model")
    reads: Literal["image", "sound", "video"] = "image"


def register_encoder(family: Family, matches: type | Callable[[nn.Module], bool]) -> None:
    """Teach the probe a family of models.

    Later entries win over earlier ones and over those built in.

    Args:
        family: How its models are read.
        matches: The models' class, or a function of a module that says whether it is one.

    Raises:
        TypeError: `family` is no `Family`, or `matches` neither a class nor a function.

    Example:
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = nn.LazyLinear(8), nn.EmbeddingBag(100, 8)
        >>> register_encoder(
        ...     Family(
        ...         name="Mine",
        ...         embed_images=lambda model, inputs: model.image(inputs["pixel_values"]),
        ...         embed_texts=lambda model, inputs: model.text(inputs["input_ids"]),
        ...         logit_scale=lambda model: (100.0, None),
        ...         towers=("image", "text"),
        ...     ),
        ...     Mine,
        ... )
    """
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a `Family`, got {type(family).__name__}")
    if not callable(matches):
        raise TypeError(
            "`matches` must be the models' class or a function of a module that returns a bool, "
            f"got {matches!r}"
        )
    if isinstance(matches, type):
        kind = matches
        _REGISTERED.insert(0, (lambda module: isinstance(module, kind), family))
    else:
        _REGISTERED.insert(0, (matches, family))


def family_of(module: nn.Module) -> Family | None:
    """The family of a module that is itself a dual encoder, else None."""
    table = _REGISTERED + ([] if _model_type(module) in _NO_JOINT_SPACE else _TABLE)
    return next((family for matches, family in table if matches(module)), None)


def is_registered(family: Family) -> bool:
    """Whether it is the user's own."""
    return any(family is own for _, own in _REGISTERED)


def encoder_inside(module: nn.Module) -> nn.Module | None:
    """The dual encoder inside one whose functions pass on to it; None in all others."""
    inner = (m for m in module.modules() if m is not module)
    return next((m for m in inner if family_of(m) is not None), None)


def why_not(module: nn.Module) -> str | None:
    """Why a module is no dual encoder; None if nothing is known of it."""
    for name, value in vars(module).items():
        held = value.values() if isinstance(value, Mapping) else value
        held = held if isinstance(value, Mapping | list | tuple) else (value,)
        hidden = [m for m in held if isinstance(m, nn.Module) and family_of(m) is not None]
        if hidden and name != "_modules":
            return (
                f"its `{name}` hides a {type(hidden[0]).__name__} from torch, so that no optimizer "
                "trains it and no checkpoint has it; set it as an attribute, or in an "
                "`nn.ModuleList`"
            )
    kind = _model_type(module)
    if kind in _NO_JOINT_SPACE:
        return _NO_JOINT_SPACE[kind]
    generates = getattr(module, "can_generate", None)
    if callable(generates) and generates():
        return "it generates text and has no space in which images and texts are compared"
    inputs = getattr(module, "main_input_name", None)
    if inputs == "pixel_values":
        return "it embeds images only and has no text tower"
    if inputs == "input_ids" and kind is not None:
        return "it embeds texts only and has no image tower"
    return None


def _vector(output: Any) -> Any:
    # transformers 5 returns an object, or a tuple with `config.return_dict=False`; 4 a tensor.
    if isinstance(output, Tensor):
        return output
    return output[1] if isinstance(output, tuple) else output.pooler_output


def _first_token(output: Any) -> Any:
    # All tokens are projected; the space was trained on the first.
    vectors = _vector(output)
    return vectors[:, 0] if vectors.ndim == 3 else vectors


def _transformers(
    name: str,
    *,
    images: str | Callable[[Any, Inputs], Tensor] = "get_image_features",
    texts: str | Callable[[Any, Inputs], Tensor] = "get_text_features",
    vector: Callable[[Any], Any] = _vector,
    padding: Callable[[Any], int] | None = None,
    **entry: Any,
) -> Family:
    def tokenize(model: Any, processor: Any) -> Read:
        return read_prompts(model, processor, padding(model) if padding else None)

    def embed(function: str | Callable[[Any, Inputs], Tensor]) -> Callable[[Any, Inputs], Tensor]:
        if callable(function):
            return function
        return lambda model, inputs: vector(getattr(model, function)(**inputs))

    return Family(
        name=name, embed_images=embed(images), embed_texts=embed(texts), tokenize=tokenize, **entry
    )


def _full_length(model: Any) -> int:
    return int(model.config.text_config.max_position_embeddings)


def _temperature(model: Any) -> tuple[Any, Any]:
    return 1 / model.temperature, None


def _x_clip_videos(model: Any, inputs: Inputs) -> Tensor:
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            "`model` XCLIPModel needs transformers 5: its `get_video_features` fails in "
            f"{transformers.__version__}"
        )
    embeds: Tensor = _vector(model.get_video_features(**inputs))
    return embeds


def _blip_tokens(inputs: Inputs) -> Inputs:
    # A BERT tokenizer gives token types, BLIP has none.
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}


def _siglip() -> Family:
    def tokenize(model: Any, processor: Any) -> Read:
        read = read_prompts(model, processor, _full_length(model))
        if not keeps_case(processor):
            return read
        return lambda prompts: read([prompt.lower() for prompt in prompts])

    return replace(_transformers("SigLIP"), tokenize=tokenize)


def _open_clip() -> Family:
    def images(model: Any, inputs: Inputs) -> Tensor:
        # In half precision open_clip keeps some weights in full, the convolution never.
        patches = next((p for p in model.visual.parameters() if p.ndim == 4), None)
        pixels = inputs["pixel_values"]
        embeds: Tensor = model.encode_image(pixels if patches is None else pixels.to(patches.dtype))
        return embeds

    return Family(
        name="open_clip",
        embed_images=images,
        embed_texts=lambda model, inputs: model.encode_text(inputs["input_ids"]),
        towers=("visual", "text", "transformer"),
    )


def _model_type(module: nn.Module) -> Any:
    return getattr(getattr(module, "config", None), "model_type", None)


def _own(module: nn.Module, name: str) -> Any:
    # PEFT, `torch.compile` and FSDP 1 pass on what is asked of the model inside.
    if type(module).__module__.startswith("torch.jit"):  # a script passes on to its own code
        return getattr(module, name, None)
    for own in (module._modules, module.__dict__):
        if name in own:
            return own[name]
    return getattr(type(module), name, None)


def _has(*functions: str) -> Callable[[nn.Module], bool]:
    return lambda module: all(callable(_own(module, name)) for name in functions)


def _is(*model_types: str, functions: str = "get_text_features") -> Callable[[nn.Module], bool]:
    has = _has(functions)

    return lambda module: _model_type(module) in model_types and has(module)


_NO_JOINT_SPACE = {
    "blip-2": "its text side is a language model whose states lie in no space shared with images, "
    "or, for retrieval, an image has 32 vectors instead of one",
    "instructblip": "it generates text and has no space in which images and texts are compared",
}

_REGISTERED: list[tuple[Callable[[nn.Module], bool], Family]] = []  # by the user, the latest first
# The first match counts. What follows the usual way needs no entry: the last ones read any model
# with the usual functions.
_TABLE: list[tuple[Callable[[nn.Module], bool], Family]] = [
    # Trained on text padded to its full length, and reads the padding.
    (_is("siglip", "siglip2"), _siglip()),
    (_is("tipsv2"), _transformers("TIPSv2", padding=_full_length, logit_scale=_temperature)),
    (_is("align"), _transformers("ALIGN", logit_scale=_temperature)),
    # Its text tower attends to what comes later where no text of the batch is padded.
    (
        _is("aimv2"),
        _transformers(
            "AIMv2",
            padding=_full_length,
            logit_scale=lambda m: (m.logit_scale.clamp(0.0, m.max_log_logit_scale).exp(), None),
        ),
    ),
    (
        _is("flava"),
        _transformers("FLAVA", vector=_first_token, towers=("image_model", "text_model")),
    ),
    (
        _is("clap"),
        _transformers(
            "CLAP",
            images="get_audio_features",
            logit_scale=lambda model: (model.logit_scale_a.exp(), None),
            towers=("audio_model", "text_model"),
            reads="sound",
        ),
    ),
    (
        _is("xclip"),
        _transformers(
            "X-CLIP",
            images=_x_clip_videos,
            towers=("vision_model", "mit", "text_model"),
            reads="video",
        ),
    ),
    (  # it has no feature functions and no scale; 0.07 is BLIP's own initial temperature
        _is("blip", functions="text_proj"),
        Family(
            name="BLIP retrieval",
            embed_images=lambda m, inputs: m.vision_proj(m.vision_model(**inputs)[0][:, 0]),
            embed_texts=lambda m, inputs: m.text_proj(
                m.text_encoder(**_blip_tokens(inputs))[0][:, 0]
            ),
            logit_scale=lambda model: (1 / 0.07, None),
            towers=("vision_model", "text_encoder"),
        ),
    ),
    (
        _is("blip"),
        _transformers(
            "BLIP",
            texts=lambda model, inputs: _vector(model.get_text_features(**_blip_tokens(inputs))),
        ),
    ),
    (  # transformers 4: its `get_text_features` fails, because the text tower has no pooler
        _is("chinese_clip"),
        _transformers(
            "Chinese-CLIP",
            texts=lambda m, inputs: m.text_projection(m.text_model(**inputs)[0][:, 0]),
        ),
    ),
    (_has("get_image_features", "get_text_features"), _transformers("CLIP")),
    # A user's module may have these two around a model of any family; `visual` is open_clip's.
    (_has("encode_image", "encode_text", "visual"), _open_clip()),
]
