"""Zero-shot accuracy of every task, and what fine-tuning on one of them gains and costs.

    python evaluate.py --sample build/sample/sample --tune handwritten_digits --lr 3e-4

The fine-tuning is full (both towers): cross-entropy over logit_scale * x.t with the class prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

Split = tuple[torch.Tensor, torch.Tensor]
Tasks = dict[str, tuple[Split, torch.Tensor, int]]


def load(sample: Path, name: str, split: str) -> tuple[Split, list[str]]:
    """Pixels [N, 3, 48, 48] in [-1, 1], labels [N], and the class names."""
    data = datasets.Dataset(pq.read_table(sample / "tasks" / name / f"{split}.parquet"))
    pixels = np.stack([np.asarray(i.convert("RGB")) for i in data["image"]])
    labels = torch.tensor(data["label"])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return (images, labels), data.features["label"].names


def class_ids(tokenizer: CLIPTokenizer, names: list[str], templates: list[str]) -> torch.Tensor:
    """Token ids [T * C, L], template by template."""
    texts = [t.format(n) for t in templates for n in names]
    return tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]


@torch.no_grad()
def accuracy(model: CLIPModel, split: Split, ids: torch.Tensor, classes: int) -> float:
    """Zero-shot accuracy with the mean of the templates' text embeddings."""
    model.eval()
    images, labels = split
    pixels = images[:2]  # the forward pass wants both; its image part is not used here
    t = model(input_ids=ids, pixel_values=pixels).text_embeds
    t = F.normalize(t.view(-1, classes, t.shape[-1]).mean(0), dim=-1)
    parts = [model(input_ids=ids[:1], pixel_values=b).image_embeds for b in images.split(128)]
    return float((torch.cat(parts) @ t.T).argmax(1).eq(labels).float().mean())


def everything(model: CLIPModel, tasks: Tasks) -> dict[str, float]:
    """Accuracy of every task's test split."""
    return {n: accuracy(model, s, i, c) for n, (s, i, c) in tasks.items()}


def tune(
    model: CLIPModel,
    split: Split,
    ids: torch.Tensor,
    classes: int,
    lr: float,
    steps: int,
    batch: int,
) -> None:
    """Full fine-tuning with one template's prompts at a time, AdamW, linear decay."""
    torch.manual_seed(0)
    templates = ids.split(classes)
    model.train()
    images, labels = split
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        pick = torch.randint(len(labels), (batch,))
        prompts = templates[step % len(templates)]
        logits = model(input_ids=prompts, pixel_values=images[pick]).logits_per_image
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[pick]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=Path, default=Path("build/sample/sample"))
    parser.add_argument("--tune", nargs="*", default=[], help="tasks to fine-tune on, one by one")
    parser.add_argument("--lr", nargs="*", type=float, default=[3e-4])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = CLIPTokenizer.from_pretrained(args.sample / "model")
    cards = json.loads((args.sample / "tasks.json").read_text())
    tasks = {}
    for name, card in cards.items():
        split, names = load(args.sample, name, "test")
        tasks[name] = (split, class_ids(tokenizer, names, card["templates"]), len(names))
    before = everything(CLIPModel.from_pretrained(args.sample / "model"), tasks)
    print(f"{'task':20}{'classes':>8}{'test':>6}{'chance':>8}{'zero-shot':>11}")
    for name, (split, _, classes) in tasks.items():
        n = len(split[1])
        print(f"{name:20}{classes:8}{n:6}{1 / classes:8.1%}{before[name]:11.1%}")
    for name in args.tune:
        for lr in args.lr:
            model = CLIPModel.from_pretrained(args.sample / "model")
            start = time.time()
            classes = tasks[name][2]
            train = load(args.sample, name, "train")[0]
            tune(model, train, tasks[name][1], classes, lr, args.steps, args.batch)
            took = time.time() - start
            after = everything(model, tasks)
            drops = {n: before[n] - after[n] for n in tasks if n != name}
            worst = max(drops, key=lambda n: drops[n])
            print(
                f"{name}, lr {lr:g}, {args.steps} steps, {took:.0f} s: gain "
                f"{after[name] - before[name]:+.1%}, mean drop elsewhere "
                f"{sum(drops.values()) / len(drops):+.1%}, worst {worst} {drops[worst]:+.1%}"
            )
            print("   ", {n: round(100 * d, 1) for n, d in drops.items()})


if __name__ == "__main__":
    main()
