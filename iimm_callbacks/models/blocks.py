"""Where in a model the fine-tuning methods act, by name: towers, blocks, what is in them."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from .families import family_of

_ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")
# A text decoder inside the text tower reads images through these; a dual encoder never runs them.
_UNUSED = re.compile(r"cross_?att")
_INPUT_PROJECTION = re.compile(
    r"\.(in_proj|[qkv]_proj)_weight$|\.([qkv]_proj|query|key|value|q|k|v|kv|qkv)\.weight$"
)


def towers(model: nn.Module) -> list[str]:
    """Names of the submodules that embed images and texts."""
    family = family_of(model)
    assert family is not None
    return [tower for tower in family.towers if isinstance(getattr(model, tower, None), nn.Module)]


def block_names(model: nn.Module, n_blocks: int | None) -> list[str]:
    """Names of the blocks of every tower: what has a number for a name, and attention inside.

    Of such modules inside one another the innermost counts. In a tower without attention all with
    a number are blocks.

    Args:
        model: A dual encoder.
        n_blocks: Only the last so many of each tower; None: all.

    Raises:
        ValueError: `n_blocks` is no integer of at least 1.
    """
    if n_blocks is not None and (not isinstance(n_blocks, int) or n_blocks < 1):
        raise ValueError(f"`n_blocks` must be an integer of at least 1, got {n_blocks!r}")
    chosen = []
    for tower in towers(model):
        numbered = {
            name: found[0]
            for name, _ in model.get_submodule(tower).named_parameters(prefix=tower)
            if (found := re.findall(r"^.*\.\d+(?=\.)", name))
        }
        attention = {block for name, block in numbered.items() if is_input_projection(name)}
        blocks = [b for b in dict.fromkeys(numbered.values()) if not attention or b in attention]
        innermost = [b for b in blocks if not any(o.startswith(f"{b}.") for o in blocks)]
        chosen += innermost[-(n_blocks or 0) :]
    return chosen


def inside(names: list[str]) -> Callable[[str], bool]:
    """A function of a name: whether it lies in one of these modules, and is used there."""
    starts = tuple(f"{name}." for name in names)
    return lambda name: name.startswith(starts) and not _UNUSED.search(name)


def in_attention(name: str) -> bool:
    """Whether a module or parameter of this name belongs to an attention."""
    return _ATTENTION.search(name) is not None


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    return name.endswith("bias")


def is_input_projection(name: str) -> bool:
    """Whether a parameter of this name is a weight that makes queries, keys or values."""
    return in_attention(name) and _INPUT_PROJECTION.search(name) is not None
