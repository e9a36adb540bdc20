"""Images of prompts: a value of the data into a Picture, looked at before any model is, and a Picture into the bytes a policy is shown.

A value is a path (relative ones begin at the data's file), "data:image/png;base64,...", base64, bytes, a PIL image, or one of
Hugging Face's and verl's objects {"bytes": ..., "path": ...}. Nothing is fetched by URL.
"""

import base64
import binascii
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hone.datasets.errors import DataError, shown

if TYPE_CHECKING:
    from PIL import Image

WRITTEN_AS = 'write a path, a data URI, or {"path": ...} or {"bytes": ...}'
UPRIGHT = 1
"""EXIF's word for an image whose first row is its top."""
SHORTEST_BASE64 = 64
"""Characters below which a text that is no file is taken for a path mistyped: no image is as short."""


class BadImageError(Exception):
    """What is wrong with an image (`what`), how to mend it, and this image's own part."""

    def __init__(self, what: str, remedy: str, detail: str) -> None:
        super().__init__(f"{what}: {detail}")
        self.what, self.remedy, self.detail = what, remedy, detail


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image: the file it lies in, or its bytes; its upright size [pixels]; `plain` if it is shown as it lies.

    What is not plain is turned upright as its EXIF says, or laid over white where it is transparent.
    """

    source: Path | bytes
    digest: str
    width: int
    height: int
    plain: bool

    def encoded(self) -> bytes:
        """The bytes of an image file, upright and opaque. Raises DataError for a file that has changed since it was looked at."""
        data = _read(self.source)
        if _digest(data) != self.digest:
            raise DataError(f"the image {self.source} is not what it was when the data was read; leave the files alone during a run")
        if self.plain:
            return data
        file = io.BytesIO()
        _settled(_opened(data)).save(file, format="PNG")
        return file.getvalue()


def picture(value: object, *, folder: Path) -> Picture:
    """The image a value of the data means, decoded once to see that it can be. Raises BadImageError."""
    source = _source(value, folder)
    data = _read(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", _pil().DecompressionBombWarning)
            image = _opened(data)
            image.load()
    except (OSError, ValueError, SyntaxError, _pil().DecompressionBombWarning, _pil().DecompressionBombError) as error:
        reason = "not an image in a format that is known" if "cannot identify" in str(error) else str(error)
        raise BadImageError("an image that cannot be read", "replace it, or delete the rows", f"{_name(value)}: {reason}") from error
    settled = _settled(image)
    return Picture(source=source, digest=_digest(data), width=settled.width, height=settled.height, plain=settled is image)


def _source(value: object, folder: Path) -> Path | bytes:
    if isinstance(value, Mapping):
        for name in ("bytes", "image", "path", "image_url", "url"):
            if value.get(name) is not None:
                inner = value[name]
                return _source(base64_bytes(inner) if name == "bytes" and isinstance(inner, str) else inner, folder)
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, str) and value.strip():
        return _of_text(value, folder)
    if _is_pil(value):
        file = io.BytesIO()
        value.save(file, format="PNG")  # pyright: ignore[reportAttributeAccessIssue] - a PIL image
        return file.getvalue()
    raise BadImageError("a value that is no image", WRITTEN_AS, shown(value))


def _of_text(text: str, folder: Path) -> Path | bytes:
    if text.startswith(("http://", "https://", "s3://", "gs://", "ftp://")):
        remedy = "download it and name the file: what a data set says is not fetched during a run"
        raise BadImageError("an image by URL", remedy, shown(text))
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadImageError("a data URI that is not base64", "write data:image/png;base64,...", shown(text))
        return base64_bytes(body)
    path = folder / Path(text.removeprefix("file://")).expanduser()
    if len(text) < SHORTEST_BASE64 or text.startswith("file://"):
        if not path.is_file():
            raise BadImageError("an image file that is not there", "mend the path; relative ones begin at the data's file", str(path))
        return path
    try:
        if path.is_file():
            return path
    except OSError:  # longer than a name can be
        return base64_bytes(text)
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        remedy = "mend the path; relative ones begin at the data's file"
        raise BadImageError("an image file that is not there", remedy, str(path)) from error


def base64_bytes(text: str) -> bytes:
    """The bytes that `text` is the base64 of. Raises BadImageError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImageError("an image that is not base64", WRITTEN_AS, f"{shown(text)}: {error}") from error


def _read(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise BadImageError("an image file that cannot be read", "mend its permissions", f"{source}: {error.strerror}") from error


def _settled(image: "Image.Image") -> "Image.Image":
    """Upright and opaque; the same object where it is already."""
    from PIL import Image, ImageOps

    if image.getexif().get(274, UPRIGHT) != UPRIGHT:  # 274: EXIF's tag of the orientation
        image = ImageOps.exif_transpose(image).convert("RGBA" if image.has_transparency_data else "RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image


def _opened(data: bytes) -> "Image.Image":
    return _pil().open(io.BytesIO(data))


def _pil():
    from PIL import Image

    return Image


def _is_pil(value: object) -> bool:
    return isinstance(value, _pil().Image)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _name(value: object) -> str:
    return shown(value)
