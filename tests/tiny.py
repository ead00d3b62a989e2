"""A tiny seeded dual encoder of every family in transformers, with its processor, offline.

`FAMILIES["CLIP"]()` is (model, processor): 32 wide, 2 layers, joint vectors of 24 (SigLIP and
TIPSv2: 32), pictures of 16 px in patches of 8, texts of 12 tokens of `WORDS`. The model is in
eval mode. What this transformers lacks or cannot run is in `UNAVAILABLE`, with the reason.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WORDS = (
    "a photo of the red green blue grey thing circle square cross sound clip video tone noise click"
).split()
LENGTH, JOINT = 12, 24
SIZE = {"height": 16, "width": 16}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH = DEPTH | {"hidden_size": 32, "intermediate_size": 64}
VISION = WIDTH | {"image_size": 16, "patch_size": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# from weights of 0.02, the default, a narrow BERT makes nearly the same of every text
BERTLIKE = NO_DROPOUT | {"initializer_range": 0.2}
TYPED = ["input_ids", "token_type_ids", "attention_mask"]

# first ids, last ids, what goes around a text, and what each token is for
CLIP = ["!"], ["<bos>", "<eos>"], "<bos> $A <eos>", {"bos": "<bos>", "eos": "<eos>"}
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], [], "[CLS] $A [SEP]", {"cls": "[CLS]", "sep": "[SEP]"}
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>"], [], "<s> $A </s>", {"bos": "<s>", "eos": "</s>"}
SIGLIP = ["<pad>", "</s>", "<unk>"], [], "$A </s>", {"eos": "</s>"}
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>"], [], "$A <eos>", {"eos": "<eos>", "bos": "<bos>"}
TIPS = ["<pad>", "<unk>"], [], "$A", {}


def tokenizer(kind, pad="<pad>", unk="<unk>", names=("input_ids", "attention_mask"), **more):
    """One token a word, between the special tokens of a kind above."""
    first, last, template, roles = kind
    vocab = {token: i for i, token in enumerate([*first, *WORDS, *last])}
    rules = Tokenizer(models.WordLevel(vocab, unk_token=unk))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocab[token]) for token in roles.values()]
    rules.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=rules,
        pad_token=pad,
        unk_token=unk,
        model_max_length=LENGTH,
        model_input_names=list(names),
        **{f"{role}_token": token for role, token in roles.items()},
        **more,
    )


def clip_words(pad="<eos>"):
    """As CLIP's: the end has the largest id, at which some of its kin pool, and pads."""
    return tokenizer(CLIP, pad=pad, unk="<eos>")


def bert_words():
    return tokenizer(BERT, pad="[PAD]", unk="[UNK]", names=TYPED)


def text(words, **more):
    """The keywords of a text config that fits a tokenizer."""
    ids = {f"{role}_token_id": getattr(words, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    return WIDTH | {"vocab_size": len(words), "max_position_embeddings": LENGTH} | ids | more


def pictures(name, **more):
    """An image processor for 16 px."""
    return getattr(hf, name)(size=SIZE, **more)


def cropped(name):
    """Of a class that would cut the sides off."""
    return pictures(name, crop_size=SIZE, do_center_crop=False)


def build(model, config, processor, **parts):
    """The model of a config, and a processor of the tokenizer and another part."""
    torch.manual_seed(0)
    cls = getattr(hf, processor)
    if hasattr(cls, "tokenizer_class"):  # transformers 4 insists on BertTokenizer and the like
        cls = type(processor, (cls,), {"tokenizer_class": "AutoTokenizer"})
    return getattr(hf, model)(config).eval(), cls(**parts)


def pair(family, words, part, texts=(), vision=VISION, tower="vision", processor=None, **more):
    """A family whose config holds one config of texts and one of the other tower."""
    model = more.pop("model", f"{family}Model")
    of_text = text(words) | dict(texts)
    config = getattr(hf, f"{family}Config")(
        text_config=of_text, **{f"{tower}_config": dict(vision)} | more
    )
    name = "feature_extractor" if tower == "audio" else "image_processor"
    processor = processor or f"{family}Processor"
    return build(model, config, processor, tokenizer=words, **{name: part})


def clip(family="CLIP", words=None, images=None, processor="CLIPProcessor", **more):
    words, images = words or clip_words(), images or cropped("CLIPImageProcessor")
    return pair(family, words, images, processor=processor, projection_dim=JOINT, **more)


def siglip(kind, family="Siglip", images=None, **more):
    # no mask, as its checkpoints; max_length or the processor of naflex pads to 64
    words = tokenizer(kind, names=["input_ids"], max_length=LENGTH)
    images = images or pictures("SiglipImageProcessor")
    model, processor = pair(family, words, images, **more)
    with torch.no_grad():  # they start at 0, where leaving them out would not show
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model, processor


def siglip2_naflex():
    images = hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=9)
    vision = WIDTH | {"patch_size": 8, "num_patches": 9}
    return siglip(GEMMA, "Siglip2", images, vision=vision)


def altclip():
    # positions start after the pad id; transformers 4 reads the factor, not the range
    more = {"max_position_embeddings": LENGTH + 2, "initializer_factor": 10.0, "project_dim": 32}
    return clip("AltCLIP", tokenizer(ROBERTA), None, "AltCLIPProcessor", texts=BERTLIKE | more)


def chinese_clip():
    images = cropped("ChineseCLIPImageProcessor")
    return clip("ChineseCLIP", bert_words(), images, "ChineseCLIPProcessor", texts=BERTLIKE)


def align():
    vision = {
        "image_size": 16,
        "in_channels": (32, 16),  # the stem has 32
        "out_channels": (16, JOINT),  # nothing projects the pictures
        "hidden_dim": JOINT,
        "kernel_sizes": (3, 3),
        "strides": (1, 2),
        "num_block_repeats": (1, 1),
        "expand_ratios": (1, 2),
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "drop_connect_rate": 0.0,
        "initializer_range": 0.2,  # the batch norms of a new model enlarge nothing
    }
    images = pictures("EfficientNetImageProcessor")
    texts = BERTLIKE | {"max_position_embeddings": 64}  # to which its processor pads
    return clip("Align", bert_words(), images, "AlignProcessor", texts=texts, vision=vision)


def groupvit():
    stages = {"depths": (1, 1), "num_group_tokens": (4, 0), "num_output_groups": (4, 4)}
    return clip("GroupViT", vision=VISION | stages, projection_intermediate_dim=32)


def flava():
    images, more = cropped("FlavaImageProcessor"), {"multimodal_config": WIDTH, "hidden_size": 32}
    words = bert_words()
    return clip("Flava", words, images, "FlavaProcessor", texts=BERTLIKE, tower="image", **more)


def blip(model):
    words, images = bert_words(), pictures("BlipImageProcessor")
    texts = BERTLIKE | {"encoder_hidden_size": 32, "sep_token_id": words.sep_token_id}
    more = {
        "texts": texts,
        "vision": VISION | {"initializer_range": 0.02},  # of 1e-10, all pictures would be alike
        "image_text_hidden_size": JOINT,
    }
    return clip("Blip", words, images, "BlipProcessor", model=model, **more)


def owl(family, images):
    """Pads with the id 0 and pools at the largest."""
    return clip(family, clip_words(pad="!"), images, f"{family}Processor")


def tipsv2():
    # its own image processor wants torchvision; this one does the same
    images = pictures("ViTImageProcessor", do_normalize=False)
    texts = {"max_position_embeddings": 64}  # to which its processor pads
    return pair("Tipsv2", tokenizer(TIPS), images, texts, VISION | {"mlp_ratio": 2})


def vision_text_dual_encoder():
    words, name = bert_words(), "VisionTextDualEncoder"
    towers = hf.ViTConfig(**VISION | NO_DROPOUT), hf.BertConfig(**text(words) | BERTLIKE)
    config = getattr(hf, f"{name}Config").from_vision_text_configs(*towers, projection_dim=JOINT)
    parts = {"image_processor": pictures("ViTImageProcessor"), "tokenizer": words}
    return build(f"{name}Model", config, f"{name}Processor", **parts)


def clap():
    """Of a second of sound at 8 kHz: 51 frames of 16 mel bins, seen as 32 x 32."""
    audio = NO_DROPOUT | {
        "spec_size": 32,
        "num_mel_bins": 16,
        "window_size": 4,
        "depths": (1, 1),
        "num_attention_heads": (2, 2),
        "num_hidden_layers": 2,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,  # doubled by the second stage
    }
    sounds = hf.ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=8000,
        hop_length=160,
        fft_window_size=256,
        max_length_s=1,
        frequency_max=4000,
        truncation="rand_trunc",  # as the checkpoints without fusion
    )
    texts = NO_DROPOUT | {"max_position_embeddings": LENGTH + 2}
    more = {"texts": texts, "vision": audio, "tower": "audio"}
    return clip("Clap", tokenizer(ROBERTA), sounds, "ClapProcessor", **more)


def x_clip():
    """Of videos of 2 frames."""
    mit = {f"mit_{name}": value for name, value in WIDTH.items()} | {"mit_hidden_size": JOINT}
    vision = VISION | mit | {"num_frames": 2}
    more = {"vision": vision, "prompt_layers": 1, "prompt_num_attention_heads": 2}
    return clip("XCLIP", None, cropped("VideoMAEImageProcessor"), "XCLIPProcessor", **more)


def clipseg():
    return clip("CLIPSeg", None, pictures("ViTImageProcessor"), "CLIPSegProcessor")


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "CLIP": clip,
    "SigLIP": lambda: siglip(SIGLIP),
    # the checkpoints of one resolution are SiglipModels with Gemma's tokenizer
    "SigLIP 2": lambda: siglip(GEMMA),
    "SigLIP 2 naflex": siglip2_naflex,
    "MetaCLIP 2": lambda: clip("MetaClip2", tokenizer(ROBERTA)),
    "AltCLIP": altclip,
    "Chinese-CLIP": chinese_clip,
    "ALIGN": align,
    "CLIPSeg": clipseg,
    "GroupViT": groupvit,
    "FLAVA": flava,
    "BLIP": lambda: blip("BlipModel"),
    "BLIP retrieval": lambda: blip("BlipForImageTextRetrieval"),
    "OwlViT": lambda: owl("OwlViT", cropped("OwlViTImageProcessor")),
    "OWLv2": lambda: owl("Owlv2", pictures("Owlv2ImageProcessor")),
    "AIMv2": lambda: clip("Aimv2"),
    "TIPSv2": tipsv2,
    "VisionTextDualEncoder": vision_text_dual_encoder,
    "CLAP": clap,
    "X-CLIP": x_clip,
}
ALL = tuple(FAMILIES)
UNAVAILABLE: dict[str, str] = {}
if not hasattr(hf, "Tipsv2Model"):
    UNAVAILABLE["TIPSv2"] = "not in this version of transformers"
if int(hf.__version__.split(".")[0]) < 5:  # only forward() works
    UNAVAILABLE["X-CLIP"] = (
        "get_video_features: AttributeError: 'tuple' object has no attribute 'pooler_output'"
    )
for _name in UNAVAILABLE:
    del FAMILIES[_name]
