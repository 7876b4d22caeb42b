"""Decode image files and Pillow images to uint8 tensors (3, H, W)."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dkd.data.jpeg import jpeg_decoder
from dkd.data.sources.base import DataError

# Formats that data sets have. Pillow would try all of its formats by content, among them EPS, which Pillow hands to
# Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ORIENTATION = 0x0112  # EXIF's tag


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image file by Pillow, in one of the formats that data sets have. Raises what Pillow raises."""
    return Image.open(file, formats=_FORMATS)


def to_rgb_tensor(image: Image.Image) -> torch.Tensor:
    """Return uint8 (3, H, W), a view of rows of RGB pixels, turned by the image's EXIF orientation.

    Grayscale of 8 or 16 bits, palette and CMYK become RGB; alpha is dropped.

    Raises:
        ValueError: the pixels are 32-bit numbers.
    """
    upright = ImageOps.exif_transpose(image) if image.getexif() else image
    if upright.mode.startswith("I;16"):
        # Pillow would cut 16 bits to 8 instead of scaling them.
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {upright.mode}), whose range is not known; store 8 or 16 bits"
        )
    return _view_channels_first(np.array(upright if upright.mode == "RGB" else upright.convert("RGB")))


def _view_channels_first(pixels: np.ndarray) -> torch.Tensor:
    """View uint8 (H, W, 3) as (3, H, W): a transposed copy would cost half as much as decoding, and resizing would
    transpose the copy back."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_pixels(content: bytes) -> torch.Tensor:
    """Decode an image file's content to uint8 (3, H, W), to the same pixels as `to_rgb_tensor` of Pillow's image.
    Raises what Pillow raises."""
    decoder = jpeg_decoder()
    header = decoder.header(content)
    if header is not None and header.plain:
        pixels = decoder.pixels(content, header)
        if pixels is not None:
            return _view_channels_first(pixels)
    with open_image(io.BytesIO(content)) as image:
        if (
            header is not None
            and not header.plain
            and image.format == "JPEG"
            and image.getexif().get(_ORIENTATION, 1) == 1
        ):
            pixels = decoder.pixels(content, header)
            if pixels is not None:
                return _view_channels_first(pixels)
        return to_rgb_tensor(image)


def decode_cell(
    name: str, index: int, encoded: Mapping[str, Any] | bytes | None, folder: str | None = None
) -> torch.Tensor:
    """Decode a cell of an image column, encoded bytes or {bytes, path}, to uint8 (3, H, W).

    Args:
        name, index: the data set and the row, for the error's message.
        encoded: the cell.
        folder: the data set's folder, the only place where a path without bytes may lead; None: nowhere.

    Raises:
        DataError: the cell is null or its image cannot be read; the message names the image.
    """
    cell: Mapping[str, Any] = {"bytes": encoded, "path": None} if isinstance(encoded, bytes) else encoded or {}
    content: bytes | None = cell.get("bytes")
    path: str | None = cell.get("path")
    if content is None and path is None:
        raise DataError(f"{name}: image {index} is null")
    with naming_errors(f"{name}: image {index} ({path or 'no name'})"):
        return decode_pixels(_read_inside(path or "", folder) if content is None else content)


def _read_inside(path: str, folder: str | None) -> bytes:
    """Read the file that a cell names instead of holding the file's content. A data set may come from anybody: it must
    not choose which files of this machine are opened. Raises ValueError for a path that leads out of the data set's
    folder, also where it does so by links."""
    if folder is None:
        raise ValueError(
            "its cell holds a path and no bytes, and this kind of data set has no folder for it; store the images' "
            "bytes"
        )
    top = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(top, path))
    if os.path.commonpath([top, real]) != top:
        raise ValueError(
            f"its cell holds no bytes and a path that leads out of the data set's folder {folder!r}; store the images' "
            "bytes"
        )
    return read_file(real)


def read_file(path: str) -> bytes:
    """Read a regular file. Raises OSError, and ValueError for anything else than a regular file: reading a pipe could
    wait forever."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        return file.read()


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Turn whatever is raised inside, except MemoryError, into a DataError that names the image: Pillow raises errors
    of many kinds for damaged images.

    Args:
        what: the image, in words.
    """
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{what} cannot be read: it is no image in a known format") from error
    except Exception as error:
        raise DataError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
