"""What the paper used and what it found, as far as that is known.

Models, prompts, validation cut and optimizer are those of its authors' code (mit-ll/IIMM, MIT
licence), the values those of a third-party note on the paper. What neither says is a choice of
ours, in `CHOICES`. No slope and no intercept is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
VALIDATION_SHARE, MOST_VALIDATION = 0.1, 5000

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


@dataclass(frozen=True)
class Claim:
    """A published value of one model, under full fine-tuning, over the nine tasks.

    Attributes:
        statistic: ``"r2"`` or ``"tau"``, of the predictor and the gain over zero-shot error.
        predictor: As `results.PREDICTORS`.
        value: The published one.
    """

    statistic: str
    predictor: str
    value: float


def _claims(model: str, **columns: Mapping[str, float]) -> tuple[Claim, ...]:
    return tuple(
        Claim(column.split("__")[0], column.split("__")[1], values[model])
        for column, values in columns.items()
        if model in values
    )


CLAIMS = {
    model: _claims(
        model,
        r2__iimm={"coca": 0.92, "eva02": 0.89, "clip": 0.92, "siglip": 0.92},
        r2__intra={"coca": 0.88, "clip": 0.81, "siglip": 0.88},
        r2__inter={"coca": 0.82, "clip": 0.62, "siglip": 0.80},
        r2__text_text={"coca": 0.37, "clip": 0.57, "siglip": 0.17},
        tau__iimm={"coca": 0.89, "eva02": 0.83, "clip": 0.78, "siglip": 0.78},
        tau__gbc={"coca": 0.78, "eva02": 0.72, "clip": 0.78, "siglip": 0.83},
        tau__transrate={"coca": 0.67, "eva02": 0.61, "clip": 0.67, "siglip": 0.72},
        tau__emms={"coca": 0.61, "eva02": 0.28, "clip": 0.61, "siglip": 0.44},
        tau__h_score={"coca": 0.11, "eva02": -0.78, "clip": 0.50, "siglip": -0.67},
    )
    for model in MODELS
}
