"""`iimm demo`: the README's guarded fine-tune, on what ships with the package."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .shell import Answer, folder_to_write, no_bars_in_a_log

if TYPE_CHECKING:
    from transformers import Trainer

    from ..records.outcomes import Outcome
    from ..trainer.callback import IIMMCallback

_TASK = "handwritten_digits"
_COLUMNS = ("step", "done", "IIMM", "gain", "forgetting", "forecast of the end", "P(exceed)")


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write to")] = Path("iimm_demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps", min=1)] = 100,
) -> Answer:
    """Fine-tune the shipped sample under guard: see it work.

    A small CLIP learns handwritten digits, offline, in under a minute; the guard stops it once it
    is likely to forget more than 5 points of letters and emoji. Nothing goes on your record.
    """
    from ..records.run_file import save_run
    from ..reports import terminal as report

    started = time.perf_counter()
    folder = output.expanduser()
    with folder_to_write(folder, "--output"):
        guard, outcomes = _guard(folder)
        trainer = _trainer(guard, folder, steps)
        with Looks(guard, Console(stderr=True)) as looks:
            trainer.add_callback(looks.callback())
            trainer.train()
        record = guard.record()
        save_run(record, folder / "run.json")
        written, told = _report(record, folder, outcomes)
    seconds = time.perf_counter() - started
    data = {
        "output": str(folder),
        "run_file": str(folder / "run.json"),
        "report": None if written is None else str(written),
        "seconds": seconds,
        "record": record,
    }
    lines = [told, f"It took {seconds:.0f} seconds. With your own data: iimm forecast --help."]
    return Answer(data, f"{report.summary_table(record)}\n{report.page(*lines)}")


class Looks:
    """The looks of a guarded run as a table that grows while it trains; else a line for each.

    Args:
        guard: Whose looks. It is silent itself.
        console: Where to show them; no terminal gets a table that is drawn over again.
    """

    def __init__(self, guard: IIMMCallback, console: Console) -> None:
        self.guard = guard
        self.console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._shown = 0

    def __enter__(self) -> Looks:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def callback(self) -> Any:
        """The `TrainerCallback` that shows them; it must come after the guard."""
        from transformers import TrainerCallback

        class ShowLooks(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
            def on_train_begin(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.update(0, state.max_steps)

            def on_step_end(_, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.update(state.global_step, state.max_steps)

            on_train_end = on_step_end

        return ShowLooks()

    def update(self, step: int, total: int) -> None:
        """Show what there is by now.

        Args:
            step: Optimizer steps done.
            total: Of the whole training.
        """
        from ..reports import terminal as report

        if self.guard.monitor is None:
            return
        record = self.guard.record()
        if not self._shown:
            self.console.print(Text(report.preflight_table(record)), soft_wrap=True)
            self._shown = 1
        if self._live:
            self._live.update(looks_table(record, step, total), refresh=True)
            return
        for row in record["looks"][self._shown :]:
            self.console.print(Text(report.look_line(row)), soft_wrap=True)
        self._shown = len(record["looks"])


def sample_outcomes() -> list[Outcome]:
    """The shipped runs on other tasks: what a task taught must not forecast it."""
    from .. import sample

    return [run for run in sample.load_outcomes() if run.task != _TASK]


def looks_table(record: dict[str, Any], step: int, total: int) -> Table:
    """All looks so far, in points.

    Args:
        record: `IIMMCallback.record`.
        step: Optimizer steps done.
        total: Of the whole training.
    """
    table = Table(title=f"Looks while training: step {step} of {total}")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in record["looks"]:
        table.add_row(*map(str, _cells(row)), style="bold red" if row["level"] == "stop" else None)
    return table


def _cells(row: dict[str, Any]) -> list[Any]:
    from ..records import keys
    from ..reports import terminal as report

    expected = report.forecast_in(row, "forgetting")
    observed = [row.get(keys.observed_key(name)) for name in ("gain", "forgetting")]
    return [
        row["step"],
        f"{row['share']:.0%}",
        f"{row[keys.PREFIX]:.3f}",
        *("" if value is None else report.points(value) for value in observed),
        "" if expected is None else report.interval(expected),
        f"{row[keys.EXCEED]:.2f}" if keys.EXCEED in row else "",
        row["level"],
    ]


def _guard(folder: Path) -> tuple[IIMMCallback, list[Outcome]]:
    """The guard, and the runs that it learns from."""
    from .. import sample
    from ..data.tasks import Task
    from ..trainer.callback import IIMMCallback

    letters, emoji = sample.load_dataset("printed_letters"), sample.load_dataset("emoji_groups")
    outcomes = sample_outcomes()
    guard = IIMMCallback(
        Task("digits", sample.load_dataset(_TASK), templates="the number {}"),
        [Task("letters", letters, templates="the letter {}"), Task("emoji", emoji)],
        max_forgetting=0.05,
        action="stop",
        max_overhead=None,  # so short a run would drop its looks to keep to the default
        outcomes=outcomes,
        store=None,
        run_file=folder / "run.json",
        verbose=False,
    )
    return guard, outcomes


def _trainer(guard: IIMMCallback, folder: Path, steps: int) -> Trainer:
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from .. import sample
    from ..models.classifier import ImageCollator, PromptClassifier

    no_bars_in_a_log()
    set_seed(0)
    model, processor = sample.load_model(), sample.load_processor()
    trainer = Trainer(
        model=PromptClassifier(model, guard.task, processor),
        args=TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        train_dataset=sample.load_dataset(_TASK, "train"),
        data_collator=ImageCollator(processor),
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _report(
    record: dict[str, Any], folder: Path, outcomes: list[Outcome]
) -> tuple[Path | None, str]:
    """The page, and where it is; without matplotlib the run file alone."""
    from ..reports.page import write_report

    try:
        written = write_report(record, folder, outcomes)
    except ImportError as error:
        return None, f"Written to {folder}: run.json, and no report: {error}"
    return written, f"Written to {folder}: run.json and the report, {written.name}"
