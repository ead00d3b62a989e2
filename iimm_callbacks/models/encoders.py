"""Model -> image and text embeddings: no trace is left, what is frozen is not computed again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import kind, random_streams_kept
from .families import Family, encoder_inside, exponential_scale, family_of, is_registered
from .processors import (
    describe,
    find_processor,
    is_complete,
    keeps_case,
    read_images,
    read_prompts,
    tokenizer_told,
)
from .wrappers import adapt, breadth_first, core_of, find_dual_encoder

TEXT_BATCH = 256  # prompts in one forward pass

EncodePair = tuple[
    Callable[[nn.Module, list[Any]], Tensor], Callable[[nn.Module, list[str]], Tensor]
]


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
        tokenizer: What tells its tokens from those of any other tokenizer; None: not known.
    """

    preprocess: Callable[[list[Any]], Any]
    tokenize: Callable[[list[str]], Any]
    embed_backbone: Callable[[nn.Module, Any], Tensor]
    embed_texts: Callable[[nn.Module, Any], Tensor]
    logit_scale: Callable[[nn.Module], tuple[Any, Any]]
    description: str
    tokenizer: Callable[[], str | None] = lambda: None

    def embed_images(self, model: nn.Module, inputs: Any) -> Tensor:
        """(model, preprocessed images) -> [n, D], not normalised, as the model is tuned now."""
        return adapt(model, self.embed_backbone(model, inputs))

    def scale(self, model: nn.Module) -> float | None:
        """The model's factor on cosines, above 0; None where it tells none."""
        try:
            scale, _ = self.logit_scale(model)
            found = float(torch.as_tensor(scale).detach())
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None  # your own model, or a scale that is sharded over ranks
        return found if math.isfinite(found) and found > 0 else None


def find_encoder(
    model: nn.Module, processor: Any = None, encode: EncodePair | None = None
) -> Encoder:
    """The `Encoder` for a model: by its entry in `families`, or from `encode`.

    Args:
        model: A dual encoder of a family in `families`, bare, under PEFT, DDP or `torch.compile`,
            or inside a user's `nn.Module`.
        processor: Its processor (image processor and tokenizer in one), or for open_clip the pair
            ``(transform, tokenizer)``. Without, or with a part of one: that of the
            `PromptClassifier` the model is in; or loaded with `AutoProcessor` from where the model
            came from, and the part given is used with the other part of that one.
        encode: ``(encode_images, encode_texts)`` for any other model: each takes the model and a
            list (RGB PIL images; prompts) and returns embeddings [n, D].

    Returns:
        The `Encoder`.

    Raises:
        TypeError: `encode` is not two functions.
        ValueError: The model has no readable joint space, or no processor was to be found.
    """
    if encode is not None:
        is_pair = isinstance(encode, tuple | list) and len(encode) == 2
        if not is_pair or not all(map(callable, encode)):
            raise TypeError(
                "`encode` must be two functions (encode_images, encode_texts) of (model, list), "
                f"got {encode!r}"
            )
        images, texts = encode
        names = ", ".join(getattr(f, "__qualname__", type(f).__name__) for f in encode)
        return Encoder(list, list, images, texts, lambda m: (1.0, None), f"user functions {names}")
    known = (getattr(module, "encoder", None) for module in breadth_first(model))
    own = next((e for e in known if isinstance(e, Encoder)), None)
    if own is not None and not is_complete(processor):
        return own
    core = find_dual_encoder(model)
    family, inner = _reading(core)
    own_way = family.preprocess is not read_images and family.tokenize is not read_prompts
    if not own_way:
        processor = find_processor(inner, processor, takes_pair=family.name == "open_clip")
    read = family.preprocess(processor)
    is_lowered = family.name == "SigLIP" and keeps_case(processor)

    def preprocess(images: list[Any]) -> Any:
        wrong = next((k for k in map(kind, images) if k != family.reads), None)
        if wrong is not None:
            raise ValueError(
                f"`dataset` must hold {family.reads}s for {type(core).__name__}, got {wrong}s"
            )
        return read(images)

    return Encoder(
        preprocess,
        family.tokenize(inner, processor),
        lambda m, inputs: _vectors(m, family, "embed_images", inputs),
        lambda m, inputs: _vectors(m, family, "embed_texts", inputs),
        lambda m: family.logit_scale(find_dual_encoder(m)),
        family.name if own_way else describe(processor) + " prompts in lower case" * is_lowered,
        lambda: None if is_registered(family) else tokenizer_told(processor, family.name),
    )


def _reading(module: nn.Module) -> tuple[Family, nn.Module]:
    """How a dual encoder is read, and the module that its tokens and processor go by: itself.

    A user's module that passes on to a dual encoder inside is read by its own functions, and by the
    tokens, the processor and, unless it has one, the scale of the one inside.
    """
    family, inner = family_of(module), encoder_inside(module)
    assert family is not None
    if inner is None or is_registered(family):
        return family, module
    theirs, innermost = _reading(inner)

    def scale(model: Any) -> tuple[Any, Any]:
        inner, own = encoder_inside(model), getattr(model, "logit_scale", None)
        if own is None or own is getattr(inner, "logit_scale", None):
            return theirs.logit_scale(inner)
        return exponential_scale(model)

    functions = family.embed_images, family.embed_texts
    return replace(
        theirs, embed_images=functions[0], embed_texts=functions[1], logit_scale=scale
    ), innermost


def move(inputs: Any, model: nn.Module) -> Any:
    """Model inputs on the encoder's device, floating ones in its dtype; anything else as it is."""
    if not isinstance(inputs, Mapping):
        return inputs
    parts = core_of(model), model  # FSDP 1 may keep its weights outside
    first = next((p for m in parts for p in m.parameters() if p.is_floating_point()), None)
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
    return output


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate inside, and leave no trace: no gradients, modes and random streams restored.

    Train mode is restored module by module, because ``model.train()`` would wake submodules that
    were frozen in eval mode. `no_grad`, not `inference_mode`: a tensor that a model caches under
    the latter cannot be saved for backward. The 4-bit layers of bitsandbytes on some CPUs repack
    their weights in place at the first evaluation, and cannot be trained after: not in here.

    Args:
        model: The model that is put in eval mode for the while.
    """
    modes = [(module, module.training) for module in model.modules()]
    packing: list[Any] = [
        m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)
    ]
    model.eval()
    for module in packing:
        module.support_avx512bf16_for_cpu = False
    try:
        with torch.no_grad(), _device_streams_kept(), random_streams_kept():
            yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True
        for module, training in modes:
            module.training = training


@contextmanager
def _device_streams_kept() -> Iterator[None]:
    """The random streams of all accelerators as before; `torch.manual_seed` seeds them, too."""
    with ExitStack() as after:
        for many in (torch.cuda, torch.xpu):
            if many.is_available():
                after.callback(many.set_rng_state_all, many.get_rng_state_all())
        if torch.backends.mps.is_available():
            after.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield


def autocast(
    model: nn.Module, dtype: torch.dtype | None, cache_enabled: bool = True
) -> AbstractContextManager[Any]:
    """`torch.autocast` on the model's device; with ``dtype=None`` that of the caller, if any."""
    if dtype is None:
        return nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype, cache_enabled=cache_enabled)


class FrozenPart:
    """Keeps what a part of a model returned for as long as that part cannot have changed.

    At every look `update` embeds one item with gradients on, unless everything trains or what
    trains is what trained when gradients last reached that item. What is kept stays valid only if

    1. no gradient reaches that embedding: nothing that trains takes part in it;
    2. it is bit for bit what it was: what swaps or merges weights, or writes
       to them through ``.data``, changes it;
    3. no frozen tensor of the model was written to in place: not thawed, trained and frozen again
       between two looks, no running statistics of a batch norm moved.

    A write through ``.data`` to what that one item does not use (other rows of a token table) is
    the one change that goes unseen.

    Args:
        keep_on: Device that keeps them; ``None``: the model's.

    Attributes:
        is_frozen: Whether the part was frozen at the latest `update`.
    """

    def __init__(self, keep_on: str | None = None) -> None:
        self.keep_on = keep_on
        self.is_frozen = False
        self._trains: list[bool] = []  # which parameters did at the latest embedding
        self._witness: Tensor | None = None
        self._versions: list[tuple[int, int]] = []
        self._kept: dict[Any, Tensor] = {}

    def update(self, model: nn.Module, embed: Callable[[], Tensor]) -> None:
        """Forget what was kept if the part can have changed; call it before each round of `get`.

        Args:
            model: The model in its present state, in eval mode.
            embed: Embeds one item, always the same. Run it outside of autocast's cache: a cast
                weight from there has no gradient.
        """
        trains = [p.requires_grad for p in model.parameters()]
        if all(trains) or (trains == self._trains and not self.is_frozen):
            self.is_frozen = False  # as before, and then nothing is kept
            self._kept.clear()
            return
        self._trains = trains
        with torch.enable_grad():
            embeds = embed()
        self.is_frozen = not embeds.requires_grad
        self._device = embeds.device
        witness, versions = embeds.detach().cpu(), _versions(model)
        last = self._witness
        same = last is not None and witness.dtype == last.dtype and torch.equal(witness, last)
        if not (self.is_frozen and same and versions == self._versions):
            self._kept.clear()
        self._witness, self._versions = witness, versions

    def holds(self, key: Any) -> bool:
        """Whether `get` needs not compute."""
        return key in self._kept

    def get(self, key: Any, compute: Callable[[], Tensor], *, keep: bool = True) -> Tensor:
        """The value kept under a key, else `compute()`, kept if the part is frozen and `keep`."""
        if key in self._kept:
            return self._kept[key].to(self._device)
        value = compute()
        if keep and self.is_frozen:
            self._kept[key] = value if self.keep_on is None else value.to(self.keep_on)
        return value


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    # Every write in place counts a tensor's version up; inference tensors have none.
    tensors = [*model.parameters(), *model.buffers()]
    return [(id(t), 0 if t.is_inference() else t._version) for t in tensors if not t.requires_grad]
