"""Base weights in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): normal float, scales quantised again; bitsandbytes' own."""

from typing import Any

import torch
from torch import nn

from hone.learner.errors import ModelError

BLOCK = 64
"""Weights that share a scale."""


def in_four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to hold every linear layer but the output embedding in 4 bits, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def settle(model: nn.Module, name: str) -> None:
    """Weights stay as they were quantised, and are read right: two traps of bitsandbytes 0.50 on the CPU.

    Without gradients, Linear4bit.forward (nn/modules.py) would repack weights on CPUs with bf16 instructions; that rounds their
    scales to bf16, so that log-probabilities would differ between evaluation and training. And rows that do not fill blocks of 64
    are dequantised with other rows' scales: ModelError for a model that has them.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer_name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
            if layer.weight.device.type == "cpu" and layer.in_features % BLOCK:
                raise ModelError(
                    f"{name}: bitsandbytes misreads 4-bit weights on the CPU unless their rows are multiples of {BLOCK}, and those of "
                    f"{layer_name} have {layer.in_features}; use a GPU, or drop --ds.load-in-4bit"
                )
