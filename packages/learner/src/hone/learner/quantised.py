"""Base weights in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314): normal float, scales quantised again; bitsandbytes' own."""

from typing import Any

import torch


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
