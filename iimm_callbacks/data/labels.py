"""The labels and class names of a data set -> checked, or an error that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        TypeError: `given` is no list, or one of its names is no string.
        ValueError: There are none, fewer than two, two alike, a blank one of the user's, one that
            UTF-8 cannot hold, or they are not those of the data set.
    """
    if given is None and own is None:
        raise ValueError(
            f"`class_names` of task {name!r} must be given: the data set has integer labels "
            "without names"
        )
    if given is None:
        names = tuple(str(n) for n in own)  # type: ignore[union-attr]
    else:
        names = _given_names(name, given)
    for each in names:
        check_utf8(f"`class_names` of task {name!r}", each)
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


def as_listed(what: str, expected: str, given: Any) -> tuple[Any, ...]:
    """What a user gave for a list, as a tuple; what has no order of its own is refused.

    Args:
        what: It is, for errors.
        expected: What it must be, for errors.
        given: A list, a tuple, an array, ...

    Raises:
        TypeError: It is none of these.
    """
    if not isinstance(given, str | bytes | Mapping | set | frozenset):
        try:
            entries = iter(given)
        except TypeError:  # also that of an array without dimensions
            pass
        else:
            return tuple(entries)
    raise TypeError(f"{what} must be {expected}, got {given!r:.80} ({type(given).__name__})")


def check_utf8(what: str, text: str) -> None:
    """Raise unless UTF-8 can hold a text: tokenizers, logs and files take no other.

    Args:
        what: It is, for errors.
        text: Of a user, or the name of a folder.

    Raises:
        ValueError: It holds half a pair of surrogates, or a byte of a file name that is no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be valid UTF-8, got {text!r:.80} with {text[error.start]!r} at "
            f"{error.start}; rename it, or read it with the encoding that it was written in"
        ) from None


def check_captions(name: str, captions: Sequence[Any], class_names: Any) -> None:
    """Raise unless a task's labels can be captions.

    Args:
        name: Of the task, for errors.
        captions: One for each image.
        class_names: Given by the user: captions have none.

    Raises:
        TypeError: One is no string, or `class_names` is given.
        ValueError: All are alike, or UTF-8 cannot hold one.
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


def _given_names(name: str, given: Any) -> tuple[str, ...]:
    what = f"`class_names` of task {name!r}"
    names = as_listed(what, "a list of names in the order of the labels", given)
    for position, each in enumerate(names):
        if not isinstance(each, str):
            raise TypeError(
                f"{what} must be strings, got {each!r:.80} ({type(each).__name__}) for class "
                f"{position}; write the name as it should stand in a prompt"
            )
        if not each.strip():
            raise ValueError(
                f"{what} must not be blank, got {each!r:.80} for class {position}; give a name "
                "that its prompt can hold"
            )
    return tuple(map(str, names))
