"""Lines of a store -> a table of what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from zlib import crc32

import msgspec
import numpy as np
from numpy.typing import NDArray

from . import objects
from .lines import name_of, parse_line
from .outcomes import SCHEMA_VERSION, Retired

DAMAGED, OUTCOME, RETIRED = range(3)  # what the column `kind` says
WORDS = ("model", "model_fingerprint", "method", "task")
_ROW = np.dtype(
    [(word, np.int32) for word in WORDS]
    + [("name", "S32"), ("complete", np.bool_), ("has_run", np.bool_), ("kind", np.int8)]
    + [("object", "S32"), ("start", "i8"), ("size", "i8"), ("check", "i8"), ("written", "f8")]
)


@dataclass(frozen=True)
class Table:
    """What lines hold. Arrays of numpy: pyarrow would take 90 MB and half of a start.

    Attributes:
        rows: [n] of `Outcome`'s ``model``, ``model_fingerprint``, ``method``, ``task`` as positions
            in `words`; ``name``, `hashed` from `lines.name_of` or from the run that is retired;
            ``complete``; ``has_run``, whether its `Outcome.run` is known; ``kind``; ``object``,
            `objects.digest` of the line; ``start`` and ``size`` in bytes; ``check``, the line's
            CRC-32; ``written``, when its object was, in seconds, or 0.
        words: Of each such column, its different values.
    """

    rows: NDArray[Any]
    words: Mapping[str, Sequence[str]]

    def take(self, rows: NDArray[Any]) -> Table:
        """Some of the rows."""
        return Table(self.rows[rows], self.words)

    def to_bytes(self, **told: str) -> bytes:
        """As a file, with what is told of it: a line of JSON, and the rows as they are."""
        rows = self.rows.tobytes()
        head = {"words": self.words, "told": told, "check": crc32(rows)}
        return json.dumps(head).encode() + b"\n" + rows


def from_bytes(data: bytes) -> tuple[Table, dict[str, str]]:
    """The table, and what was told of it.

    Raises:
        ValueError: It is none.
    """
    head, _, rows = data.partition(b"\n")
    try:
        found = json.loads(head)
        if found["check"] != crc32(rows):
            raise ValueError("torn")
        return Table(np.frombuffer(rows, _ROW), found["words"]), found["told"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no table: {error}") from error


EMPTY = Table(np.empty(0, _ROW), {word: [] for word in WORDS})


def hashed(name: str) -> bytes:
    """What the column ``name`` holds of a name."""
    return hashlib.sha256(name.encode()).hexdigest()[:32].encode()


def scan_lines(path: Path, start: int, end: int, before: Table = EMPTY) -> Table:
    """The facts of the lines between two places in a file, in their order.

    Args:
        path: Of JSON lines.
        start: Where a line begins, in bytes.
        end: Where to stop: the line that begins before is read to its end.
        before: Of the lines before, which the table returned begins with.

    Raises:
        OSError: The file cannot be read.
    """
    places = {word: {v: i for i, v in enumerate(before.words[word])} for word in WORDS}
    with path.open("rb") as file:
        file.seek(start)
        rows = np.fromiter(_rows(file, start, end, places), _ROW)
    words = {word: list(place) for word, place in places.items()}
    return Table(np.concatenate([before.rows, rows]), words)


def _rows(
    file: BinaryIO, start: int, end: int, places: dict[str, dict[str, int]]
) -> Iterator[tuple[Any, ...]]:
    for line in file:
        if start >= end:
            return
        if line.strip():
            words, facts = _facts(line)
            codes = [
                place.setdefault(word, len(place))
                for word, place in zip(words, places.values(), strict=True)
            ]
            yield *codes, *facts, objects.digest(line), start, len(line), crc32(line), 0.0
        start += len(line)


_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Difference = Annotated[float, msgspec.Meta(ge=-1, le=1)]
_Error = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Plain = str | int | float | bool | None


class _Look(msgspec.Struct, forbid_unknown_fields=True):
    """A row of a usual `Outcome.trajectory`."""

    share: _Fraction
    gain: _Difference
    forgetting: _Difference = 0
    worst: _Difference = 0
    iimm: _Difference = 0
    gain_se: _Error = 0
    forgetting_se: _Error = 0
    worst_se: _Error = 0
    training_loss: float = 0
    drops: dict[str, _Difference] = {}


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """What nearly all lines are, checked in a fifth of the time that `parse_line` takes.

    A line that fits is an `Outcome` to `parse_line` too, which says what all others are.
    """

    model: str
    model_fingerprint: str
    method: str
    task: str
    task_fingerprint: str
    iimm: _Difference | None
    inter: _Difference | None
    intra: _Difference | None
    standard_error: _Error | None
    n_images: _Count | None
    n_classes: _Count | None
    zero_shot_accuracy: _Fraction
    final_accuracy: _Fraction
    run: Annotated[str, msgspec.Meta(min_length=1)]
    schema_version: Annotated[int, msgspec.Meta(ge=1, le=SCHEMA_VERSION)]
    off_target_before: dict[str, _Fraction] = {}
    off_target_after: dict[str, _Fraction] = {}
    trajectory: list[_Look] = []
    complete: bool = True
    ended: str = ""
    recipe: dict[str, _Plain | dict[str, _Plain] | list[_Plain]] = {}
    versions: dict[str, str] = {}
    source: str = ""
    n_train: _Count | None = None
    linear_probe_accuracy: _Fraction | None = None
    linear_probe_standard_error: _Error | None = None
    linear_probe_n_train: _Count | None = None
    images: dict[str, str] = {}
    provenance: dict[str, str] = {}


_decode = msgspec.json.Decoder(_Line).decode


def _facts(line: bytes) -> tuple[list[str], tuple[Any, ...]]:
    """The words, and the columns from ``name`` to ``kind``."""
    record: Any = None
    with suppress(msgspec.DecodeError, UnicodeDecodeError):  # the latter of an older msgspec
        record = _decode(line)
    if record is None or record.off_target_before.keys() != record.off_target_after.keys():
        record = parse_line(line)
    if isinstance(record, ValueError):
        return [""] * len(WORDS), (b"", False, False, DAMAGED)
    if isinstance(record, Retired):
        return [""] * len(WORDS), (hashed(record.retired), False, False, RETIRED)
    words = [getattr(record, word) for word in WORDS]
    return words, (hashed(name_of(record)), record.complete, bool(record.run), OUTCOME)
