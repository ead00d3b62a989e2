"""Published fine-tunes of CLIP: their accuracies, as outcomes without an IIMM.

They say what is usual before anything was run here, and are *not* runs of your recipe; SOURCE.md
names where they come from. Nothing here touches the network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...records.outcomes import Outcome

__all__ = ["load_base_rates"]


def load_base_rates() -> list[Outcome]:
    """Published fine-tunes of CLIP ViT-B/32, B/16 and L/14: full, LoRA and linearized LoRA.

    Of the eight tasks that were tested crosswise each outcome has the other seven as off-target
    tasks; the twelve others (``"full"`` only) have none. Nine tasks have the published accuracy of
    a linear probe on all training images beside them. Their `model_fingerprint` is
    ``"published:<model>"``, so none is taken for a run of your model.

    Returns:
        76 outcomes, all with a `source`.
    """
    data, probes = _read("clip.json"), _read("linear_probes.json")["models"]
    names = data["task_names"]
    probed = {model: _fractions(table, table.values()) for model, table in probes.items()}
    twenty = {
        table["model"]: _fractions(table["columns"], table["pre_trained"])
        for table in data["twenty_tasks"]
    }
    found = []  # table, task, accuracies before and after
    for table in data["matrices"]:
        tasks = [names[column] for column in table["columns"]]
        before = {task: twenty[table["model"]][task] for task in tasks}
        if table["pre_trained"] is not None:  # the published table of B/16 has no such row
            before = _fractions(tasks, table["pre_trained"])
        for row, after in table["fine_tuned"].items():
            found.append((table, names[row], before, _fractions(tasks, after)))
    for table in data["twenty_tasks"]:
        before, after = (
            _fractions(table["columns"], table[k]) for k in ("pre_trained", "fine_tuned")
        )
        for task in before:
            if task not in names.values():
                found.append((table, task, {task: before[task]}, {task: after[task]}))
    return [
        Outcome(
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
            zero_shot_accuracy=before[task],
            final_accuracy=after[task],
            off_target_before={name: v for name, v in before.items() if name != task},
            off_target_after={name: v for name, v in after.items() if name != task},
            recipe=dict(data["recipes"][table["recipe"]]),
            source=data["source"],
            linear_probe_accuracy=probed[table["model"]].get(task),
        )
        for table, task, before, after in found
    ]


def _read(name: str) -> Any:
    return json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _fractions(tasks: Iterable[str], percents: Iterable[float]) -> dict[str, float]:
    # 28.3 / 100 is 0.28300000000000003
    return {task: round(p / 100, 6) for task, p in zip(tasks, percents, strict=True)}
