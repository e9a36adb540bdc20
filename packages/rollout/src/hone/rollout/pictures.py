"""Images of prompts for engines: files decoded, and ids in which an image is one placeholder."""

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hone.algos.batch import Attachment

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 64
"""Decoded images a process keeps; the samples of a prompt share theirs."""


def sees(model: str) -> bool:
    """Whether the model in a directory, or of a hub id, has a vision tower; of its configuration alone."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(model, trust_remote_code=False), "vision_config", None) is not None


def decoded(images: Sequence[Attachment]) -> list["Image"]:
    """The pictures, in order."""
    return [_decoded(one.data) for one in images]


@functools.lru_cache(maxsize=KEPT)
def _decoded(data: bytes) -> "Image":
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def collapsed(tokens: Sequence[int], images: Sequence[Attachment]) -> list[int]:
    """The ids with one placeholder for each image, as a processor is given them that puts in the others itself."""
    ids: list[int] = []
    end = 0
    for one in images:
        ids += tokens[end : one.start + 1]
        end = one.start + one.count
    return [*ids, *tokens[end:]]


def processed(processor: Any, images: Sequence[Attachment]) -> dict[str, Any]:
    """What a model's forward is told of the images: patches, and their grids."""
    seen = processor(images=decoded(images), return_tensors="pt")
    return {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}
