"""Prompt templates by name: those that CLIP's authors published for their data sets.

They are given to a task as ``templates="clip:eurosat"``. The lists, their source, licence and what
is said there about class names are in ``clip_prompts/``. They are what others call
"the CLIP prompts", so that accuracies compare; they are not the best prompts for your model, and
CLIP's accuracy on a data set rests on its class names as much as on its templates.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from .class_names import as_listed, check_utf8

_PREFIX = "clip:"


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
    if isinstance(templates, str):
        templates = [templates]
    expanded: list[Any] = []
    for entry in as_listed(what, "a template or a list of them", templates):
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
