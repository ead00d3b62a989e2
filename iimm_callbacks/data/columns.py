"""The features of a data set -> which columns are its images and its labels."""

from __future__ import annotations

from typing import Any

_IMAGES = ("Image", "Audio")  # features of `datasets`
# Names of a column of labels, or of captions, in the order of preference.
_CALLED_LABEL = ("label", "labels", "class", "target", "caption", "captions", "text")


def pick_columns(name: str, features: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the columns of images and of labels.

    Of several columns the one whose name says so is it, whatever their types: a `ClassLabel` may
    be that of the split. Truth values are labels where their name says so, or nothing else is.

    Args:
        name: Of the task, for errors.
        features: Of the data set.
        image: The column of images, where the user named it.
        label: That of labels, likewise.

    Raises:
        ValueError: A column is missing, or there are several that it could be.
    """
    pictures = [key for key, feature in features.items() if type(feature).__name__ in _IMAGES]
    labels = [key for key, feature in features.items() if _may_be_labels(feature)]
    flags = [key for key, feature in features.items() if getattr(feature, "dtype", "") == "bool"]
    labels += [key for key in flags if key in _CALLED_LABEL or not labels]
    return (
        _pick(name, "image_column", image, pictures, ("image",), features),
        _pick(name, "label_column", label, labels, _CALLED_LABEL, features),
    )


def _pick(
    name: str,
    argument: str,
    given: str | None,
    found: list[str],
    called: tuple[str, ...],
    features: Any,
) -> str:
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


def _may_be_labels(feature: Any) -> bool:
    """Whether a feature is of classes, integers, strings, or lists of strings such as captions."""
    if type(feature).__name__ == "ClassLabel":
        return True
    if type(feature).__name__ == "Value":
        return "int" in feature.dtype or "string" in feature.dtype
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return getattr(inner, "dtype", "") in ("string", "large_string")
