"""A model from a folder or the Hub, of the class that was saved and with all of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
