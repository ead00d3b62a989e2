"""What ships: a small CLIP, labelled tasks of real pictures, and runs of it and of others.

The model was trained from scratch on captioned pictures, the tasks hold pictures that it has never
seen; DATA_CARD.md names sources, licences and measured accuracies. Made for examples, tests and
canaries ("does it still know simple pictures?"), *not* for claims about CLIP at scale.

Nothing here touches the network or writes a cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import CLIPModel, CLIPProcessor

    from ..data.tasks import Task
    from ..records.outcomes import Outcome

__all__ = [
    "canaries",
    "load_base_rates",
    "load_dataset",
    "load_model",
    "load_outcomes",
    "load_processor",
    "load_task",
    "model_path",
    "task_names",
    "templates",
]

_FOLDER = Path(__file__).parent
OUTCOMES = _FOLDER / "outcomes.jsonl"
_SPLITS = ("train", "test")
_CANARY_SIZE = 128  # images


def model_path() -> Path:
    """The folder that `from_pretrained` reads: model, tokenizer and image processor."""
    return _FOLDER / "model"


def load_model() -> CLIPModel:
    """The shipped model in float32 on the CPU, in eval mode, as `from_pretrained` leaves it.

    Image input is [N, 3, 48, 48], embeddings have D = 128.
    """
    import torch
    from transformers import CLIPModel

    # Cast afterwards: the keyword for it has another name in transformers 4 and in 5.
    model = CLIPModel.from_pretrained(model_path(), local_files_only=True)
    return cast("CLIPModel", model.to(dtype=torch.float32))


def load_processor() -> CLIPProcessor:
    """The tokenizer and the image processor that belong to the model; needs no torchvision."""
    import transformers
    from transformers import CLIPProcessor, CLIPTokenizer

    # transformers 5 resizes with torchvision where it finds one, which moves pixels a little, and
    # warns where it does not; PIL's class has a name of its own there, and had the plain one in 4.
    pil = "CLIPImageProcessorPil"
    kind = getattr(transformers, pil if hasattr(transformers, pil) else "CLIPImageProcessor")
    tokenizer = CLIPTokenizer.from_pretrained(model_path(), local_files_only=True)
    images = kind.from_pretrained(model_path(), local_files_only=True)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def task_names() -> list[str]:
    """The names of the tasks, in a fixed order.

    Example:
        >>> "handwritten_digits" in task_names()
        True
    """
    return list(_read("tasks.json"))


def templates(name: str) -> list[str]:
    """A task's prompt templates, each with one `{}` for the class name.

    Args:
        name: One of `task_names()`.

    Raises:
        ValueError: `name` is not a task of the sample.

    Example:
        >>> templates("printed_letters")[0].format("B")
        'the letter B'
    """
    return list(_card(name)["templates"])


def load_dataset(name: str, split: str = "test") -> Dataset:
    """A task's labelled pictures: column `image` (48 px), column `label` (a `ClassLabel`).

    Args:
        name: One of `task_names()`.
        split: "train" (to fine-tune on) or "test" (to measure with); the model saw neither.

    Raises:
        ValueError: `name` is not a task of the sample, or `split` is neither of the two.
    """
    _card(name)
    if split not in _SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(_SPLITS)}, got {split!r}")
    import datasets
    import pyarrow.parquet

    # Read as a table: `datasets.load_dataset` would write a copy to the user's cache. The features
    # come back from the schema's metadata.
    table = pyarrow.parquet.read_table(_FOLDER / "tasks" / name / f"{split}.parquet")
    return datasets.Dataset(table)


def load_task(name: str, split: str = "test", probe_size: int | None = None) -> Task:
    """One of the tasks, ready for the guard.

    Args:
        name: One of `task_names()`.
        split: As `load_dataset`.
        probe_size: As `Task`.

    Raises:
        ValueError: As `load_dataset`.
    """
    from ..data.tasks import Task

    return Task(name, load_dataset(name, split), templates=templates(name), probe_size=probe_size)


def canaries(except_for: str, probe_size: int | None = None) -> list[Task]:
    """The canaries but one, as off-target tasks: does the model still know simple pictures?

    The canaries are the thirteen tasks that every saved run was measured on. ``symbol_counts`` came
    later and is none: of its own runs all thirteen are the canaries, of the other runs twelve.

    Args:
        except_for: Name of the task being learnt, which is left out if it is one of the sample.
        probe_size: Images of each task; ``None``: 128, and fewer where the run is short.
    """
    names = [name for name, card in _read("tasks.json").items() if card.get("canary", True)]
    names = [name for name in names if name != except_for]
    if probe_size is not None:
        return [load_task(name, probe_size=probe_size) for name in names]
    return [_first_images(name) for name in names]


def off_target_tasks(task: Task, given: Task | Sequence[Task] | None) -> list[Task]:
    """The off-target tasks that were given, as a list; ``None``: the canaries.

    Raises:
        TypeError: One is not a `Task`.
        ValueError: None were given, and the images of the task are sounds or videos: the shipped
            tasks are pictures.
    """
    from ..data.tasks import as_tasks, check_tasks

    off_target = [] if given is None else as_tasks(given)
    check_tasks(task, off_target)
    if given is not None:
        return off_target
    if (found := task.kind()) != "image":
        raise ValueError(
            f"`off_target` must be given for a task of {found}s, got None: the shipped tasks are "
            "pictures; pass tasks of your own, or [] to measure the gain only"
        )
    return canaries(except_for=task.name)


def _first_images(name: str) -> Task:
    """A task of `_CANARY_SIZE` images."""
    from ..data.tasks import Task

    whole = load_task(name)
    few = whole.subset(_CANARY_SIZE)
    return Task(name, load_dataset(name).select(few), templates=templates(name))


def load_outcomes() -> list[Outcome]:
    """The saved runs of the shipped model: what `examples/study/run.py` wrote."""
    from ..records.store import read_outcomes

    return read_outcomes(OUTCOMES)


def load_base_rates() -> list[Outcome]:
    """Published fine-tunes of CLIP ViT-B/32, B/16 and L/14: full, LoRA and linearized LoRA.

    They say what is usual before anything was run here, have no IIMM, and are *not* runs of your
    recipe; ``base_rates/SOURCE.md`` names where they come from. Of the eight tasks that were tested
    crosswise each outcome has the other seven as off-target tasks; the twelve others (``"full"``
    only) have none. Nine tasks have the published accuracy of a linear probe on all training images
    beside them. Their `model_fingerprint` is ``"published:<model>"``, so none is taken for a run of
    your model.

    Returns:
        76 outcomes, all with a `source`.
    """
    from ..records.outcomes import Outcome

    data, probes = _read("base_rates/clip.json"), _read("base_rates/linear_probes.json")["models"]
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


def _fractions(tasks: Iterable[str], percents: Iterable[float]) -> dict[str, float]:
    # 28.3 / 100 is 0.28300000000000003
    return {task: round(p / 100, 6) for task, p in zip(tasks, percents, strict=True)}


def _read(file: str) -> Any:
    return json.loads((_FOLDER / file).read_text(encoding="utf-8"))


def _card(name: str) -> dict[str, Any]:
    cards = _read("tasks.json")
    if name not in cards:
        choices = ", ".join(cards)
        raise ValueError(f"`name` must be a task of the sample, one of {choices}; got {name!r}")
    return cast("dict[str, Any]", cards[name])
