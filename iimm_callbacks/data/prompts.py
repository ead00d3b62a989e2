"""What a task's prompts are made of, templates and class names -> checked, or an error.

The templates that CLIP's authors published have names, ``"clip:eurosat"``. They are what others
call "the CLIP prompts", so that accuracies compare; they are not the best prompts for your model.
Lists, source, licence and what is said there about class names are in ``clip_prompts/``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ..records.log import get_logger

_PREFIX = "clip:"

logger = get_logger(__name__)

_WORDNET = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"^\d+[\W_]+(?=[\W_]*[^\W_])")
_NUMBERED = re.compile(r"(\d{2,})[._ -]+(\D.*)")  # such as "001.Black_footed_Albatross"


def names() -> tuple[str, ...]:
    """All names, sorted: ``"clip:birdsnap"``, ``"clip:caltech101"``, ...

    Example:
        >>> len(names())
        28
    """
    return tuple(_PREFIX + key for key in _lists())


def get(name: str) -> tuple[str, ...]:
    """The templates of this name, as published and in that order; each has one ``{}``.

    Args:
        name: One of `names`. Case, ``_`` and ``-`` do not matter, and the headings of the source
            are names as well: ``"clip:DescribableTextures"`` is ``"clip:dtd"``.

    Raises:
        ValueError: There are none of this name; tells close ones, and all.

    Example:
        >>> get("clip:eurosat")[1]
        'a centered satellite photo of a {}.'
        >>> [len(get(name)) for name in ("clip:imagenet", "clip:imagenet_7")]
        [80, 7]
    """
    key = _plain(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else ""
    for own, (heading, found) in _lists().items():
        if key and key in (_plain(own), _plain(heading)):
            return found
    close = get_close_matches(name.lower(), names(), n=1)
    hint = f", which is close to {close[0]!r}" if close else ""
    raise ValueError(
        f"`templates` must be templates or a known name, got {name!r}{hint}; names are "
        f"{', '.join(names())}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


@cache
def _lists() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Key -> heading in the source, and templates."""
    file = Path(__file__).parent / "clip_prompts" / "templates.json"
    lists = json.loads(file.read_text(encoding="utf-8"))["lists"]
    return {key: (entry["section"], tuple(entry["templates"])) for key, entry in lists.items()}


def given_templates(name: str, templates: Any) -> tuple[str, ...]:
    """The templates that a task was given, checked, with names replaced by what they stand for.

    A template has a ``{}`` and a name has none, so neither is taken for the other.

    Args:
        name: Of the task, for errors.
        templates: As `Task`.

    Raises:
        TypeError: They are no strings.
        ValueError: One has no place for the class name, or there is no set of this name.

    Example:
        >>> given_templates("digits", ["clip:stl10", "{}"])
        ('a photo of a {}.', 'a photo of the {}.', '{}')
    """
    what = f"`templates` of task {name!r}"
    given = [templates] if isinstance(templates, str) else templates
    expanded: list[Any] = []
    for entry in as_listed(what, "a template or a list of them", given):
        is_name = isinstance(entry, str) and entry.startswith(_PREFIX) and "{}" not in entry
        expanded += get(entry) if is_name else [entry]
    for template in expanded or [""]:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                f"{what} must each have exactly one '{{}}' for the class name, got {template!r}; "
                "write e.g. 'a photo of a {}.', or 'clip:imagenet'"
            )
        check_utf8(what, template)
    return tuple(expanded)


def own_names(name: str, classes: Any, given: Any = None) -> tuple[str, ...] | None:
    """A data set's own names in label order; None where it has none.

    Of a class with several names, as torchvision's ImageNet has them, it is the first.

    Args:
        name: Of the task, for errors.
        classes: Of the data set: a list of names, or a mapping from names to labels.
        given: Names by the user; a list replaces what cannot be read.

    Raises:
        TypeError: They are neither, or one of them is no name.
        ValueError: The labels of a mapping are not 0, 1, 2, ...
    """
    if classes is None:
        return None
    what = f"`dataset.classes` of task {name!r}"
    try:
        if isinstance(classes, Mapping):
            if sorted(classes.values(), key=str) != sorted(range(len(classes)), key=str):
                raise ValueError(
                    f"{what} must map names to labels 0, 1, 2, ..., got {classes!r:.80}"
                )
            classes = sorted(classes, key=classes.__getitem__)
        names = as_listed(what, "a list of names in the order of the labels", classes)
        firsts = [own[0] if isinstance(own, list | tuple) and own else own for own in names]
        for label, first in enumerate(firsts):
            if not isinstance(first, str):
                raise TypeError(
                    f"{what} must be strings, got {names[label]!r:.80} for class {label}"
                )
        return tuple(map(str, firsts))
    except (TypeError, ValueError) as error:
        if given is not None and not isinstance(given, Mapping):
            return None
        raise type(error)(f"{error}; pass `class_names`, one for each label") from None


def checked_class_names(name: str, given: Any, own: Sequence[str] | None) -> tuple[str, ...]:
    """The names of a task's classes as its prompts have them, in the order of its labels.

    Of the data set's own names ``_`` becomes a space, and numbering such as "001." goes.

    Args:
        name: Of the task, for errors.
        given: By the user: a list, or a mapping from the data set's own names.
        own: The data set's.

    Raises:
        TypeError: `given` is no list or mapping, or one of its names is no string.
        ValueError: There are none, fewer than two, two alike, a blank one, one that UTF-8 cannot
            hold, they are not those of the data set, or the order of the data set's is doubtful.
    """
    if isinstance(given, Mapping):
        names = _given_names(name, _mapped(name, given, own))
    elif given is not None:
        names = _given_names(name, given)
        if own is not None:
            _check_order(name, names, own)
    elif own is not None:
        names = _words(name, own)
    else:
        raise ValueError(
            f"`class_names` of task {name!r} must be given: the data set has integer labels "
            "without names"
        )
    for each in names:
        check_utf8(f"`class_names` of task {name!r}", each)
    if len(names) < 2:
        raise ValueError(
            f"`class_names` of task {name!r} must hold at least 2 classes, got {len(names)}: "
            "IIMM compares images with the texts of wrong classes"
        )
    doubles = [each for each, n in Counter(names).items() for _ in range(n) if n > 1]
    tell_doubles(f"`class_names` of task {name!r}", "more than once", doubles, len(names))
    return names


def _mapped(name: str, given: Mapping[Any, Any], own: Sequence[str] | None) -> list[Any]:
    if own is None:
        raise TypeError(
            f"`class_names` of task {name!r} must be a list of names in the order of the labels, "
            f"got {given!r:.80} ({type(given).__name__}): the data set has no names to map from"
        )
    if set(given) != set(own):
        missing, strange = sorted(set(own) - set(given)), sorted(set(given) - set(own), key=str)
        raise ValueError(
            f"`class_names` of task {name!r} must map all names of the data set and no other, got "
            f"{some(strange) or 'none'} too many and {some(missing) or 'none'} missing"
        )
    return [given[each] for each in own]


def _check_order(name: str, given: tuple[str, ...], own: Sequence[str]) -> None:
    """Raise where given names do not go with the data set's, as far as that can be told."""
    if len(given) != len(own):
        raise ValueError(
            f"`class_names` of task {name!r} must match the data set's {len(own)} classes "
            f"({', '.join(map(str, own[:5]))}, ...), got {len(given)}; give one name per class, "
            "in the order of the labels"
        )
    # By which names are the same, ever looser: the last without numbering.
    for key in (_spaced, _letters, lambda n: _letters(_NUMBER.sub("", n))):
        ours, theirs = list(map(key, own)), list(map(key, given))
        if ours != theirs and len(set(ours)) == len(ours) and sorted(ours) == sorted(theirs):
            raise ValueError(
                f"`class_names` of task {name!r} must be in the data set's own order {list(own)}, "
                f"got {list(given)}: every label would name another class"
            )
    by_number = sorted(own, key=int) if all(n.isdecimal() for n in own) else list(own)
    if by_number != list(own) and list(map(_spaced, given)) != list(map(_spaced, own)):
        raise ValueError(
            f"`class_names` of task {name!r} may be meant in two orders: the data set's names are "
            f"numbers, {some(own, 4)} by label and {some(by_number, 4)} by number; pass a "
            f"mapping, such as {{{by_number[0]!r}: 'its name', ...}}"
        )


def _words(name: str, own: Sequence[str]) -> tuple[str, ...]:
    """The data set's names as a prompt should have them."""
    names = list(own)
    if all(_WORDNET.fullmatch(n) for n in names):
        logger.warning(
            "Task %r: its classes are WordNet ids (%s), which no model reads as names; pass "
            "`class_names`",
            name, some(names, 2),
        )  # fmt: skip
    parts = [_NUMBERED.fullmatch(n) for n in names]
    if all(parts) and len({len(p[1]) for p in parts if p}) == 1:
        bare = [p[2] for p in parts if p]
        if len(set(bare)) == len(bare):
            logger.info("Task %r: the numbering of its classes is left out of prompts", name)
            names = bare
    for position, each in enumerate(names):
        if not each.strip():
            raise ValueError(
                f"`class_names` of task {name!r} must be given: the data set's name of class "
                f"{position} is blank, {each!r}"
            )
    return tuple(map(_spaced, names))


def _spaced(class_name: str) -> str:
    return class_name.replace("_", " ")


def _letters(class_name: str) -> str:
    return re.sub(r"[\W_]+", "", class_name).casefold()


def _given_names(name: str, given: Any) -> tuple[str, ...]:
    what = f"`class_names` of task {name!r}"
    names = as_listed(what, "a list of names in the order of the labels", given)
    for position, each in enumerate(names):
        if not isinstance(each, str):
            raise TypeError(
                f"{what} must be strings, got {each!r:.80} ({type(each).__name__}) for class "
                f"{position}; write the name as it should read in a prompt"
            )
        if not each.strip():
            raise ValueError(
                f"{what} must not be blank, got {each!r:.80} for class {position}; give a name "
                "that its prompt can hold"
            )
    return tuple(map(str, names))


def tell_doubles(what: str, how: str, doubles: Sequence[str], n_classes: int) -> None:
    """Refuse classes that have one text; warn where they are at most one in a hundred.

    Official class lists have a few: of two such classes the second one is never found.

    Args:
        what: They are, for the message.
        how: They are alike, for the message.
        doubles: The classes that share a text.
        n_classes: All classes.

    Raises:
        ValueError: They are more than one in a hundred.
    """
    if not doubles:
        return
    listed = sorted(set(doubles))
    if 100 * len(doubles) > n_classes:
        raise ValueError(
            f"{what} must be unique, got {listed[:10]} {how}; two classes with one prompt cannot "
            "be told apart"
        )
    logger.warning(
        "%s: %s %s; of classes with one prompt only the first is ever found", what, listed, how
    )


def some(names: Sequence[Any], n: int = 8) -> str:
    """The first names, for a message."""
    return ", ".join(map(repr, names[:n])) + (", ..." if len(names) > n else "")


def as_listed(what: str, expected: str, given: Any) -> tuple[Any, ...]:
    """A user's list as a tuple; containers without an order are refused.

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
