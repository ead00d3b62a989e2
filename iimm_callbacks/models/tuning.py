"""The fine-tuning methods of the paper: prepare a model for one, recognise the one in use."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.tasks import Task
from ..records.log import get_logger
from .encoders import TEXT_BATCH, Encoder, class_embeddings, find_encoder, move, undisturbed
from .families import encoder_inside, family_of
from .sharded import full_parameters
from .untouched import freeze
from .wrappers import ClipAdapter, LinearProbe, adapter_ids, core_of, find_dual_encoder, find_head

logger = get_logger(__name__)

_SCALES = re.compile(r"(^|\.)(logit_scale(_[at])?|logit_bias|temperature)$")
_ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")
# A text decoder inside the text tower reads images through these; a dual encoder never runs them.
_UNUSED = re.compile(r"cross_?att")
_INPUT_PROJECTION = re.compile(
    r"\.(in_proj|[qkv]_proj)_weight$|\.([qkv]_proj|query|key|value|q|k|v|kv|qkv)\.weight$"
)


def prepare(model: nn.Module, method: str, **options: Any) -> nn.Module:
    """Make a dual encoder ready to be fine-tuned by a method of arXiv 2407.15731.

    Args:
        model: A dual encoder of a family in `families`. It is changed in place.
        method: One of

            =================  ============================================================
            ``"full"``         all weights
            ``"bitfit"``       the biases inside the transformer blocks
            ``"attention"``    the attention input-projection weights of both towers
            ``"lora"``         low-rank adapters on the attention of both towers, by peft
            ``"clip_adapter"`` a bottleneck on the image embeddings, see `wrappers.ClipAdapter`
            ``"linear_probe"`` a linear classifier on them, see `wrappers.LinearProbe`
            =================  ============================================================
        **options: Of the method:

            - ``bitfit``, ``attention``: ``n_blocks``, only the last so many blocks of each tower.
            - ``lora``: ``rank`` (8), ``alpha`` (twice the rank), ``dropout`` (0), ``mlp`` (False;
              adapt the MLPs too), ``n_blocks``. Fused attention (open_clip) is adapted in its
              input projection only, and takes no dropout.
            - ``clip_adapter``: ``reduction`` (4), ``residual_ratio`` (0.2), ``processor``.
            - ``linear_probe``: ``task``, from whose class embeddings it starts, ``processor``.

            ``processor`` as in `encoders.find_encoder`; not needed where it was saved with the
            model.

    Returns:
        The model itself, a `peft.PeftModel` or a `wrappers.Head`, for the plain Trainer: inside a
        `PromptClassifier`, or as it is where it has a loss of its own. To load it again, prepare a
        fresh model in the same way and load the state dict, as the Trainer does when it resumes;
        `trainable_share` tells how much of it trains.

    Raises:
        ValueError: `method` is unknown, the model is no dual encoder, it has nothing of what the
            method tunes, or an option is out of range.
        TypeError: An option that the method has not.
        ImportError: ``"lora"`` without peft.
    """
    if method not in _METHODS:
        known = ", ".join(map(repr, _METHODS))
        raise ValueError(f"`method` must be one of {known}, got {method!r}")
    core = find_dual_encoder(model)
    inner = encoder_inside(core)
    if core is not model or inner is not None:
        raise ValueError(
            f"`model` must be the dual encoder itself, got {type(model).__name__} around "
            f"{type(inner or core).__name__}; prepare that one first, then wrap it"
        )
    prepared = _METHODS[method](model, **options)
    n_total = sum(p.numel() for p in prepared.parameters())
    share = trainable_share(prepared)
    logger.info("%s trains %.3g %% of %d parameters", method, 100 * share, n_total)
    return prepared


def trainable_share(model: nn.Module) -> float:
    """Parameters with `requires_grad` over all parameters, a fraction in [0, 1]."""
    counts = [(whole.numel(), p.requires_grad) for _, p, whole in full_parameters(model)]
    return sum(n for n, trains in counts if trains) / max(sum(n for n, _ in counts), 1)


def detect(model: nn.Module) -> str:
    """The fine-tuning method a model is prepared for, whoever prepared it.

    Args:
        model: Any module; under DDP and `torch.compile` too.

    Returns:
        ``"clip_adapter"`` or ``"linear_probe"``; the PEFT type in lower case (``"lora"``,
        ``"ia3"``, ``"prompt_tuning"``, ...; ``"dora"`` for LoRA with DoRA); else by what trains:
        ``"full"``, ``"bitfit"`` (biases only), ``"attention"`` (attention input-projection weights
        only), ``"frozen"`` (nothing) or ``"partial"``. Whether the logit scale trains changes none
        of this. A head or an adapter on an encoder that trains too is ``"partial"``, but for the
        biases that the adapter's config asks for. An adapter that does not train is part of the
        model, and what trains beside it counts. What is frozen around the encoder, such as a
        teacher, does not count.
    """
    trains = _what_trains(model)
    tuned = [name for name, is_trained in trains.items() if is_trained]
    head = find_head(model)
    if head is not None:
        return "partial" if any(_what_trains(head.dual_encoder).values()) else head.method
    everything = len(tuned) == len(trains)
    config = next((c for m in model.modules() if (c := _active_config(m)) is not None), None)
    ids = adapter_ids(model)  # none of prompts, which peft adds to no layer
    adapters = {name for name, p in model.named_parameters() if id(p) in ids}
    if config is not None and (not adapters or not adapters.isdisjoint(tuned)):
        beside = [n for n in tuned if n not in adapters and not _asks_for(config, n)]
        return "partial" if everything or (adapters and beside) else _peft_type(config)
    if everything:
        return "full"
    if not tuned:
        return "frozen"
    if all(map(_is_bias, tuned)):
        return "bitfit"
    return "attention" if all(map(_is_input_projection, tuned)) else "partial"


def _what_trains(model: nn.Module) -> dict[str, bool]:
    inside = {id(p) for p in core_of(model).parameters()}
    return {
        name: p.requires_grad
        for name, p in model.named_parameters()
        if (p.requires_grad or id(p) in inside) and not _SCALES.search(name)
    }


def _active_config(module: nn.Module) -> Any:
    """The peft config in use; None without adapters."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, dict) or not configs:
        return None
    active: Any = getattr(module, "active_adapter", None)  # a function in transformers
    return configs[active] if isinstance(active, str) else next(iter(configs.values()))


def _asks_for(config: Any, name: str) -> bool:
    """Whether a peft config makes this parameter of the encoder train."""
    bias = getattr(config, "bias", "none")
    return _is_bias(name) and bias != "none" and (bias == "all" or ".base_layer." in name)


def _peft_type(config: Any) -> str:
    if getattr(config, "use_dora", False):
        return "dora"
    kind = config.peft_type
    return str(getattr(kind, "value", kind)).lower()


def _lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: int | None = None,
    dropout: float = 0.0,
    mlp: bool = False,
    n_blocks: int | None = None,
) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft; pip install 'iimm_callbacks[peft]'") from error
    _check_at_least_1(rank=rank)
    modules, parameters = _lora_targets(model, mlp, n_blocks)
    if not modules and not parameters:
        raise ValueError(f"`model` {type(model).__name__} has no attention that LoRA could adapt")
    if parameters and dropout:
        raise ValueError(
            f"`dropout` must be 0 for {type(model).__name__}, got {dropout}: its attention is one "
            "fused projection, whose weight is adapted as a whole"
        )
    _warn_of_untouched_towers(model, "attention", modules + parameters)
    freeze(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        # An expression, since peft takes the names in a list for the ends of names.
        target_modules="|".join(map(re.escape, modules)) or [],
        target_parameters=parameters or None,
    )
    return get_peft_model(model, config)


def _lora_targets(model: nn.Module, mlp: bool, n_blocks: int | None) -> tuple[list[str], list[str]]:
    """Names of the linear modules, and of the weights of fused attention, that LoRA adapts."""
    in_blocks = _inside(_block_names(model, n_blocks))
    modules, parameters, fused = [], [], []
    for name, module in model.named_modules():
        parent: Any = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.MultiheadAttention):
            # It reads its projections without calling a module: only the weight can be adapted.
            fused.append(f"{name}.in_proj_weight")
            if in_blocks(name):
                parameters.append(fused[-1])
        elif (
            isinstance(module, nn.Linear)
            and not isinstance(parent, nn.MultiheadAttention)
            and in_blocks(name)
            and (mlp or _ATTENTION.search(name))
        ):
            modules.append(name)
            if name.endswith(".qkv") and getattr(parent, "q_bias", None) is not None:
                # timm's attention too, unless told to add the bias by itself.
                if not hasattr(parent, "qkv_bias_separate"):
                    raise ValueError(f"LoRA on {name!r} needs a newer timm (1.0 or later)")
                parent.qkv_bias_separate = True
    ends = tuple(f".{name}" for name in parameters)
    extra = [name for name in fused if name.endswith(ends) and name not in parameters]
    if extra:
        raise ValueError(
            f"`n_blocks` must be None for LoRA on {type(model).__name__}, got {n_blocks}: peft "
            f"would adapt {extra[0]} too, whose name ends like one of the chosen; use method "
            "'attention' or 'bitfit', or all blocks"
        )
    return modules, parameters


def _clip_adapter(
    model: nn.Module, *, processor: Any = None, reduction: int = 4, residual_ratio: float = 0.2
) -> nn.Module:
    _check_at_least_1(reduction=reduction)
    if not 0 < residual_ratio <= 1:
        raise ValueError(f"`residual_ratio` must lie in (0, 1], got {residual_ratio!r}")
    embeds = _embed_texts(model, find_encoder(model, processor), ["a"])
    head = ClipAdapter(model, embeds.shape[1], reduction=reduction, residual_ratio=residual_ratio)
    return head.to(embeds.device)


def _linear_probe(model: nn.Module, *, task: Task, processor: Any = None) -> nn.Module:
    if task.is_captions:
        raise ValueError(f"`task` {task.name!r} must have classes, got captions")
    encoder = find_encoder(model, processor)
    embeds = _embed_texts(model, encoder, task.prompts([]))
    scale, _ = encoder.logit_scale(model)
    return LinearProbe(model, class_embeddings(embeds, len(task.templates)), scale).to(
        embeds.device
    )


def _embed_texts(model: nn.Module, encoder: Encoder, prompts: list[str]) -> Tensor:
    chunks = [prompts[i : i + TEXT_BATCH] for i in range(0, len(prompts), TEXT_BATCH)]
    with undisturbed(model):
        return torch.cat(
            [encoder.embed_texts(model, move(encoder.tokenize(chunk), model)) for chunk in chunks]
        )


def _train_only(
    model: nn.Module, *, what: str, wanted: Callable[[str], bool], n_blocks: int | None = None
) -> nn.Module:
    in_blocks = _inside(_block_names(model, n_blocks))
    names = [name for name, _ in model.named_parameters() if in_blocks(name) and wanted(name)]
    if not names:
        raise ValueError(f"`model` {type(model).__name__} has no {what} inside its blocks to tune")
    freeze(model)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    _warn_of_untouched_towers(model, what, names)
    return model


def _warn_of_untouched_towers(model: nn.Module, what: str, names: list[str]) -> None:
    for tower in _towers(model):
        if not any(map(_inside([tower]), names)):
            logger.warning("%r has no %s: it stays as it is", tower, what)


def _check_at_least_1(**arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}")


def _towers(model: nn.Module) -> list[str]:
    """Names of the submodules that embed images and texts."""
    family = family_of(model)
    assert family is not None
    return [tower for tower in family.towers if isinstance(getattr(model, tower, None), nn.Module)]


def _block_names(model: nn.Module, n_blocks: int | None) -> list[str]:
    """Names of the blocks of every tower: what has a number for a name, and attention inside.

    Of such modules inside one another the innermost counts. In a tower without attention all with
    a number are blocks.
    """
    if n_blocks is not None:
        _check_at_least_1(n_blocks=n_blocks)
    chosen = []
    for tower in _towers(model):
        numbered = {
            name: found[0]
            for name, _ in model.get_submodule(tower).named_parameters(prefix=tower)
            if (found := re.findall(r"^.*\.\d+(?=\.)", name))
        }
        attention = {block for name, block in numbered.items() if _is_input_projection(name)}
        blocks = [b for b in dict.fromkeys(numbered.values()) if not attention or b in attention]
        innermost = [b for b in blocks if not any(o.startswith(f"{b}.") for o in blocks)]
        chosen += innermost[-(n_blocks or 0) :]
    return chosen


def _inside(names: list[str]) -> Callable[[str], bool]:
    """A function of a name: whether it lies in one of these modules, and is used there."""
    starts = tuple(f"{name}." for name in names)
    return lambda name: name.startswith(starts) and not _UNUSED.search(name)


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _is_input_projection(name: str) -> bool:
    """Whether it is a weight that makes queries, keys or values."""
    return all(pattern.search(name) for pattern in (_ATTENTION, _INPUT_PROJECTION))


_METHODS: dict[str, Callable[..., nn.Module]] = {
    "full": lambda model: model.requires_grad_(True),
    "bitfit": partial(_train_only, what="bias", wanted=_is_bias),
    "attention": partial(
        _train_only, what="attention input projection", wanted=_is_input_projection
    ),
    "lora": _lora,
    "clip_adapter": _clip_adapter,
    "linear_probe": _linear_probe,
}
