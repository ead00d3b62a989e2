"""Checks of JSON values: what passes comes back, what does not is named with what was expected.

Each check is also tried on whole records, in test_outcomes.py and test_run_file.py.
"""

import math

import pytest

from iimm_callbacks.records import checks

pytestmark = pytest.mark.once


def test_what_passes_comes_back():
    assert checks.list_of(checks.text)(["a", ""], "x") == ["a", ""]
    assert checks.dict_of(checks.FRACTION)({"a": 1, "": 0.5}, "x") == {"a": 1.0, "": 0.5}
    assert isinstance(checks.finite(10**300, "x"), float)
    assert checks.or_none(checks.count)(None, "x") is None
    assert checks.one_of("a", "b")("b", "x") == "b"
    assert checks.anything({"a": [None, True, 1, "ü", {"b": []}]}, "x")["a"][4] == {"b": []}


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (checks.one_of("a", "b"), "c", "`x` must be one of 'a', 'b', got 'c'"),
        (checks.one_of("a"), ["a"], "`x` must be one of 'a', got list"),
        (checks.list_of(checks.flag), [True, 1], "`x[1]` must be true or false, got 1"),
        (checks.list_of(checks.flag), {}, "`x` must be a list, got dict"),
        (checks.dict_of(checks.text), {"k" * 99: 5}, f"`x['{'k' * 39}]` must be a string, got 5"),
        (checks.finite, math.nan, "`x` must be a finite number, got nan"),
        (checks.finite, 10**400, "`x` must be a finite number, got a huge number"),
        (checks.DIFFERENCE, "y" * 99, f"`x` must be a number in [-1, 1], got '{'y' * 39}"),
    ],
)
def test_what_does_not_pass_is_named(check, value, says):
    with pytest.raises(ValueError, match=r"^`x") as caught:
        check(value, "x")
    assert str(caught.value) == says


def test_the_fields_of_an_object_are_needed_optional_or_the_rest():
    needed, optional = {"a": checks.count}, {"b": checks.text}
    value = {"a": 1, "c": 0.5}
    assert checks.object_of(needed, optional)(value, "x") == {"a": 1}
    assert checks.object_of(needed, optional, checks.anything)(value, "x") == value
    assert checks.object_of(needed)({"a": 2}, "x") == {"a": 2}
    for given, name, says in (
        ({}, "x", "`x` lacks `a`"),
        ({}, "", "`a` is missing"),
        ({"a": 1, "b": None}, "x", "`x['b']` must be a string, got None"),
        ({"a": -1}, "", "`a` must be a whole number from 0, got -1"),
        (7, "x", "`x` must be an object, got 7"),
        ([], "", "`all of it` must be an object, got list"),
    ):
        with pytest.raises(ValueError, match=r"must|lacks|missing") as caught:
            checks.object_of(needed, optional)(given, name)
        assert str(caught.value) == says
