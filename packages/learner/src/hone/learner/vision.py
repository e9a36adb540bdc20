"""Images of packed rows through a vision-language model: files in, what its forward is told of a micro-batch out.

Flow: Attachment --image processor (here, on the CPU)--> patches --vision tower, once a micro-batch--> features, which stand in
for the embeddings of the attachment's tokens. Every token has three positions (time, height, width), reckoned in its row alone.
T tokens of the micro-batch.
"""

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hone.algos.batch import Attachment
from hone.learner.attention.varlen import PACKED
from hone.learner.errors import ModelError

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""`model_type` of the models whose images are understood: features in the place of one repeated token, positions of three axes."""
KEPT = 64
"""Processed images a rank keeps: a step asks for each at least three times, and the samples of a prompt share theirs."""

Attached = Sequence[Sequence[Attachment]]


def sees(config: Any) -> bool:
    """Whether images can be shown to a model with this configuration."""
    return config.model_type in FAMILIES


def attention(config: Any) -> str | dict[str, str]:
    """Attention of packed rows for the language model; a vision tower has rows of its own, and attends to them both ways."""
    return {"text_config": PACKED, "vision_config": "sdpa"} if sees(config) else PACKED


class Sight:
    """The image processor that a vision-language model in `directory` came with. Raises ModelError where there is none."""

    def __init__(self, directory: Path, config: Any) -> None:
        from transformers import AutoImageProcessor

        try:
            self._processor = AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"{directory} is a vision-language model without a usable image processor ({str(error).strip().partition(chr(10))[0]}); "
                "copy preprocessor_config.json (or processor_config.json) of the model into it, and install hone-learner[vision]"
            ) from error
        self.processed = functools.lru_cache(maxsize=KEPT)(self._processed)
        self.blank = _blank()

    def _processed(self, data: bytes) -> tuple[Tensor, Tensor]:
        """Patches [P, values of a patch] of an image, and their grid [1, 3]."""
        from PIL import Image

        seen = self._processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")
        return seen["pixel_values"], seen["image_grid_thw"]

    def inputs(
        self,
        backbone: Any,
        tokens: Int[Tensor, " T"],
        position_ids: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " N_plus_1"],
        attached: Attached,
    ) -> dict[str, Any]:
        """Keyword arguments for the forward of the language model in `backbone`: embeddings with the images' features, positions.

        Without an image the tower is shown a blank one, which adds nothing: every rank must run the same modules, for a sharded
        one is gathered by all ranks together, and every parameter of the tower has a gradient, if of zero. An image token that
        no attachment speaks of is one the policy wrote, and is embedded as such. Raises ValueError where an attachment has
        another number of tokens than its image has features.
        """
        starts = cu_seqlens.tolist()
        shown = sorted(((starts[row] + one.start, one) for row, of_row in enumerate(attached) for one in of_row), key=lambda pair: pair[0])
        pictures = [self.processed(one.data) for _, one in shown] or [self.processed(self.blank)]
        pixels = torch.cat([patches for patches, _ in pictures]).to(tokens.device)
        grids = torch.cat([grid for _, grid in pictures])
        seen = backbone.get_image_features(pixels, grids.to(tokens.device), return_dict=True)
        features = torch.cat(seen.pooler_output)
        # Some towers have features for the first layers of the language model, too.
        deep = [torch.cat(level) for level in getattr(seen, "deepstack_features", None) or ()]
        embeddings = backbone.get_input_embeddings()(tokens)[None]
        if not shown:
            # An empty sum is zero whatever the features are, and still hangs on the graph.
            embeddings = embeddings + sum(part[:0].sum() for part in (features, *deep))
            return {"inputs_embeds": embeddings, "position_ids": position_ids.expand(3, 1, -1)}
        for (place, one), of_image in zip(shown, seen.pooler_output, strict=True):
            if len(of_image) != one.count:
                raise ValueError(
                    f"the image at token {place} of the micro-batch has {len(of_image)} features for {one.count} tokens: the learner's "
                    "image processor differs from the one that tokenised the prompt; give all roles the same model's processor"
                )
        places = torch.cat([torch.arange(place, place + one.count) for place, one in shown]).to(tokens.device)
        arguments = {
            "inputs_embeds": embeddings.index_copy(1, places, features[None].to(embeddings.dtype)),
            "position_ids": self._positions(backbone, position_ids, starts, attached, grids),
        }
        if deep:
            arguments |= {"visual_pos_masks": torch.zeros_like(tokens, dtype=torch.bool).index_fill(0, places, True)[None]}
            arguments |= {"deepstack_visual_embeds": deep}
        return arguments

    def _positions(
        self, backbone: Any, position_ids: Int[Tensor, " T"], starts: Sequence[int], attached: Attached, grids: Int[Tensor, "I 3"]
    ) -> Int[Tensor, "3 1 T"]:
        """The model's own positions of each row with images, as if it were alone; a row without has the same one on all axes."""
        positions = position_ids.expand(3, 1, -1).clone()
        first = 0
        for row, of_row in enumerate(attached):
            if not of_row:
                continue
            length = starts[row + 1] - starts[row]
            kinds = torch.zeros(1, length, dtype=torch.int)
            for one in of_row:
                kinds[0, one.start : one.start + one.count] = 1
            ids, own = torch.zeros(1, length, dtype=torch.long), grids[first : first + len(of_row)]
            found, _ = backbone.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=own)
            positions[:, :, starts[row] : starts[row + 1]] = found.to(positions.device)
            first += len(of_row)
        return positions


def _blank() -> bytes:
    """A small grey picture."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 48), (127, 127, 127)).save(file, format="PNG")
    return file.getvalue()
