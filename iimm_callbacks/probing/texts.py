"""Texts of a task: the captions of each image, and prompts that are one to the text encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.class_names import tell_doubles
from ..data.tasks import Task


def tell_one_text(task: Task, prompts: list[str], tokenized: list[Any]) -> None:
    """Refuse classes, and warn of captions, that are one text to the text encoder.

    Names may differ in case, in Unicode form, in words that its vocabulary lacks, or beyond the
    length that it reads.

    Args:
        task: Whose prompts they are.
        prompts: Class by class (for captions: image by image), templates within.
        tokenized: The same, in batches of model inputs.

    Raises:
        ValueError: As `class_names.tell_doubles`.
    """
    if not all(isinstance(batch, Mapping) and "input_ids" in batch for batch in tokenized):
        return  # a user's `encode` reads strings
    rows = [row for batch in tokenized for row in _token_rows(batch)]
    each = len(task.templates)
    texts = [tuple(rows[i : i + each]) for i in range(0, len(rows), each)]
    counts = Counter(texts)
    doubles = [prompts[i * each] for i, text in enumerate(texts) if counts[text] > 1]
    tell_doubles(
        f"{'captions' if task.is_captions else '`class_names`'} of task {task.name!r}",
        "that are the same tokens",
        doubles,
        10**9 if task.is_captions else len(texts),
    )


def _token_rows(batch: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The tokens of each prompt without its padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    rows = []
    for i, row in enumerate(ids.tolist()):
        kept = row if mask is None else [t for t, m in zip(row, mask[i].tolist(), strict=True) if m]
        while mask is None and len(kept) > 1 and kept[-1] == kept[-2]:
            kept.pop()
        rows.append(tuple(kept))
    return rows


def first_of_each(task: Task, digest: Tensor) -> Tensor:
    """[N] whether an image is the first of its like: it counts once, under all its captions.

    Args:
        task: For the error.
        digest: [N, 32] of the images.

    Raises:
        ValueError: All are the same.
    """
    seen: set[tuple[float, ...]] = set()
    first = []
    for row in map(tuple, digest.tolist()):
        first.append(row not in seen)
        seen.add(row)
    if len(seen) < 2:
        raise ValueError(f"`dataset` of task {task.name!r} must hold at least 2 distinct images")
    return torch.tensor(first)


def captions_of(
    captions: Sequence[Sequence[str]], digest: Tensor, first: Tensor
) -> list[list[str]]:
    """The captions of each image that is shown, with those of the rows that hold the same one.

    Args:
        captions: Of each row.
        digest: [N, 32] of the rows' images.
        first: [N] which rows are shown.
    """
    found: dict[tuple[float, ...], dict[str, None]] = {}
    rows = list(map(tuple, digest.tolist()))
    for row, own in zip(rows, captions, strict=True):
        found.setdefault(row, {}).update(dict.fromkeys(own))
    return [list(found[row]) for row, stays in zip(rows, first.tolist(), strict=True) if stays]
