"""Texts of a task: captions by image, prompts that are one to the text encoder, kept embeddings."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..data.prompts import tell_doubles
from ..data.tasks import Task
from ..models.encoders import TEXT_BATCH, Encoder
from ..records.run_file import write_whole

FOLDER = "IIMM_CALLBACKS_TEXTS"  # environment variable: a folder, or "off"
WORTH = 4096  # prompts; fewer are embedded faster than weights are read for their fingerprint
ROOM = 2**30  # bytes of all files
_IN_MEMORY = 2**17  # prompts whose tokens are kept: 150 MB of a CLIP's at most


class Prompts:
    """A task's prompts in batches of model inputs; over 131,072 are tokenized anew each time.

    Args:
        names: Class names, or captions; each in all of the task's templates, these within.
        task: Whose they are.
        encoder: Tokenizes them.
    """

    def __init__(self, names: Sequence[str], task: Task, encoder: Encoder) -> None:
        self.names = names
        self._task, self._encoder = task, encoder
        self._kept: list[Any] | None = None
        if len(self) < WORTH:
            self._kept = list(self)

    def __len__(self) -> int:
        return len(self.names) * len(self._task.templates)

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            return iter(self._kept)
        batches = map(self.tokenize, self._batches())
        return batches if len(self) > _IN_MEMORY else self._keep(batches)

    def _keep(self, batches: Iterator[Any]) -> Iterator[Any]:
        kept = []
        for batch in batches:
            kept.append(batch)
            yield batch
        self._kept = kept

    def tokenize(self, prompts: list[str]) -> Any:
        """Model inputs."""
        return self._encoder.tokenize(prompts)

    def listed(self) -> Iterator[bytes]:
        """Pieces of the ``repr`` of the list of all, which need not be in memory at once."""
        yield b"["
        for number, batch in enumerate(self._batches()):
            yield f"{', ' if number else ''}{repr(batch)[1:-1]}".encode()
        yield b"]"

    def told(self) -> Iterator[bytes] | None:
        """What the tokens follow from, without tokenizing; None where that cannot be told."""
        tokenizer = self._encoder.tokenizer()
        return None if tokenizer is None else chain([tokenizer.encode()], self.listed())

    def _batches(self) -> Iterator[list[str]]:
        prompts = chain.from_iterable(self._task.fill([name]) for name in self.names)
        while batch := list(islice(prompts, TEXT_BATCH)):
            yield batch


def tell_one_text(task: Task, prompts: Prompts) -> None:
    """Refuse classes, and warn of captions, that are one text to the text encoder.

    Names may differ in case, in Unicode form, in words that its vocabulary lacks, or beyond the
    length that it reads.

    Args:
        task: Whose prompts they are.
        prompts: Its prompts.

    Raises:
        ValueError: As `prompts.tell_doubles`.
    """
    texts: list[Any] = [()] * len(prompts.names)  # tokens of those that are not told apart yet
    same = list(range(len(texts)))
    for template in task.templates:
        for start in range(0, len(same), TEXT_BATCH):
            some = same[start : start + TEXT_BATCH]
            batch = prompts.tokenize([template.replace("{}", prompts.names[i]) for i in some])
            if not (isinstance(batch, Mapping) and "input_ids" in batch):
                return  # a user's `encode` reads strings
            for i, row in zip(some, _token_rows(batch), strict=True):
                texts[i] += (row,)
        counts = Counter(texts[i] for i in same)
        same = [i for i in same if counts[texts[i]] > 1]
    tell_doubles(
        f"{'captions' if task.is_captions else '`class_names`'} of task {task.name!r}",
        "that are the same tokens",
        task.fill([prompts.names[i] for i in same])[:: len(task.templates)],
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


class KeptTexts:
    """Class embeddings of large tasks on disk, so that the next run of the same model has them.

    A file is named by weights, prompts, tokenizer and numerics, and holds the embeddings of the
    first batch as well: they are embedded anew, and must be the same bit for bit. So what no
    fingerprint tells, such as an adapter that is switched off, is seen. The oldest files go where
    there are too many.

    Args:
        core: The dual encoder; all its weights count, so it must not have been trained.
        dtype: Of autocast.
    """

    def __init__(self, core: nn.Module, dtype: torch.dtype | None) -> None:
        self._core = core
        self._dtype = dtype

    def path(
        self, prompts: Iterable[Any], n_templates: int, told: Iterable[bytes] | None = None
    ) -> Path | None:
        """The file for these prompts; None where none is to be kept.

        Args:
            prompts: Tokenized, in batches.
            n_templates: Of each class.
            told: As `Prompts.told`; ``None``: their tokens are read.
        """
        folder = os.environ.get(FOLDER) or user_cache_path("iimm_callbacks") / "texts"
        if folder == "off" or self._weights is None:
            return None
        whole = hashlib.sha256(self._weights)
        where = next(self._core.parameters()).device
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
        whole.update(repr((n_templates, self._dtype, name, torch.get_num_threads())).encode())
        whole.update(repr((torch.__version__, transformers.__version__)).encode())
        for piece in told or ():
            whole.update(piece)
        for batch in prompts if told is None else ():
            if not isinstance(batch, Mapping):
                return None
            for key, value in sorted(batch.items()):
                whole.update(f"{key} {_kind(value)}".encode() + _bytes(value))
        return Path(folder) / f"{whole.hexdigest()[:32]}.safetensors"

    @cached_property
    def _weights(self) -> bytes | None:
        whole = hashlib.sha256(f"{self._core} {getattr(self._core, 'config', '')}".encode())
        for name, value in (*self._core.named_parameters(), *self._core.named_buffers()):
            if type(value.data) is not Tensor or type(value) not in (Tensor, nn.Parameter):
                return None  # quantised: not all of it is in the tensor
            whole.update(f"{name} {_kind(value)}".encode() + _bytes(value))
        return whole.digest()

    def read(self, path: Path, first: Tensor) -> Tensor | None:
        """[C, D] class embeddings; None where there are none, or not of this model.

        Args:
            path: As `path` gave it.
            first: [n, D] embeddings of the first batch.
        """
        try:
            found = load(path.read_bytes())
            then, classes, now = found["first"], found["classes"], first.cpu()
            path.touch()  # so that the oldest is the one longest unused
        except (OSError, SafetensorError, KeyError):  # a torn file is written anew
            return None
        same = then.dtype == now.dtype and torch.equal(then, now)
        return classes.to(first.device) if same else None

    def write(self, path: Path, first: Tensor, classes: Tensor) -> None:
        """Keep them, if the disk lets us."""
        content = save({"first": first.cpu().contiguous(), "classes": classes.cpu().contiguous()})
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            files = [(file.stat().st_mtime, file) for file in path.parent.glob("*.safetensors")]
            room = ROOM - len(content)
            for _, file in sorted(files, reverse=True):
                room -= file.stat().st_size
                if room < 0:
                    file.unlink(missing_ok=True)
            if len(content) <= ROOM:
                write_whole(path, content)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return b""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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
