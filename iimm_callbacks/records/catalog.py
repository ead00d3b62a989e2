"""A store -> the saved runs that matter, read without the others where there are many."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from glob import escape
from typing import TYPE_CHECKING, Any, TypeAlias

from .log import get_logger
from .outcomes import Outcome, one_of_each_run

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .table import Tabled

logger = get_logger(__name__)

Catalog: TypeAlias = "Listed | Tabled"  # the runs of a store; one of its table reads only some
LEARNT_FROM = 400  # runs; a forecast from as many takes half a second
_OWN = 0.75  # at most, of the model that is asked about, where there are others


def thin(runs: Sequence[Outcome], model: str, limit: int = LEARNT_FROM) -> list[int]:
    """Positions of the runs that a forecast for a model is learnt from, in their order.

    All of them, up to a limit. Beyond it the model's own come first, and in turn the newest run of
    each model, method and task, the second newest, and so on: a forecast needs variety. Thinned
    again they stay the same.

    Args:
        runs: Complete runs, the oldest first.
        model: `model_fingerprint` of the model.
        limit: How many at most.
    """
    if len(runs) <= limit:
        return list(range(len(runs)))
    import numpy as np

    number: dict[Any, int] = {}
    known = [(run.model_fingerprint, run.method, run.task) for run in runs]
    cells = np.array([number.setdefault(cell, len(number)) for cell in known])
    own = np.array([run.model_fingerprint == model for run in runs], dtype=bool)
    chosen: list[int] = thin_cells(own, cells, limit).tolist()
    return chosen


def thin_cells(own: NDArray[np.bool_], cells: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """As `thin`, of runs whose equal `cells` are of one model, method and task."""
    import numpy as np

    n = len(cells)
    if n <= limit:
        return np.arange(n)
    newest_first = np.arange(n)[::-1]
    by_cell = newest_first[np.argsort(cells[newest_first], kind="stable")]
    starts = np.flatnonzero(np.r_[True, np.diff(cells[by_cell]) != 0])
    turn = np.empty(n, dtype=np.int64)  # 0 for the newest run of its cell, 1 for the next
    turn[by_cell] = np.arange(n) - np.repeat(starts, np.diff(np.r_[starts, n]))
    order = newest_first[np.argsort(turn[newest_first], kind="stable")]
    mine, others = order[own[order]], order[~own[order]]
    mine = mine[: max(limit - len(others), int(limit * _OWN))]
    return np.sort(np.r_[mine, others[: limit - len(mine)]])


class Listed:
    """The catalog of runs that are at hand, the oldest first.

    Args:
        outcomes: The runs that count; those retired and damaged lines do not.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = outcomes

    @property
    def n_outcomes(self) -> int:
        """Runs that count."""
        return len(self._outcomes)

    def methods(self) -> set[str]:
        """Those of all runs."""
        return {outcome.method for outcome in self._outcomes}

    def relevant(self, model: str, first: int | None = None) -> list[Outcome]:
        """The complete runs that a forecast for a model is learnt from: see `thin`.

        Those that `audit.contradicted` names are left out, with a warning.

        Args:
            model: `model_fingerprint`.
            first: Only of so many that were saved first; ``None``: of all.
        """
        from .audit import contradicted

        complete = [o for o in one_of_each_run(self._outcomes[:first]) if o.complete]
        chosen = [complete[i] for i in thin(complete, model)]
        left_out = contradicted(chosen)
        if left_out:
            logger.warning(
                "%d of %d saved runs are left out of forecasts: they contradict most runs of their "
                "model on the same images; `iimm outcomes check` names them",
                len(left_out), len(chosen),
            )  # fmt: skip
        return [o for i, o in enumerate(chosen) if i not in left_out]

    def select(self, model: str = "*", method: str = "*", task: str = "*") -> list[int]:
        """Positions of the runs that fit these patterns; ``*`` matches anything.

        Args:
            model: Its name or its fingerprint.
            method: Of fine-tuning.
            task: The name of the task learnt.
        """
        is_model, is_method, is_task = (matcher(words) for words in (model, method, task))
        return [
            i
            for i, o in enumerate(self._outcomes)
            if (is_model(o.model) or is_model(o.model_fingerprint))
            and is_method(o.method)
            and is_task(o.task)
        ]

    def read(self, positions: Sequence[int]) -> list[Outcome]:
        """The runs at these ascending positions; a damaged one is reported and skipped."""
        return [self._outcomes[i] for i in positions]


def of_model(past: Catalog, record: Mapping[str, Any]) -> list[Outcome]:
    """The saved runs of the model of a run; none where it is unknown.

    Args:
        past: The saved runs.
        record: As `run_file.save_run`.
    """
    model = record.get("model_fingerprint")
    return past.read(past.select(escape(model))) if model else []


def matcher(pattern: str) -> Callable[[str], Any]:
    """Whether a text fits a pattern, of which ``*`` matches anything."""
    return re.compile(translate(pattern)).match
