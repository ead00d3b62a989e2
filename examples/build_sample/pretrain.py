"""Train the sample's small CLIPModel from scratch on captioned pictures.

    python pretrain.py --work build/sample

Reads pretrain.npz and captions.json, writes sample/model. Forty minutes on two cores.
A run that was cut off goes on with --resume: the weights are saved every 100 steps (the
optimizer's moments are not, they are back within some dozen steps).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel

# Sources by how often a picture of them is drawn: the tasks ask about all of them, but glyphs are
# easily learnt and emoji and clip art are few and varied.
WEIGHT = {
    "digits": 0.09,
    "letters": 0.13,
    "scripts": 0.12,
    "styles": 0.07,
    "arrows": 0.06,
    "symbols": 0.09,
    "icons": 0.05,
    "emoji": 0.17,
    "clipart": 0.14,
    "tango": 0.01,
    "flags": 0.07,
}
CONTEXT = 20
IMAGE = 48


def train_tokenizer(captions: list[list[str]], size: int, folder: Path) -> Tokenizer:
    """A CLIP byte-pair tokenizer in the classic files that every version of CLIPTokenizer reads."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=size - 258,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator((c for row in captions for c in row), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in merges]
    # CLIP's order: bytes, bytes that end a word, merges, start, end. The end-of-text id is then
    # the largest, which is where both of CLIPModel's ways to find it look.
    order = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(p) for p in pairs), start, end]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(order))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(p) for p in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    tokens = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    return vocab


def tokenize(folder: Path, texts: list[str]) -> torch.Tensor:
    """Token ids [N, CONTEXT] as CLIPTokenizer itself makes them."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    made = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT)
    return torch.tensor(made["input_ids"])


def build_model(vocab: dict[str, int], width: int = 160) -> CLIPModel:
    """A CLIPModel of about 2.2 million parameters, its vision tower this wide."""
    end = vocab["<|endoftext|>"]
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "gelu",
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": 128,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "image_size": IMAGE,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 128,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    config._attn_implementation = "sdpa"
    return CLIPModel(config)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random place, size, tilt, light, colour, noise; uint8 [B, 56, 56, 3] to [B, 3, 48, 48].

    No mirror images and hardly a tilt: left is not right, and a six is not a nine.
    """
    n = len(images)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = torch.empty(n).uniform_(0.78, 1.08)
    angle = torch.empty(n).normal_(0, 0.06)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = torch.empty(n, 2).uniform_(-0.08, 0.08)
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 3, IMAGE, IMAGE], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    light = torch.empty(n, 1, 1, 1).uniform_(0.75, 1.2)
    colour = torch.empty(n, 3, 1, 1).uniform_(0.88, 1.12)
    x = x * light * colour + torch.empty(n, 1, 1, 1).uniform_(-0.15, 0.15)
    grey = torch.rand(n, 1, 1, 1) < 0.12
    x = torch.where(grey, x.mean(1, keepdim=True), x)
    x = x + torch.randn_like(x) * torch.empty(n, 1, 1, 1).uniform_(0, 0.08)
    return x.clamp(-1, 1)


def loss_of(model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss; pictures that share a caption share its target."""
    longest = int((ids != model.config.text_config.eos_token_id).sum(1).max()) + 1
    out = model(input_ids=ids[:, :longest], pixel_values=pixels)
    x, t = out.image_embeds, out.text_embeds
    logits = model.logit_scale.exp().clamp(max=100) * x @ t.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def save(model: CLIPModel, folder: Path) -> None:
    """Float32 weights rounded to float16's precision: the zeros that follow compress away."""
    whole = model.state_dict()
    state = {k: v.half().float() if v.is_floating_point() else v for k, v in whole.items()}
    model.save_pretrained(folder, state_dict=state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/sample"))
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--resume", type=int, default=0, metavar="STEP", help="go on from STEP")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=2200)
    parser.add_argument("--width", type=int, default=160, help="of the vision tower, 32s")
    parser.add_argument("--keep", type=float, default=1.0, help="share of the pictures, at random")
    parser.add_argument("--output", type=Path, help="folder of the model; default: to ship")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(2)
    data = np.load(args.work / "pretrain.npz")
    images, sources = torch.from_numpy(data["images"]), data["sources"]
    captions = json.loads((args.work / "captions.json").read_text())
    if args.keep < 1:
        few = torch.randperm(len(images))[: round(args.keep * len(images))].sort().values.tolist()
        images, sources = images[few], sources[few]
        captions = [captions[i] for i in few]
    folder = args.output or args.work / "sample" / "model"
    if args.resume:
        vocab = json.loads((folder / "vocab.json").read_text())
    else:
        vocab = train_tokenizer(captions, args.vocabulary, folder)
    unique = sorted({c for row in captions for c in row})
    ids = tokenize(folder, unique)
    at = {c: i for i, c in enumerate(unique)}
    rows = [torch.tensor([at[c] for c in row]) for row in captions]
    counts = {s: int((sources == s).sum()) for s in WEIGHT}
    weight = torch.tensor([WEIGHT[s] / counts[s] for s in sources], dtype=torch.float64)
    model = CLIPModel.from_pretrained(folder) if args.resume else build_model(vocab, args.width)
    model.train()
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(images)} pictures, {len(unique)} captions, {len(vocab)} tokens, {size} parameters")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    start, mean = time.time(), 0.0
    for step in range(args.resume, args.steps):
        warm = min(1.0, (step - args.resume + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * cosine)
        pick = torch.multinomial(weight, args.batch)
        said = torch.stack([ids[rows[i][torch.randint(len(rows[i]), ())]] for i in pick.tolist()])
        loss = loss_of(model, augment(images[pick]), said)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        mean = loss.item() if step == args.resume else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 25 == 0:
            minutes = (time.time() - start) / 60
            print(f"{minutes:5.1f} min  step {step + 1:5}  loss {mean:.3f}", flush=True)
        if (step + 1) % 100 == 0:
            save(model, folder)
    save(model, folder)
    print(f"{args.steps - args.resume} steps in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
