"""Arguments by their former names: taken for one release, with a warning that names the new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any


def check_former(call: str, given: Mapping[str, Any], advice: Mapping[str, str]) -> None:
    """Warn of each argument that has a former name.

    Args:
        call: Whose arguments they are, for the message.
        given: Name -> value, of the arguments that the signature does not name.
        advice: Former name -> what to write instead.

    Raises:
        TypeError: A name that is unknown.
    """
    for name in given:
        if name not in advice:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
        warnings.warn(
            f"`{name}` of `{call}` will be removed in the next release; {advice[name]}",
            FutureWarning,
            stacklevel=3,
        )


def pick(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The entries with these names, of those that are there."""
    return {name: given[name] for name in names if name in given}
