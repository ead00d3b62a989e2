"""The features of a data set -> which columns are its images and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_IMAGES = ("Image", "Audio")  # features of `datasets`
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
# Names of a column of labels, or of captions, in the order of preference.
_CALLED_LABEL = ("label", "labels", "class", "target", "caption", "captions", "text")


def pick_columns(name: str, features: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the columns of images and of labels.

    Of several columns the one called label is it, whatever their types. Else the only `ClassLabel`
    is, unless another column's name says that it has classes or captions: the user has to choose.
    Names of splits are no classes. Truth values are labels where their name says so, or nothing
    else is.

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
    classes = [key for key in labels if type(features[key]).__name__ == "ClassLabel"]
    called = [word for word in _CALLED_LABEL if word in labels]
    if classes and not {"label", "labels"} & set(called):
        labels = classes if set(called) <= set(classes) else [*classes, *called]
        called = [word for word in called if word in classes and len(labels) == len(classes)]
    return (
        _pick(name, "image_column", image, pictures, ("image",), features),
        _pick(name, "label_column", label, labels, called, features),
    )


def _pick(
    name: str,
    argument: str,
    given: str | None,
    found: list[str],
    called: Sequence[str],
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
        return not {name.lower() for name in feature.names} <= _SPLITS
    if type(feature).__name__ == "Value":
        return "int" in feature.dtype or "string" in feature.dtype
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return getattr(inner, "dtype", "") in ("string", "large_string")
