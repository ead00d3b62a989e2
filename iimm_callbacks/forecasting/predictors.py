"""What a run's end is predicted from: the candidates before training and during it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .candidates import Candidate

MEAN = Candidate("mean")
ZERO_SHOT = Candidate("zero-shot error", ("zero_shot_error",))
_OVER_ERROR = {"gain": "zero_shot_error"}  # the paper's target; forgetting is taken as it is
# Quantity -> the pooled forecast as it is. What that of the gain rests on was learnt on other tasks
# and models too: ahead of what this record suggests.
_BY_ERROR = Candidate(
    "zero-shot error, pooled", offset="pooled", intercept=False, learnt_elsewhere=True
)
POOLED = {
    "gain": replace(_BY_ERROR, name="linear probe, pooled", credit=4.0),
    "forgetting": _BY_ERROR,
    "worst": _BY_ERROR,
}
RECIPE = ("log_learning_rate", "log_steps")


def before_training(quantity: str, features: Mapping[str, Any]) -> list[Candidate]:
    """The candidates for the end of a run, from what is known before it, nested.

    Args:
        quantity: "gain", "forgetting" or "worst"; gain is fitted over zero-shot error too.
        features: Those of the table: the recipe's are used where they differ between runs.
    """
    over_error = _OVER_ERROR.get(quantity)
    nested = [MEAN, ZERO_SHOT]
    if over_error:
        nested.append(Candidate("mean gain over zero-shot error", times=over_error))
    nested += [
        Candidate("IIMM", ("iimm",), times=over_error),
        Candidate("both terms of IIMM", ("inter", "intra"), times=over_error),
        Candidate("zero-shot error and IIMM", ("zero_shot_error", "iimm")),
        Candidate("other runs of the same task", ("same_task",)),
    ]
    if recipe := _varied_recipe(features):
        nested += [
            replace(c, name=f"{c.name} + recipe", features=(*c.features, *recipe)) for c in nested
        ]
    found = [*nested, *(replace(c, pooled=True) for c in nested)]
    return [POOLED[quantity], *found]


def during_training(features: Mapping[str, Any]) -> list[Candidate]:
    """The candidates for the end of a run, from what was seen of it so far.

    The forecast before training enters as it is, without a slope.

    Left-out forecasts of the saved runs are built from each other's ends (those of the plain
    mean exactly so), and a line on them would find that.
    """
    so_far = "what was seen so far"
    nested = [
        Candidate(f"{so_far} and the mean rest", offset="so_far"),
        Candidate(f"line on {so_far}", ("so_far",)),
    ]
    more = [
        (("zero_shot_error",), "zero-shot error"),
        (("iimm",), "IIMM"),
        (("probe_gain",), "linear probe"),
        (("gain_so_far",), "gain so far"),
        (("mean_so_far",), "mean forgetting so far"),
        (_varied_recipe(features), "recipe"),
    ]
    nested += [
        Candidate(f"line on {so_far} and {name}", ("so_far", *added))
        for added, name in more
        if added
    ]
    return [
        Candidate("forecast before training", offset="prior", intercept=False),
        Candidate(so_far, offset="so_far", intercept=False),
        *nested,
        *(replace(c, pooled=True) for c in nested),
    ]


def _varied_recipe(features: Mapping[str, Any]) -> tuple[str, ...]:
    """The recipe's features that differ between the saved runs."""
    return tuple(n for n in RECIPE if n in features and np.ptp(features[n]) > 1e-9)
