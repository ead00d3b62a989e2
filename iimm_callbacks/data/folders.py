"""A folder with one folder of images per class -> a data set of paths, read when asked for.

Written out rather than left to the `imagefolder` builder of `datasets`, which writes a cache of
the paths, hashes every file first, takes sub-folders called `train` or `test` for splits, follows
links out of the folder, and keeps folder names as they are: for a probe of a few hundred images
a sorted list of paths is all there is to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from ..records.log import get_logger

# Words of names of splits: a folder of each, or a "train" beside folders that are all such.
SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")
_BESIDE_SPLITS = (
    "set", "data", "dataset", "images", "seg", "pred", "predict", "prediction", "predictions",
    "sample", "samples", "extra", "unlabeled", "unlabelled", "holdout",
)  # fmt: skip

# Told by Pillow, but not read; and EPS by another program only, which it would start.
_UNREAD = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

logger = get_logger(__name__)


class ImageFolder:
    """(path, label) pairs of the images in `path/CLASS/**`, classes in sorted order.

    Every file whose extension Pillow reads is an image; nothing is opened here. Of a class all
    images below its folder count, in sorted order. What is hidden (its name starts with a dot) is
    passed over. Other files, links to folders, and links that lead out of the folder are skipped,
    and a warning is logged that counts them.

    Args:
        path: The folder.

    Attributes:
        path: The folder, its own links resolved.
        folders: Names of the class folders, in label order.
        classes: The same; see `class_names.checked_class_names` for what prompts have.
        targets: Label of every image.
        skipped: How many files and links were skipped.

    Raises:
        TypeError: `path` is no path.
        ValueError: There is no such folder, it has fewer than two class folders, they are splits,
            or one of them has no image.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                f"`path` must be a folder of class folders, got {path!r:.80} "
                f"({type(path).__name__}); pass its path as a string or pathlib.Path"
            )
        self.path = Path(path).expanduser().resolve()
        if not self.path.is_dir():
            got = "which is a file" if self.path.exists() else "which does not exist"
            raise ValueError(f"`path` must be a folder of class folders, got {str(path)!r}, {got}")
        self.folders = [entry.name for entry in _visible(self.path) if _is_folder(entry)]
        self.classes = self.folders
        self._check_folders(path)
        self.skipped = sum(entry.is_symlink() for entry in _visible(self.path))
        self._paths: list[Path] = []
        self.targets: list[int] = []
        for label, name in enumerate(self.folders):
            found = list(self._images(self.path / name))
            if not found:
                raise ValueError(
                    f"`path` must have images in every class folder, got none in "
                    f"{str(self.path / name)!r} that Pillow reads; remove it, or name it with a "
                    "dot in front"
                )
            self._paths += found
            self.targets += [label] * len(found)
        if self.skipped:
            logger.warning(
                "%d files or links in %s are skipped: no images, or links out of it or to folders",
                self.skipped,
                self.path,
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, position: int) -> tuple[str, int]:
        return str(self._paths[position]), self.targets[position]

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.path)!r}, {len(self)} images, {len(self.folders)} classes)"

    def _check_folders(self, path: str | os.PathLike[str]) -> None:
        if _are_splits(self.folders):
            raise ValueError(
                f"`path` must be the folder of one split, got {str(path)!r} with "
                f"{', '.join(self.folders)} in it; pass e.g. "
                f"{str(Path(path) / self.folders[-1])!r}"
            )
        if len(self.folders) < 2:
            raise ValueError(
                f"`path` must hold at least 2 folders, one per class, got {str(path)!r} with "
                f"{', '.join(self.folders) or 'none'} (hidden ones and links do not count)"
            )

    def _images(self, folder: Path) -> Iterator[Path]:
        for entry in _visible(folder):
            if _is_folder(entry):
                yield from self._images(folder / entry.name)
            elif is_image(entry.name) and self._is_inside(entry):
                yield folder / entry.name
            else:
                self.skipped += 1

    def _is_inside(self, entry: os.DirEntry[str]) -> bool:
        """Whether it is a file, and if by a link then one of this folder."""
        if not entry.is_symlink():
            return entry.is_file()
        target = Path(entry.path).resolve()
        return target.is_file() and target.is_relative_to(self.path)


def _are_splits(folders: list[str]) -> bool:
    """Whether folders are splits of a data set: words for splits, and nothing but such words."""
    words = [set(re.split(r"[\W_\d]+", name.lower())) - {""} for name in folders]
    splits, beside = set(SPLITS), set(SPLITS) | set(_BESIDE_SPLITS)
    some = [name_words & splits for name_words in words]
    return sum(map(bool, some)) > 0 and all(w and w <= beside for w in words)


def has_class_folders(path: Path) -> bool:
    """Whether a folder has two or more folders with images right in them, and no other data."""
    if not path.is_dir():
        return False
    folders = [entry.name for entry in _visible(path) if _is_folder(entry)]
    files = [entry.name for entry in _visible(path) if not _is_folder(entry)]
    return (
        len(folders) > 1
        and all(any(is_image(inner.name) for inner in _visible(path / name)) for name in folders)
        and all(os.path.splitext(name)[1].lower() in ("", ".md", ".txt") for name in files)
    )


def is_image(name: str) -> bool:
    """Whether Pillow reads files of this extension."""
    return os.path.splitext(name)[1].lower() in _extensions()


@cache
def _extensions() -> frozenset[str]:
    found = Image.registered_extensions()  # loads Pillow's plugins
    readable = set(Image.OPEN) - set(_UNREAD)
    return frozenset(extension for extension, kind in found.items() if kind in readable)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)
