"""A data set of the paper, from the Hub or a mirror -> its training, validation and test tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...data import hub
from ...data.sources import has_class_folders
from ...data.tasks import Task
from .published import MOST_VALIDATION, VALIDATION_SHARE, PaperTask

_SEED = 0


class Part:
    """Some images of a task, as (image, label) pairs.

    Attributes:
        targets: [N] labels.
    """

    def __init__(self, task: Task, positions: list[int]) -> None:
        self._task, self._positions = task, positions
        self.targets = task.labels(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        """The image, maybe encoded, and its class index."""
        return self._task.item(self._positions[position]), self.targets[position]


@dataclass(frozen=True)
class Splits:
    """A data set as the experiment uses it.

    Attributes:
        train: Without the validation cut.
        validation: The cut.
        test: What accuracies are of.
    """

    train: Task
    validation: Task
    test: Task


def read_splits(name: str, about: PaperTask, mirror: Path | None, most_test: int | None) -> Splits:
    """The data set's tasks; it is downloaded unless it is kept or a mirror has it.

    Args:
        name: Of the task.
        about: Of the data set.
        mirror: A folder with folders named like the Hub's data sets; ``None``: the Hub.
        most_test: Test images, at most, balanced over the classes; ``None``: all.

    Raises:
        ValueError: It cannot be had, lacks a split, or its splits have other classes.
    """
    train, test = (_read(name, about, mirror, split) for split in ("train", "test"))
    if train.class_names != test.class_names:
        raise ValueError(
            f"the splits of {about.hub!r} must have the same classes in one order, got "
            f"{len(train.class_names)} in train and {len(test.class_names)} in test"
        )
    order = np.random.default_rng(_SEED).permutation(len(train)).tolist()
    n_cut = max(min(int(VALIDATION_SHARE * len(order)), MOST_VALIDATION), 2)

    def part(task: Task, positions: list[int], size: int | None = None) -> Task:
        return Task(
            name,
            Part(task, positions),
            templates=about.template,
            class_names=[_plain(one, about) for one in task.class_names],
            probe_size=min(size or len(positions), len(positions)),
        )

    return Splits(
        part(train, sorted(order[n_cut:])),
        part(train, sorted(order[:n_cut])),
        part(test, list(range(len(test))), most_test),
    )


def place_of(name: str, mirror: Path | None) -> Path | None:
    """The folder in the mirror that stands for a name on the Hub; None where there is none."""
    found = None if mirror is None else mirror / name
    return found if found is not None and found.is_dir() else None


def _read(name: str, about: PaperTask, mirror: Path | None, split: str) -> Task:
    place = place_of(about.hub, mirror)
    if place is not None and has_class_folders(place / split):
        return Task.from_folder(place / split, name=name)
    config = about.config or None
    loaded = hub.load(place or about.hub, split, config=None if place else config, argument="tasks")
    return Task(name, loaded, label_column=about.label_column)


def _plain(name: str, about: PaperTask) -> str:
    key = "".join(c for c in name.lower() if c.isalpha())
    return about.class_names.get(key, name.replace("_", " "))
