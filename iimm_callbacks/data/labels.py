"""Which columns of a data set are images and labels; its labels, checked."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..records.log import get_logger
from .prompts import check_utf8, checked_class_names, own_names, some

_IMAGES = ("Image", "Audio")  # features of `datasets`
# Names of a column of labels, or of captions, in the order of preference.
_CALLED_LABEL = ("label", "labels", "class", "target", "caption", "captions", "text")

# Words of names of splits: a folder of each, or a "train" beside folders that are all such.
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")

logger = get_logger(__name__)


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
        return not {name.lower() for name in feature.names} <= set(SPLITS)
    if type(feature).__name__ == "Value":
        return "int" in feature.dtype or "string" in feature.dtype
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return getattr(inner, "dtype", "") in ("string", "large_string")


def read_labels(
    name: str, source: Any, given: Any
) -> tuple[list[Any], tuple[str, ...] | None, tuple[str, ...] | None]:
    """A task's labels as class indices, names of classes, and the data set's own names of them.

    Of captions it is tuples of them and twice None.

    Strings are names of classes where each is there twice or more on average, or where names
    are known; else they are captions.

    Args:
        name: Of the task, for errors.
        source: As `sources.open_source` returns it: its labels, one for each image, its names of
            classes, as `prompts.own_names` takes them, and how often each string was read.
        given: Names of the classes by the user: in the order of the labels, or a mapping from the
            data set's names.

    Raises:
        TypeError: A label is neither an integer nor a string, or not of the kind of the first; or
            as `checked_class_names`.
        ValueError: A label is none of the classes, or as `check_captions`.
    """
    labels, strings = source.labels(), source.strings
    missing = next((i for i, label in enumerate(labels) if label is None), None)
    if missing is not None:
        raise TypeError(
            f"`dataset` of task {name!r}: label {missing} must be an integer, a string or a list "
            f"of captions, got None (NoneType){advice(None)}"
        )
    if isinstance(labels[0], list | tuple):
        if given is not None:
            raise TypeError(
                f"`dataset` of task {name!r}: label 0 must be one of `class_names`, got "
                f"{labels[0]!r:.80}; lists are captions, which have no `class_names`"
            )
        several = [_several(name, position, label) for position, label in enumerate(labels)]
        check_captions(name, [caption for captions in several for caption in captions])
        return several, None, None
    own = own_names(name, source.class_names, given)
    if not isinstance(labels[0], str):
        names = checked_class_names(name, given, own)
        return integer_labels(name, labels, len(names)), names, own
    if strings is None:
        strings = Counter(label for label in labels if isinstance(label, str))
    if given is None and own is None and not are_classes(strings):
        check_captions(name, labels)
        return [(label,) for label in labels], None, None
    for position, label in enumerate(labels):
        if not isinstance(label, str):
            raise TypeError(
                f"`dataset` of task {name!r}: label {position} must be a string like label 0, got "
                f"{label!r:.80} ({type(label).__name__})"
            )
    found = sorted(strings)
    if own is None and (given is None or isinstance(given, Mapping)):
        own = tuple(found)
        logger.warning(
            "Task %r: the %d distinct strings of %d labels are taken as classes: %s",
            name, len(found), strings.total(), some(found),
        )  # fmt: skip
    names = checked_class_names(name, given, own)
    known = own if own is not None else names
    places = {label: place for place, label in enumerate(known)}
    strange = [label for label in found if label not in places]
    if strange:
        raise ValueError(
            f"`dataset` of task {name!r}: labels must be among the {len(known)} class names "
            f"({some(known)}), got {some(strange)}"
        )
    return [places[label] for label in labels], names, tuple(known)


def _several(name: str, position: int, captions: Any) -> tuple[str, ...]:
    if isinstance(captions, list | tuple) and captions and isinstance(captions[0], str):
        return tuple(captions)
    raise TypeError(
        f"`dataset` of task {name!r}: label {position} must be an integer, a string or a list of "
        f"captions, all of one kind, got {captions!r:.80} ({type(captions).__name__})"
    )


def are_classes(strings: Counter[str]) -> bool:
    """Whether strings are names of classes, not captions: each is there twice on average."""
    return 1 < len(strings) <= strings.total() / 2


def check_captions(name: str, captions: Sequence[Any]) -> None:
    """Raise unless a task's labels can be captions.

    Args:
        name: Of the task, for errors.
        captions: One for each image.

    Raises:
        TypeError: One is no string.
        ValueError: One is blank, all are alike, or UTF-8 cannot hold one.
    """
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(
                f"`dataset` of task {name!r}: caption {position} must be a string, got {caption!r}"
            )
        if not caption.strip():
            raise ValueError(
                f"`dataset` of task {name!r}: caption {position} must not be blank, got "
                f"{caption!r}; leave its image out"
            )
        check_utf8(f"`dataset` of task {name!r}: caption {position}", caption)
    if len(set(captions)) < 2:
        raise ValueError(
            f"`dataset` of task {name!r} must hold at least 2 distinct captions, got "
            f"{captions[0]!r} only: IIMM compares images with wrong texts"
        )


def integer_labels(name: str, labels: Sequence[Any], n_classes: int) -> list[int]:
    """A task's labels as class indices.

    Args:
        name: Of the task, for errors.
        labels: One for each image.
        n_classes: How many there are.

    Raises:
        TypeError: One is no integer.
        ValueError: One lies outside [0, n_classes).
    """
    integers = []
    for position, label in enumerate(labels):
        value = as_integer(label)
        if value is None:
            raise TypeError(
                f"`dataset` of task {name!r}: label {position} must be an integer, or all labels "
                f"strings, got {label!r:.80} ({type(label).__name__}){advice(label)}"
            )
        if not 0 <= value < n_classes:
            raise ValueError(
                f"`dataset` of task {name!r}: label {position} must lie in [0, {n_classes}) for "
                f"{n_classes} class names, got {value}; -1 often marks an unlabelled test split"
            )
        integers.append(value)
    return integers


def as_integer(label: Any) -> int | None:
    """A label as an integer, of truth values 0 and 1; None where it is neither."""
    if isinstance(label, np.bool_):
        return int(label)
    try:
        return operator.index(label)
    except (TypeError, ValueError, RuntimeError):  # also of arrays and tensors
        return None


def advice(label: Any) -> str:
    """What to do about a label that is no integer, to end its error."""
    if label is None or (isinstance(label, float) and label != label):
        return "; leave images without a label out"
    if isinstance(label, bytes):
        return "; decode it"
    if getattr(label, "ndim", 0):
        return "; of one-hot labels pass int(label.argmax())"
    if hasattr(label, "item"):
        return "; pass int(label)"
    return ""
