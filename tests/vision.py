"""A vision-language model small enough for tests, with its processor and tokenizer, and pictures to show it; all made here, offline."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.utils import logging

from hone.algos.batch import Attachment

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}
"""Fewest and most pixels of a picture, once it is resized: 1 to 16 tokens."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One id for every byte, behind the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)


def save_vision_model(directory: Path, *, family: str = "qwen2_5_vl", tied: bool = False, seed: int = 0, wide: float = 0.1) -> str:
    """A random model of the family with processor and tokenizer, as a user's directory would hold it; `wide` is the weights' deviation."""
    logging.disable_progress_bar()
    words = tokenizer()
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad", "im_end")}
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": wide,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": ids["im_end"],
        "pad_token_id": words.pad_token_id,
    }
    marks = {
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": tied,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    torch.manual_seed(seed)
    videos = Qwen2VLVideoProcessor(size=PIXELS)
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "initializer_range": wide}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **marks))
        kind = Qwen2VLProcessor
    elif family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
        vision |= {"fullatt_block_indexes": [1], "initializer_range": wide}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))
        kind = Qwen2_5_VLProcessor
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0], "initializer_range": wide}
        text |= {"head_dim": 32}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **marks))
        kind, videos = Qwen3VLProcessor, Qwen3VLVideoProcessor(size=PIXELS)
    model.save_pretrained(directory)
    images = Qwen2VLImageProcessor(size=PIXELS)
    kind(image_processor=images, tokenizer=words, video_processor=videos, chat_template=TEMPLATE).save_pretrained(directory)
    return str(directory)


def picture(width: int, height: int, *, seed: int = 0) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def show(processor: Any, *parts: str | bytes) -> tuple[list[int], tuple[Attachment, ...]]:
    """Ids of texts and pictures after one another, as the processor has them, and the pictures with their places."""
    ids: list[int] = []
    attached: list[Attachment] = []
    for part in parts:
        if isinstance(part, str):
            ids += processor.tokenizer.encode(part, add_special_tokens=False)
            continue
        width, height = Image.open(io.BytesIO(part)).size
        count = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
        ids.append(processor.tokenizer.convert_tokens_to_ids("<|vision_start|>"))
        attached.append(Attachment(start=len(ids), count=count, data=part))
        ids += [processor.image_token_id] * count
        ids.append(processor.tokenizer.convert_tokens_to_ids("<|vision_end|>"))
    return ids, tuple(attached)


def alone(processor: Any, model: PreTrainedModel, ids: Sequence[int], attached: Sequence[Attachment]) -> Tensor:
    """Logits [T, V] of one row by transformers' own forward and processor."""
    tokens = torch.tensor([list(ids)])
    if not attached:
        return model(input_ids=tokens).logits[0]
    kinds = torch.zeros_like(tokens)
    for one in attached:
        kinds[0, one.start : one.start + one.count] = 1
    pictures = [Image.open(io.BytesIO(one.data)) for one in attached]
    seen = processor.image_processor(images=pictures, return_tensors="pt")
    return model(input_ids=tokens, mm_token_type_ids=kinds, **seen).logits[0]
