"""How a run ended: in words, and whether a forecast may learn from its outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measures.embeddings import NotFiniteError
from ..records import keys


def has_moved(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the latest look measured anything else than the look before training."""
    names = (keys.PREFIX, keys.INTER, keys.INTRA, keys.ACCURACY)
    return any(history[0][name] != history[-1][name] for name in names)


def ended_as(
    failure: Exception | None, given: str, *, told: bool, reached: bool, later: bool
) -> tuple[str, bool]:
    """The end in words, and whether the outcome is that of a complete run.

    Args:
        failure: Of the last look: numbers of an earlier step are no outcome.
        given: Why training ended before its last step; empty: it did not, or did so unguarded.
        told: Whether the steps done are known.
        reached: Whether they are all.
        later: Whether the model had been trained already when the run began.
    """
    if failure is not None:
        diverged = isinstance(failure, NotFiniteError)
        return given or ("training diverged" if diverged else "the last look failed"), False
    if given:
        return given, False
    if not reached:
        return ("stopped early" if told else "the steps done were never told"), False
    if later:
        return "finished, as a later phase of its training", False
    return "finished", True
