"""Whether a model's rows can be cut over a ring: tried out once, before anything is trained or evaluated over it."""

from itertools import accumulate
from typing import Any, Literal

import torch

from hone.learner.attention.wire import Wire
from hone.learner.context import piece_for
from hone.learner.errors import ModelError
from hone.learner.model import CriticModel, PolicyModel, packed_hidden

CUT_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 1.25e-2}
"""Largest difference of hidden states, as a share of their size, that cutting a row may bring by rounding."""


@torch.no_grad()
def check_cut(
    model: PolicyModel | CriticModel,
    name: str,
    *,
    wire: Wire,
    head_stride: int | None,
    impl: Literal["own", "ring-flash-attn"] = "own",
) -> None:
    """One row cut over the ring, two whole, against the same rows packed on this rank. Collective; raises ModelError on all ranks.

    Catches architectures whose layers look at neighbours by other ways than attention (convolutions, recurrences).
    """
    backbone: Any = model.causal_lm.base_model if isinstance(model, PolicyModel) else model.backbone
    embedding = backbone.get_input_embeddings().weight
    lengths = [3, 4 * wire.size + 3, 3]
    tokens = (torch.arange(sum(lengths), device=embedding.device) * 7919 + 1) % embedding.shape[0]
    position_ids = torch.cat([torch.arange(length, device=embedding.device) for length in lengths])
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=embedding.device)
    piece = piece_for(cu_seqlens, wire=wire, impl=impl, head_stride=head_stride, max_tokens=len(tokens))
    ours = packed_hidden(backbone, tokens, position_ids, cu_seqlens, piece).float()[: piece.held]
    packed = packed_hidden(backbone, tokens, position_ids, cu_seqlens).float()[piece.index[: piece.held]]
    sums = torch.stack([(ours - packed).square().sum(), packed.square().sum()])
    wire.add_up(sums)
    difference = float((sums[0] / sums[1]).sqrt())
    if not difference <= CUT_LIMIT[embedding.dtype]:
        raise ModelError(
            f"{name}: hidden states of a row cut over {wire.size} ranks differ from the whole row's by {difference:.3g} of their size (at "
            f"most {CUT_LIMIT[embedding.dtype]:g} is rounding); {type(backbone).__name__} cannot be cut, set --ds.ring-attn-size 1"
        )
