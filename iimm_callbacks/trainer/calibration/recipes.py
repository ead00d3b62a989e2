"""A recipe: method and `TrainingArguments`, from flags or a YAML or JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

METHODS = ("full", "bitfit", "attention", "lora", "clip_adapter")
# Type of an argument -> what must be given; others are for the Trainer to check.
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a finite number"}
# Where none is given: those of the shipped study, a tenth of it where all weights of a large model
# move.
_USUAL_RATES = dict.fromkeys(METHODS, 1e-3) | {"full": 1e-5, "attention": 1e-5}
_USUAL = {"max_steps": 150, "per_device_train_batch_size": 32}
# What a calibration decides for itself: nothing is kept of a run but its outcome and run file.
_FIXED = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "push_to_hub": False,
    "load_best_model_at_end": False,
}


@dataclass(frozen=True)
class Recipe:
    """How the model is fine-tuned.

    Attributes:
        method: Of `models.tuning.prepare`; with `peft` the name of its kind in lower case.
        arguments: Of `TrainingArguments`, without ``output_dir``. ``per_device_train_batch_size``
            is that of one process; n processes train on n times as many images a step.
        peft: Keyword arguments of a `peft` config with its ``peft_type``; empty: none.

    Raises:
        ValueError: An unknown method, an argument that `TrainingArguments` does not have or take, a
            ``peft_type`` that peft does not know, or no number of steps.

    Example:
        >>> Recipe("lora", {"learning_rate": 1e-3, "max_steps": 50}).name
        'lora 0.001'
    """

    method: str = "full"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.peft:
            object.__setattr__(self, "method", _kind_of(self.peft))
        elif self.method not in METHODS:
            raise ValueError(
                f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}; others are "
                "given as `peft` of a recipe"
            )
        if "num_train_epochs" in self.arguments and "max_steps" not in self.arguments:
            raise ValueError(
                "`num_train_epochs` must be left out of a recipe, as epochs are of different "
                f"length on each task, got {self.arguments['num_train_epochs']!r}; give `max_steps`"
            )
        usual = _USUAL | {"learning_rate": _USUAL_RATES.get(self.method, 1e-3)}
        arguments = usual | _numbers(self.arguments)
        object.__setattr__(self, "arguments", arguments)
        _check(arguments)

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return int(self.arguments["max_steps"])

    @property
    def name(self) -> str:
        """Method and learning rate, for people."""
        return f"{self.method} {float(self.arguments['learning_rate']):g}"

    def training_arguments(
        self, folder: str | Path, steps: int, use_cpu: bool = False
    ) -> TrainingArguments:
        """What the Trainer is given for a run of so many steps that writes to a folder."""
        import torch
        from transformers import TrainingArguments

        usual = {"logging_steps": steps, "dataloader_pin_memory": torch.cuda.is_available()}
        fixed = _FIXED | {"output_dir": str(folder), "max_steps": steps}
        device = {"use_cpu": True} if use_cpu else {}
        return TrainingArguments(**usual | dict(self.arguments) | fixed | device)

    def prepare(self, model: nn.Module, processor: Any) -> nn.Module:
        """The model, changed in place, ready to be trained by the method.

        Raises:
            ImportError: It needs peft.
            ValueError: The model has nothing of what the method trains.
        """
        from ...models.tuning import prepare

        if self.peft:
            from peft import get_peft_config, get_peft_model

            wrapped: nn.Module = get_peft_model(model, get_peft_config(dict(self.peft)))
            return wrapped
        options = {"processor": processor} if self.method == "clip_adapter" else {}
        return prepare(model, self.method, **options)


def read_recipes(
    path: Path | None = None,
    *,
    methods: Sequence[str] = (),
    rates: Sequence[float] = (),
    **given: Any,
) -> list[Recipe]:
    """Every method with every learning rate, of a file and of flags, which take its place.

    Args:
        path: A YAML or JSON file of `TrainingArguments`, or of a list of several; in it ``method``
            and ``learning_rate`` may be lists, and ``peft`` a `peft` config with its ``peft_type``.
            ``None``: no file.
        methods: Instead of the file's; without any: full.
        rates: Instead of the file's.
        given: Further `TrainingArguments`; None is passed over.

    Raises:
        ValueError: The file cannot be read, or as `Recipe`.
    """
    flags: dict[str, Any] = {"method": list(methods), "learning_rate": list(rates)} | given
    flags = {name: value for name, value in flags.items() if value not in (None, [])}
    if methods:
        flags["peft"] = None
    found = []
    for read in _read(path):
        try:
            found += _each(read | flags)
        except ValueError as error:
            named = str(error).split("`")[1]
            if path is None or named in flags:
                raise
            told = str(error).replace("`", "'")
            raise ValueError(f"`--recipe` {path}: {told}") from error
    return found


def _each(read: dict[str, Any]) -> list[Recipe]:
    """A recipe for each method and learning rate of a file's entry."""
    peft = read.pop("peft", None) or {}
    if not isinstance(peft, dict):
        raise ValueError(f"`peft` must be the settings of a config, got {peft!r}")
    methods = _listed(read.pop("method", "full"))
    rates = [{"learning_rate": rate} for rate in _listed(read.pop("learning_rate", []))] or [{}]
    return [Recipe(method, read | rate, peft) for method, rate in product(methods, rates)]


def _read(path: Path | None) -> list[dict[str, Any]]:
    if path is None:
        return [{}]
    from yaml import YAMLError, safe_load

    try:
        text = path.expanduser().read_text(encoding="utf-8")
        read = json.loads(text) if path.suffix == ".json" else safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, YAMLError) as error:
        told = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"`--recipe` must be a YAML or JSON file, got {path} ({told})") from error
    found = _listed(read)
    wrong = [repr(one) for one in found if not isinstance(one, dict)]
    if wrong or not found:
        raise ValueError(
            f"`--recipe` must hold names and values of `TrainingArguments`, got {path} with "
            f"{next(iter(wrong), 'none'):.80}"
        )
    return found


def _check(arguments: Mapping[str, Any]) -> None:
    from transformers import TrainingArguments

    known = {f.name: f for f in fields(TrainingArguments) if f.init}
    for name, value in arguments.items():
        if name not in known:
            close = get_close_matches(name, ["method", "peft", *known], 1)
            raise ValueError(
                f"`{name}` of a recipe must be `method`, `peft` or an argument of "
                "`TrainingArguments`, which has none of that name"
                + "".join(f"; did you mean {other!r}?" for other in close)
            )
        if name == "output_dir" or (name in _FIXED and value != _FIXED[name]):
            raise ValueError(f"`{name}` must be left out of a recipe: calibration sets it")
        kind = str(getattr(known[name].type, "__name__", known[name].type))
        if kind in _KINDS and not _is_of(kind, value):
            raise ValueError(f"`{name}` must be {_KINDS[kind]}, got {value!r}")
    if not 0 < arguments["learning_rate"] < math.inf:
        raise ValueError(
            f"`learning_rate` must be a positive number, got {arguments['learning_rate']!r}"
        )
    for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if arguments.get(name, 1) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {arguments[name]!r}")


def _is_of(kind: str, value: Any) -> bool:
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    return isinstance(value, int) or (
        kind == "float" and isinstance(value, float) and math.isfinite(value)
    )


def _numbers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """YAML takes 1e-5, without a dot, for text."""

    def number(value: Any) -> Any:
        try:
            return float(value) if isinstance(value, str) and value[:1].isdigit() else value
        except ValueError:
            return value

    return {str(name): number(value) for name, value in arguments.items()}


def _kind_of(peft: Mapping[str, Any]) -> str:
    try:
        from peft import get_peft_config
    except ImportError as error:
        raise ImportError("`peft` needs peft; pip install 'iimm_callbacks[peft]'") from error
    try:
        config = get_peft_config(dict(peft))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`peft` must be the settings of a peft config with its `peft_type`, got {dict(peft)} "
            f"({type(error).__name__}: {error})"
        ) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    return "dora" if getattr(config, "use_dora", False) else kind


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
