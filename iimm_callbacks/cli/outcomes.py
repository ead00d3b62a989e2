"""`iimm outcomes`: list, add, import, export and check the saved runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .loading import SAMPLE, first_line, load_recorded
from .shell import Answer, command

if TYPE_CHECKING:
    from ..records.catalog import Catalog
    from ..records.objects import Address
    from ..records.outcomes import Outcome

Store = Annotated[
    str | None, Option(help="Saved runs, or sample [default: the user's]", show_default=False)
]
Private = Annotated[bool, Option("--private", help="Make it private, if it is new there")]
License = Annotated[str | None, Option("--license", help="For the Hub's card, such as cc0-1.0")]
HubName = Annotated[str, Argument(help="Data set on the Hub, such as org/runs")]

app = typer.Typer(
    rich_markup_mode=None,
    help="Saved runs: list, add, export, sync, check, retire and so on.",
)


@command(app, "list")
def list_outcomes(
    model: Annotated[str, Option(help="Name or fingerprint; * matches anything")] = "*",
    method: Annotated[str, Option(help="* matches anything")] = "*",
    task: Annotated[str, Option(help="* matches anything")] = "*",
    limit: Annotated[int, Option(min=1, help="How many on a page")] = 200,
    page: Annotated[int, Option(min=1, help="1 has the newest, 2 those before")] = 1,
    store: Store = None,
) -> Answer:
    """List the saved runs, the newest last."""
    from ..records.lines import name_of
    from ..reports import tables

    path, found = open_record(store)
    chosen = found.select(model, method, task)
    end = max(len(chosen) - (page - 1) * limit, 0)
    shown = found.read(chosen[max(end - limit, 0) : end])
    derived = ("gain", "forgetting", "worst")
    data = {
        "store": str(path),
        "n_outcomes": found.n_outcomes,
        "n_found": len(chosen),
        "page": page,
        "n_pages": max(-(-len(chosen) // limit), 1),
        "outcomes": [
            asdict(o) | {name: getattr(o, name) for name in derived} | {"name": name_of(o)}
            for o in shown
        ],
    }
    return Answer(data, tables.outcomes(data))


@command(app, "add")
def add(
    file: Annotated[Path, Argument(help="Runs written down by hand", metavar="FILE.csv")],
    store: Store = None,
) -> Answer:
    """Add runs written down in a CSV file.

    One run a line, accuracies as fractions. Columns: model, method, task, zero_shot_accuracy,
    final_accuracy; where known also iimm, inter, intra, n_images, n_classes, learning_rate, steps,
    batch_size, n_train, linear_probe_accuracy, linear_probe_standard_error, linear_probe_n_train,
    run, model_fingerprint, task_fingerprint, and before:TASK and after:TASK for each off-target
    task. Looks during training are columns QUANTITY@SHARE, such as gain@0.1 and forgetting@0.1
    after a tenth of the steps; also worst, gain_se, forgetting_se, worst_se, iimm, training_loss.
    Runs that are there already are skipped.
    """
    from ..records.by_hand import read_csv

    return _append(read_csv(file.expanduser()), store)


@command(app, "import")
def import_outcomes(
    source: Annotated[
        str, Argument(help="JSON-lines file, save_to_disk folder or Hub name", metavar="SOURCE")
    ],
    store: Store = None,
) -> Answer:
    """Add the runs of another store.

    Those that are there already are skipped.
    """
    return _append(load_recorded(source), store)


@command(app, "export")
def export(
    target: Annotated[
        Path | None, Argument(help="A new .jsonl file or folder", metavar="TARGET")
    ] = None,
    push_to_hub: Annotated[
        str | None, Option(help="Name of a data set on the Hub, instead of TARGET")
    ] = None,
    private: Private = False,
    license_name: License = None,
    store: Store = None,
) -> Answer:
    """Write the saved runs to a file, a folder or the Hub.

    What it writes, `iimm outcomes import` reads; a folder is one of `datasets`. To the Hub goes
    nothing of who saved a run, and a card with models, methods and counts.
    """
    if (target is None) == (push_to_hub is None):
        got = "neither" if target is None else "both"
        raise ValueError(f"`TARGET` or `--push-to-hub` must be given, got {got}; give one of them")
    if target is not None and (private or license_name is not None):
        raise ValueError(
            "`--private` and `--license` are of a data set on the Hub, got one of them with "
            f"{target}; leave it out, or give `--push-to-hub` instead of `TARGET`"
        )
    from ..records.as_dataset import write_new

    path, found = read_record(store)
    if not found:
        raise ValueError(f"`--store` must hold outcomes to export, got {path} without any")
    if target is None:
        _push(found, str(push_to_hub), private, license_name)
    else:
        write_new(found, target.expanduser())
    where = str(push_to_hub or target)
    data = {"store": str(path), "target": where, "n_outcomes": len(found)}
    return Answer(data, f"{len(found)} outcomes of {path} written to {where}")


@command(app, "push")
def push(
    name: HubName, private: Private = False, license_name: License = None, store: Store = None
) -> Answer:
    """Write the saved runs to a data set on the Hub.

    As `export --push-to-hub`: a table in place of the one that is there, without who saved a run,
    and a card with counts, models, methods and license. First `pull` what others pushed, or share
    a store at hf://datasets/org/name, to which all add.
    """
    return export(None, name, private, license_name, store)  # type: ignore[no-any-return]


@command(app, "pull")
def pull(name: HubName, store: Store = None) -> Answer:
    """Add the runs of a data set on the Hub.

    As `import`: those that are there already are skipped.
    """
    return import_outcomes(name, store)  # type: ignore[no-any-return]


def _push(outcomes: Sequence[Outcome], name: str, private: bool, license_name: str | None) -> None:
    from huggingface_hub import DatasetCard

    from ..records.as_dataset import to_dataset
    from ..reports.card import update_outcomes_card

    public = [
        replace(o, provenance={k: v for k, v in o.provenance.items() if k != "who"})
        for o in outcomes
    ]
    to_dataset(public).push_to_hub(name, private=private or None)
    card = DatasetCard.load(name)  # the columns are on it
    update_outcomes_card(card, public, name, license_name)
    card.push_to_hub(name)


@command(app, "check")
def check(store: Store = None) -> Answer:
    """Name the damaged lines; exit code 1 if there are any.

    Also what seems wrong with the others, which is no error: doubles, contradictions, accuracies
    below chance, and runs far off from those like them.
    """
    from ..records.audit import doubts
    from ..records.store import check_store, read_outcomes

    path = _existing(store)
    problems = check_store(path) if path.exists() else []
    doubted = doubts(read_outcomes(path)) if path.exists() else []
    lines = [f"{path} {problem}" for problem in problems] or [f"{path}: no damaged lines"]
    text = "\n".join([*lines, *(f"To look at: {doubt}" for doubt in doubted)])
    data = {"store": str(path), "problems": problems, "doubts": doubted}
    return Answer(data, text, 1 if problems else 0)


@command(app, "sync")
def sync(
    one: Annotated[str, Argument(help="File, folder/ or address", metavar="A")],
    other: Annotated[str, Argument(help="Likewise", metavar="B")],
) -> Answer:
    """Give each of two stores what only the other has.

    Nothing is changed or deleted. Addresses are those of fsspec, such as s3://bucket/team,
    gs://bucket/team or hf://datasets/org/name. What could not be written to one of them before is
    carried over.
    """
    from ..records.store import sync as bring_together

    added = bring_together(store_to_write(one, "A"), store_to_write(other, "B"))
    data = {"stores": [one, other], "added": list(added)}
    return Answer(data, f"{added[0]} outcomes added to {one}, {added[1]} to {other}")


@command(app, "retire")
def retire(
    name: Annotated[str, Argument(help="Its name, as list --json has it", metavar="NAME")],
    why: Annotated[str, Option(help="In words")],
    store: Store = None,
) -> Answer:
    """Let a saved run no longer count.

    It stays where it is, and why, who and when stand beside it.
    """
    from ..records.store import retire as let_go

    store_to_write(store)
    path = _existing(store)
    run = let_go(path, name, why)
    data = {"store": str(path), "retired": name, "why": why}
    text = f"{run.task:.60}, {run.method:.60} ({name}) no longer counts: {why}"
    return Answer(data, text)


def read_record(store: str | None) -> tuple[Path | Address, list[Outcome]]:
    """Where the saved runs are, and all of them: as `open_record`."""
    from ..records.store import read_outcomes

    with _reading(store, "--store") as path:
        return path, read_outcomes(path) if path.exists() else []


def open_record(store: str | None, argument: str = "--store") -> tuple[Path | Address, Catalog]:
    """Where the saved runs are, and their catalog; the user's store need not exist yet.

    Args:
        store: As ``--store``; ``None`` for the user's own.
        argument: What `store` is called in errors.

    Raises:
        ValueError: There is no such store, or it cannot be read.
    """
    from ..records.store import open_store

    with _reading(store, argument) as path:
        return path, open_store(path)


@contextmanager
def _reading(store: str | None, argument: str) -> Iterator[Path | Address]:
    """The place of a store; errors of reading it name the argument."""
    path = _existing(store, argument)
    try:
        yield path
    except (OSError, TypeError, ValueError) as error:
        told = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        is_empty = path.is_dir() and isinstance(error, FileNotFoundError)
        why = "which holds none" if is_empty else f"which cannot be read ({told})"
        raise _no_outcomes(path, argument, why) from error


def store_to_write(store: str | None, argument: str = "--store") -> Path | Address:
    """Where runs are added.

    Args:
        store: As ``--store``; ``None`` for the user's own.
        argument: What `store` is called in errors.

    Raises:
        ImportError: As `objects.as_store`.
        ValueError: Likewise; or it is what ships with the package.
    """
    from ..records.objects import as_store
    from ..records.store import default_store

    if store == SAMPLE:
        raise ValueError(
            f"`{argument}` must be a store to write to, got {store!r}, whose runs ship with the "
            f"package and stay as they are; name another (./{store} is a file)"
        )
    return default_store() if store is None else as_store(store)


def _existing(store: str | None, argument: str = "--store") -> Path | Address:
    from ..records.objects import as_store
    from ..records.store import default_store
    from ..sample import OUTCOMES

    if store == SAMPLE:
        return OUTCOMES
    path = default_store() if store is None else as_store(store)
    if store is not None and not path.exists():
        raise _no_outcomes(path, argument, "which does not exist")
    return path


def _no_outcomes(path: Path | Address, argument: str, why: str) -> ValueError:
    return ValueError(
        f"`{argument}` must be a file or folder of outcomes, as `iimm outcomes export` writes "
        f"them, got {path}, {why}; name another, or leave it out for your own saved runs"
    )


def _append(new: Sequence[Outcome], store: str | None) -> Answer:
    """Add what is not there yet, whoever saved it; two equal runs of one source are two runs."""
    from ..records.lines import to_line
    from ..records.store import append_outcome, read_outcomes

    path = store_to_write(store)

    def content(outcome: Outcome) -> bytes:
        return to_line(replace(outcome, provenance={}))

    there = Counter(map(content, read_outcomes(path) if path.exists() else []))
    added = 0
    for outcome in new:
        what = content(outcome)
        if there[what] > 0:
            there[what] -= 1
            continue
        append_outcome(path, outcome)
        added += 1
    data = {"store": str(path), "added": added, "skipped": len(new) - added}
    text = f"{added} outcomes added to {path}, {data['skipped']} were there already"
    return Answer(data, text)
