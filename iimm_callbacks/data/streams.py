"""A stream of examples -> the few that a probe needs, in one pass and in little memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from ..records.log import get_logger
from .labels import advice, are_classes, as_integer

STREAM_SIZE = 4096  # examples read, eight for each of a default probe

Label = int | str | tuple[str, ...]  # of a class, a caption, several captions

logger = get_logger(__name__)


def is_stream(dataset: Any) -> bool:
    """Whether this behaves as a `datasets.IterableDataset`."""
    return (
        hasattr(dataset, "features")
        and hasattr(dataset, "with_format")
        and not hasattr(dataset, "__len__")
    )


def read_stream(
    name: str,
    stream: Any,
    image: str,
    label: str,
    *,
    size: int,
    first: int,
    seed: int,
    given: Any = None,
) -> tuple[list[tuple[Any, Any]], Counter[str]]:
    """The examples that a balanced draw from the first of a stream takes, in their order.

    The stream is read once, from its start, in its order, on each rank for itself; neither it nor
    any global random stream is changed. Of images the encoded bytes are kept, or the path of a
    local file; those at an address are fetched last, and only those that were drawn. The same
    stream gives the same examples. One that `shuffle` was called on without a seed does not, nor
    does one over an iterator that is used up.

    Args:
        name: Of the task, for errors.
        stream: A `datasets.IterableDataset`; it may be endless.
        image: Its column of images.
        label: Its column of labels, or captions.
        size: Examples kept at most.
        first: Examples read at most.
        seed: Of the draw.
        given: Names of the classes by the user; then strings are no captions.

    Returns:
        Pairs of image and label, or caption; each caption once. And how often each string is there
        in all that was read, for `labels.read_labels`.

    Raises:
        TypeError: A label is neither an integer nor a string.
        ValueError: It is a rank's part of a stream, a column is missing, it fails while being
            read, or all that was read is of one of several classes.
    """
    if getattr(stream, "_distributed", None) is not None:
        raise ValueError(
            f"`dataset` of task {name!r} is one rank's part of a stream; all ranks must probe the "
            "same images: pass the stream as it was before `split_dataset_by_node`"
        )
    plain = stream.with_format(None)
    features = stream.features or {}
    if features:
        plain = plain.select_columns(list({image: None, label: None}))  # all of a row is decoded
    if type(features.get(image)).__name__ == "Image":
        plain = plain.cast_column(image, replace(features[image], decode=False))
    examples = (
        (_column(name, example, image), _label(name, _column(name, example, label), position))
        for position, example in _read(name, plain, first)
    )
    draws = [Draw(size, seed, captions=captions) for captions in (True, False)]
    strings: Counter[str] = Counter()
    n_read = 0
    for x, y in examples:
        n_read += 1
        strings.update([y] if isinstance(y, str) else ())
        for draw in draws:
            draw.add(x, y)
    drawn = draws[given is not None or are_classes(strings)].drawn()
    names = getattr(features.get(label), "names", None)
    _check_classes(name, [y for _, y in drawn], names, given, size, n_read)
    return [(_fetched(name, x), y) for x, y in drawn], strings


class Draw:
    """A seeded, class-balanced draw from examples that pass by once, in their order.

    Every example gets a random number. Its turn is how many of its class have a lower one, and the
    first `size` by turn, then number, are drawn: classes take turns, until one runs out. A further
    example can only raise the turn of others or come before them. So what once is beyond the first
    `size` stays there and can be let go at once: the draw is that from all examples together, and
    never more than twice its size is in memory.

    Args:
        size: Examples drawn at most.
        seed: Of the numbers.
        captions: Whether of strings the first of each only may be drawn.
    """

    def __init__(self, size: int, seed: int, *, captions: bool = True) -> None:
        self._size, self._captions = size, captions
        self._rng = np.random.default_rng(seed)
        self._kept: list[tuple[float, int, Any, Label]] = []
        self._seen: set[str] = set()
        self._position = 0

    def add(self, item: Any, label: Label) -> None:
        """The next example: anything, and its class."""
        position, self._position = self._position, self._position + 1
        if self._captions and isinstance(label, str | tuple):
            captions = {label} if isinstance(label, str) else set(label)
            if not self._seen.isdisjoint(captions):
                return
            self._seen |= captions
        self._kept.append((self._rng.random(), position, item, label))
        if len(self._kept) >= 2 * self._size:
            self._kept = _first(self._kept, self._size)

    def drawn(self) -> list[tuple[Any, Any]]:
        """The examples drawn and their classes, in the order they came."""
        first = sorted(_first(self._kept, self._size), key=lambda row: row[1])
        return [(item, label) for _, _, item, label in first]


def _first(rows: list[Any], size: int) -> list[Any]:
    turns: Counter[Label] = Counter()
    ranked = []
    for row in sorted(rows, key=lambda row: row[:2]):
        ranked.append((turns[row[3]], row))
        turns[row[3]] += 1
    return [row for _, row in sorted(ranked, key=lambda entry: entry[0])[:size]]


def _read(name: str, stream: Any, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    with closing(iter(stream)) as examples:
        for position in range(first):
            try:
                example = next(examples)
            except StopIteration:
                return
            except Exception as error:  # of whatever kind: it is told
                raise ValueError(
                    f"`dataset` of task {name!r}: the stream failed at example {position} of the "
                    f"first {first} ({type(error).__name__}: {error}); repair it, or read fewer by "
                    "`stream_size`"
                ) from error
            yield position, example


def _column(name: str, example: dict[str, Any], key: str) -> Any:
    if key not in example:
        raise ValueError(
            f"`dataset` of task {name!r}: the stream must have a column {key!r}, got "
            f"{list(example)}; name the column"
        )
    return example[key]


def _label(name: str, label: Any, position: int) -> Label:
    if isinstance(label, list) and label and isinstance(label[0], str):
        return tuple(label)  # several captions of an image
    if isinstance(label, str):
        return label
    value = as_integer(label)
    if value is None:
        raise TypeError(
            f"`dataset` of task {name!r}: label {position} of the stream must be an integer, or a "
            f"caption, got {label!r:.80} ({type(label).__name__}){advice(label)}"
        )
    return value


def _check_classes(
    name: str, labels: Sequence[Label], own: Sequence[str] | None, given: Any, size: int, n: int
) -> None:
    """Raise where the draw from n examples is of one class; warn where most are missing."""
    found = len(set(labels))
    known = len(own or (given if isinstance(given, Sized) else ()))
    remedy = "shuffle it with a seed, stream.shuffle(seed=0), or read more by `stream_size`"
    if found == 1 < n and labels[0] != -1:  # which `integer_labels` explains
        of = f"one of its {known} classes" if known else "one class or caption"
        only = own[labels[0]] if own and isinstance(labels[0], int) else labels[0]
        raise ValueError(
            f"`dataset` of task {name!r}: the first {n} examples of the stream are all of {of}, "
            f"{only!r}; {remedy}"
        )
    if found < min(known, size) / 2:
        logger.warning(
            "the first %d examples of the stream of task %r hold %d of its %d classes, and so "
            "does the probe; %s",
            n,
            name,
            found,
            known,
            remedy,
        )


def _fetched(name: str, image: Any) -> Any:
    """The image with its bytes where only its address is known, as of a folder on the Hub."""
    if not isinstance(image, dict) or image.get("bytes") is not None:
        return image
    path = str(image.get("path"))
    if "://" not in path:
        return image
    import fsspec  # comes with `datasets`

    try:
        with fsspec.open(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except Exception as error:  # of whatever kind: it is told
        raise ValueError(
            f"`dataset` of task {name!r}: an image of the stream cannot be fetched from {path!r} "
            f"({type(error).__name__}: {error})"
        ) from error
