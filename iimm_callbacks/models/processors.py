"""What a model's processor makes of images and prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..records.log import get_logger

Inputs = dict[str, Any]
Read = Callable[[list[Any]], Any]

# Settings of a processor that do nothing to the pixels of an RGB image, and differ between
# versions of transformers.
_NOT_PREPROCESSING = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_processor_class",
    "do_convert_rgb",
)

logger = get_logger(__name__)

_UNLIMITED = 10**6  # tokens; a tokenizer that names no maximum says far more


def read_images(processor: Any) -> Read:
    """Images -> model inputs, through a processor's own preprocessing.

    Args:
        processor: With an ``image_processor`` (or ``feature_extractor``, for sound), or such a one
            itself, or a pair ``(transform, tokenizer)`` as open_clip has them; the transform takes
            one image.

    Returns:
        A function of a list of images.

    Raises:
        TypeError: It is none of these.
    """
    part = image_part(processor)
    if part is None:
        raise TypeError(
            "`processor` must be a model's processor, an image processor, a feature extractor or a "
            f"pair (transform, tokenizer), got {type(processor).__name__}"
        )
    if isinstance(processor, tuple):
        return lambda images: {"pixel_values": torch.stack([part(image) for image in images])}
    if hasattr(part, "sampling_rate"):
        return _read_sounds(part)
    return lambda images: dict(part(images, return_tensors="pt"))


def image_part(processor: Any) -> Any:
    """The part of a processor, or of a pair, that reads images (or sounds); None without one."""
    if isinstance(processor, tuple):
        return processor[0]
    for name in ("image_processor", "feature_extractor"):
        if hasattr(processor, name):
            return getattr(processor, name)
    # A tokenizer, too, is callable and knows the names of its model's inputs.
    alone = callable(processor) and hasattr(processor, "model_input_names")
    return processor if alone and not hasattr(processor, "convert_ids_to_tokens") else None


def read_prompts(model: Any, processor: Any, pad_to: int | None = None) -> Read:
    """Prompts -> model inputs, through a processor's own tokenizer.

    Args:
        model: Not needed here; entries of the table that pad read their length from it.
        processor: As `read_images`.
        pad_to: Pad every text to this many tokens; None: to the longest of its batch.

    Returns:
        A function of a list of prompts.
    """
    if isinstance(processor, tuple):
        return _read_by_pair(processor[1])
    tokenizer = processor.tokenizer
    most = pad_to or _most_tokens(model, tokenizer)
    padding = True if pad_to is None else "max_length"
    tell = _teller()

    def read(prompts: list[str]) -> Inputs:
        found = dict(
            tokenizer(
                prompts, truncation=True, max_length=most, padding=padding, return_tensors="pt"
            )
        )
        if most is not None:
            tell(lambda: _cut(tokenizer, prompts, found, most), most)
        return found

    return read


def _read_by_pair(tokenizer: Callable[[list[str]], Any]) -> Read:
    tell = _teller()

    def read(prompts: list[str]) -> Inputs:
        ids = tokenizer(prompts)
        count, most = _counter(tokenizer), ids.shape[1]
        if count is not None:
            # A token is a byte at least, but for those around the text.
            long = [p for p in prompts if len(p.encode()) + 3 > most]
            tell(lambda: [p for p in long if count(p) > most], most)
        return {"input_ids": ids}

    return read


def _counter(tokenizer: Any) -> Callable[[str], int] | None:
    """Tokens of a prompt by a tokenizer of open_clip; None for another, which does not tell."""
    inner, clean = getattr(tokenizer, "tokenizer", None), getattr(tokenizer, "clean_fn", str)
    if callable(inner):
        return lambda prompt: len(inner(clean(prompt), verbose=False)["input_ids"])
    if hasattr(tokenizer, "encode") and hasattr(tokenizer, "context_length"):
        return lambda prompt: len(tokenizer.encode(prompt)) + 2  # start and end
    return None


def _teller() -> Callable[[Callable[[], list[str]], int], None]:
    """A function that warns of prompts that are cut, once."""
    told = False

    def tell(find_cut: Callable[[], list[str]], most: int) -> None:
        nonlocal told
        cut = [] if told else find_cut()
        if cut:
            told = True
            logger.warning(
                "%d prompts have more than the %d tokens that the text encoder reads, and are cut: "
                "%r among them",
                len(cut),
                most,
                f"{cut[0][:60]}...",
            )

    return tell


def keeps_case(processor: Any) -> bool:
    """Whether its tokenizer is Gemma's, which SigLIP 2 was trained with on lower-cased text.

    Checkpoints name it as it is; `Siglip2Tokenizer` lower-cases by itself.
    """
    return type(getattr(processor, "tokenizer", None)).__name__.startswith("Gemma")


def _most_tokens(model: Any, tokenizer: Any) -> int | None:
    """Tokens that a prompt is cut at: the tokenizer's limit, or the model's positions if fewer."""
    config = getattr(model, "config", None)
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    limits = [getattr(tokenizer, "model_max_length", None), positions]
    return min((n for n in limits if isinstance(n, int) and n < _UNLIMITED), default=None)


def _cut(tokenizer: Any, prompts: list[str], found: Inputs, most: int) -> list[str]:
    """The prompts of which `found` has the first tokens only."""
    if found["input_ids"].shape[1] < most:
        return []
    mask = found.get("attention_mask")
    full = range(len(prompts)) if mask is None else mask.all(1).nonzero().flatten().tolist()
    return [
        p
        for p in (prompts[i] for i in full)
        if len(tokenizer(p, verbose=False)["input_ids"]) > most
    ]


def _read_sounds(extractor: Any) -> Read:
    def read(sounds: list[Any]) -> Inputs:
        for sound in sounds:
            rate = sound["sampling_rate"]
            if rate not in (None, extractor.sampling_rate):
                raise ValueError(
                    f"`dataset` must hold sounds of {extractor.sampling_rate} Hz for this model, "
                    f"got {rate} Hz; resample them, e.g. dataset.cast_column('audio', "
                    f"Audio(sampling_rate={extractor.sampling_rate}))"
                )
        arrays = [sound["array"] for sound in sounds]
        return dict(extractor(arrays, sampling_rate=extractor.sampling_rate, return_tensors="pt"))

    return read


def describe(processor: Any) -> str:
    """The preprocessing of images in words, for fingerprints: the same in every version."""
    part = image_part(processor)
    if not hasattr(part, "to_dict"):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(part))  # another one in every process
    # As JSON: a processor made in code has tuples and enums where one read from a file has not.
    settings = {
        key: value
        for key, value in part.to_dict().items()
        if value is not None and key not in _NOT_PREPROCESSING
    }
    return json.dumps(settings, sort_keys=True, default=str)


def tokenizer_told(processor: Any, reads: str) -> str | None:
    """Vocabulary, rules and settings of a fast tokenizer; None of any other kind.

    Args:
        processor: As `read_images`.
        reads: How it is asked: the family's name.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None  # a class of one's own may do anything
    rules = json.loads(backend.to_str())
    del rules["truncation"], rules["padding"]  # as it was last asked
    names = ("model_max_length", "padding_side", "truncation_side", "pad_token_id")
    settings = {name: getattr(tokenizer, name, None) for name in (*names, "model_input_names")}
    return json.dumps([type(tokenizer).__name__, reads, settings, rules], sort_keys=True)


def is_complete(processor: Any) -> bool:
    """Whether it reads images (or sounds) as well as prompts."""
    if isinstance(processor, tuple):
        return len(processor) == 2 and all(map(callable, processor))
    return image_part(processor) is not None and hasattr(processor, "tokenizer")


def _with_part(saved: Any, part: Any) -> Any:
    """A saved processor, with the part that is given instead of its own; it is changed."""
    images, tokenizer = image_part(part), getattr(part, "tokenizer", part)
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        saved.tokenizer = tokenizer
    if images is not None and not isinstance(part, tuple):
        name = "image_processor" if hasattr(saved, "image_processor") else "feature_extractor"
        setattr(saved, name, images)
    return saved


def find_processor(model: nn.Module, processor: Any, takes_pair: bool) -> Any:
    """The processor as given, if it is complete, else the one saved with the model.

    A part that is given takes the place of the saved one's.

    Args:
        model: A dual encoder.
        processor: With an ``image_processor`` or ``feature_extractor`` and a ``tokenizer``, or the
            pair (transform, tokenizer); or None, or a part of one.
        takes_pair: The model is of open_clip, which has pairs.

    Raises:
        TypeError: It is a name.
        ValueError: There is none.
    """
    if is_complete(processor):
        return processor
    if isinstance(processor, str | Path):
        raise TypeError(
            f"`processor` must be a processor, got {str(processor)!r}; load it with "
            "`AutoProcessor.from_pretrained`"
        )
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    problem = "the model does not say where it was loaded from"
    if source:
        from transformers import AutoProcessor

        try:
            loaded = AutoProcessor.from_pretrained(source)
        except Exception as error:  # of whatever kind: it is told below
            problem = f"loading one from {source!r} failed ({error})"
        else:
            if is_complete(loaded):
                return _with_part(loaded, processor)
            problem = f"{source!r} has {type(loaded).__name__} only"
    got = "none" if processor is None else type(processor).__name__
    if takes_pair:
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
