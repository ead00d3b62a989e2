"""Saved runs: what a forecast is learnt from. `store` keeps them in files."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .checks import (
    DIFFERENCE,
    ERROR,
    FRACTION,
    Check,
    anything,
    count,
    dict_of,
    finite,
    flag,
    list_of,
    object_of,
    or_none,
    short,
    text,
)

SCHEMA_VERSION = 2  # 1, read as it is: the linear probe added its ridge to the probabilities
_OF_GIT = 5.0  # seconds that it may take
OFF_TARGET_PROBE_SIZE = 256  # images of an off-target task, where no other number is given


@dataclass(frozen=True)
class Outcome:
    """One fine-tuning run: what was measured before, and how it ended. All fractions.

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
            and ``worst`` so far, and the standard error of each as ``gain_se`` and so on; ``drops``
            of each off-target task, ``iimm`` and ``training_loss`` where they are known.
        complete: Whether training ran to its last planned step.
        ended: Why it ended, in words.
        recipe: Optimizer, learning rate, steps, batch size and so on, for people.
        versions: Library -> its version.
        source: Where the numbers were published; empty for a run that this package guarded.
        run: What tells this run from all others, the same when it is resumed; empty where unknown.
        n_train: Images in the training set; ``None`` where unknown.
        linear_probe_accuracy: Of a linear probe on the untouched model's embeddings, fitted to
            `n_train` images or carried on to that many; ``None`` where it was not measured.
        linear_probe_standard_error: Of that.
        linear_probe_n_train: Images that the probe was fitted to.
        images: Name of an accuracy, such as ``"final_accuracy"`` -> which images it is of.
        provenance: Who saved it, when, and by which script, see `provenance`; two records that
            differ in that only are equal.
        schema_version: Of this record: 2, or 1 of one that was saved before, see
            `linear_probe_form`.
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
    trajectory: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True
    ended: str = "finished"
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    source: str = ""
    run: str = ""
    n_train: int | None = None
    linear_probe_accuracy: float | None = None
    linear_probe_standard_error: float | None = None
    linear_probe_n_train: int | None = None
    images: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict, compare=False)
    schema_version: int = SCHEMA_VERSION

    @property
    def linear_probe_form(self) -> str | None:
        """What the probe behind `linear_probe_accuracy` added its ridge regression to.

        ``"logits"``, the zero-shot ones, as `measures` does now; ``"probabilities"`` in records of
        schema 1, whose accuracies are some points lower or higher; ``None`` where there is none,
        or where it is not of this package: published, or added by hand.
        """
        if self.linear_probe_accuracy is None or self.source:
            return None
        return "logits" if self.schema_version > 1 else "probabilities"

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


@dataclass(frozen=True)
class Retired:
    """Says that a saved run no longer counts; the run itself stays where it is.

    Attributes:
        retired: `Outcome.run`, or what `lines.name_of` calls a run that has none.
        why: In words.
        provenance: Who said so, and when.
    """

    retired: str
    why: str
    provenance: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def parse_record(row: Any) -> Outcome | Retired:
    """What a line of a store holds: an outcome, or that one is retired.

    Raises:
        ValueError: As `parse_outcome`.
    """
    if not isinstance(row, dict) or "retired" not in row:
        return parse_outcome(row)
    _check_schema(row)
    said = dict_of(text)(row.get("provenance", {}), "provenance")
    words = text(row["retired"], "retired"), text(row.get("why"), "why")
    return Retired(*words, said, row["schema_version"])


def one_of_each_run(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """One outcome of each run: the latest that counts.

    A run is saved more than once where it was interrupted and resumed, or killed after its end
    and before anybody knew. The latest counts, of complete ones where there are any.

    Args:
        outcomes: Records, the oldest first.

    Returns:
        The records that count; those of unknown `run` all do.
    """
    found: dict[object, Outcome] = {}
    for outcome in outcomes:
        key = outcome.run or object()  # of unknown runs each is its own
        if outcome.complete or key not in found or not found[key].complete:
            found.pop(key, None)  # it counts where its latest record is
            found[key] = outcome
    return list(found.values())


def at_the_last_step(outcome: Outcome) -> Outcome:
    """The outcome after the last step of training, of which forecasts are.

    Where the best model was loaded at the end, ``recipe["best_step"]``, that is what the first look
    at the last step saw; incomplete where there was none.
    """
    if "best_step" not in outcome.recipe:
        return outcome
    last = [look for look in outcome.trajectory if look["share"] >= 1]
    if len(last) < 2:  # the only one is of the model that was loaded
        return replace(outcome, complete=False)
    drops, before = last[0].get("drops", {}), outcome.off_target_before
    if drops.keys() != before.keys():
        return replace(outcome, complete=False)
    return replace(
        outcome,
        final_accuracy=outcome.zero_shot_accuracy + last[0]["gain"],
        off_target_after={name: before[name] - drops[name] for name in before},
        trajectory=outcome.trajectory[: outcome.trajectory.index(last[0]) + 1],
    )


def library_versions() -> dict[str, str]:
    """What `Outcome.versions` holds: of the libraries that a run's numbers depend on."""
    found = {}
    for library in ("iimm_callbacks", "torch", "transformers", "peft", "open_clip_torch"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, str]:
    """What `Outcome.provenance` holds of this process; what is not known is left out.

    Returns:
        ``who``: ``$IIMM_CALLBACKS_AUTHOR``, else the name that one is logged in by; ``when``: now,
        UTC; ``script``: name of its file; ``commit``: that its folder is at in git, with ``+``
        where the script itself has changed since.
    """
    found = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    try:
        found["who"] = os.environ.get("IIMM_CALLBACKS_AUTHOR") or getpass.getuser()
    except (OSError, KeyError, ImportError):  # of a user without a name
        pass
    script = Path(sys.argv[0] or "-")
    if script.is_file():
        found["script"] = script.name
        if commit := _commit(script.absolute()):
            found["commit"] = commit
    return found


def _commit(script: Path) -> str:
    """Empty where the script is under no version control."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(script.parent), *command],
            capture_output=True, text=True, timeout=_OF_GIT, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", script.name):
            return ""
        changed = "+" if git("status", "--porcelain", "--", script.name) else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return ""


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
    outcome = Outcome(**_FIELDS(row, ""))
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
            f"was written by a newer version of iimm_callbacks (schema {short(found)}; "
            f"this one reads {SCHEMA_VERSION}); upgrade to read it"
        )
    if not whole or found < 1:
        raise ValueError(f"not an outcome record: `schema_version` is {short(found)}")


_LOOK = {
    "forgetting": DIFFERENCE, "worst": DIFFERENCE, "iimm": DIFFERENCE,
    "gain_se": ERROR, "forgetting_se": ERROR, "worst_se": ERROR, "drops": dict_of(DIFFERENCE),
}  # fmt: skip
_CHECKS: dict[str, Check] = (
    dict.fromkeys(("model", "model_fingerprint", "method", "task", "task_fingerprint"), text)
    | dict.fromkeys(("ended", "source", "run"), text)
    | dict.fromkeys(("iimm", "inter", "intra"), or_none(DIFFERENCE))
    | dict.fromkeys(("standard_error", "linear_probe_standard_error"), or_none(ERROR))
    | dict.fromkeys(("n_images", "n_classes", "n_train", "linear_probe_n_train"), or_none(count))
    | dict.fromkeys(("zero_shot_accuracy", "final_accuracy"), FRACTION)
    | dict.fromkeys(("off_target_before", "off_target_after"), dict_of(FRACTION))
    | dict.fromkeys(("versions", "images", "provenance"), dict_of(text))
    | {"linear_probe_accuracy": or_none(FRACTION), "complete": flag, "schema_version": count}
    | {"trajectory": list_of(object_of({"share": FRACTION, "gain": DIFFERENCE}, _LOOK, finite))}
    | {"recipe": dict_of(anything)}
)
_NEEDED = [f.name for f in fields(Outcome) if f.default is MISSING and f.default_factory is MISSING]
_FIELDS = object_of({name: _CHECKS[name] for name in _NEEDED}, _CHECKS)
