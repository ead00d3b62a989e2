"""A run's record -> the model card: a section for people, a `model-index` for machines.

Names and prompts may come from anyone's data: `_shown` is the one place that turns them into
Markdown. Between two comments that name the task stands what is ours: written again it is replaced,
and nothing else on the card is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, EvalResult, ModelCard, RepoCard

from ..records import keys
from ..records.outcomes import Outcome
from ..records.run_file import file_name
from .tables import WORDS, mixed
from .words import (
    interval,
    level_words,
    observed,
    percent,
    points,
    printable,
    score_name,
    size,
    standard_error,
)

HEADING = "Gain and forgetting (iimm_callbacks)"
TASK_TYPE = "zero-shot-image-classification"
_MEASURED_BY = "iimm_callbacks"
_MOST_PROMPTS = 8  # of a task in the metadata; the section has them all
_RUNS, _MOST_ROWS = "outcomes", 100
_MARKUP = re.compile(r"[\\`*_\[\]<>|&~$:@#]")


def update_card(
    card: ModelCard | str | Path,
    record: Mapping[str, Any],
    *,
    templates: Mapping[str, Sequence[str]] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> ModelCard:
    """Put a run on a model card: a section, and a `model-index` entry for every task.

    An entry holds the score after and before fine-tuning, fractions both, with prompts and
    fingerprint. They are of the probe, some hundred images, *not* of a whole test set, and say
    nothing of another prompt.

    Args:
        card: The card, or a folder with its ``README.md``, or that file (``.md``); made if it is
            not there. A file is written, a `ModelCard` only changed.
        record: `IIMMCallback.record`, `IIMMMonitor.record`, or what `run_file.read_run` read.
        templates: Task name -> its prompt templates. ``None``: those of the record.
        metrics: Task name -> what stands in for accuracy there. ``None``: as the record says, else
            accuracy.

    Returns:
        The card as it is now.

    Raises:
        OSError: The file cannot be read or written.
        ValueError: Its metadata cannot be parsed; it is left as it was. Or there is no look yet.
    """
    if not record.get("looks"):
        raise ValueError("`record` must hold a look, got none; a run has one once it has begun")
    given = {"templates": templates, "metrics": metrics}
    record = {**record, **{key: value for key, value in given.items() if value is not None}}
    if isinstance(card, ModelCard):
        _amend(card, record)
        return card
    path = Path(card)
    if path.is_dir() or not (path.is_file() or path.suffix.lower() == ".md"):
        path = path / "README.md"
    found = ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n")
    data: Any = found.data  # a `ModelCardData`, which its type does not say
    data.model_name = data.model_name or path.absolute().parent.name
    _amend(found, record)
    found.save(path)
    return found


def _eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """Every task after and before fine-tuning.

    Results of one `dataset_type` become one entry of the `model-index`, so each task has its own.
    """
    learnt, fingerprints = record["task"], record.get("fingerprints", {})
    templates, metrics = record.get("templates", {}), record.get("metrics", {})
    results = []
    for name, before, after in _scores(record):
        metric, score = metrics.get(name, "accuracy"), score_name(metrics, name)
        prompts = [printable(template) for template in templates.get(name, ())]
        about: dict[str, Any] = {"fingerprint": fingerprints.get(name)}
        if prompts:
            about |= {"prompts": prompts[:_MOST_PROMPTS], "n_prompts": len(prompts)}
        for when, value in (("after", after), ("before", before)):
            if value is None:
                continue
            results.append(
                EvalResult(
                    task_type=TASK_TYPE,
                    task_name="Zero-Shot Image Classification",
                    dataset_type=_slug(name),
                    dataset_name=printable(name),
                    dataset_args=about,
                    metric_type=re.sub(r"[^A-Za-z0-9_-]", "_", metric),
                    metric_name=f"{score}, {when} fine-tuning on {printable(learnt)}",
                    metric_value=value,
                    metric_args={"measured_by": _MEASURED_BY, "fine_tuned_on": _slug(learnt)},
                )
            )
    return results


def _section(record: Mapping[str, Any]) -> list[str]:
    """The lines of the section for people, in points."""
    first, last = record["looks"][0], record["looks"][-1]
    learnt, fingerprints = record["task"], record.get("fingerprints", {})
    templates, metrics = record.get("templates", {}), record.get("metrics", {})
    lines = [
        f"## {HEADING}",
        "",
        f"Before and after fine-tuning on *{_shown(learnt)}* (method *{_shown(record['method'])}*, "
        f"measured at step {last['step']}), with the same images and prompts:",
        "",
        "| task | measured | before | after | change, points | fingerprint |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name, before, after in _scores(record):
        role = "learnt" if name == learnt else "off-target"
        cells = (
            f"{_shown(name)} ({role})",
            _shown(score_name(metrics, name)),
            percent(before),
            "not measured" if after is None else percent(after),
            "" if after is None else points(after - before),
            _shown(fingerprints.get(name) or "none"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_facts(record, first, last), "", "Prompts:", ""]
    for name, _, _ in _scores(record):
        given = templates.get(name)
        prompts = "; ".join(f'"{_shown(t)}"' for t in given) if given else "not saved"
        lines.append(f"- {_shown(name)}: {prompts}")
    return lines


def _amend(card: ModelCard, record: Mapping[str, Any]) -> None:
    data: Any = card.data
    new = _eval_results(record)
    measured = {(r.dataset_type, r.metric_name) for r in new}
    ours = {"measured_by": _MEASURED_BY, "fine_tuned_on": _slug(record["task"])}
    kept = [
        old
        for old in data.eval_results or []
        if not ours.items() <= (old.metric_args or {}).items()
        and (old.dataset_type, old.metric_name) not in measured
    ]
    data.model_name = data.model_name or str(record.get("model") or "model")
    data.eval_results = kept + new
    _put(card, _section(record), record["task"])


def _put(card: RepoCard, lines: Sequence[str], name: str) -> None:
    """The lines between two comments that mark them as ours, in the place of what stood there."""
    name = _slug(name)  # which holds no "-->"
    ends = [f"<!-- iimm_callbacks {name}: {end} -->" for end in ("begin", "end")]
    text = "\n".join([ends[0], *lines, ends[1]])
    there = re.compile(".*?".join(map(re.escape, ends)), re.DOTALL)
    if there.search(card.text):
        card.text = there.sub(lambda found: text, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}\n"


def update_outcomes_card(
    card: DatasetCard, outcomes: Sequence[Outcome], name: str, license_name: str | None = None
) -> None:
    """Put saved runs on a data set's card: how many, of which models and methods.

    Args:
        card: Changed: a section between two comments, tags, and the license.
        outcomes: The runs.
        name: The data set's on the Hub.
        license_name: As the Hub writes it, such as ``cc0-1.0``; ``None``: what the card says.
    """
    data: Any = card.data
    data.license = license_name or data.license
    data.tags = sorted({*(data.get("tags") or []), "iimm", "fine-tuning"})
    data.pretty_name = data.pretty_name or "Fine-tuning runs"
    cells: dict[tuple[str, str, str], list[str]] = {}
    for o in outcomes:
        cells.setdefault((o.model, o.model_fingerprint, o.method), []).append(o.task)
    rows = [
        f"| {' | '.join(map(_shown, cell))} | {len(set(tasks))} | {len(tasks)} |"
        for cell, tasks in sorted(cells.items())
    ]
    n_models = len({o.model_fingerprint or o.model for o in outcomes})
    lines = [
        "## Fine-tuning runs (iimm_callbacks)",
        "",
        f"{len(outcomes)} runs of {n_models} models, {sum(o.complete for o in outcomes)} complete. "
        f"`iimm outcomes pull {name}` adds them to your own, and forecasts learn from them.",
        "",
        "| model | fingerprint | method | tasks | runs |",
        "| --- | --- | --- | --- | --- |",
        *rows[:_MOST_ROWS],
        *([f"| and {len(rows) - _MOST_ROWS} more | | | | |"] if len(rows) > _MOST_ROWS else []),
        "",
        "Accuracies are fractions on probes of some hundred images. Who saved a run is left out.",
    ]  # fmt: skip
    _put(card, lines, _RUNS)


def _scores(record: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Task, score before and score after, if it is known; the task being learnt comes first.

    The last look is at the fine-tuned model. Where a mix took its place its score on the task is
    that of `Rescue.held_out`, which does not flatter; of single off-target tasks there is none.
    """
    first, last = record["looks"][0], record["looks"][-1]
    rescue = mixed(record)
    after = last[keys.ACCURACY] if rescue is None else rescue["held_out"]["accuracy"]
    yield record["task"], first[keys.ACCURACY], after
    for name in record["off_target"]:
        key = keys.accuracy_key(name)
        yield name, first[key], last[key] if rescue is None else None


def _facts(record: Mapping[str, Any], first: Any, last: Any) -> Iterator[str]:
    predicted = record["forecast"] or {}
    rescue = mixed(record)
    if rescue is not None:
        held = rescue["held_out"]
        yield (
            f"- **The weights are a mix** of {rescue['alpha']:.3g} fine-tuned and "
            f"{1 - rescue['alpha']:.3g} untouched, chosen to keep to the limit. On images that had "
            f"no part in the choice: gain {points(held['gain'])}, mean forgetting "
            f"{points(held['forgetting'])}, worst {points(held['worst'])} points. All below is of "
            "the fine-tuned model before that."
        )
    for name, words in WORDS.items():
        if (value := observed(last, name)) is None:
            continue
        error = standard_error(last, name)
        spread = "" if error is None else f" ± {size(error)}"
        told = f"{words.capitalize()}: {points(value)}{spread} points"
        told += " (standard error)" if spread else ""
        if name in predicted:
            told += f"; forecast before training {interval(predicted[name])}, 90 % interval"
        yield f"- {told}"
    yield f"- IIMM: {first[keys.PREFIX]:.3f} before, {last[keys.PREFIX]:.3f} after"
    limits = record["limits"]
    if limits["max_forgetting"] is not None:
        limit = size(limits["max_forgetting"])
        level = level_words(last["level"])
        yield f"- Limit: {limit} points of {limits['limit_on']} forgetting; {level}"
    yield f"- Run: {_shown(record['ended'])}; {record['n_images']} images of the task probed"
    yield f"- Base model: {_shown(str(record.get('model')))}, fingerprint " + _shown(
        str(record.get("model_fingerprint"))
    )
    yield "- Forgetting is before minus after: positive is loss, negative is transfer."


def _slug(name: str) -> str:
    """The name of a task as metadata may hold it, each its own."""
    return Path(file_name(name)).stem.removeprefix("iimm_")


def _shown(text: str) -> str:
    r"""`text` as Markdown that shows it as it is written, on one line.

    Example:
        >>> print(_shown("a [b](c) | *d*"))
        a \[b\](c) \| \*d\*
    """
    return _MARKUP.sub(lambda found: f"\\{found[0]}", printable(text))
