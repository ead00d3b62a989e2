"""A saved run <-> a line of a store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from .log import get_logger
from .outcomes import Outcome, Retired, parse_record

logger = get_logger(__name__)

Found = tuple[str, "Outcome | Retired | ValueError"]  # where it is, and what it is


def to_line(record: Outcome | Retired) -> bytes:
    """The record as it stands in a file, once it is sure that it can be read back."""
    try:
        line = json.dumps(asdict(record), allow_nan=False, sort_keys=True)
        parse_record(json.loads(line))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`outcome` cannot be saved: {error}") from error
    return f"{line}\n".encode()


def name_of(outcome: Outcome) -> str:
    """What a saved run is called to `retire` it: its `run`, else a hash of it."""
    return outcome.run or hashlib.sha256(to_line(outcome)).hexdigest()[:32]


def decode_line(data: bytes | ValueError) -> Any:
    """What its JSON holds, with or without a mark of UTF-8 before it.

    Raises:
        ValueError: It is none.
    """
    if isinstance(data, ValueError):
        raise data
    return json.loads(data.decode(errors="surrogateescape").removeprefix("\ufeff"))


def parse_line(
    line: Any, decode: Callable[[Any], Any] = decode_line
) -> Outcome | Retired | ValueError:
    """What a line, an object or, with another `decode`, a row holds; or what is wrong with it."""
    try:
        return parse_record(decode(line))
    except RecursionError:
        return ValueError("nested too deep to be an outcome")
    except ValueError as error:
        return error


def report(found: Iterable[Found], origin: str) -> list[Outcome]:
    """The outcomes that count; what is none is reported.

    Args:
        found: What a store holds.
        origin: Its name, for warnings.
    """
    outcomes: list[Outcome] = []
    retired: set[str] = set()
    for where, item in found:
        if isinstance(item, Outcome):
            outcomes.append(item)
        elif isinstance(item, Retired):
            retired.add(item.retired)
        else:
            logger.warning("%s %s is not an outcome and is skipped: %s", origin, where, item)
    return [o for o in outcomes if name_of(o) not in retired] if retired else outcomes
