"""The labels and class names of a data set -> checked, or an error that says why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def checked_class_names(
    name: str, given: Sequence[str] | None, own: Sequence[str] | None
) -> tuple[str, ...]:
    """The names of a task's classes, in the order of its labels.

    Args:
        name: Of the task, for errors.
        given: By the user.
        own: The data set's.

    Raises:
        TypeError: `given` is a string.
        ValueError: There are none, fewer than two, two alike, or not those of the data set.
    """
    if given is None and own is None:
        raise ValueError(
            f"`class_names` of task {name!r} must be given: the data set has integer labels "
            "without names"
        )
    if isinstance(given, str):
        raise TypeError(f"`class_names` of task {name!r} must be a list of names, got {given!r}")
    names = tuple(str(n) for n in (own if given is None else given))  # type: ignore[union-attr]
    if given is not None and own is not None and len(names) != len(own):
        raise ValueError(
            f"`class_names` of task {name!r} must match the data set's {len(own)} classes "
            f"({', '.join(map(str, own[:5]))}, ...), got {len(names)}; give one name per class, "
            "in the order of the labels"
        )
    if own is not None and names != tuple(own) and sorted(names) == sorted(own):
        raise ValueError(
            f"`class_names` of task {name!r} must be in the data set's own order {list(own)}, got "
            f"{list(names)}: every label would name another class"
        )
    if len(names) < 2:
        raise ValueError(
            f"`class_names` of task {name!r} must hold at least 2 classes, got {len(names)}: "
            "IIMM compares images with the texts of wrong classes"
        )
    doubles = sorted({n for n in names if names.count(n) > 1})
    if doubles:
        raise ValueError(
            f"`class_names` of task {name!r} must be unique, got {doubles} more than once; two "
            "classes with one prompt cannot be told apart"
        )
    return names


def check_captions(name: str, captions: Sequence[Any], class_names: Any) -> None:
    """Raise unless a task's labels can be captions.

    Args:
        name: Of the task, for errors.
        captions: One for each image.
        class_names: Given by the user: captions have none.

    Raises:
        TypeError: One is no string, or `class_names` is given.
        ValueError: All are alike.
    """
    if class_names is not None:
        raise TypeError(
            f"`dataset` of task {name!r}: label 0 must be an integer, got {captions[0]!r}; with "
            "`class_names` the labels are positions in it, without it strings are captions"
        )
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(
                f"`dataset` of task {name!r}: caption {position} must be a string, got {caption!r}"
            )
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
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise TypeError(
                f"`dataset` of task {name!r}: label {position} must be an integer, got {label!r} "
                f"({type(label).__name__})"
            )
        value = label.__index__()
        if not 0 <= value < n_classes:
            raise ValueError(
                f"`dataset` of task {name!r}: label {position} must lie in [0, {n_classes}) for "
                f"{n_classes} class names, got {value}; -1 often marks an unlabelled test split"
            )
        integers.append(value)
    return integers
