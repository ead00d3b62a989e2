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
    logit_scale: the model's factor on cosines (not its logarithm), positive; given to `compute`.
        With it the linear probe is measured too; not for captions. Default None.

Returns:
    iimm: (inter + intra) / 2, in [-1, 1].
    inter: mean cosine of an image and the text of a wrong class.
    intra: mean cosine of two distinct images, same class included.
    standard_error: of iimm over the drawing of the images; nan below 3 images.
    n_images: N.
    n_classes: C.
    linear_probe_accuracy, linear_probe_standard_error: only with `logit_scale`: leave-one-out
        accuracy of a linear probe anchored at the zero-shot classifier, in [0, 1], and its error.
        Minus zero-shot accuracy it goes with the gain of full, attention and LoRA tuning.
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
        TypeError: By `add`, `add_batch` and `compute`: labels are not integers, embeddings are
            not numbers, or `text_embeds` is of no float dtype.
        ValueError: Likewise: as `iimm_callbacks.iimm`, an input is missing, or rows do not match.
            What is wrong with `text_embeds` is told before any batch is used up.

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

    # `evaluate` appends what the inputs are to the docstrings of these three.

    def add_batch(self, *, image_embeds: Any = None, labels: Any = None, **inputs: Any) -> None:
        """Add a batch of images."""
        _check_given(image_embeds, labels)
        super().add_batch(
            image_embeds=_matrix("image_embeds", image_embeds), labels=_integers(labels), **inputs
        )

    def add(self, *, image_embeds: Any = None, labels: Any = None, **inputs: Any) -> None:
        """Add one image: its embedding [D], and its class."""
        _check_given(image_embeds, labels)
        (row,) = _matrix("image_embeds", [image_embeds])
        super().add(image_embeds=row.tolist(), labels=int(_integers([labels])[0]), **inputs)

    def compute(
        self,
        *,
        image_embeds: Any = None,
        labels: Any = None,
        text_embeds: Any = None,
        **inputs: Any,
    ) -> Any:
        """The measures of all images that were added, and of these."""
        if image_embeds is None and labels is None:
            if self.process_id == 0 and not len(self):
                raise ValueError(
                    "`image_embeds` and `labels` must be given to `compute`, or before it to "
                    "`add_batch`, got no image"
                )
        else:
            _check_given(image_embeds, labels)
        if self.process_id == 0:  # elsewhere nothing is computed
            if text_embeds is None:
                raise ValueError("`text_embeds` must be given to `compute`: [C, D], one per class")
            text_embeds = _matrix("text_embeds", text_embeds)
            iimm_callbacks.IIMMAccumulator(text_embeds)  # raises where they do not suit
        return super().compute(
            image_embeds=image_embeds, labels=labels, text_embeds=text_embeds, **inputs
        )

    def _compute(
        self, image_embeds: Any, labels: Any, text_embeds: Any, logit_scale: float | None = None
    ) -> dict[str, float]:
        images = _matrix("image_embeds", list(image_embeds)).astype(np.float32)
        found = dict(vars(iimm_callbacks.iimm(images, text_embeds, labels)))
        if logit_scale is not None:
            probe = iimm_callbacks.linear_probe(
                images, text_embeds, labels, logit_scale=logit_scale
            )
            found["linear_probe_accuracy"] = probe.accuracy
            found["linear_probe_standard_error"] = probe.standard_error
        return found


def _check_given(image_embeds: Any, labels: Any) -> None:
    if image_embeds is None:
        raise ValueError("`image_embeds` must be given: [n, D], one embedding per image")
    if labels is None:
        raise ValueError(
            "`labels` must be given: [n], the class of each image; for captions their positions"
        )


def _matrix(name: str, rows: Any) -> Any:
    """Rows in a list as a float32 array; tensors and other arrays of numbers as they are."""
    dtype = getattr(rows, "dtype", None)
    is_listed = dtype is None or getattr(dtype, "kind", "f") in "OSU"
    if is_listed and hasattr(rows, "__len__") and not isinstance(rows, str | bytes):
        rows = _array(name, [_plain(row) for row in rows])
    shape = getattr(rows, "shape", None)
    expected = f"`{name}` must be a matrix with one embedding per row"
    if shape is None:
        raise TypeError(f"{expected}, got {rows!r:.80} ({type(rows).__name__})")
    if len(shape) != 2:
        raise ValueError(f"{expected}, got shape {tuple(shape)}")
    return rows


def _array(name: str, rows: list[Any]) -> np.ndarray:
    if not rows:
        return np.zeros((0, 0), dtype=np.float32)
    widths = sorted({len(row) for row in rows if isinstance(row, list | tuple)})
    if len(widths) > 1:
        raise ValueError(
            f"`{name}` must all be of one width, got widths {widths}; pass the projected "
            "embeddings of the joint space"
        )
    try:
        array = np.asarray(rows)
    except (TypeError, ValueError) as error:  # rows and numbers side by side
        raise ValueError(
            f"`{name}` must be a matrix with one embedding per row, got rows of several shapes"
        ) from error
    if array.dtype.kind not in "iuf":
        raise TypeError(
            f"`{name}` must be rows of numbers, got {array.dtype}, the first {rows[0]!r:.80}"
        )
    return array.astype(np.float32)


def _integers(labels: Any) -> np.ndarray:
    """Labels as int64; what would have to be rounded or parsed is refused."""
    given = _plain(labels)
    if isinstance(given, str | bytes) or not hasattr(given, "__len__"):
        raise TypeError(f"`labels` must be a list of integers, one per image, got {labels!r:.80}")
    whole = [_plain(label) for label in given]
    for position, label in enumerate(whole):
        if not isinstance(label, int) or isinstance(label, bool):
            raise TypeError(
                f"`labels` must be integers, one per image, got {label!r:.80} "
                f"({type(label).__name__}) at {position}; pass positions in the class texts"
            )
        if abs(label) >= 2**63:
            raise ValueError(f"`labels` must lie in [0, C), got a huge number at {position}")
    return np.array(whole, dtype=np.int64)


def _plain(values: Any) -> Any:
    """A tensor or an array as Python numbers, on whatever device and of whatever dtype it is."""
    return values.tolist() if hasattr(values, "tolist") else values
