"""Whether a model's rows can be packed: tried out once as it is loaded, against transformers' own forward of each row alone."""

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from hone.algos.batch import Attachment
from hone.learner.errors import ModelError
from hone.learner.vision import attention

if TYPE_CHECKING:
    from hone.learner.model import PolicyModel

PROBE_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest mean log-probability difference [nats] to transformers' own forward that rounding explains."""


@torch.no_grad()
def check_packed(model: "PolicyModel", name: str, dtype: torch.dtype) -> None:
    """Two short rows packed, through our attention and head, against each alone; the second has an image where the model sees."""
    device, causal_lm = model.head.weight.device, model.causal_lm
    rows, attached, shown = _rows(model)
    lengths = [len(row) for row in rows]
    tokens = torch.tensor([token for row in rows for token in row], device=device)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])
    model.eval()
    try:
        packed, _ = model(tokens, position_ids, cu_seqlens, torch.ones_like(tokens, dtype=torch.bool), 1.0, False, attached=attached)
    except ValueError as error:
        raise ModelError(f"{name}: {error}; this architecture ({type(causal_lm).__name__}) is not supported") from error
    causal_lm.set_attn_implementation("eager")
    expected = []
    for row, images in zip(tokens.split(lengths), shown, strict=True):
        logits = causal_lm(input_ids=row[None], use_cache=False, **images).logits[0].float()
        expected.append(logits[:-1].log_softmax(-1).gather(1, row[1:, None])[:, 0])
    causal_lm.set_attn_implementation(attention(causal_lm.config))
    ours = torch.cat([row[1:] for row in packed.split(lengths)])
    difference = float((ours - torch.cat(expected)).abs().mean())
    if not difference <= PROBE_LIMIT[dtype]:
        raise ModelError(
            f"{name}: log-probabilities over packed rows differ from transformers' own by {difference:.3g} nats (at most "
            f"{PROBE_LIMIT[dtype]:g} is rounding); {type(causal_lm).__name__} does something that packing "
            "does not reproduce, use another model"
        )


def _rows(model: "PolicyModel") -> tuple[list[list[int]], list[tuple[Attachment, ...]], list[dict[str, Any]]]:
    """Rows of token ids, what is attached to each, and the same as transformers' own forward is told it."""
    config, device = model.causal_lm.config, model.head.weight.device
    marks = () if model.sight is None else (config.image_token_id, config.video_token_id)
    ids = ((7919 * index + 1) % model.head.weight.shape[0] for index in range(64))
    words = [id_ for id_ in ids if id_ not in marks]
    if model.sight is None:
        return [words[:4], words[4:9]], [], [{}, {}]
    patches, grid = (tensor.to(device) for tensor in model.sight.processed(model.sight.blank))
    count = int(grid.prod()) // config.vision_config.spatial_merge_size**2
    row = [*words[4:6], *[config.image_token_id] * count, *words[6:9]]
    kinds = torch.tensor([[int(token == config.image_token_id) for token in row]], device=device)
    shown = {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    return [words[:4], row], [(), (Attachment(start=2, count=count, data=model.sight.blank),)], [{}, shown]
