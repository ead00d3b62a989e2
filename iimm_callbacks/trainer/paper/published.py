"""What the paper used and what it found, as far as that is known; its data sets, read.

Models, prompts, validation cut and optimizer are those of its authors' code (mit-ll/IIMM, MIT
licence), the values those of a third-party note on the paper. What neither says is a choice of
ours, in `CHOICES`. No slope and no intercept is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...data import hub
from ...data.sources import has_class_folders
from ...data.tasks import Task

EPOCHS = 30
BATCH_SIZE = 128
RATES = (1e-2, 1e-3, 1e-4, 1e-5)
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
METHODS: dict[str, dict[str, int]] = {  # and the options of `models.tuning.prepare`
    "full": {},
    "bitfit": {},
    "attention": {},
    "lora": {"rank": 16},
    "clip_adapter": {"reduction": 4},
}
VALIDATION_SHARE, MOST_VALIDATION, _CUT_SEED = 0.1, 5000, 0

CHOICES = (
    "The nine data sets are those of the authors' code that are not for evaluation only, without "
    "ImageNet, STL10 and fMoW.",
    "They come from the Hub, with its splits: EuroSAT's are not the authors' draw.",
    "Class names are those of the Hub's data set, _ as a space; EuroSAT's are CLIP's.",
    "The validation cut is a seeded tenth of the training images, 5,000 at most.",
    "Of each run the epoch of best validation accuracy counts, and of the learning rates the run.",
    "IIMM, its terms and the transfer scores are of the training images without the cut.",
    "EMMS embeds labels by the model's own text encoder, the prompts of a class averaged; its "
    "authors take several large encoders, the paper does not say which.",
    "LoRA has rank 16 on the attention of both towers; CLIP-Adapter reduces by 4.",
    "Training is in bfloat16 where the GPU has it; the authors' is in float16. The learning rate "
    "stays as it is.",
    "The published values are taken to be of full fine-tuning, Kendall's tau without weights.",
    "A task with a zero-shot accuracy above 0.95 has no gain over zero-shot error: left out.",
)


@dataclass(frozen=True)
class PaperModel:
    """One of the four models.

    Attributes:
        title: For people.
        source: As `iimm` takes it for MODEL.
        hub: Where its weights are on the Hub; a mirror has a folder of this name.
    """

    title: str
    source: str
    hub: str


@dataclass(frozen=True)
class PaperTask:
    """One of the nine data sets.

    Attributes:
        hub: Name on the Hub; a mirror has a folder of this name.
        template: The prompt.
        n_train, n_test: Images, about.
        config: Of the data set.
        label_column: Where there is a choice.
        class_names: The data set's name of a class, in lower case without spaces -> the prompt's.
    """

    hub: str
    template: str
    n_train: int
    n_test: int
    config: str = ""
    label_column: str | None = None
    class_names: Mapping[str, str] = field(default_factory=dict)


MODELS = {
    "clip": PaperModel(
        "CLIP ViT-B/32", "open_clip:ViT-B-32:openai", "timm/vit_base_patch32_clip_224.openai"
    ),
    "siglip": PaperModel(
        "SigLIP ViT-B/16", "open_clip:hf-hub:timm/ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP"
    ),
    "coca": PaperModel(
        "CoCa ViT-B/32",
        "open_clip:coca_ViT-B-32:laion2b_s13b_b90k",
        "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    ),
    "eva02": PaperModel(
        "EVA-02-CLIP B/16",
        "open_clip:EVA02-B-16:merged2b_s8b_b131k",
        "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
    ),
}

_DIGIT = 'a photo of the number: "{}"'
_EUROSAT = {
    "annualcrop": "annual crop land",
    "herbaceousvegetation": "brushland or shrubland",
    "highway": "highway or road",
    "industrial": "industrial buildings or commercial buildings",
    "industrialarea": "industrial buildings or commercial buildings",
    "pasture": "pasture land",
    "permanentcrop": "permanent crop land",
    "residential": "residential buildings or homes or apartments",
    "residentialarea": "residential buildings or homes or apartments",
    "sealake": "lake or sea",
}
TASKS = {
    "cars": PaperTask("tanganke/stanford_cars", "a photo of a {}", 8144, 8041),
    "cifar100": PaperTask(
        "uoft-cs/cifar100", "a photo of a {}", 50000, 10000, label_column="fine_label"
    ),
    "dtd": PaperTask("tanganke/dtd", "a photo of a {} texture", 3760, 1880),
    "eurosat": PaperTask(
        "tanganke/eurosat", "a centered satellite photo of a {}", 21600, 2700, class_names=_EUROSAT
    ),
    "gtsrb": PaperTask("tanganke/gtsrb", 'a photo of a "{}" traffic sign', 26640, 12630),
    "mnist": PaperTask("ylecun/mnist", _DIGIT, 60000, 10000),
    "resisc45": PaperTask("tanganke/resisc45", "satellite imagery of {}", 18900, 6300),
    "sun397": PaperTask("tanganke/sun397", "a photo of a {}", 19850, 19850),
    "svhn": PaperTask("ufldl-stanford/svhn", _DIGIT, 73257, 26032, config="cropped_digits"),
}


_VALUES = {  # statistic, of the predictor and the gain over zero-shot error -> model -> value
    ("r2", "iimm"): {"coca": 0.92, "eva02": 0.89, "clip": 0.92, "siglip": 0.92},
    ("r2", "intra"): {"coca": 0.88, "clip": 0.81, "siglip": 0.88},
    ("r2", "inter"): {"coca": 0.82, "clip": 0.62, "siglip": 0.80},
    ("r2", "text_text"): {"coca": 0.37, "clip": 0.57, "siglip": 0.17},
    ("tau", "iimm"): {"coca": 0.89, "eva02": 0.83, "clip": 0.78, "siglip": 0.78},
    ("tau", "gbc"): {"coca": 0.78, "eva02": 0.72, "clip": 0.78, "siglip": 0.83},
    ("tau", "transrate"): {"coca": 0.67, "eva02": 0.61, "clip": 0.67, "siglip": 0.72},
    ("tau", "emms"): {"coca": 0.61, "eva02": 0.28, "clip": 0.61, "siglip": 0.44},
    ("tau", "h_score"): {"coca": 0.11, "eva02": -0.78, "clip": 0.50, "siglip": -0.67},
}
# (model, statistic, predictor of `results.PREDICTORS`) -> what is published, under full
# fine-tuning over the nine tasks.
CLAIMS = {
    (model, *of): values[model]
    for model in MODELS
    for of, values in _VALUES.items()
    if model in values
}


class _Images:
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
    order = np.random.default_rng(_CUT_SEED).permutation(len(train)).tolist()
    n_cut = max(min(int(VALIDATION_SHARE * len(order)), MOST_VALIDATION), 2)

    def part(task: Task, positions: list[int], size: int | None = None) -> Task:
        return Task(
            name,
            _Images(task, positions),
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
