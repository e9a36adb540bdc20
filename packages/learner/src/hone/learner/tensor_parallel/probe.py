"""Whether a model cut over ranks computes what it did whole: tried out once on a short row, before anything is trained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hone.learner.attention.wire import TensorWire
from hone.learner.errors import ModelError
from hone.learner.model import packed_hidden
from hone.learner.tensor_parallel.cut import cut_of

LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference, as a share of the size, that summing in parts may bring by rounding."""
TOKENS = 9


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Hidden states of one row, and the gradients of a number made of them by the vectors (norms, biases) that are whole."""

    hidden: Tensor
    gradients: dict[str, Tensor]


def probed(backbone: Any) -> Probe:
    """Of the model as it is now."""
    vectors = {name: one for name, one in backbone.named_parameters() if one.dim() == 1 and one.requires_grad and cut_of(one) is None}
    device = next(iter(backbone.parameters())).device
    tokens = (torch.arange(TOKENS, device=device) * 7919 + 1) % backbone.config.get_text_config().vocab_size
    row = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    with torch.enable_grad():
        hidden = packed_hidden(backbone, tokens, torch.arange(TOKENS, device=device), row)
        number = (hidden.float() * torch.sin(torch.arange(hidden.numel(), device=device) + 1.0).view_as(hidden)).sum()
        found = torch.autograd.grad(number, list(vectors.values()), allow_unused=True) if vectors else ()
    gradients = {name: one.detach().float() for name, one in zip(vectors, found, strict=True) if one is not None}
    return Probe(hidden=hidden.detach().float(), gradients=gradients)


def check_split(backbone: Any, before: Probe, name: str, *, wire: TensorWire) -> None:
    """The model as it is now against what it was. Collective; raises ModelError on all ranks."""
    after = probed(backbone)
    pairs = {"hidden states": (after.hidden, before.hidden)}
    pairs |= {f"the gradient of {one}": (after.gradients[one], before.gradients[one]) for one in after.gradients}
    off = torch.stack([(ours - whole).norm() / whole.norm().clamp(min=1e-6) for ours, whole in pairs.values()])
    wire.take_highest(off)
    worst, limit = int(off.argmax()), LIMIT[next(iter(backbone.parameters())).dtype]
    if not float(off.max()) <= limit:
        raise ModelError(
            f"{name}: cut over {wire.size} ranks, {list(pairs)[worst]} differ from the whole model's by {float(off[worst]):.3g} of their "
            f"size (at most {limit:g} is rounding); {type(backbone).__name__} cannot be cut this way, set --ds.tensor-parallel-size 1"
        )
