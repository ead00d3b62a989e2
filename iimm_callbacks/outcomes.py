"""Finished runs on record: what a forecast is learnt from. `store` keeps them in files."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1
_DEEPEST = 16  # nesting of `recipe`; what is deeper could be read but not copied or written again
_LARGEST = sys.float_info.max

_Check = Callable[[Any, str], Any]  # value, name of its field -> the value, or ValueError


@dataclass(frozen=True)
class Outcome:
    """One fine-tuning run: what was measured before it, and what came of it. All fractions.

    Attributes:
        model: Name for people.
        model_fingerprint: `encoders.model_fingerprint` of the untouched model.
        method: Fine-tuning method, e.g. ``"full"`` or ``"lora"``.
        task: Name of the task that was learnt.
        task_fingerprint: Of its probe images, prompts and preprocessing.
        iimm, inter, intra, standard_error: The measurement before training; ``None`` where it was
            not made, as for published figures.
        n_images, n_classes: Of that measurement; ``None`` where unknown.
        zero_shot_accuracy: On the task, before training.
        final_accuracy: On the task, after training.
        off_target_before, off_target_after: Task name -> zero-shot accuracy.
        trajectory: One row per look: ``share`` of the steps done, ``gain``, ``forgetting`` (mean)
            and ``worst`` so far, and the standard error of each as ``gain_se`` and so on.
        complete: Whether training ran to its last planned step.
        ended: Why it ended, in words.
        recipe: Optimizer, learning rate, steps, batch size and so on, for people.
        versions: Library -> its version.
        source: Where the numbers were published; empty for a run that this package guarded.
        schema_version: Of this record.
    """

    model: str
    model_fingerprint: str
    method: str
    task: str
    task_fingerprint: str
    iimm: float | None
    inter: float | None
    intra: float | None
    standard_error: float | None
    n_images: int | None
    n_classes: int | None
    zero_shot_accuracy: float
    final_accuracy: float
    off_target_before: dict[str, float] = field(default_factory=dict)
    off_target_after: dict[str, float] = field(default_factory=dict)
    trajectory: list[dict[str, float]] = field(default_factory=list)
    complete: bool = True
    ended: str = "finished"
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    source: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def gain(self) -> float:
        """Accuracy after minus before on the task, in [-1, 1]."""
        return self.final_accuracy - self.zero_shot_accuracy

    @property
    def drops(self) -> dict[str, float]:
        """Off-target task -> zero-shot accuracy before minus after; positive means loss."""
        return {
            name: before - self.off_target_after[name]
            for name, before in self.off_target_before.items()
        }

    @property
    def forgetting(self) -> float | None:
        """Mean drop over the off-target tasks; ``None`` where there were none."""
        drops = self.drops.values()
        return sum(drops) / len(drops) if drops else None

    @property
    def worst(self) -> float | None:
        """Largest drop of any one off-target task; ``None`` where there were none."""
        return max(self.drops.values(), default=None)


def library_versions() -> dict[str, str]:
    """What `Outcome.versions` holds: of the libraries that a run's numbers depend on."""
    found = {}
    for library in ("iimm_callbacks", "torch", "transformers", "peft", "open_clip_torch"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def parse_outcome(row: Any) -> Outcome:
    """The outcome that a JSON value holds; fields it does not know are ignored.

    Args:
        row: What `json.loads` makes of ``json.dumps(dataclasses.asdict(outcome))``.

    Returns:
        The record, equal to the one that was written.

    Raises:
        ValueError: It is none; the message names the field, what was expected and what came.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    _check_schema(row)
    values = {}
    for f in fields(Outcome):
        if f.name in row:
            values[f.name] = _CHECKS[f.name](row[f.name], f.name)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"`{f.name}` is missing")
    outcome = Outcome(**values)
    if outcome.off_target_before.keys() != outcome.off_target_after.keys():
        raise ValueError("`off_target_before` and `off_target_after` hold different tasks")
    return outcome


def _check_schema(row: dict[str, Any]) -> None:
    if "schema_version" not in row:
        raise ValueError("not an outcome record: no `schema_version`")
    found = row["schema_version"]
    whole = isinstance(found, int) and not isinstance(found, bool)
    if whole and found > SCHEMA_VERSION:
        raise ValueError(
            f"was written by a newer version of iimm_callbacks (schema {_short(found)}; "
            f"this one reads {SCHEMA_VERSION}); upgrade to read it"
        )
    if not whole or found < SCHEMA_VERSION:
        raise ValueError(f"not an outcome record: `schema_version` is {_short(found)}")


def _refuse(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"`{name}` must be {expected}, got {_short(got)}")


def _short(value: Any) -> str:
    """`value` in an error message, which a long one would hide."""
    if isinstance(value, dict | list):
        return type(value).__name__
    if isinstance(value, int) and abs(value) > 10**20:
        return "a huge number"  # `repr` refuses the longest
    return f"{value!r:.40}"


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _refuse(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, or a byte that is no text
        raise _refuse(name, "a string in UTF-8", value) from None
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "true or false", value)
    return value


def _count(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise _refuse(name, "a whole number from 0", value)
    return value


def _number(low: float, high: float, expected: str) -> _Check:
    def check(value: Any, name: str) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # NaN is not
            raise _refuse(name, expected, value)
        return float(value)

    return check


def _or_none(check: _Check) -> _Check:
    return lambda value, name: None if value is None else check(value, name)


def _dict_of(check: _Check) -> _Check:
    def check_all(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refuse(name, "an object", value)
        return {_text(k, f"{name}, a key"): check(v, f"{name}[{k!r}]") for k, v in value.items()}

    return check_all


def _trajectory(value: Any, name: str) -> list[dict[str, float]]:
    if not isinstance(value, list):
        raise _refuse(name, "a list", value)
    rows = []
    for position, look in enumerate(value):
        where = f"{name}[{position}]"
        row = _dict_of(_number(-_LARGEST, _LARGEST, "a finite number"))(look, where)
        for key in {"share", "gain"} - row.keys():
            raise ValueError(f"`{where}` lacks `{key}`")
        for key in row.keys() & _LOOK.keys():
            _LOOK[key](row[key], f"{where}[{key!r}]")
        rows.append(row)
    return rows


def _anything(value: Any, name: str, depth: int = 0) -> Any:
    """Whatever JSON can hold and give back."""
    if depth > _DEEPEST:
        raise ValueError(f"`{name}` is nested deeper than {_DEEPEST}")
    if isinstance(value, dict):
        return {_text(k, f"{name}, a key"): _anything(v, name, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_anything(v, name, depth + 1) for v in value]
    if isinstance(value, str):
        return _text(value, name)
    if value is None or (isinstance(value, int | float) and -math.inf < value < math.inf):
        return value
    raise _refuse(name, "a JSON value, numbers finite", value)


_FRACTION = _number(0, 1, "a fraction in [0, 1]")
_DIFFERENCE = _number(-1, 1, "a number in [-1, 1]")
_ERROR = _number(0, _LARGEST, "a finite number from 0")
_LOOK = {
    "share": _FRACTION, "gain": _DIFFERENCE, "forgetting": _DIFFERENCE, "worst": _DIFFERENCE,
    "gain_se": _ERROR, "forgetting_se": _ERROR, "worst_se": _ERROR,
}  # fmt: skip
_CHECKS: dict[str, _Check] = (
    dict.fromkeys(("model", "model_fingerprint", "method", "task", "task_fingerprint"), _text)
    | dict.fromkeys(("ended", "source"), _text)
    | dict.fromkeys(("iimm", "inter", "intra"), _or_none(_DIFFERENCE))
    | dict.fromkeys(("n_images", "n_classes"), _or_none(_count))
    | dict.fromkeys(("zero_shot_accuracy", "final_accuracy"), _FRACTION)
    | dict.fromkeys(("off_target_before", "off_target_after"), _dict_of(_FRACTION))
    | {"standard_error": _or_none(_ERROR), "trajectory": _trajectory, "complete": _flag}
    | {"recipe": _dict_of(_anything), "versions": _dict_of(_text), "schema_version": _count}
)
