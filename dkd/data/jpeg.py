"""Decode JPEG files by the fastest decoder whose pixels equal Pillow's, bit for bit.

Pillow is the reference for which files can be read, how images are turned, and every pixel. Where simplejpeg is
installed (the extra `fast`) and its libjpeg-turbo decodes the trial images below to the same bits as Pillow,
simplejpeg decodes the files of the kinds that were tried. Pillow decodes all other files: grayscale and CMYK, other
samplings, and damaged files.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

Decode = Callable[[bytes], np.ndarray]
"""A function from a JPEG file's content to uint8 (H, W, 3), RGB. Raises ValueError for anything unusual in the file."""

_SOI = b"\xff\xd8"
_BASELINE, _PROGRESSIVE, _SCAN = 0xC0, 0xC2, 0xDA
_TABLES = (0xC4, 0xDB, 0xFE)  # Huffman tables, quantisation tables, comments
_RESTARTS, _JFIF, _ADOBE = 0xDD, 0xE0, 0xEE


class Kind(NamedTuple):
    """Hold the features of a file that decide which code decodes it."""

    progressive: bool
    """Whether the scans are progressive."""
    sampling: tuple[int, ...]
    """Sampling of the three components, as written in the frame header: 0x22 is 2 by 2."""
    restarts: bool
    """Whether the file has restart markers."""
    colours: str
    """The marker that declares the colours to be YCbCr: `JFIF`, `Adobe`, or nothing (the default)."""


class Header(NamedTuple):
    """Hold the header of a JPEG file of three components of 8 bits."""

    kind: Kind
    """Features that decide which code decodes the file."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    plain: bool
    """Whether the only metadata is JFIF's: then nothing turns the image, and there is nothing that Pillow might
    refuse."""


@dataclass(frozen=True)
class JpegDecoder:
    """Decode the JPEG files of this process, or leave them to Pillow."""

    name: str
    """Name and version of the decoder; where it is Pillow, with the reason."""
    decode: Decode | None
    """The decoding function; None where Pillow decodes all files."""
    kinds: frozenset[Kind] = frozenset()
    """Kinds of files whose pixels have been compared."""

    def header(self, content: bytes) -> Header | None:
        """Return the header of a file that `pixels` may decode; None for a file that Pillow must decode."""
        header = read_header(content) if self.decode is not None else None
        if header is None or header.kind not in self.kinds:
            return None
        limit = Image.MAX_IMAGE_PIXELS  # above it, Pillow warns or refuses
        return header if limit is None or header.width * header.height <= limit else None

    def pixels(self, content: bytes, header: Header) -> np.ndarray | None:
        """Decode a file to uint8 (H, W, 3). Returns None where something in the file is unusual: Pillow then decides
        whether the file can be read."""
        assert self.decode is not None
        try:
            pixels = self.decode(content)
        except MemoryError:
            raise
        except Exception:  # Pillow decodes next, and its error states what is wrong
            return None
        return pixels if pixels.shape == (header.height, header.width, 3) else None


def read_header(content: bytes) -> Header | None:
    """Read a file's header. Returns None for anything but a well-formed header of three components of 8 bits."""
    if content[:2] != _SOI:
        return None
    position, frame, restarts, jfif, adobe, plain = 2, None, False, False, -1, True
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker, length = content[position + 1], int.from_bytes(content[position + 2 : position + 4], "big")
        segment = content[position + 4 : position + 2 + length]
        if length < 2 or len(segment) != length - 2:
            return None
        if marker == _SCAN:
            if frame is None or (adobe != 1 and adobe >= 0 and not jfif):
                return None
            progressive, sampling, height, width = frame
            colours = "JFIF" if jfif else "Adobe" if adobe >= 0 else ""
            return Header(Kind(progressive, sampling, restarts, colours), height, width, plain)
        if marker in (_BASELINE, _PROGRESSIVE):
            # Precision, height, width, number of components; of each its name, sampling and table.
            if frame is not None or length != 17 or segment[0] != 8 or segment[5] != 3 or segment[6:15:3] != b"\1\2\3":
                return None
            height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            if height == 0 or width == 0:
                return None
            frame = marker == _PROGRESSIVE, tuple(segment[7:15:3]), height, width
        elif marker == _RESTARTS:
            restarts = restarts or segment != b"\0\0"
        elif marker == _JFIF and segment[:5] == b"JFIF\0" and len(segment) >= 14:
            jfif = True
        elif marker == _ADOBE and segment[:5] == b"Adobe" and len(segment) >= 12:
            adobe, plain = segment[11], False
        elif 0xE0 <= marker <= 0xEF:
            plain = False
        elif marker not in _TABLES:
            return None
        position += 2 + length
    return None


@functools.cache
def jpeg_decoder() -> JpegDecoder:
    """Return the decoder of JPEG files for this process, which is chosen once, by decoding the trial images."""
    pillow = f"Pillow {PIL.__version__}"
    try:
        import simplejpeg
    except ImportError:
        return JpegDecoder(f"{pillow} (simplejpeg is not installed)", None)

    def decode(content: bytes) -> np.ndarray:
        # Pillow uses the exact DCT and the smooth upsampling; `strict` turns warnings into errors.
        pixels: np.ndarray = simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, strict=True)
        return pixels

    name = f"simplejpeg {getattr(simplejpeg, '__version__', '')}".strip()
    kinds = tried_kinds(decode)
    if isinstance(kinds, str):
        return JpegDecoder(f"{pillow} ({name} is not used: {kinds})", None)
    return JpegDecoder(f"{name}, pixels as by {pillow}", decode, kinds)


def tried_kinds(decode: Decode) -> frozenset[Kind] | str:
    """Return the kinds of the trial images when all are decoded to Pillow's pixels, else the reason why this decoder
    cannot be used."""
    kinds = set()
    try:
        for content in trial_images():
            header = read_header(content)
            if header is None:  # the encoder writes something else
                continue
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
                wanted = np.asarray(image.convert("RGB"))
            if not np.array_equal(decode(content), wanted):
                size = f"{header.width}×{header.height}"
                return f"its pixels differ from Pillow's, first in a trial image of {size}, {header.kind}"
            kinds.add(header.kind)
    except Exception as error:  # any error of either library is a reason to stay with Pillow
        return f"a trial image cannot be decoded: {type(error).__name__}: {error}"
    return frozenset(kinds)


def trial_images() -> Iterator[bytes]:
    """Yield JPEG files in which decoders can differ: odd sizes, each sampling, coarse and fine quantisation of noise
    that overflows, progressive scans, restart markers, and the three ways to declare YCbCr colours."""
    generator = np.random.default_rng(0)
    ways: list[dict[str, Any]] = [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 2},
        {"progressive": True, "restart_marker_rows": 1},
    ]
    sizes = (1, 1), (9, 7), (16, 16), (33, 18), (70, 47), (157, 39)
    for number, (width, height) in enumerate(sizes):
        pixels = generator.integers(0, 2, (height, width, 3)) * 255
        smooth = (
            np.linspace(0, 255, width)[None, :, None]
            * np.linspace(1, 0.2, height)[:, None, None]
            * np.array([1.0, 0.7, 0.3])
        )
        pixels = np.where(np.arange(width)[None, :, None] < 0.6 * width, smooth, pixels).astype(np.uint8)
        for sampling in (0, 1, 2):
            for way in ways:
                file = io.BytesIO()
                Image.fromarray(pixels).save(
                    file, "JPEG", quality=(40, 75, 95)[(number + sampling) % 3], subsampling=sampling, **way
                )
                content = file.getvalue()
                yield content
                if (width, height) == sizes[-1] and content[2:4] == b"\xff\xe0":
                    # The same file without JFIF's marker, and with Adobe's (transform 1) in its place.
                    rest = content[4 + int.from_bytes(content[4:6], "big") :]
                    yield _SOI + rest
                    yield _SOI + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + rest
