"""Images as rows name them: a path, bytes, a data URL, an image of the ``datasets`` library; opened late, checked early."""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageOps

from nemo_automodel.errors import DataError

_ROTATED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112


class BadImageError(DataError):
    """An image that is not there, or cannot be read."""


def size_of(image: Any, folder: Path | None, where: str) -> tuple[int, int]:
    """(width, height) of ``image`` as ``load_image`` gives it, read from its header alone."""
    opened = _open(image, folder, where)
    width, height = opened.size
    return (height, width) if _orientation(opened) in _ROTATED else (width, height)


def _orientation(opened: Image.Image) -> Any:
    """EXIF's, from the header: ``getexif`` would decode a whole PNG."""
    exif = Image.Exif()
    if isinstance(written := opened.info.get("exif"), bytes):
        exif.load(written)
    return exif.get(_ORIENTATION) or dict(getattr(opened, "tag_v2", None) or {}).get(_ORIENTATION)


def load_image(image: Any, folder: Path | None, where: str) -> Image.Image:
    """``image`` decoded, in RGB and the right way up.

    Args:
        image: a path (relative to ``folder``), ``{bytes, path}``, a data URL, raw bytes or a PIL image.
        folder: what relative paths are relative to; None: the working directory.
        where: where the row stands, for messages.

    Raises:
        BadImageError: it is not there, is no image, or is damaged.
    """
    opened = _open(image, folder, where)
    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"{where}: {_name(image)} is damaged ({error}); {_FIX}") from None


_FIX = "replace it, take the row out, or set dataset.on_bad_image: skip to leave such rows out"


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """``dataset`` with its Image columns given as ``{bytes, path}``, so that reading a row decodes nothing."""
    features = _without_decoding(dataset.features)
    return dataset.cast(datasets.Features(features)) if features != dict(dataset.features) else dataset


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {key: _without_decoding(value) for key, value in feature.items()}
    if isinstance(feature, list):
        return [_without_decoding(value) for value in feature]
    inner = getattr(feature, "feature", None)
    if inner is not None and _without_decoding(inner) != inner:
        return type(feature)(_without_decoding(inner), length=getattr(feature, "length", -1))
    return feature


def _open(image: Any, folder: Path | None, where: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    content = _content(image, folder, where)
    try:
        return Image.open(content)
    except FileNotFoundError:
        raise BadImageError(f"{where}: image {content} does not exist; {_FIX}") from None
    except IsADirectoryError:
        raise BadImageError(f"{where}: image {content} is a directory; {_FIX}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image that can be read" if "cannot identify" in str(error) else str(error)
        raise BadImageError(f"{where}: {_name(image)} is {reason}; {_FIX}") from None


def _content(image: Any, folder: Path | None, where: str) -> Any:
    """Something that PIL opens: a path, or a file in memory."""
    if isinstance(image, dict):
        given = image.get("bytes") or image.get("path")
        if given is None:
            raise BadImageError(f"{where}: an image with neither bytes nor path; {_FIX}")
        image = given
    if isinstance(image, bytes | bytearray):
        return io.BytesIO(image)
    if not isinstance(image, str):
        raise DataError(
            f"{where}: an image must be a path, bytes or {{bytes, path}}, got {type(image).__name__}: {str(image)[:60]!r}"
        )
    if match := re.match(r"data:image/[\w.+-]+;base64,", image):
        try:
            return io.BytesIO(base64.b64decode(image[match.end() :], validate=True))
        except binascii.Error as error:
            raise BadImageError(f"{where}: a data URL that is not base64 ({error}); {_FIX}") from None
    if (path := local_path(image, folder)) is None:
        raise DataError(f"{where}: {image[:80]} is on the network; download the images and write their paths")
    return path


def local_path(image: Any, folder: Path | None) -> Path | None:
    """The file that ``image`` names; None where it names none: bytes, a data URL, something on the network."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str) or re.match(r"data:image/[\w.+-]+;base64,|(?!file://)[a-z]+://", image):
        return None
    path = Path(image.removeprefix("file://")).expanduser()
    return path if path.is_absolute() or folder is None else folder / path


def _name(image: Any) -> str:
    if isinstance(image, dict):
        image = image.get("path")
    return f"image {image[:120]}" if isinstance(image, str) and not image.startswith("data:") else "an image"
