"""Small seeded open_clip models, built by open_clip itself from folders written on the spot."""

import gzip
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torchvision_ops  # isort: skip  # noqa: F401  # before open_clip
import open_clip
import torch
from timm.models import register_model
from timm.models.eva import eva02_base_patch16_clip_224
from timm.models.vision_transformer import vit_base_patch16_siglip_224
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WIDTH, HEADS, LAYERS, EMBED, SIZE, PATCH, LENGTH = 32, 2, 2, 24, 16, 8, 32
TRUNK = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS}
TRUNK |= {"num_heads": HEADS}


@register_model
def tiny_eva02_clip(pretrained=False, **kwargs):
    return eva02_base_patch16_clip_224(False, **(TRUNK | {"ref_feat_shape": (2, 2)} | kwargs))


@register_model
def tiny_siglip(pretrained=False, **kwargs):
    return vit_base_patch16_siglip_224(False, **(TRUNK | kwargs))


def write_bpe(folder: Path) -> dict[str, Any]:
    """open_clip's own SimpleTokenizer without merges: one token a byte, start and end last."""
    path = folder / "bpe.txt.gz"
    path.write_bytes(gzip.compress(b"#version: 0.2"))
    return {"vocab_size": 514, "tokenizer_kwargs": {"bpe_path": str(path)}}


def write_hf(folder: Path) -> dict[str, Any]:
    """A tokenizer like SigLIP's: no start, `</s>` at the end and as padding, up to full length."""
    vocab = {
        t: i for i, t in enumerate(["<unk>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    name = {"hf_tokenizer_name": "local", "tokenizer_kwargs": {"clean": "canonicalize"}}
    return {"vocab_size": len(vocab), **name}


def config(family: str, folder: Path) -> dict[str, Any]:
    """What open_clip ships as `model_configs/*.json` for the family, at this file's size."""
    vision = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS}
    vision |= {"head_width": WIDTH // HEADS}
    text = {"context_length": LENGTH, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    text |= write_hf(folder) if family == "SigLIP" else write_bpe(folder)
    model = {"embed_dim": EMBED, "vision_cfg": vision, "text_cfg": text}
    if family == "SigLIP":  # ViT-B-16-SigLIP
        vision = {"image_size": SIZE, "timm_model_name": "tiny_siglip"}
        vision |= {"timm_pool": "map", "timm_proj": "none"}
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
        text |= {"norm_kwargs": {"eps": 1e-6}}
        # its trunk has no projection: the joint space is as wide as the trunk
        model |= {"embed_dim": WIDTH, "vision_cfg": vision, "init_logit_bias": -10}
    elif family == "CoCa":  # coca_ViT-B-32: both text towers as wide as the joint space
        vision |= {"attentional_pool": True, "attn_pooler_heads": HEADS, "attn_pooler_queries": 4}
        vision |= {"output_tokens": True}
        text |= {"width": EMBED, "embed_cls": True, "output_tokens": True}
        keys = ("context_length", "vocab_size", "width", "heads", "layers")
        model |= {"multimodal_cfg": {key: text[key] for key in keys}}
    elif family == "EVA-02-CLIP":  # EVA02-B-16
        vision = {"image_size": SIZE, "timm_model_name": "tiny_eva02_clip"}
        model |= {"vision_cfg": vision | {"timm_pool": "token", "timm_proj": None}}
    return model | {"custom_text": family != "CLIP"}


def build(family: str, **options: Any) -> tuple[nn.Module, tuple[Callable, Callable]]:
    """`options` go to `open_clip.create_model_and_transforms`: `precision`, `output_dict` ..."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = {"model_cfg": config(family, Path(folder)), "preprocess_cfg": {}}
        if family == "SigLIP":
            half = [0.5, 0.5, 0.5]
            cfg["preprocess_cfg"] = {"mean": half, "std": half, "resize_mode": "squash"}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(cfg))
        name = f"local-dir:{folder}"
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms(name, **options)
        if family == "CoCa":  # open_clip leaves this one as the memory happened to be
            nn.init.normal_(model.text_decoder.text_projection, std=EMBED**-0.5)
        return model, (preprocess, open_clip.get_tokenizer(name))


FAMILIES = {
    f"open_clip {family}": partial(build, family)
    for family in ("CLIP", "SigLIP", "CoCa", "EVA-02-CLIP")
}
