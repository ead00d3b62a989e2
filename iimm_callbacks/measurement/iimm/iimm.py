"""The Inter-Intra Modal Measure as a measurement of `evaluate`."""

# One import a line: `evaluate` reads them line by line.
from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

import iimm_callbacks

_DESCRIPTION = """\
The Inter-Intra Modal Measure (IIMM) of a labelled set of images under a dual encoder such as \
CLIP: how close the images are to each other and to the texts of the wrong classes. Across the \
tasks of one model a higher IIMM went with more gain and more forgetting by fine-tuning (arXiv \
2407.15731). It is not for ranking encoders, and compares only with the same prompts, \
preprocessing, images and dtype.
"""

_INPUTS = """
Args:
    image_embeds: [N, D] float, one embedding per image, N >= 2, of any scale; computed in float32.
    labels: [N] integers in [0, C), the class of each image; for captions range(N), text i being
        the caption of image i.
    text_embeds: [C, D] float, C >= 2, one embedding per class; with several prompt templates the
        normalised mean of their normalised embeddings. Given to `compute`, not to `add_batch`.

Returns:
    iimm: (inter + intra) / 2, in [-1, 1].
    inter: mean cosine of an image and the text of a wrong class.
    intra: mean cosine of two distinct images, same class included.
    standard_error: of iimm over the drawing of the images; nan below 3 images.
    n_images: N.
    n_classes: C.
"""

_CITATION = """\
@inproceedings{niss2025iimm,
  title = {The Inter-Intra Modal Measure: A Predictive Lens on Fine-Tuning Outcomes in
           Vision-Language Models},
  author = {Niss, Laura and Vogt-Lowell, Kevin and Tsiligkaridis, Theodoros},
  booktitle = {ICCV},
  year = {2025},
  eprint = {2407.15731},
  archivePrefix = {arXiv}
}
"""


class IIMM(evaluate.Measurement):  # type: ignore[misc]  # evaluate is untyped
    """`iimm_callbacks.iimm` with the interface of `evaluate`.

    What is given to `add_batch` is kept in a file of `evaluate`'s cache until `compute`, unless
    ``keep_in_memory=True``.

    Args:
        config_name, keep_in_memory, ...: As `evaluate.Measurement`.

    Raises:
        TypeError: By `compute`: `text_embeds` is of no float dtype.
        ValueError: By `add_batch` and `compute`: as `iimm_callbacks.iimm`, `text_embeds` is
            missing, or rows do not match.

    Example:
        >>> images = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> measure = IIMM(keep_in_memory=True)
        >>> m = measure.compute(image_embeds=images, labels=[0, 1, 1], text_embeds=np.eye(2))
        >>> round(m["inter"], 6), round(m["intra"], 6), round(m["iimm"], 6)
        (0.2, 0.466667, 0.333333)
    """

    def _info(self) -> Any:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "image_embeds": datasets.Sequence(datasets.Value("float32")),
                    "labels": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2407.15731"],
        )

    def _compute(self, image_embeds: Any, labels: Any, text_embeds: Any = None) -> dict[str, float]:
        if text_embeds is None:
            raise ValueError("`text_embeds` must be given to `compute`: [C, D], one per class")
        widths = sorted({len(row) for row in image_embeds})
        if len(widths) > 1:
            raise ValueError(
                f"`image_embeds` must all be of one width, got widths {widths}; pass the projected "
                "embeddings of the joint space"
            )
        if isinstance(text_embeds, list | tuple):
            text_embeds = np.array(text_embeds, dtype=np.float32)
        m = iimm_callbacks.iimm(np.array(image_embeds, dtype=np.float32), text_embeds, labels)
        return {
            "iimm": m.iimm,
            "inter": m.inter,
            "intra": m.intra,
            "standard_error": m.standard_error,
            "n_images": m.n_images,
            "n_classes": m.n_classes,
        }
