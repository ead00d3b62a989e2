"""From the untouched to the fine-tuned model: what each mix gains and forgets, and which to take.

Pure functions of which images each mix has right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..measures.accuracy import forgetting, paired_drop
from ..records.look import Look
from ..records.verdict import Limits

_FOLDS = 10
_ROUNDING = 1e-9  # of a mean of fractions


@dataclass(frozen=True)
class Mix:
    """What a mix of untouched and fine-tuned weights gains and forgets. Fractions.

    Attributes:
        alpha: Share of the fine-tuned weights, in [0, 1].
        accuracy: Zero-shot accuracy on the task.
        gain: That minus the untouched model's; `gain_se` is its paired standard error.
        forgetting: Mean drop of off-target accuracy, positive is loss; `forgetting_se` likewise.
        worst: Drop of the worst off-target task, `worst_task`; `worst_se` likewise.
        inside: Whether the limit on mean or worst forgetting is kept by what was observed.
    """

    alpha: float
    accuracy: float
    gain: float
    gain_se: float
    forgetting: float
    forgetting_se: float
    worst: float
    worst_se: float
    worst_task: str
    inside: bool


def choose(mixes: Sequence[Mix], limits: Limits) -> tuple[float, str]:
    """The mix with the most gain among those inside the limit; of equals the smaller α.

    Args:
        mixes: The curve; that of α = 0 among them.
        limits: Told in the reason.

    Returns:
        α, and why in words.
    """
    inside = [mix for mix in mixes if mix.inside]
    best = min(inside, key=lambda mix: (-mix.gain, mix.alpha))
    limit = f"{100 * (limits.max_forgetting or 0):.1f} points of {limits.limit_on} forgetting"
    if best.alpha == 0:
        return 0.0, f"no mix gains anything within {limit}: only the untouched model is left"
    if best.alpha == 1:
        return 1.0, f"the fine-tuned model is within {limit}, and no mix gains more"
    kept = f"{len(inside)} of {len(mixes)} mixes are within {limit}"
    return best.alpha, f"{kept}; of these it gains most"


def measure_mixes(looks: Mapping[float, Look], limits: Limits) -> list[Mix]:
    """The row of each mix.

    Args:
        looks: α -> what was seen of that mix; 0 among them.
        limits: What `inside` is judged by.
    """
    before = looks[0].correct
    return [_mix(alpha, before, look.correct, limits) for alpha, look in looks.items()]


def held_out(looks: Mapping[float, Look], limits: Limits) -> Mix:
    """The result of choosing, on held-out images, by ten-fold cross-validation.

    Args:
        looks: As `measure_mixes`.
        limits: The limit chosen under.

    Returns:
        Each image counts as the mix has it that the other folds' images choose.
    """
    before = looks[0].correct
    after = {name: bits.copy() for name, bits in before.items()}
    # The probe's order is random: every tenth image is a fair sample.
    folds = {name: np.arange(len(bits)) % _FOLDS for name, bits in before.items()}
    chosen = []
    for fold in range(_FOLDS):
        others = {
            alpha: replace(
                look, correct={n: bits[folds[n] != fold] for n, bits in look.correct.items()}
            )
            for alpha, look in looks.items()
        }
        alpha, _ = choose(measure_mixes(others, limits), limits)
        chosen.append(alpha)
        for name, bits in after.items():
            here = folds[name] == fold
            bits[here] = looks[alpha].correct[name][here]
    return _mix(float(np.mean(chosen)), before, after, limits)


def _mix(
    alpha: float,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    limits: Limits,
) -> Mix:
    task, *off_target = before
    gain = paired_drop(before[task], after[task])
    drops = forgetting({n: before[n] for n in off_target}, {n: after[n] for n in off_target})
    judged = drops.mean if limits.limit_on == "mean" else drops.worst
    return Mix(
        alpha=alpha,
        accuracy=float(after[task].mean()),
        gain=0.0 - gain.value,  # never -0.0
        gain_se=gain.standard_error,
        forgetting=drops.mean.value,
        forgetting_se=drops.mean.standard_error,
        worst=drops.worst.value,
        worst_se=drops.worst.standard_error,
        worst_task=drops.worst_task,
        inside=judged.value <= (limits.max_forgetting or 0) + _ROUNDING,
    )
