"""Saved runs + the forecast of the mean -> what each off-target task will lose.

Which off-target task is asked about tells more of its drop than which task is learnt. With ``F``
the mean forgetting of a run, task b is forecast to lose ``F + s · u_b``. Its profile ``u_b`` is by
how much it lost more than the mean in saved runs, in units of the spread ``s`` over a run's tasks;
``s`` is a line in ``F`` over the method's runs. The profile of a task without saved runs is read
off a line in zero-shot accuracy: what is not known cannot be forgotten.

During training ``s · u_b`` is joined by what is seen: ``α · (drop so far - its mean) + β · s ·
u_b``, α and β by least squares over saved runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..records.forecast import Prediction
from .mixed_model import Floats
from .runs import MIN_TASKS, Ask, Run, n_tasks, of_a_kind

# The profile of all methods counts as much as this many tasks under the method itself.
_POOLING = 2.0
_LEAST_SPREAD = 0.3  # of the method's mean spread: a line may not take it to 0


def by_task(
    runs: Sequence[Run],
    ask: Ask,
    mean: Prediction | None,
    seen: tuple[float, Mapping[str, float]] | None = None,
) -> dict[str, Prediction]:
    """The forecast drop of each off-target task at the end of the run.

    Args:
        runs: Saved ones.
        ask: The run that is asked about, with its off-target tasks and their accuracies.
        mean: The forecast of its mean forgetting, if there is one.
        seen: Share of the steps done, and the drop of each off-target task so far.

    Returns:
        Off-target task -> `Prediction`, fractions, the largest first. Empty where saved runs on too
        few tasks have off-target tasks of their own. The points are about `mean`, but for the
        rounding at what an accuracy allows.
    """
    table = _Drops.of(of_a_kind(runs, ask, "forgetting"), ask)
    if table is None or mean is None:
        return {}
    own = table.spread(ask.method, mean.point) * table.profile(ask.method)  # [T]
    residual = table.residual(ask.method)
    if seen is not None and (weights := table.weights_at(ask.method, seen[0])) is not None:
        so_far = np.array([seen[1].get(name, math.nan) for name in table.names])
        own = weights[0] * (so_far - np.nanmean(so_far)) + weights[1] * own
        residual = weights[2]
    asked = np.array([table.names.index(name) for name in ask.off_target])
    points = mean.point + own[asked] - own[asked].mean()
    scale = math.hypot(mean.scale, residual)
    found = {
        name: Prediction(min(max(float(p), z - 1), z), scale, mean.dof, z - 1, z)
        for name, p, z in zip(ask.off_target, points, ask.off_target_accuracies, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].point))


@dataclass(frozen=True)
class _Drops:
    """What n saved runs lost on T off-target tasks.

    Attributes:
        runs: [n].
        names: [T], those of the runs and of the one that is asked about.
        drops: [n, T] at the end; NaN where a run was not probed on the task.
        accuracy: [T] mean zero-shot accuracy.
        weights: [n] so that the runs of one task under one method weigh 1 together.
        profiles: What `_left_out` has found.
    """

    runs: list[Run]
    names: list[str]
    drops: Floats
    accuracy: Floats
    weights: Floats
    profiles: dict[tuple[str, str], Floats] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, runs: Sequence[Run], ask: Ask) -> _Drops | None:
        """None where the runs are on too few tasks, or nothing is known of those asked about."""
        rows = [run for run in runs if len(run.off_target) > 1]
        if n_tasks(rows) < MIN_TASKS or len(ask.off_target_accuracies) < 2:
            return None
        asked = dict(zip(ask.off_target, ask.off_target_accuracies, strict=True))
        before = [*(r.outcome.off_target_before for r in rows), asked]
        names = sorted(set().union(*before))
        drops = np.array([[r.outcome.drops.get(n, math.nan) for n in names] for r in rows])
        accuracy = np.nanmean([[b.get(n, math.nan) for n in names] for b in before], axis=0)
        cells = Counter((r.outcome.task, r.outcome.method) for r in rows)
        weights = np.array([1 / cells[r.outcome.task, r.outcome.method] for r in rows])
        return cls(rows, names, drops, accuracy, weights)

    @cached_property
    def means(self) -> Floats:
        """[n] mean drop of each run."""
        return np.asarray(np.nanmean(self.drops, axis=1))

    @cached_property
    def spreads(self) -> Floats:
        """[n] standard deviation over the tasks of each run."""
        return np.asarray(np.nanstd(self.drops, axis=1))

    def of_method(self, method: str) -> NDArray[np.bool_]:
        """[n] the method's runs, where they are on tasks enough; else all."""
        own = np.array([run.outcome.method == method for run in self.runs])
        enough = n_tasks([run for run, mine in zip(self.runs, own, strict=True) if mine])
        return own if enough >= MIN_TASKS else np.ones(len(own), bool)

    def profile(self, method: str, without: str | None = None) -> Floats:
        """[T] profiles under a method, from runs on all learnt tasks but one."""
        rows = np.array([run.outcome.task != without for run in self.runs])
        own = rows & self.of_method(method)
        deviations = self.drops - self.means[:, None]
        shared, known = self._ratio(deviations, rows)
        usual = float(np.average(self.spreads[own], weights=self.weights[own]))
        found, _ = self._ratio(deviations, own, _POOLING * usual, shared)
        if known.sum() >= MIN_TASKS and not known.all():
            line = np.polyfit(self.accuracy[known], shared[known], 1)
            found[~known] = np.polyval(line, self.accuracy[~known])
        return found

    def _ratio(
        self,
        deviations: Floats,
        rows: NDArray[np.bool_],
        prior: float = 0.0,
        shared: Floats | float = 0.0,
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """[T] sum of deviations over sum of spreads, 0 without any; and where there are some."""
        weights = np.where(np.isnan(deviations), 0.0, self.weights[:, None]) * rows[:, None]
        over = (weights * self.spreads[:, None]).sum(0)
        total = (weights * np.nan_to_num(deviations)).sum(0) + prior * shared
        return total / np.maximum(over + prior, 1e-9), over > 0

    def spread(self, method: str, mean: float) -> float:
        """Spread over the tasks of a run with this mean forgetting."""
        own = self.of_method(method)
        usual = float(np.average(self.spreads[own], weights=self.weights[own]))
        if np.ptp(self.means[own]) < 1e-6:
            return usual
        line = np.polyfit(self.means[own], self.spreads[own], 1, w=np.sqrt(self.weights[own]))
        return max(float(np.polyval(line, mean)), _LEAST_SPREAD * usual)

    def expected(self, method: str) -> Floats:
        """[n, T] deviations from each run's mean as forecast without its task; NaN: others'."""
        found = np.full_like(self.drops, math.nan)
        own = self.of_method(method)
        for i in np.flatnonzero(own):
            o = self.runs[i].outcome
            found[i] = self.spread(o.method, self.means[i]) * self._left_out(o.method, o.task)
        return found

    def _left_out(self, method: str, task: str) -> Floats:
        key = method, task
        if key not in self.profiles:
            self.profiles[key] = self.profile(method, without=task)
        return self.profiles[key]

    def residual(self, method: str) -> float:
        """Standard deviation of single drops about what the mean of their run makes of them."""
        misses = self.drops - self.means[:, None] - self.expected(method)
        return float(np.sqrt(np.nanmean(misses**2)))

    def weights_at(self, method: str, share: float) -> tuple[float, float, float] | None:
        """α, β and the residual standard deviation at a share of the steps; None without looks."""
        found = {i: drops for i, r in enumerate(self.runs) if (drops := r.drops_at(share))}
        if not found:
            return None
        rows = list(found)
        so_far = np.array(
            [[drops.get(n, math.nan) for n in self.names] for drops in found.values()]
        )
        seen = so_far - np.nanmean(so_far, axis=1, keepdims=True)
        x = np.stack([seen, self.expected(method)[rows]], axis=-1)  # [n, T, 2]
        y = (self.drops - self.means[:, None])[rows]
        good = np.isfinite(x).all(-1) & np.isfinite(y)
        if good.sum() < 2 * MIN_TASKS:
            return None
        (alpha, beta), *_ = np.linalg.lstsq(x[good], y[good], rcond=None)
        misses = y[good] - x[good] @ np.array([alpha, beta])
        return float(alpha), float(beta), float(np.sqrt(np.mean(misses**2)))
