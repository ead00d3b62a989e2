"""Published fine-tunes of CLIP: their accuracies, as outcomes without an IIMM.

They say what is usual before anything was run here, and are *not* runs of your recipe; SOURCE.md
names where they come from. Nothing here touches the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...records.outcomes import Outcome

__all__ = ["load_base_rates"]

_FOLDER = Path(__file__).parent


def load_base_rates() -> list[Outcome]:
    """Published fine-tunes of CLIP ViT-B/32, B/16 and L/14: full, LoRA and linearized LoRA.

    Of the eight tasks that were tested crosswise each outcome has the other seven as off-target
    tasks; the twelve others (``"full"`` only) have none. Nine tasks have the published accuracy of
    a linear probe on all training images beside them. Their `model_fingerprint` is
    ``"published:<model>"``, so none is taken for a run of your model.

    Returns:
        76 outcomes, all with a `source`.
    """
    data = json.loads((_FOLDER / "clip.json").read_text(encoding="utf-8"))
    probes = json.loads((_FOLDER / "linear_probes.json").read_text(encoding="utf-8"))["models"]
    twenty = {
        table["model"]: dict(zip(table["columns"], table["pre_trained"], strict=True))
        for table in data["twenty_tasks"]
    }
    outcomes = []
    for table in data["matrices"]:
        tasks = [data["task_names"][column] for column in table["columns"]]
        before = table["pre_trained"]
        if before is None:  # the published table of B/16 has no such row
            before = [twenty[table["model"]][task] for task in tasks]
        for row in table["fine_tuned"]:
            after = dict(zip(tasks, table["fine_tuned"][row], strict=True))
            task = data["task_names"][row]
            outcomes.append(
                _outcome(data, probes, table, task, dict(zip(tasks, before, strict=True)), after)
            )
    crosswise = set(data["task_names"].values())
    for table in data["twenty_tasks"]:
        for task, before, after in zip(
            table["columns"], table["pre_trained"], table["fine_tuned"], strict=True
        ):
            if task not in crosswise:
                outcomes.append(_outcome(data, probes, table, task, {task: before}, {task: after}))
    return outcomes


def _outcome(
    data: dict[str, Any],
    probes: dict[str, dict[str, float]],
    table: dict[str, Any],
    task: str,
    before: dict[str, float],
    after: dict[str, float],
) -> Outcome:
    from ...records.outcomes import Outcome

    probe = probes[table["model"]].get(task)
    return Outcome(
        model=table["model"],
        model_fingerprint=f"published:{table['model']}",
        method=table["method"],
        task=task,
        task_fingerprint="",
        iimm=None,
        inter=None,
        intra=None,
        standard_error=None,
        n_images=None,
        n_classes=None,
        zero_shot_accuracy=_fraction(before[task]),
        final_accuracy=_fraction(after[task]),
        off_target_before={name: _fraction(v) for name, v in before.items() if name != task},
        off_target_after={name: _fraction(v) for name, v in after.items() if name != task},
        recipe=dict(data["recipes"][table["recipe"]]),
        source=data["source"],
        linear_probe_accuracy=None if probe is None else _fraction(probe),
    )


def _fraction(percent: float) -> float:
    return round(percent / 100, 6)  # 28.3 / 100 is 0.28300000000000003
