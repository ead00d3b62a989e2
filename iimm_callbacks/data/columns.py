"""The features of a data set -> which columns are its images and its labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_IMAGES = ("Image", "Audio")  # features of `datasets`
# Names of a column of labels, or of captions, in the order of preference.
_CALLED_LABEL = ("label", "labels", "class", "target", "caption", "captions", "text")


def pick_columns(name: str, features: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the columns of images and of labels."""
    from datasets import ClassLabel, Value

    def pick(argument: str, given: str | None, found: list[str], called: tuple[str, ...]) -> str:
        if given is not None:
            if given not in features:
                raise ValueError(
                    f"`{argument}` of task {name!r} must be one of {list(features)}, got {given!r}"
                )
            return given
        if len(found) > 1:
            found = next(([word] for word in called if word in found), found)
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"`dataset` of task {name!r} must have one column for `{argument}`, got "
            f"{f'{found} among ' if found else ''}features {dict(features)}; name the column"
        )

    def of(is_kind: Callable[[Any], bool]) -> list[str]:
        return [str(key) for key, feature in features.items() if is_kind(feature)]

    numbers_or_texts = of(
        lambda f: (
            _holds_texts(f) or (isinstance(f, Value) and ("int" in f.dtype or "string" in f.dtype))
        )
    )
    return (
        pick("image_column", image, of(lambda f: type(f).__name__ in _IMAGES), ("image",)),
        pick(
            "label_column",
            label,
            of(lambda f: isinstance(f, ClassLabel)) or numbers_or_texts,
            _CALLED_LABEL,
        ),
    )


def _holds_texts(feature: Any) -> bool:
    """Whether a feature of `datasets` is a list of strings, such as the captions of an image."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return getattr(inner, "dtype", "") in ("string", "large_string")
