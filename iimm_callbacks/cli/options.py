"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

LimitOn = Annotated[str, typer.Option(help="'mean' of the off-target tasks, or the 'worst'")]


@dataclass(frozen=True)
class Reading:
    """How a data set and a model are read."""

    split: Annotated[str | None, typer.Option(help="Default: test, or the only one")] = None
    template: Annotated[
        list[str] | None, typer.Option(help="Prompt; repeatable [default: a photo of a {}.]")
    ] = None
    image_column: Annotated[str | None, typer.Option(help="Where there is a choice")] = None
    label_column: Annotated[str | None, typer.Option(help="Where there is a choice")] = None
    task_name: Annotated[str | None, typer.Option(help="Name of the task, as in past runs")] = None
    probe_size: Annotated[int | None, typer.Option(help="Images, at most [default: 512]")] = None
    batch_size: Annotated[int, typer.Option(help="Images in a forward pass", min=1)] = 64
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one")] = None
    processor: Annotated[
        str | None, typer.Option(help="Hub name or folder, where MODEL has none")
    ] = None
    seed: Annotated[int, typer.Option(help="Of the choice of images", min=0)] = 0
