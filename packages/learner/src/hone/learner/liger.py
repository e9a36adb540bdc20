"""Liger's Triton kernels in a transformers model (norms, rotary embedding, gated MLP); the only file that imports liger_kernel.

Its fused cross-entropy stays out: the head here never holds the logits either, and takes other losses. Rotary embeddings are
patched in transformers' own module, so all models of that architecture in the process have them.
"""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from hone.learner.errors import ModelError
from hone.learner.vision import sees


def check_liger(device: torch.device) -> None:
    """Raises ModelError where the kernels cannot run: without CUDA, or without the package."""
    mend = "drop --ds.use-liger-kernel, or"
    if device.type != "cuda":
        raise ModelError(f"Liger's kernels run on CUDA only, and this rank computes on the {device.type}; {mend} give it a GPU")
    if find_spec("liger_kernel") is None:
        raise ModelError(f"liger-kernel is not installed; {mend} install it with the extra: hone-learner[liger]")


def apply_liger(model: PreTrainedModel, *, name: str) -> None:
    """Puts the kernels into a loaded model. Raises ModelError for an architecture that Liger has none for: it would say nothing."""
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports] - an extra
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    kind = model.config.model_type
    if sees(model.config):
        raise ModelError(
            f"{name} is a vision-language model, whose positions Liger's kernels are not proven for; drop --ds.use-liger-kernel"
        )
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"{name}: Liger has no kernels for {kind} models; drop --ds.use-liger-kernel")
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
