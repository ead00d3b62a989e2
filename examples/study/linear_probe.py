"""How much of the recorded gain does a linear probe explain, with no past run at all?

    python examples/study/linear_probe.py    # half a minute on one core

Embeds training and test images of the shipped tasks with the untouched model, fits the probe
to the training images, and compares its accuracy on the test images with the accuracies after
saved fine-tunes. Means over a task's runs. Expected output: LINEAR_PROBE.txt.

The mean of other tasks is that of the gain under the same method, added to zero-shot accuracy.
Test images are those of `Outcome.final_accuracy`. Fourteen tasks of one small model. The
embeddings of all but `symbol_counts` were seen when the probe's form was chosen.
`compare_heads.py` holds other classifiers against this one. `--update FILE` writes the probes'
accuracies into saved runs of the shipped model, where the probe's form has changed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from iimm_callbacks import linear_probe, sample, zero_shot_accuracy
from iimm_callbacks.models.encoders import class_embeddings, find_encoder


@dataclass
class Settings:
    tasks: list[str] = field(default_factory=sample.task_names, metadata={"help": "Shipped tasks"})
    n_images: int = field(default=1000, metadata={"help": "Most images of a split"})
    update: list[Path] = field(default_factory=list, metadata={"help": "JSON-lines files"})


@torch.no_grad()
def embed(model, encoder, name, split, n_images):
    """Embeddings [N, D], labels [N] and class embeddings [C, D] of a split of a shipped task."""
    task = sample.load_task(name, split, probe_size=n_images)
    positions = task.subset()
    batches = [positions[i : i + 64] for i in range(0, len(positions), 64)]
    images = [encoder.embed_images(model, encoder.preprocess(task.images(b))) for b in batches]
    texts = encoder.embed_texts(model, encoder.tokenize(task.prompts(positions)))
    labels = torch.tensor(task.labels(positions))
    return torch.cat(images), labels, class_embeddings(texts, len(task.templates))


def probe_tasks(settings):
    """Task -> zero-shot accuracy and the `LinearProbe`, on its test images."""
    model = sample.load_model().eval()
    encoder = find_encoder(model, sample.load_processor(), None)
    scale = model.logit_scale.detach().exp().item()
    found = {}
    for name in settings.tasks:
        images, labels, texts = embed(model, encoder, name, "train", settings.n_images)
        test, truth, _ = embed(model, encoder, name, "test", settings.n_images)
        probe = linear_probe(images, texts, labels, logit_scale=scale, held_out=(test, truth))
        found[name] = zero_shot_accuracy(test, texts, truth), probe
    return found


def update(path, found):
    """Give the runs in a file the probes' accuracies."""
    lines = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        _, probe = found[row["task"]]
        assert row["linear_probe_n_train"] == row["n_train"] == probe.n_train
        new = {
            "linear_probe_accuracy": probe.accuracy,
            "linear_probe_standard_error": probe.standard_error,
        }
        row |= {name: round(value, 6) for name, value in new.items()}
        lines.append(json.dumps(row, sort_keys=True) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def r_squared(x, y):
    return np.corrcoef(x, y)[0, 1] ** 2


def grade(found, outcomes, method):
    """Errors in points, and R² of the gain, over the tasks under one method."""
    runs = [[o for o in outcomes if (o.task, o.method) == (name, method)] for name in found]
    gain = np.array([np.mean([o.gain for o in of_task]) for of_task in runs])
    iimm = np.array([of_task[0].iimm for of_task in runs])
    before, probe = np.array([(accuracy, p.accuracy) for accuracy, p in found.values()]).T
    n = len(gain)
    others = (gain.sum() - gain) / (n - 1)
    errors = [np.abs(guess - gain).mean() for guess in (probe - before, 0 * gain, others)]
    explained = [r_squared(x, gain) for x in (probe - before, 1 - before, iimm)]
    return [f"{100 * e:.1f}" for e in errors] + [f"{r:.2f}" for r in explained]


def main(arguments=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(arguments)
    found = probe_tasks(settings)
    for path in settings.update:
        update(path, found)
    outcomes = sample.load_outcomes()
    console = Console(width=110, color_system=None)
    accuracies = Table("task", "zero-shot", "linear probe", title="Accuracy on test images")
    for name, (before, probe) in found.items():
        accuracies.add_row(name, f"{before:.3f}", f"{probe.accuracy:.3f}")
    console.print(accuracies)
    title = "Gain before training, no past run: mean absolute error in points; R² of the gain"
    columns = [
        "method",
        "probe",
        "no change",
        "mean of others",
        "R² probe",
        "zero-shot error",
        "IIMM",
    ]
    graded = Table(*columns, title=title)
    for method in sorted({o.method for o in outcomes}):
        graded.add_row(method, *grade(found, outcomes, method))
    console.print(graded)


if __name__ == "__main__":
    main()
