"""`action="rescue"`: keeps the untouched weights from before the first step until the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..probing import ranks
from ..probing.probe import Probe
from ..records import keys
from ..records.log import get_logger
from ..records.verdict import Limits
from .counterparts import Kept, save_weights
from .mixing import check_starts_untouched, keep_untouched, needs_untouched
from .sweep import Rescue, Untouched, sweep

logger = get_logger(__name__)


class Rescuer:
    """Keeps what a rescue needs while a run lasts, and rescues at its end.

    Where only adapters or a CLIP-Adapter train, that is nothing. Otherwise it is a copy of the
    weights that train on the CPU of every rank, and, for a run that will be resumed, a file of the
    same size beside its checkpoints. The device holds no second model at any time.

    Args:
        folder: Of the run: for the files.
        name: What their names begin with.
        base_model: The model before fine-tuning, where it can be loaded again: a model, its Hub
            name or folder, or a function that returns it. Then nothing is kept.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        base_model: nn.Module | str | Path | Callable[[], nn.Module] | None = None,
    ) -> None:
        self.kept_file = folder / f"{name}_untouched.safetensors"
        self.tuned_file = folder / f"{name}_tuned.safetensors"
        self._base: Untouched = base_model
        self._given = base_model is not None

    def begin(self, model: nn.Module, *, will_save: bool, kept: Rescuer | None = None) -> None:
        """Keep the untouched weights; call it before the first step.

        Args:
            model: The untouched model, ready to be trained.
            will_save: Whether checkpoints will be written, from which it could be resumed.
            kept: Where the model has been trained in a run that failed: that run's.

        Raises:
            OSError: The file cannot be written.
            ValueError: See `mixing.needs_untouched` and, where no `base_model` was given,
                `mixing.check_starts_untouched`.
        """
        needs = ranks.together(lambda: needs_untouched(model))
        if self._given:
            return
        if kept is None:
            ranks.together(lambda: check_starts_untouched(model))
        if not needs:
            return
        self._base = keep_untouched(model) if kept is None else kept._base
        if will_save and isinstance(self._base, Kept):
            weights = self._base.weights
            ranks.from_first(lambda: save_weights(weights, self.kept_file))

    def resume(self, model: nn.Module) -> Rescuer:
        """Find the untouched weights again; call it where a run goes on from a checkpoint.

        Args:
            model: The model as the checkpoint has it.

        Returns:
            Itself.

        Raises:
            ValueError: They are not available; or see `mixing.needs_untouched`.
        """
        if ranks.together(lambda: needs_untouched(model)) and not self._given:
            self._base = ranks.from_first(self._read)
        return self

    def _read(self) -> Kept:
        try:
            return Kept.load(self.kept_file)
        except OSError as error:
            raise ValueError(
                f"`base_model` must be given to rescue a resumed run without {self.kept_file.name}"
                f" in its folder ({error}): the untouched weights were not kept"
            ) from error

    def rescue(self, model: nn.Module, probe: Probe, limits: Limits, **settings: Any) -> Rescue:
        """Leave the model with the mix chosen; the fine-tuned weights go to `tuned_file`.

        Args:
            model: The fine-tuned model.
            probe: That of the run.
            limits: Those of the run.
            settings: Further arguments of `sweep.sweep`: `baseline`, `autocast_dtype`.

        Returns:
            The curve and the choice.

        Raises:
            Exception: As `rescue.sweep.sweep`; the model is as it was.
        """
        return sweep(model, self._base, probe, limits, keep_tuned=self.tuned_file, **settings)


def rescue_at_end(rescue: Callable[[], Rescue], rescuer: Rescuer, *, strict: bool) -> None:
    """Rescue a model after training; if that fails it stays as trained, with a warning.

    Args:
        rescue: Rescues it, see `IIMMMonitor.rescue`.
        rescuer: What has the untouched weights.
        strict: Raise instead.
    """
    speaks = ranks.world()[0] == 0
    try:
        found = rescue()
    except Exception as error:  # the model is as it was, on all ranks
        if strict:
            raise
        if speaks:
            logger.warning("The model could not be rescued and is as trained: %s", error)
        return
    if found.alpha == 0 and speaks:
        logger.warning(
            "The model is the UNTOUCHED one again, as %s; the fine-tuned weights are in %s",
            found.reason,
            rescuer.tuned_file,
        )


def is_exceeded(row: dict[str, Any], limits: Limits) -> bool:
    """Whether a look's observed forgetting is over the limit, whatever its sampling error.

    Args:
        row: Of the look, see `keys.look_row`.
        limits: The user's.
    """
    key = keys.observed_key("forgetting") if limits.limit_on == "mean" else keys.WORST
    limit = limits.max_forgetting
    return limit is not None and row.get(key, 0.0) > limit
