"""What a JSON value must be: the error names the field, what was expected and what came.

A check takes a value and the name of its field, and returns the value or raises a `ValueError`.
Checks of lists and objects make the names of what is inside only where there is an error to tell.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any, str], Any]

_DEEPEST = 16  # nesting of `anything`; what is deeper could be read but not copied or written again
_LARGEST = sys.float_info.max


def refuse(name: str, expected: str, got: Any) -> ValueError:
    """The error to raise for a field of this name."""
    return ValueError(f"`{name}` must be {expected}, got {short(got)}")


def short(value: Any) -> str:
    """`value` shortened for an error message."""
    if isinstance(value, dict | list):
        return type(value).__name__
    if isinstance(value, int) and abs(value) > 10**20:
        return "a huge number"  # `repr` refuses the longest
    return f"{value!r:.40}"


def text(value: Any, name: str) -> str:
    """A string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise refuse(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, or a byte that is no text
        raise refuse(name, "a string in UTF-8", value) from None
    return value


def flag(value: Any, name: str) -> bool:
    """True or false, and no number."""
    if not isinstance(value, bool):
        raise refuse(name, "true or false", value)
    return value


def count(value: Any, name: str) -> int:
    """A whole number from 0 that a column of 64 bits can hold."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise refuse(name, "a whole number from 0", value)
    return value


def anything(value: Any, name: str, depth: int = 0) -> Any:
    """Whatever JSON can hold and give back."""
    if depth > _DEEPEST:
        raise ValueError(f"`{name}` is nested deeper than {_DEEPEST}")
    if isinstance(value, dict):
        return {text(k, f"{name}, a key"): anything(v, name, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [anything(v, name, depth + 1) for v in value]
    if isinstance(value, str):
        return text(value, name)
    if value is None or (isinstance(value, int | float) and -math.inf < value < math.inf):
        return value
    raise refuse(name, "a JSON value, numbers finite", value)


def number(low: float, high: float, expected: str) -> Check:
    """Makes the check of a number in [low, high], which returns a float."""

    def check(value: Any, name: str) -> float:
        if type(value) is float and low <= value <= high:  # as nearly all are
            return value
        real = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool))
        if not real or not low <= value <= high:  # NaN is not
            raise refuse(name, expected, value)
        return float(value)

    return check


def one_of(*words: str) -> Check:
    """Makes the check of one of these words."""

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or value not in words:
            raise refuse(name, f"one of {', '.join(map(repr, words))}", value)
        return value

    return check


def or_none(check: Check, instead: Any = None) -> Check:
    """Makes the check that lets None pass as well, and returns `instead` of it."""
    return lambda value, name: instead if value is None else check(value, name)


def list_of(check: Check) -> Check:
    """Makes the check of a list whose values all pass `check`."""

    def check_all(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise refuse(name, "a list", value)
        try:
            return [check(v, name) for v in value]
        except ValueError:
            for position, v in enumerate(value):
                check(v, f"{name}[{position}]")
            raise

    return check_all


def dict_of(check: Check) -> Check:
    """Makes the check of an object whose values all pass `check`, whatever their names."""
    return object_of({}, rest=check)


def object_of(
    needed: Mapping[str, Check],
    optional: Mapping[str, Check] | None = None,
    rest: Check | None = None,
) -> Check:
    """Makes the check of an object with these fields.

    Args:
        needed: Fields that must be there. Of the outermost object the name is empty.
        optional: Fields that may be there.
        rest: Of all other fields; ``None``: they are left out.
    """
    checks = {**(optional or {}), **needed}

    def check_all(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(name or "all of it", "an object", value)
        for key in needed:
            if key not in value:
                raise ValueError(f"`{name}` lacks `{key}`" if name else f"`{key}` is missing")
        for key in value if rest is not None else ():
            if not isinstance(key, str) or not key.isascii():  # as nearly all are
                text(key, f"{name or 'all of it'}, a key")
        try:
            return {
                key: check(inner, name)
                for key, inner in value.items()
                if (check := checks.get(key, rest)) is not None
            }
        except ValueError:
            for key, inner in value.items():
                if (check := checks.get(key, rest)) is not None:
                    check(inner, _within(name, key))
            raise

    return check_all


def _within(name: str, key: str) -> str:
    """Name of the field `key` inside the field `name`, for errors."""
    if name:
        return f"{name}[{short(key)}]"
    return f"{key:.40}" if key.isidentifier() else short(key)


FRACTION = number(0.0, 1.0, "a fraction in [0, 1]")
DIFFERENCE = number(-1.0, 1.0, "a number in [-1, 1]")
ERROR = number(0.0, _LARGEST, "a finite number from 0")
finite = number(-_LARGEST, _LARGEST, "a finite number")
