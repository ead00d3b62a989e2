"""`iimm demo` and `iimm doctor`: see it work here, or why it does not."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer import Option

from .. import __version__
from .shell import Answer, folder_to_write, no_bars_in_a_log

if TYPE_CHECKING:
    from ..records.outcomes import Outcome

_TASK = "handwritten_digits"
_PACKAGE = "iimm_callbacks"
_NEEDED = "is needed"
_BY_ITSELF = "by itself"
_NO_EXTRA = "test"  # extras for those who work on the package begin with this
# Found by transformers or by us where they are installed; no extra of ours.
_BESIDE = ("torchvision", "evaluate", "bitsandbytes", "sentence-transformers")
# What a user's script imports of transformers, which itself loads nothing until it is asked.
_ASKED = {"transformers": ("CLIPModel", "Trainer")}
_TORCHVISION = (
    "transformers imports torchvision wherever it finds one, so that `from transformers import "
    "CLIPModel` fails with it. It was most likely built for another torch: install the one for "
    "torch {torch} (pip install --force-reinstall torchvision, from the index torch came from), or "
    "remove it (pip uninstall torchvision): iimm_callbacks does without"
)


def demo(
    output: Annotated[Path, Option(help="Folder to write to")] = Path("iimm_demo"),
    steps: Annotated[int, Option(help="Optimizer steps", min=1)] = 100,
) -> Answer:
    """Fine-tune the shipped sample under guard: see it work.

    A small CLIP learns handwritten digits, offline, in under a minute; the guard stops it once it
    is likely to forget more than 3 points of letters and emoji. The run is not saved among yours.
    """
    from ..records.run_file import file_name

    started = time.perf_counter()
    folder = output.expanduser()
    with folder_to_write(folder, "--output"):
        outcomes = sample_outcomes()
        record = _guarded(outcomes, folder, steps)
        written, told = _report(record, folder, outcomes)
    seconds = time.perf_counter() - started
    data = {
        "output": str(folder),
        "run_file": str(folder / file_name(record["task"])),
        "report": None if written is None else str(written),
        "seconds": seconds,
        "record": record,
    }
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = [
        f"Written to {folder}: {', '.join(files)}",
        *[told] * bool(told),
        f"It took {seconds:.0f} seconds. With your own data: iimm forecast --help.",
    ]
    return Answer(data, "\n".join(lines))


def sample_outcomes() -> list[Outcome]:
    """The shipped runs on other tasks: a task's own runs must not forecast it."""
    from .. import sample

    return [run for run in sample.load_outcomes() if run.task != _TASK]


def _guarded(outcomes: list[Outcome], folder: Path, steps: int) -> dict[str, Any]:
    """The run that learns from these, as its guard recorded it."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    from .. import sample
    from ..data.tasks import Task
    from ..models.classifier import ImageCollator, PromptClassifier
    from ..trainer.callback import IIMMCallback

    letters, emoji = sample.load_dataset("printed_letters"), sample.load_dataset("emoji_groups")
    guard = IIMMCallback(
        Task("digits", sample.load_dataset(_TASK), templates="the number {}"),
        [Task("letters", letters, templates="the letter {}"), Task("emoji", emoji)],
        max_forgetting=0.03,
        action="stop",
        max_overhead=None,  # so short a run would drop its looks to keep to the default
        outcomes=outcomes,
    )
    no_bars_in_a_log()
    set_seed(0)
    processor = sample.load_processor()
    trainer = Trainer(
        model=PromptClassifier(sample.load_model(), guard.task, processor),
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
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=sample.load_dataset(_TASK, "train"),
        data_collator=ImageCollator(processor),
        callbacks=[guard],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return guard.record()


def _report(
    record: dict[str, Any], folder: Path, outcomes: list[Outcome]
) -> tuple[Path | None, str]:
    """The page; without matplotlib none, and why."""
    from ..reports.page import write_report

    try:
        return write_report(record, folder, outcomes), ""
    except ImportError as error:
        return None, f"No report was written: {error}"


def doctor() -> Answer:
    """Check the installation: versions, extras, devices, the store.

    Exit code 1 if something is wrong. A missing extra is not.
    """
    system = f"{platform.system()} {platform.machine()}"
    about = f"iimm_callbacks {__version__}, Python {platform.python_version()}, {system}"
    typer.echo(about, err=True)  # before torch and transformers are imported, which takes seconds
    importlib.invalidate_caches()
    modules = _modules()
    packages = [_package(name, *asked, modules) for name, asked in _requirements().items()]
    extras = {extra for p in packages if p["version"] is None for extra in p["extras"]}
    store = _store()
    problems = [*package_problems(packages), *store["problems"]]
    data = {
        "python": platform.python_version(),
        "system": system,
        "packages": packages,
        "missing_extras": {
            extra: f"pip install '{_PACKAGE}[{extra}]'" for extra in sorted(extras - {_BY_ITSELF})
        },
        "devices": _devices(),
        "trackers": _trackers(),
        "store": store,
        "problems": problems,
    }
    return Answer(data, _text(data), 1 if problems else 0)


def _requirements() -> dict[str, tuple[list[str], Requirement | None]]:
    """Distribution -> the extras it is in, none where always needed, and what is asked of it."""
    found: dict[str, tuple[list[str], Requirement | None]] = {_PACKAGE: ([], None)}
    optional: dict[str, tuple[list[str], Requirement | None]] = {}
    about = metadata(_PACKAGE)
    for line in about.get_all("Requires-Dist") or []:
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            found[asked.name] = ([], asked)
            continue
        for extra in about.get_all("Provides-Extra") or []:
            if not extra.startswith(_NO_EXTRA) and asked.marker.evaluate({"extra": extra}):
                optional.setdefault(asked.name, ([], asked))[0].append(extra)
    beside = {name: ([_BY_ITSELF], None) for name in _BESIDE if name not in optional}
    return found | optional | beside


def _modules() -> dict[str, list[str]]:
    """Distribution, as `canonicalize_name` writes it -> what it is imported as."""
    found: dict[str, list[str]] = {}
    for module, owners in packages_distributions().items():
        for owner in set(map(canonicalize_name, owners)):
            found.setdefault(owner, []).append(module)
    # Some bring modules beside their own, such as tests.
    return {
        owner: [m for m in modules if canonicalize_name(m) == owner] or modules[:1]
        for owner, modules in found.items()
    }


def _package(
    name: str,
    extras: Sequence[str],
    asked: Requirement | None,
    modules: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Facts on a distribution; ``problem`` if it is installed and cannot be used."""
    about: dict[str, Any] = {
        "name": name,
        "extras": list(extras),
        "asked": str(asked.specifier) if asked else "",
    }
    try:
        about["version"] = version(name)
    except PackageNotFoundError:
        return about | {"version": None, "problem": None}
    about["problem"] = import_problem(modules.get(canonicalize_name(name), [name]))
    if asked and not asked.specifier.contains(about["version"], prereleases=True):
        about["problem"] = about["problem"] or f"{asked.specifier} {_NEEDED}"
    return about


def import_problem(modules: Sequence[str]) -> str | None:
    """Why these cannot be imported: the error at the root, which others wrap; None if they can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in modules:
                imported = importlib.import_module(module)
                for attribute in _ASKED.get(module, ()):
                    getattr(imported, attribute)
    except Exception as error:  # whatever a broken library raises
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        return f"{type(root).__name__}: {root}"
    return None


def package_problems(packages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with these and what to do, with what a broken torchvision breaks.

    Args:
        packages: What `iimm doctor --json` prints of them.
    """
    known = {package["name"]: package for package in packages}
    cause = known.get("torchvision", {}).get("problem")
    for package in packages:
        name, found, problem = package["name"], package["version"], package["problem"]
        wanted = f"pip install '{name}{package['asked']}'"
        if found is None and not package["extras"]:
            yield f"{name} is missing: {wanted}"
        elif problem and problem.endswith(_NEEDED):
            yield f"{name} {found}: {problem}: {wanted}"
        elif name == "torchvision" and problem:
            others = [n for n, p in known.items() if p["problem"] == cause and n != name]
            also = f", nor can {', '.join(others)} for its sake" if others else ""
            torch = known.get("torch", {}).get("version")
            yield f"torchvision {found} cannot be imported ({problem}){also}. " + (
                _TORCHVISION.format(torch=torch)
            )
        elif problem and problem != cause:
            yield f"{name} {found} cannot be imported ({problem})"


def _devices() -> list[str]:
    import torch

    cuda = torch.cuda
    return [
        f"cpu, {torch.get_num_threads()} threads",
        *(f"cuda:{i}, {cuda.get_device_name(i)}" for i in range(cuda.device_count())),
        *["mps"] * torch.backends.mps.is_available(),
    ]


def _trackers() -> list[str] | None:
    """Those that ``report_to`` could name here; None where transformers cannot be asked."""
    try:
        from transformers.integrations import get_available_reporting_integrations

        return sorted(get_available_reporting_integrations())
    except Exception as error:  # the table has the cause
        logging.getLogger(__name__).debug("transformers cannot be asked: %s", error)
        return None


def _store() -> dict[str, Any]:
    """The user's store: where, how many runs, whether it is writable. Changes nothing.

    Whether one on another machine is writable is not tested, and None.
    """
    from ..records.objects import why_not_writable
    from ..records.store import check_store, default_store, read_outcomes

    named = os.environ.get("IIMM_CALLBACKS_STORE")
    about: dict[str, Any] = {"path": named, "runs": 0, "damaged": 0, "writable": None}
    try:
        path = default_store()
    except (ImportError, ValueError) as error:
        return about | {"problems": [str(error)]}
    about["path"] = str(path)
    problems = []
    if isinstance(path, Path) or path.folder is not None:
        why = why_not_writable(path)
        about["writable"] = why is None
        if why is not None:
            problems.append(
                f"the store {path} cannot be written ({why}): make it writable, or name another "
                "in IIMM_CALLBACKS_STORE"
            )
    try:
        if path.exists():
            damaged = len(check_store(path))
            about |= {"damaged": damaged, "runs": len(read_outcomes(path))}
            if damaged:
                problems.append(
                    f"{damaged} lines of the store {path} are damaged and skipped: `iimm outcomes "
                    "check` names them"
                )
    except (ImportError, OSError, TypeError, ValueError) as error:
        problems.append(f"the store {path} cannot be read ({error})")
    return about | {"problems": problems}


def _text(data: dict[str, Any]) -> str:
    from ..reports.words import new_table, page

    columns = ("package", "version", "needed for", "state")
    title = f"Python {data['python']}, {data['system']}"
    table = new_table(title, *columns, unbroken=columns[:-1])
    for package in data["packages"]:
        found, purpose = package["version"], ", ".join(package["extras"]) or "always"
        state = package["problem"] or ("not installed" if found is None else "ok")
        table.add_row(package["name"], found or "", purpose, state)
    store, trackers = data["store"], data["trackers"]
    writable = {True: "writable", False: "NOT writable", None: "writing not tested"}
    lines = [
        f"Devices: {'; '.join(data['devices'])}",
        "Trackers: " + ("unknown" if trackers is None else ", ".join(trackers) or "none installed"),
        f"Store: {store['path']}, {writable[store['writable']]}, {store['runs']} runs, "
        f"{store['damaged']} damaged",
        *(f"Extra '{extra}': {how}" for extra, how in data["missing_extras"].items()),
        *(f"Problem: {problem}." for problem in data["problems"]),
    ]
    return page(table, *lines, *[] if data["problems"] else ["All is well."])
