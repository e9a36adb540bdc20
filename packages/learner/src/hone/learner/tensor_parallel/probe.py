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
"""Largest difference of hidden states, as a share of their size, that summing in parts may bring by rounding."""
GRADIENT_LIMIT = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.2}
"""The same of gradients, each measured by itself: in bf16 28 layers brought up to 0.23; one that misses the other rank's part is off by
about 0.7."""
FAINT = 1e-3
"""Share of the largest gradient's size below which one may be all rounding, and is measured against that share."""
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
    dtype = next(iter(backbone.parameters())).dtype
    off = {"hidden states": (after.hidden - before.hidden).norm() / before.hidden.norm() / LIMIT[dtype]}
    loudest = max((one.norm() for one in before.gradients.values()), default=torch.zeros(()))
    for one, ours in after.gradients.items():  # but not those of vectors that are cut now
        whole = before.gradients[one]
        off[f"the gradient of {one}"] = (ours - whole).norm() / torch.maximum(whole.norm(), FAINT * loudest) / GRADIENT_LIMIT[dtype]
    found = torch.stack(list(off.values()))
    wire.take_highest(found)
    worst = int(found.argmax())
    if not float(found.max()) <= 1:
        raise ModelError(
            f"{name}: cut over {wire.size} ranks, {list(off)[worst]} differ from the whole model's, {float(found[worst]):.3g} times what "
            f"rounding explains; {type(backbone).__name__} cannot be cut this way, set --ds.tensor-parallel-size 1"
        )
