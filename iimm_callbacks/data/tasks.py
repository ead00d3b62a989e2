"""`Task`: labelled images, class names and prompts; its probe is a fixed, balanced subset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any

import numpy as np

from ..records import keys
from . import hub
from .images import kind, random_streams_kept, read_image
from .labels import read_labels
from .metrics import as_metric
from .prompts import check_utf8, given_templates
from .sources import ImageFolder, open_source
from .streams import STREAM_SIZE

TASK_PROBE_SIZE = 512


class Task:
    """One classification (or captioning) task that a dual encoder can be probed on.

    Args:
        name: Short and unique within a run; it names the logged keys of the task.
        dataset: One of
            - a `datasets.Dataset` with one `Image` and one `ClassLabel` (or integer) column;
            - the same with a string column instead of labels. Strings are class names if each
              occurs twice or more on average, else captions; lists of strings are captions. An
              image with several captions counts once, and any of them is right;
            - any sequence of ``(image, label)`` or ``(image, caption)`` pairs, e.g. a torch data
              set. Labels are those of ``.targets`` where it has that, else every item is read once;
            - a `datasets.IterableDataset` of either kind: a balanced draw of `probe_size` (512)
              from its first `stream_size` examples, read once, in order, when the task is made,
              and kept as encoded bytes; see `streams.read_stream`. Each rank reads the stream
              itself, so all must be given the same, unsplit stream.
            Of several columns the one called "label" or similar is used, or none. One decoder,
            `images.as_image`, reads images (PIL, paths, bytes, arrays), sounds and videos. A
            transform of a `datasets.Dataset` is not applied: the model's own processor is.
        templates: One or several prompt templates with one ``{}`` for the class name; embeddings of
            several are averaged as in CLIP. ``"clip:imagenet"`` and so on name the templates that
            CLIP's authors used for a data set; `prompts.names()` lists them. For captions the
            default is the caption itself.
        class_names: One name per class, in label order; or a mapping from the data set's names.
            Default: those of the `ClassLabel`, or ``dataset.classes``, ``_`` as a space and
            without numbering.
        image_column, label_column: Where a `datasets.Dataset` leaves a choice.
        probe_size: Largest number of images in the probe; default 512 for the task being learnt,
            256 for an off-target task. The standard error of IIMM is about ``0.1/√n``.
        seed: Of the drawing of the probe, ≥ 0. Same data, size and seed: the same images.
        stream_size: Largest number of examples read from a stream; unused for other data.
        metric: Replaces accuracy: baseline, gain and forgetting are then in its units. It must lie
            in [0, 1] and be higher when more images are right; anything else (a correlation, an
            error rate) is refused, not rescaled.
            - ``None``: zero-shot accuracy;
            - ``"recall@5"`` and so on: the share of images whose own text is among the k nearest,
              for captions;
            - another name, or a folder: what `evaluate.load` loads, and runs, e.g. ``"f1"``, which
              takes the internet, or ``"path/to/my_metric"``, which does not;
            - a metric that `evaluate` has loaded, or a function ``(predictions, references)`` ->
              number, of two arrays of class indices (scikit-learn's take them the other way
              round). It must not depend on the order of the images.
            The probe is balanced, so accuracy weighs all classes equally if each has enough
            images; with a `probe_size` of all images it weighs them by their counts.
        metric_kwargs: Passed on to the metric: ``{"average": "macro"}``; JSON values.
        metric_key: Which of several numbers that the metric gives is the score.

    Attributes:
        name: As given.
        class_names: Class names in label order; empty for captions.
        own_names: What the data set calls these classes; ``None`` where it has no names.
        templates: Tuple of templates.
        is_captions: Whether images carry captions instead of labels.
        metric: A `metrics.RecallAt` or `metrics.Metric`; ``None``: zero-shot accuracy.
        columns: `image_column` and `label_column` as given.

    Raises:
        TypeError: `name`, `dataset`, `templates`, `class_names`, `metric`, `metric_kwargs` or a
            label is of another type.
        ImportError: `metric` is a name and `evaluate` is not installed.
        ValueError: Empty data set, fewer than two classes, duplicate class names, class names that
            do not match the `ClassLabel`, a label outside the classes, a template without exactly
            one ``{}``, an unknown name of templates, a text that UTF-8 cannot hold, a size or
            seed that is no such number, a stream that fails while being read or is of one class,
            or a metric that is not as above.

    Example:
        >>> from PIL import Image
        >>> pairs = [(Image.new("RGB", (8, 8), c), y) for y, c in enumerate(["red", "blue"])]
        >>> task = Task("colours", pairs, templates="a {} square", class_names=["red", "blue"])
        >>> task.prompts([0, 1])
        ['a red square', 'a blue square']
    """

    @random_streams_kept()  # reading labels may read items, which may draw
    def __init__(
        self,
        name: str,
        dataset: Any,
        *,
        templates: str | Sequence[str] | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        probe_size: int | None = None,
        seed: int = 0,
        stream_size: int = STREAM_SIZE,
        metric: Any = None,
        metric_kwargs: Mapping[str, Any] | None = None,
        metric_key: str | None = None,
    ) -> None:
        _check_settings(name, probe_size, stream_size, seed)
        self.name = name
        self.dataset = dataset
        self.probe_size = probe_size
        self.seed = seed
        self.columns = image_column, label_column
        given = None if templates is None else given_templates(name, templates)
        self._source = open_source(
            name, dataset, image_column, label_column,
            size=probe_size or TASK_PROBE_SIZE, first=stream_size, seed=seed, given=class_names,
        )  # fmt: skip
        if len(self._source) < 2:
            raise ValueError(
                f"`dataset` of task {name!r} must hold at least 2 images, got {len(self._source)}; "
                "IIMM is a mean over pairs of images"
            )
        self._labels, names, self.own_names = read_labels(name, self._source, class_names)
        self.is_captions = names is None
        self.class_names: tuple[str, ...] = names or ()
        default = "{}" if self.is_captions else "a photo of a {}."
        self.templates = (default,) if given is None else given
        n_shown = min(len(set(self._labels)), probe_size or TASK_PROBE_SIZE)
        n_classes = n_shown if self.is_captions else len(self.class_names)
        self.metric = as_metric(metric, metric_kwargs, metric_key, task=name, n_classes=n_classes)

    @classmethod
    def from_hub(
        cls,
        name: str | PathLike[str],
        split: str | None,
        *,
        config: str | None = None,
        revision: str | None = None,
        task_name: str | None = None,
        streaming: bool = False,
        **settings: Any,
    ) -> Task:
        """The task in one split of a data set on the Hub, or in a folder that `datasets` reads.

        Code that comes with a data set is never run. Once downloaded it is read offline as well.

        Args:
            name: On the Hub, such as ``"ethz/food101"``, or a folder.
            split: Such as ``"test"`` or, not `streaming` from the Hub, ``"test[:1000]"``;
                ``None``: the only one. Take images that the model is not trained on.
            config: Of several configurations of the data set, this one.
            revision: Branch, tag or commit; name a commit to get the same images every time.
            task_name: Name of the task; ``None``: the last part of `name`.
            streaming: Fetch only what is read of the stream: see `dataset` and `stream_size`.
            settings: Further arguments of `Task`.

        Raises:
            TypeError: `split` is of another type, or as `Task`.
            ValueError: There is no such data set, configuration or split (tells which there are),
                it is not available offline, it needs code of its own, several splits and none is
                named, a configuration or revision of a folder that has none, or as `Task`.
        """
        loaded = hub.load(name, split, config=config, revision=revision, streaming=streaming)
        if isinstance(loaded, dict):
            loaded = hub.pick(loaded, split, name)[0]
        return cls(task_name or hub.short_name(name), loaded, **settings)

    @classmethod
    def from_folder(
        cls, path: str | PathLike[str], *, name: str | None = None, **settings: Any
    ) -> Task:
        """The task in a folder that has one folder of images per class.

        Labels go by the sorted names of the class folders. Nothing is copied, and an image is
        opened only when the probe shows it. Which files count is told in `sources.ImageFolder`.

        Args:
            path: The folder.
            name: Name of the task; ``None``: that of the folder.
            settings: Further arguments of `Task`. Without `class_names` they are the names of the
                class folders, ``_`` as a space; given ones are in the order of the sorted folders.

        Raises:
            TypeError: `path` is of another type, or as `Task`.
            ValueError: There is no such folder, it has fewer than two class folders, they are
                splits, one of them has no image, or as `Task`.
        """
        images = ImageFolder(path)
        return cls(name or images.path.name, images, **settings)

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        kind = "captions" if self.is_captions else f"{len(self.class_names)} classes"
        return f"Task({self.name!r}, {len(self)} images, {kind})"

    def subset(self, default_size: int = TASK_PROBE_SIZE) -> list[int]:
        """Positions of the probe's images: seeded, class-balanced, in a random order.

        Classes take turns, so their counts differ by one at most unless a class runs out.
        For captions every distinct caption counts once, since the second image of a caption would
        make a right text a "wrong" one.

        Args:
            default_size: Size where the task was given no `probe_size`.

        Returns:
            Positions in the data set, the same for the same data, size and seed.
        """
        size = self.probe_size or default_size
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(self))
        if self.is_captions:
            seen: set[str] = set()
            distinct = []
            for i in order:
                if seen.isdisjoint(self._labels[i]):
                    distinct.append(int(i))
                    seen.update(self._labels[i])
            return distinct[:size]
        labels = np.asarray(self._labels)[order]
        by_class = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[by_class], labels[by_class])  # of its class
        turns = np.empty(len(self), dtype=int)  # how many of its class come before it in `order`
        turns[by_class] = np.arange(len(self)) - starts
        chosen = order[np.argsort(turns, kind="stable")][:size]
        return [int(i) for i in rng.permutation(chosen)]

    def images(self, positions: Sequence[int]) -> list[Any]:
        """The images at these positions, as `images.as_image` returns them.

        Raises:
            ValueError: An image cannot be read; names the task and the position.
        """
        images = []
        for position in positions:
            try:
                images.append(read_image(self._source, position))
            except Exception as error:
                raise ValueError(
                    f"`dataset` of task {self.name!r}: image {position} cannot be read "
                    f"({type(error).__name__}: {error}); remove or repair it"
                ) from error
        return images

    def item(self, position: int) -> Any:
        """What the data set holds at a position: bytes or a path where it has those."""
        return self._source.image(position)

    def kind(self) -> str:
        """What its images are: ``"image"``, ``"sound"`` or ``"video"``."""
        for position in self.subset():
            with suppress(ValueError):  # of those that cannot be read the probe will tell
                return kind(self.images([position])[0])
        return "image"

    def labels(self, positions: Sequence[int]) -> list[int]:
        """Class indices of these images; for captions 0, 1, 2, ... (text i belongs to image i)."""
        if self.is_captions:
            return list(range(len(positions)))
        return [self._labels[i] for i in positions]

    def pairing(self) -> str:
        """Which text goes with which label, of the first few, for a person to look at."""
        names = [own[0] for own in self._labels[:2]] if self.is_captions else self.class_names[:3]
        texts = self.fill(names)[:: len(self.templates)]
        kind = "image" if self.is_captions else "label"
        few = ", ".join(f"{kind} {i}: {text!r:.50}" for i, text in enumerate(texts))
        return f"Task {self.name!r}: {few} and so on."

    def captions(self, positions: Sequence[int]) -> list[tuple[str, ...]]:
        """The captions of each of these images; one or more."""
        return [self._labels[i] for i in positions]

    def prompts(self, positions: Sequence[int]) -> list[str]:
        """All prompts, class by class (for captions: image by image), templates within."""
        names: Iterable[str] = self.class_names
        if self.is_captions:
            names = [caption for captions in self.captions(positions) for caption in captions]
        return self.fill(names)

    def fill(self, names: Iterable[str]) -> list[str]:
        """Each name in each of the templates, templates within."""
        return [template.replace("{}", name) for name in names for template in self.templates]


def as_tasks(off_target: Task | Sequence[Task]) -> list[Task]:
    """One task or several, as a list."""
    return [off_target] if isinstance(off_target, Task) else list(off_target)


def check_tasks(task: Task, off_target: Sequence[Task]) -> None:
    """Raise unless these tasks can guard one another.

    Raises:
        TypeError: One is not a `Task`.
        ValueError: Two of one name, one whose logged key is taken, or an off-target task on the
            data of the task.
    """
    for candidate in (task, *off_target):
        if not isinstance(candidate, Task):
            raise TypeError(
                f"`task` and `off_target` must be `Task`s, got {type(candidate).__name__}; wrap "
                "the data set: Task('name', dataset)"
            )
    for other in off_target:
        if other is task or other.dataset is task.dataset:
            raise ValueError(
                f"`off_target` task {other.name!r} is the task itself; off-target tasks are those "
                "that are not trained on"
            )
    names = [t.name for t in (task, *off_target)]
    doubles = sorted({n for n in names if names.count(n) > 1})
    if doubles:
        raise ValueError(
            f"`task` and `off_target` must have names of their own, got {doubles} more than once; "
            "they name the logged keys"
        )
    if any(keys.accuracy_key(t.name) == keys.LINEAR_PROBE for t in off_target):
        raise ValueError(
            "`off_target` tasks must not be named 'linear_probe': that one's accuracy has the "
            f"logged key {keys.LINEAR_PROBE!r}; give the task another name"
        )


def _check_settings(name: Any, probe_size: Any, stream_size: Any, seed: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"`name` must be a non-empty string, got {name!r}")
    check_utf8("`name`", name)
    if probe_size is not None:
        _check_whole("probe_size", probe_size, 2)
    _check_whole("stream_size", stream_size, 2)
    _check_whole("seed", seed, 0)


def _check_whole(argument: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{argument}` must be an integer of at least {least}, got {value!r}")
