"""What a run warns of: each kind once, on the first rank; on all where the ranks were apart."""

from __future__ import annotations

from ..probing import ranks
from ..records.log import get_logger

logger = get_logger(__name__)


class Warned:
    """The warnings of one run."""

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

    def of_length(self, step: int, total_steps: int) -> None:
        """That the run goes on beyond the steps it was said to have."""
        if step > total_steps:
            self._once(
                "",
                "The run is at step %d, and %d steps in all were told: what is seen counts as its "
                "end. Tell the steps that it will have",
                step,
                total_steps,
            )

    def _once(self, kind: str, text: str, *facts: object) -> None:
        speaks = ranks.world()[0] == 0 or kind == ranks.RanksApartError.__name__
        if kind not in self._kinds and speaks:
            logger.warning(text, *facts)
        self._kinds.add(kind)
