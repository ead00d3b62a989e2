"""Finished runs on record: what a forecast is learnt from. One JSON object per line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """One fine-tuning run: what was measured before it, and what came of it. All fractions.

    Attributes:
        model: Name for people.
        model_fingerprint: `encoders.model_fingerprint` of the untouched model.
        method: Fine-tuning method, e.g. ``"full"`` or ``"lora"``.
        task: Name of the task that was learnt.
        task_fingerprint: Of its probe images, prompts and preprocessing.
        iimm, inter, intra, standard_error: The measurement before training.
        n_images, n_classes: Of that measurement.
        zero_shot_accuracy: On the task, before training.
        final_accuracy: On the task, after training.
        off_target_before, off_target_after: Task name -> zero-shot accuracy.
        trajectory: One row per look: ``share`` of the steps done, ``gain``, ``forgetting`` (mean)
            and ``worst`` so far.
        complete: Whether training ran to its last planned step.
        ended: Why it ended, in words.
        recipe: Optimizer, learning rate, steps, batch size and so on, for people.
        versions: Library -> its version.
        schema_version: Of this record.
    """

    model: str
    model_fingerprint: str
    method: str
    task: str
    task_fingerprint: str
    iimm: float
    inter: float
    intra: float
    standard_error: float | None
    n_images: int
    n_classes: int
    zero_shot_accuracy: float
    final_accuracy: float
    off_target_before: dict[str, float] = field(default_factory=dict)
    off_target_after: dict[str, float] = field(default_factory=dict)
    trajectory: list[dict[str, float]] = field(default_factory=list)
    complete: bool = True
    ended: str = "finished"
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
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


def append_outcome(path: str | Path, outcome: Outcome) -> None:
    """Add one outcome to a JSON-lines file, which is made if it does not exist.

    Any number of processes may do so at once: a lock file beside it, ``<path>.lock``, lets one at a
    time. The line is on disk when this returns.

    Args:
        path: The file.
        outcome: The record.

    Raises:
        OSError: The file cannot be written, or others have held the lock for a minute.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(outcome), allow_nan=False, sort_keys=True) + "\n"
    with FileLock(f"{path}.lock", timeout=60), path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a crash cut the last line short: do not lose this one too
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_outcomes(path: str | Path) -> list[Outcome]:
    """All outcomes of a JSON-lines file; a line that is none is reported and skipped.

    Args:
        path: The file.

    Returns:
        The outcomes, in the order of the file.

    Raises:
        OSError: The file cannot be read.
    """
    outcomes = []
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                outcomes.append(_parse(json.loads(line)))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                logger.warning(
                    "%s line %d is not an outcome and is skipped: %s", path, number, error
                )
    return outcomes


def as_outcomes(source: str | Path | Iterable[Outcome] | None) -> list[Outcome]:
    """Outcomes given as a file or as records, as a list."""
    if source is None:
        return []
    if isinstance(source, str | Path):
        return read_outcomes(source)
    outcomes = list(source)
    for outcome in outcomes:
        if not isinstance(outcome, Outcome):
            raise TypeError(f"`outcomes` must hold Outcome records, got {type(outcome).__name__}")
    return outcomes


def _parse(row: Any) -> Outcome:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if row.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"schema version {row.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
        )
    known = {f.name for f in fields(Outcome)}
    outcome = Outcome(**{k: v for k, v in row.items() if k in known})
    numbers = [
        outcome.iimm, outcome.inter, outcome.intra, outcome.zero_shot_accuracy,
        outcome.final_accuracy, *outcome.off_target_before.values(),
        *outcome.off_target_after.values(),
        *(value for look in outcome.trajectory for value in look.values()),
    ]  # fmt: skip
    if not all(isinstance(n, int | float) and -1 <= n <= 1 for n in numbers):
        raise ValueError("a measurement, accuracy or drop is not a number in [-1, 1]")
    if set(outcome.off_target_before) != set(outcome.off_target_after):
        raise ValueError("`off_target_before` and `off_target_after` hold different tasks")
    if not all(set(look) >= {"share", "gain"} for look in outcome.trajectory):
        raise ValueError("a row of `trajectory` lacks `share` or `gain`")
    return outcome
