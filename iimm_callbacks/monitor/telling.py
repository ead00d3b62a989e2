"""What a run says of itself: each warning once, what failed without ending it, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..guard.schedule import Every, waits_for_end
from ..measures.embeddings import NotFiniteError
from ..probing import ranks
from ..records import keys
from ..records.log import get_logger

logger = get_logger(__name__)


class Forgiving:
    """Calls functions of others: trackers, the terminal, what a user handed over.

    Args:
        strict: Let exceptions through; otherwise they cost one warning for each kind of call.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self._warned: set[str] = set()

    def __call__(self, what: str, do: Callable[[], Any]) -> Any:
        """`do()`, or None where it raises.

        Args:
            what: Who is called, for the warning.
            do: Calls it.
        """
        try:
            return do()
        except Exception as error:
            if self.strict:
                raise
            if what not in self._warned:
                logger.warning(
                    "%s raised %s: %s. Training goes on; further errors of it are not shown.",
                    what,
                    type(error).__name__,
                    error,
                )
            self._warned.add(what)
            return None


class Warned:
    """The warnings of one run, on the first rank only; on all where the ranks were apart."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def of_failure(self, step: int, error: Exception) -> None:
        """That a look failed."""
        self._once(
            type(error).__name__,
            "The IIMM guard could not measure the model at step %d (%s: %s). Training goes on, "
            "without numbers for this step; further failures of this kind are only counted.",
            step,
            type(error).__name__,
            error,
        )

    def of_adapters(self, name: str) -> None:
        """That a weight of an adapter is not as adapters begin."""
        self._once(
            "adapters",
            "%r and other adapters were trained before this run, or begin at random: unless it "
            "resumes from a checkpoint, it counts as a later phase of a training, from which no "
            "forecast learns",
            name,
        )

    def of_steps(self, since: int, step: int, total_steps: int, event: str | None) -> None:
        """That steps are not counted from the start of the run, up to as many as it has.

        Args:
            since: What was told before; 0 at first.
            step: Optimizer steps done, as they are told.
            total_steps: Of the whole training.
            event: As `IIMMMonitor.is_due`; the Trainer may evaluate before its first step.
        """
        if step < since or not (step or event):
            self._once(
                "order",
                "`step` was told %d after %d: it is the number of optimizer steps done, from 1 on "
                "and over all epochs. Forecast and outcome take it for that",
                step,
                since,
            )
        if step > total_steps:
            self._once(
                "",
                "The run is at step %d, and %d steps in all were told: what is seen counts as its "
                "end. Tell the steps that it will have",
                step,
                total_steps,
            )

    def of_no_look(self, every: Every, step: int, total_steps: int) -> None:
        """That a run with a limit goes by, this far without a look.

        Args:
            every: As `schedule.check_every`.
            step: Optimizer steps done.
            total_steps: Of the whole training.
        """
        if not isinstance(every, str):
            if waits_for_end(every, total_steps):
                self._once("no look", no_look(every, total_steps))
        elif 2 * step > total_steps > step:
            self._once(
                "no look",
                f"`step` was told of no {every!r} until step {step} of {total_steps}, so the IIMM "
                f"guard has not looked at the model; call it with `event={every!r}` at each",
            )

    def _once(self, kind: str, text: str, *facts: object) -> None:
        speaks = ranks.world()[0] == 0 or kind == ranks.RanksApartError.__name__
        if kind not in self._kinds and speaks:
            logger.warning(text, *facts)
        self._kinds.add(kind)


def no_look(every: Every, total_steps: int, why: str = "") -> str:
    """That no look comes before the end, in words; `why` maybe says whose setting it is."""
    because = f" ({why})" if why else ""
    return (
        f"With `every={every!r}` no look comes before the last of {total_steps} steps{because}: "
        "until then the IIMM guard can neither warn nor stop. Give `every` another value, or leave "
        "it out"
    )


def as_loss(value: Any) -> float | None:
    """A training loss as a float; None where it is no finite number, such as one for each image."""
    try:
        number = float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def has_moved(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the latest look measured anything else than the look before training."""
    names = (keys.PREFIX, keys.INTER, keys.INTRA, keys.ACCURACY)
    return any(history[0][name] != history[-1][name] for name in names)


def ended_as(
    failure: Exception | None, given: str, done: int | None, total: int, moved: bool, later: bool
) -> tuple[str, bool]:
    """The end in words, and whether the outcome is that of a complete run.

    Args:
        failure: Of the last look: numbers of an earlier step are no outcome.
        given: Why training ended before its last step; empty: it did not, or did so unguarded.
        done: Steps, as far as known.
        total: Steps of the whole training, as far as known, else 0.
        moved: Whether the model has: only then it is believed without a word that all were done.
        later: Whether the model had been trained already when the run began.
    """
    if failure is not None:
        diverged = isinstance(failure, NotFiniteError)
        return given or ("training diverged" if diverged else "the last look failed"), False
    if given:
        return given, False
    if done is None and not (total > 0 and moved):
        return "the steps done were never told", False
    if done is not None and done < max(total, 1):
        return "stopped early" if done else "no step was done", False
    if later:
        return "finished, as a later phase of its training", False
    return "finished", True
