"""A fine-tuned model that forgot too much -> the mix with the untouched one that gains most."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.metrics import check_by_images
from ..data.tasks import Task, check_tasks
from ..measures.results import forgetting, paired_drop
from ..models.encoders import EncodePair
from ..models.untouched import load_untouched
from ..probing import ranks
from ..probing.probe import Probe
from ..records.look import Look
from ..records.verdict import Limits
from .counterparts import Kept, save_weights
from .mixing import Mixture

ALPHAS = tuple(i / 10 for i in range(11))
_FOLDS = 10
_ROUNDING = 1e-9  # of a mean of fractions
_CHANGED = 0.02  # share of the images that two looks at one model may tell apart

Untouched = nn.Module | Mapping[str, Tensor] | Kept | str | Path | Callable[[], nn.Module] | None


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


@dataclass(frozen=True)
class Rescue:
    """The curve from the untouched to the fine-tuned model, and what was chosen on it.

    Attributes:
        mixes: By rising α; the first is the untouched model, the last the fine-tuned one.
        alpha: The α chosen.
        reason: Why, in words.
        held_out: What choosing in this way is worth on images that had no part in it: of each
            tenth of the probe's images the mix that the other nine tenths would choose; its
            `alpha` is the mean of theirs. **The chosen row of `mixes` flatters**, because it was
            chosen for its numbers on those images.
        limits: The limit chosen under.
        n_tensors: How many weights were mixed.
        applied: Whether the model was left with the mix chosen.
        notes: What a reader should know, in words.
        runtime: Seconds.
    """

    mixes: tuple[Mix, ...]
    alpha: float
    reason: str
    held_out: Mix
    limits: Limits
    n_tensors: int
    applied: bool
    notes: tuple[str, ...]
    runtime: float

    @property
    def chosen(self) -> Mix:
        """The mix chosen."""
        return next(mix for mix in self.mixes if mix.alpha == self.alpha)

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, for `reports.tables` and a run file."""
        return asdict(self) | {"mixes": [asdict(m) for m in self.mixes], "notes": list(self.notes)}


def rescue(
    model: nn.Module,
    base: Untouched,
    task: Task,
    off_target: Sequence[Task] | None = None,
    limits: Limits | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    processor: Any = None,
    encode: EncodePair | None = None,
    batch_size: int = 64,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
    apply: bool = True,
) -> Rescue:
    """Mix a fine-tuned model with the untouched one: as much gain as the limit allows.

    ``θ(α) = (1 - α) θ_base + α θ_tuned`` (WiSE-FT arXiv 2109.01903, PAINT arXiv 2208.05592) is
    measured on the task and the off-target tasks for every α; of the mixes whose observed
    forgetting is within the limit the one with the most gain is chosen, the smaller α of equals.
    α = 0 forgets nothing, so there always is one. Adapters are scaled, see `mixing.Mixture`.

    The choice is made on the images that it is reported on, and the best of eleven noisy numbers
    is too good by part of its noise: quote `Rescue.held_out`. That, too, is of the probe's images;
    standard errors say how far others may differ. It is no test of other off-target tasks.

    Mixes are measured one after the other, in the model itself. If anything fails, on any rank, its
    weights are bit for bit what they were. Of several ranks all must call it; all choose the same.

    Args:
        model: The fine-tuned model, as it trains: bare, wrapped or under peft.
        base: The model before fine-tuning, a state dict of it, its Hub name or folder, or a
            function that returns it; ``None`` where adapters of peft or a CLIP-Adapter are all
            that was tuned.
        task: What was learnt. Give it images that were not trained on.
        off_target: What must not be forgotten. ``None``: the shipped sample tasks, as canaries.
        limits: How much forgetting is too much; its `confidence` plays no part.
        alphas: Which mixes to measure, in [0, 1]; 0 and 1 always are. A finer grid than the
            default tells apart what its standard errors do not.
        processor: See `encoders.find_encoder`.
        encode: See `encoders.find_encoder`.
        batch_size: Images in one forward pass.
        autocast_dtype: See `Probe.look`.
        progress: See `Probe`.
        apply: Leave the model with the mix chosen; otherwise as it was.

    Returns:
        The curve and the choice.

    Raises:
        OSError: There is no `base` of that name.
        TypeError: `base`, or a task, is of another type.
        ValueError: Two tasks have one name, one of `off_target` is the task, a task has a metric
            other than accuracy and recall@k, an α is out of range, there is no limit or no
            off-target task to choose by, the model cannot be measured, or `base` is not the model
            before fine-tuning; and for what cannot be mixed, see `mixing.Mixture`.
        RuntimeError: Another rank failed.
    """
    from ..sample import off_target_tasks

    off_target = off_target_tasks(task, off_target)
    check_tasks(task, off_target)
    probe = Probe(
        task,
        off_target,
        processor=processor,
        encode=encode,
        batch_size=batch_size,
        progress=progress,
    )
    return sweep(
        model, base, probe, limits, alphas=alphas, autocast_dtype=autocast_dtype, apply=apply
    )


def sweep(
    model: nn.Module,
    base: Untouched,
    probe: Probe,
    limits: Limits | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    autocast_dtype: torch.dtype | None = None,
    baseline: Look | None = None,
    keep_tuned: Path | None = None,
    apply: bool = True,
) -> Rescue:
    """`rescue` with an existing probe.

    Args:
        model: As `rescue`.
        base: As `rescue`.
        probe: Shows the images; what it has preprocessed is used again.
        limits: As `rescue`.
        alphas: As `rescue`.
        autocast_dtype: As `rescue`.
        baseline: What this probe saw of the untouched model before training; checked to be what
            it sees at α = 0.
        keep_tuned: File of safetensors for the fine-tuned values of all that the mix chosen
            changes; ``model.load_state_dict(load_file(path), strict=False)`` brings them back.
        apply: As `rescue`.

    Raises:
        OSError: `keep_tuned` cannot be written.
        ValueError: As `rescue`; and `base` is not the model of `baseline`.
    """
    limits, start = limits or Limits(), time.perf_counter()
    grid = _grid(alphas)
    _check_choice(limits, probe)
    mixture = ranks.together(lambda: Mixture(model, _load(base)))
    probe.prepare(model)
    final = 1.0
    try:
        looks = {}
        silent = None if probe.progress else True
        for alpha in tqdm(grid, desc="mixes", unit="mix", disable=silent, leave=False):
            ranks.together(partial(mixture.set, alpha))
            looks[alpha] = probe.look(model, 0, autocast_dtype)
            if alpha == 0 and baseline is not None:
                _check_same(looks[alpha], baseline)
        mixes, honest = tuple(measure_mixes(looks, limits)), held_out(looks, limits)
        alpha, reason = choose(mixes, limits)
        if apply and alpha < 1 and keep_tuned is not None:
            path = keep_tuned
            ranks.from_first(lambda: save_weights(mixture.tuned_weights(), path))
        final = alpha if apply else 1.0
    finally:
        mixture.set(final)
    notes, runtime = tuple(mixture.notes), time.perf_counter() - start
    return Rescue(mixes, alpha, reason, honest, limits, mixture.n_tensors, apply, notes, runtime)


def _check_choice(limits: Limits, probe: Probe) -> None:
    check_by_images([probe.task, *probe.off_target])
    if limits.max_forgetting is None or not probe.off_target:
        missing = "`max_forgetting`" if limits.max_forgetting is None else "off-target task"
        raise ValueError(
            f"`limits` and `off_target` must give a limit to keep to, got no {missing}"
        )


def _grid(alphas: Sequence[float]) -> list[float]:
    for alpha in alphas:
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"`alphas` must be numbers in [0, 1], got {alpha!r}")
    return sorted({0.0, 1.0, *map(float, alphas)})


def _load(base: Untouched) -> nn.Module | Mapping[str, Tensor] | Kept | None:
    if isinstance(base, str | Path) or (callable(base) and not isinstance(base, nn.Module)):
        return load_untouched(base, nn.Linear(1, 1))  # on the CPU: the device holds one model
    return base


def _check_same(look: Look, baseline: Look) -> None:
    for task, bits in look.correct.items():
        changed = float((bits != baseline.correct[task]).mean())
        if changed > _CHANGED:
            raise ValueError(
                "`base` must be the model that was measured before training, but it has other "
                f"answers to {changed:.0%} of the images of {task!r}; give that one"
            )


# --- pure functions of which images each mix has right ---


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
    return [_mix(a, looks[0].correct, look.correct, limits) for a, look in looks.items()]


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
    alpha: float, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], limits: Limits
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
