"""Images of prompts and observations: files decoded, ids in which an image is one placeholder, and as many as it has features."""

import functools
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hone.algos.batch import Attachment

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT = 64
"""Decoded images a process keeps; the samples of a prompt share theirs."""
_ORIENTATION, _UPRIGHT = 274, 1
"""EXIF's tag, and its word for an image whose first row is its top."""


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


class Placeholders:
    """Puts as many placeholders in the place of one as a model has features of the image; `image_token` is that placeholder's id."""

    def __init__(self, image_processor: Any, *, image_token: int) -> None:
        self._images, self._token = image_processor, image_token

    def expanded(self, ids: Sequence[int], images: Sequence[object], *, start: int) -> tuple[list[int], list[Attachment]]:
        """The ids of a text, and its images with their places in a row where the text begins at `start`.

        Raises ValueError for ids that have another number of placeholders than there are images, and for what is no image.
        """
        found = sum(id_ == self._token for id_ in ids)
        if found != len(images):
            raise ValueError(
                f"{len(images)} images for {found} image tokens in the text; write the model's markup of an image once for each"
            )
        tokens: list[int] = []
        attached: list[Attachment] = []
        for id_ in ids:
            count = 1
            if id_ == self._token:
                data = encoded(images[len(attached)])
                count = self._count(data)
                attached.append(Attachment(start=start + len(tokens), count=count, data=data))
            tokens += [id_] * count
        return tokens, attached

    def _count(self, data: bytes) -> int:
        from PIL import Image

        width, height = Image.open(io.BytesIO(data)).size
        return self._images.get_number_of_image_patches(height, width, {}) // self._images.merge_size**2


def encoded(image: object) -> bytes:
    """The bytes of an image file, upright and opaque; of equal ones the same object, while it is kept.

    Given are such bytes, a PIL image, an array [height, width, 3] of bytes, or a path. Raises ValueError.
    """
    from PIL import Image

    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if isinstance(image, bytes):
        try:
            return _settled(image)
        # What Pillow raises of broken files, besides its own, and of those with too many pixels.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
            known = str(error) if "cannot identify" not in str(error) else "not an image in a format that is known"
            raise ValueError(f"an image that cannot be read: {known}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"{image!r:.200} ({type(image).__name__}) is no image; give a file's bytes, a path, a PIL image or an array of bytes"
        )
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG")
    return file.getvalue()


@functools.lru_cache(maxsize=KEPT)
def _settled(data: bytes) -> bytes:
    """The file as it is, unless its EXIF turns it or something shines through: then a PNG of what is seen, on white."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(data))
    image.load()
    turned = image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT
    if not turned and not image.has_transparency_data:
        return data
    seen = ImageOps.exif_transpose(image).convert("RGBA")
    file = io.BytesIO()
    Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB").save(file, format="PNG")
    return file.getvalue()
