"""Outcomes written down by hand, as CSV."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from .checks import DIFFERENCE, ERROR, FRACTION, Check, finite
from .outcomes import SCHEMA_VERSION, Outcome, parse_outcome

ADDED_BY_HAND = "added by hand"
_REQUIRED = ("model", "method", "task", "zero_shot_accuracy", "final_accuracy")
_TEXTS = ("model", "method", "task", "run", "model_fingerprint", "task_fingerprint")
_NUMBERS: dict[str, type[int] | type[float]] = {
    "iimm": float, "inter": float, "intra": float, "n_images": int, "n_classes": int,
    "learning_rate": float, "steps": int, "batch_size": int,
    "n_train": int, "linear_probe_accuracy": float, "linear_probe_standard_error": float,
    "linear_probe_n_train": int,
}  # fmt: skip
_LOOK: dict[str, Check] = (
    dict.fromkeys(("gain", "forgetting", "worst", "iimm"), DIFFERENCE)
    | dict.fromkeys(("gain_se", "forgetting_se", "worst_se"), ERROR)
    | {"training_loss": finite}
)
_RECIPE = ("learning_rate", "steps", "batch_size")


def read_csv(path: str | Path) -> list[Outcome]:
    """Runs written down by hand: a header and one run per line, accuracies as fractions.

    Columns: ``model``, ``method``, ``task``, ``zero_shot_accuracy``, ``final_accuracy``; where
    known ``iimm``, ``inter``, ``intra``, ``n_images``, ``n_classes``, ``learning_rate``, ``steps``,
    ``batch_size``, ``n_train``, ``linear_probe_accuracy``, ``linear_probe_standard_error``,
    ``linear_probe_n_train``, ``run`` (a name that no other run has), ``model_fingerprint``,
    ``task_fingerprint``, and for each off-target task two, ``before:<task>`` and ``after:<task>``.
    An empty cell is a number that is not known.

    Looks during training are columns ``<quantity>@<share>``, such as ``gain@0.1`` for the gain so
    far after a tenth of the steps. Quantities: ``gain``, needed at every look of a run;
    ``forgetting`` (mean) and ``worst``, in [-1, 1], positive where accuracy was lost; the standard
    errors ``gain_se``, ``forgetting_se``, ``worst_se``; ``iimm``; ``training_loss``. Runs with
    other looks leave the cells empty. In pandas a table with one row per run and look becomes such
    columns by ``wide = looks.pivot(index="run", columns="share", values=["gain", "forgetting"])``
    and ``wide.columns = [f"{quantity}@{share}" for quantity, share in wide.columns]``; then join
    it to the table of runs.

    Args:
        path: The file.

    Returns:
        The outcomes, their `source` "added by hand".

    Raises:
        OSError: The file cannot be read.
        ValueError: A cell or the header is not as above; the message names line and column.
    """
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        try:
            reader.fieldnames = _check_header([name.strip() for name in reader.fieldnames or []])
            return [_from_cells(cells) for cells in reader if any(cells.values())]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path} line {reader.reader.line_num}: {error}") from error


def _check_header(names: list[str]) -> list[str]:
    known = {*_REQUIRED, *_TEXTS, *_NUMBERS}
    looks: dict[tuple[str, float], str] = {}
    for name in names:
        kind, colon, task = name.partition(":")
        partner = {"before": f"after:{task}", "after": f"before:{task}"}.get(kind)
        if names.count(name) > 1:
            raise ValueError(f"column `{name}` is there twice")
        if colon and task and partner:
            if partner not in names:
                raise ValueError(f"column `{name}` needs a column `{partner}` beside it")
        elif name.partition("@")[0] in _LOOK and "@" in name:
            other = looks.setdefault(_look(name), name)
            if other != name:
                raise ValueError(f"columns `{other}` and `{name}` are the same; remove one")
        elif name not in known:
            raise ValueError(
                f"unknown column `{name}`; expected {', '.join(sorted(known))}, before:<task> or "
                f"after:<task>, or <quantity>@<share> with a quantity of {', '.join(_LOOK)}, with "
                "commas between them"
            )
    for name in _REQUIRED:
        if name not in names:
            raise ValueError(f"column `{name}` is missing")
    return names


def _from_cells(cells: dict[str | Any, Any]) -> Outcome:
    if None in cells:  # where `csv` keeps what is left over
        raise ValueError(
            f"has {len(cells[None])} cells more than the header; quote what has a comma in it"
        )
    cells = {name: text.strip() for name, text in cells.items()}
    for name in _REQUIRED:
        if not cells[name]:
            raise ValueError(f"column `{name}` is empty")
    row: dict[str, Any] = {name: cells.get(name, "") for name in _TEXTS}
    numbers = {name: _number(cells.get(name, ""), name) for name in _NUMBERS}
    recipe = {name: numbers.pop(name) for name in _RECIPE}
    row |= numbers | {"recipe": {name: v for name, v in recipe.items() if v is not None}}
    row |= {name: _accuracy(cells, name) for name in ("zero_shot_accuracy", "final_accuracy")}
    off_target = [name.removeprefix("before:") for name in cells if name.startswith("before:")]
    for when in ("before", "after"):
        accuracies = {task: _accuracy(cells, f"{when}:{task}") for task in off_target}
        row[f"off_target_{when}"] = {t: v for t, v in accuracies.items() if v is not None}
    for task in row["off_target_before"].keys() ^ row["off_target_after"].keys():
        raise ValueError(f"fill both `before:{task}` and `after:{task}`, or neither")
    if row["task"] in row["off_target_before"]:
        raise ValueError(f"column `before:{row['task']}`: leave it empty, it is what was learnt")
    row["trajectory"] = _trajectory(cells)
    return parse_outcome(
        row | {"standard_error": None, "source": ADDED_BY_HAND, "schema_version": SCHEMA_VERSION}
    )


def _trajectory(cells: dict[str, str]) -> list[dict[str, float]]:
    """The looks that the line fills, in the order of their shares."""
    rows: dict[float, dict[str, float]] = {}
    for name in cells:
        value = _number(cells[name], name) if "@" in name and ":" not in name else None
        if value is not None:
            quantity, share = _look(name)
            rows.setdefault(share, {"share": share})[quantity] = _LOOK[quantity](value, name)
    for share, row in rows.items():
        for quantity in row:
            needed = quantity.removesuffix("_se") if quantity.endswith("_se") else "gain"
            if quantity != "share" and needed not in row:
                raise ValueError(
                    f"column `{needed}@{share:g}` is missing or empty, where `{quantity}@{share:g}`"
                    " is not; fill both, or neither"
                )
    return [rows[share] for share in sorted(rows)]


def _look(name: str) -> tuple[str, float]:
    """Quantity and share of the steps that a column is of."""
    quantity, _, text = name.partition("@")
    try:
        share = float(text)
        FRACTION(share, name)
    except ValueError:
        raise ValueError(
            f"column `{name}`: the share of the steps after @ must be a fraction in [0, 1], got "
            f"{text!r}; write {quantity}@0.1 for 10 %"
        ) from None
    return quantity, share


def _number(text: str, name: str) -> float | None:
    if not text:
        return None
    kind = _NUMBERS.get(name, float)
    try:
        number = kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number such as 0.63"
        raise ValueError(f"column `{name}` must be {expected}, got {text!r}") from None
    if name in _RECIPE and not 0 <= number < math.inf:
        raise ValueError(f"column `{name}` must be a finite number from 0, got {text!r}")
    return number


def _accuracy(cells: dict[str, str], name: str) -> float | None:
    text = cells[name]
    value = _number(text.removesuffix("%").strip(), name)
    if value is not None and (text.endswith("%") or not 0 <= value <= 1):
        raise ValueError(
            f"column `{name}` must be a fraction in [0, 1], got {text!r}; write 0.63 for 63 %"
        )
    return value
