"""Placeholders: the one that a template writes for an image becomes as many as the model has features of it.

The model's processor would do the same and process every picture on the way; here only sizes are looked at, and the first row
with images is held against the processor's own ids.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hone.datasets.errors import BadRow, TokenizerError, shown
from hone.datasets.records import PromptRow

if TYPE_CHECKING:
    import transformers


class Expander:
    """Of one processor; `name` is the model's, for messages."""

    def __init__(self, processor: "transformers.ProcessorMixin", *, name: str) -> None:
        self._processor: Any = processor
        self._name = name
        self._image_token = int(self._processor.image_token_id)
        self._proven = False

    def expanded(self, ids: Sequence[int], row: PromptRow, text: str) -> tuple[list[int], list[tuple[int, int]]] | BadRow:
        """The ids with every image's placeholders, and (first place, count) of each; or what is wrong with the row.

        Raises TokenizerError where the processor itself comes to other ids.
        """
        found = sum(id_ == self._image_token for id_ in ids)
        if found != len(row.images):
            remedy = "take the model's image token out of the rows, or use a chat template that writes it once for each image part"
            detail = f"{found} image tokens for {len(row.images)} images, rendered {shown(text)}"
            return BadRow(
                what="the rendered prompt has another number of image tokens than images", remedy=remedy, line=row.line, detail=detail
            )
        if not row.images:
            return [*ids], []
        counts: list[int] = []
        for image in row.images:
            try:
                counts.append(self._count(image.width, image.height))
            except ValueError as error:
                detail = f"{image.width} x {image.height} pixels: {error}"
                return BadRow(
                    what=f"an image that the processor of {self._name!r} refuses",
                    remedy="replace it, or delete the rows",
                    line=row.line,
                    detail=detail,
                )
        tokens: list[int] = []
        places: list[tuple[int, int]] = []
        for id_ in ids:
            count = counts[len(places)] if id_ == self._image_token else 1
            if id_ == self._image_token:
                places.append((len(tokens), count))
            tokens += [id_] * count
        if not self._proven:
            self._prove(tokens, row, text)
        return tokens, places

    def _count(self, width: int, height: int) -> int:
        """Features the model has of an image of this size."""
        images = self._processor.image_processor
        return images.get_number_of_image_patches(height, width, {}) // images.merge_size**2

    def _prove(self, tokens: Sequence[int], row: PromptRow, text: str) -> None:
        from PIL import Image

        pictures = [Image.open(io.BytesIO(image.encoded())).convert("RGB") for image in row.images]
        own = self._processor(text=[text], images=pictures, add_special_tokens=False)["input_ids"][0]
        if list(own) != list(tokens):
            raise TokenizerError(
                f"the processor of {self._name!r} makes {len(own)} ids of line {row.line} where its tokenizer and the images' sizes give "
                f"{len(tokens)}; its image processor is of a kind that is not understood here: use another model"
            )
        self._proven = True
