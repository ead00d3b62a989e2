"""Saved runs -> which of them to look at: doubles, contradictions, implausible and far-off ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, TypeVar

from .outcomes import Outcome

_T = TypeVar("_T")
_APART = 0.02  # zero-shot accuracies, or IIMM, of one model on the same images
_LEAST_IMAGES = 50
_FEWEST = 8  # runs that tell what is usual
_FAR, _LEAST_FAR = 6.0, 0.2  # median absolute deviations, and a fraction


def doubts(outcomes: Iterable[Outcome]) -> list[str]:
    """What seems wrong with saved runs, in words; a reason to look, not a proof.

    - a run that is there twice, or twice with other results;
    - one model with two zero-shot accuracies on the same images, prompts and preprocessing, or two
      values of IIMM: see `contradicted`;
    - an accuracy of less than half of chance, on 50 images or more;
    - forgetting more than six median absolute deviations, and 20 points, from the median of eight
      or more complete runs of the model by the method; gain likewise, of those on the same task,
      as tasks differ in what there is to gain;
    - how many have a linear probe of the former form.

    Args:
        outcomes: As `read_outcomes` returns them.

    Returns:
        A line for each, in the order of the rules; each names runs as ``task, method (run)``.
    """
    runs = list(outcomes)
    rules = (_doubles, _contradictions, _implausible, _far_off, _former_probes)
    return [line for rule in rules for line in rule(runs)]


def _name(o: Outcome) -> str:
    return f"{o.model:.60}: {o.task:.60}, {o.method:.60} ({o.run or 'run unknown':.60})"


def _doubles(runs: Sequence[Outcome]) -> list[str]:
    told = []
    for same in _grouped(runs, lambda o: o.complete and o.run):
        if len(same) > 1:
            differ = any(_content(o) != _content(same[0]) for o in same)
            told.append(
                f"{_name(same[0])}: there {len(same)} times"
                f"{', with other results; the last one counts' if differ else ''}"
            )
    return told


def _grouped(items: Iterable[_T], key: Callable[[_T], Any]) -> Iterable[list[_T]]:
    """The items of each key, without those whose key is unknown."""
    found: dict[Any, list[_T]] = defaultdict(list)
    for item in items:
        if known := key(item):
            found[known].append(item)
    return found.values()


def _start(o: Outcome) -> Any:
    """What runs of one model on the same images have in common."""
    return o.model_fingerprint and o.task_fingerprint and (o.model_fingerprint, o.task_fingerprint)


def _content(o: Outcome) -> dict[str, Any]:
    return asdict(o) | {"provenance": None, "versions": None}


def contradicted(runs: Sequence[Outcome]) -> dict[int, str]:
    """Runs whose start is not that of most other runs of the model on the same images.

    Zero-shot accuracy and IIMM of an untouched model are the same in each of its runs on a task, so
    one that differs from most by more than 0.02 is of something else: another model, other images,
    or a slip of the pen. How a run *ended* contradicts nothing: one that forgets far more than all
    others is what a forecast has to learn from.

    Args:
        runs: Saved runs.

    Returns:
        Position in `runs` -> what contradicts, in words.
    """
    told: dict[int, str] = {}
    for same in _grouped(range(len(runs)), lambda i: _start(runs[i])):
        for word, field in (("zero-shot accuracy", "zero_shot_accuracy"), ("IIMM", "iimm")):
            known = {i: v for i in same if (v := getattr(runs[i], field)) is not None}
            usual = median(known.values()) if known else 0.0
            apart = [i for i, value in known.items() if abs(value - usual) > _APART]
            if apart and 2 * len(apart) < len(known):
                n = len(known) - len(apart)
                told |= {
                    i: f"{word} {known[i]:.3f}, where {n} other runs of the model on the same "
                    f"images have {usual:.3f}"
                    for i in apart
                }
    return told


def _contradictions(runs: Sequence[Outcome]) -> list[str]:
    left_out = contradicted(runs)
    told = [f"{_name(runs[i])}: {why}; forecasts leave it out" for i, why in left_out.items()]
    for same in _grouped((o for i, o in enumerate(runs) if i not in left_out), _start):
        low, high = (pick(same, key=lambda o: o.zero_shot_accuracy) for pick in (min, max))
        if high.zero_shot_accuracy - low.zero_shot_accuracy > _APART:
            told.append(
                f"{_name(low)} and {_name(high)}: the same model and images, but zero-shot "
                f"accuracies of {low.zero_shot_accuracy:.3f} and {high.zero_shot_accuracy:.3f}"
            )
    return told


def _implausible(runs: Sequence[Outcome]) -> list[str]:
    told = []
    for o in runs:
        if not o.n_classes or not o.n_images or o.n_images < _LEAST_IMAGES:
            continue
        for when, value in (("zero-shot", o.zero_shot_accuracy), ("final", o.final_accuracy)):
            if value < 0.5 / o.n_classes:
                told.append(
                    f"{_name(o)}: {when} accuracy {value:.3f}, less than half of chance with "
                    f"{o.n_classes} classes"
                )
    return told


def _far_off(runs: Sequence[Outcome]) -> list[str]:
    complete = [o for o in runs if o.complete]
    by_task = _grouped(complete, lambda o: (o.model_fingerprint, o.method, o.task))
    by_method = _grouped(complete, lambda o: (o.model_fingerprint, o.method))
    found = [line for same in by_task for line in _outliers(same, "gain")]
    return found + [line for same in by_method for line in _outliers(same, "forgetting")]


def _outliers(same: Sequence[Outcome], quantity: str) -> list[str]:
    known = [(o, v) for o in same if (v := getattr(o, quantity)) is not None]
    if len(known) < _FEWEST:
        return []
    middle = median(value for _, value in known)
    far = max(_FAR * median(abs(value - middle) for _, value in known), _LEAST_FAR)
    return [
        f"{_name(o)}: {quantity} {100 * value:+.1f} points, where the median of {len(known)} runs "
        f"like it is {100 * middle:+.1f}"
        for o, value in known
        if abs(value - middle) > far
    ]


def _former_probes(runs: Sequence[Outcome]) -> list[str]:
    n = sum(o.linear_probe_form == "probabilities" for o in runs)
    if not n:
        return []
    return [
        f"{n} of {len(runs)} runs have the linear probe in its former form (schema 1), some points "
        "off the present one; forecasts use it as it is, which is better than to do without"
    ]
