"""Decodes JPEG files by the fastest decoder whose pixels are Pillow's, bit for bit.

Pillow is the reference: which files can be read, how they are turned, and every pixel. Where simplejpeg is installed
(`pip install 'dkd[fast]'`) and its libjpeg-turbo decodes the trial images below to the same bits as Pillow's, it
decodes the files that are of the kinds tried. All others go to Pillow: grayscale and CMYK, other samplings, whatever is
damaged.
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
"""Maps a JPEG file's content to uint8 (H, W, 3), RGB. Raises ValueError for anything unusual in it."""

_SOI = b"\xff\xd8"
_BASELINE, _PROGRESSIVE, _SCAN = 0xC0, 0xC2, 0xDA
_TABLES = (0xC4, 0xDB, 0xFE)  # Huffman tables, quantisation tables, comments
_RESTARTS, _JFIF, _ADOBE = 0xDD, 0xE0, 0xEE


class Kind(NamedTuple):
    """Tells what of a file decides which code decodes it."""

    progressive: bool
    sampling: tuple[int, ...]
    """Holds the sampling of the three components as the frame header writes it: 0x22 is 2 by 2."""
    restarts: bool
    colours: str
    """Names what says that colours are YCbCr: `JFIF`, `Adobe`, or nothing (the default)."""


class Header(NamedTuple):
    """Holds what the header of a JPEG file of three components of 8 bits says."""

    kind: Kind
    height: int
    width: int
    plain: bool
    """Tells that there is no metadata but JFIF's: nothing that turns the image, and nothing that Pillow might
    refuse."""


@dataclass(frozen=True)
class JpegDecoder:
    """Decodes the JPEG files of this process, or leaves them to Pillow."""

    name: str
    """Names the decoder with its version, and where that is Pillow, the reason."""
    decode: Decode | None
    """Is None where Pillow decodes all files."""
    kinds: frozenset[Kind] = frozenset()
    """Holds the kinds of files whose pixels have been compared."""

    def header(self, content: bytes) -> Header | None:
        """Read the header of a file that `pixels` may decode. Returns None for a file that Pillow is to decode."""
        header = read_header(content) if self.decode is not None else None
        if header is None or header.kind not in self.kinds:
            return None
        limit = Image.MAX_IMAGE_PIXELS  # above it, Pillow warns or refuses
        return header if limit is None or header.width * header.height <= limit else None

    def pixels(self, content: bytes, header: Header) -> np.ndarray | None:
        """Decode a file to uint8 (H, W, 3). Returns None where something in it is unusual: Pillow then tells whether it
        can be read."""
        assert self.decode is not None
        try:
            pixels = self.decode(content)
        except MemoryError:
            raise
        except Exception:  # Pillow, which is asked next, says what is wrong
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
    """Return what decodes JPEG files in this process. It is chosen once, by decoding the trial images."""
    pillow = f"Pillow {PIL.__version__}"
    try:
        import simplejpeg
    except ImportError:
        return JpegDecoder(f"{pillow} (simplejpeg is not installed)", None)

    def decode(content: bytes) -> np.ndarray:
        # The exact DCT and the smooth upsampling, as Pillow's; `strict` turns warnings into errors.
        pixels: np.ndarray = simplejpeg.decode_jpeg(content, "RGB", fastdct=False, fastupsample=False, strict=True)
        return pixels

    name = f"simplejpeg {getattr(simplejpeg, '__version__', '')}".strip()
    kinds = tried_kinds(decode)
    if isinstance(kinds, str):
        return JpegDecoder(f"{pillow} ({name} is not used: {kinds})", None)
    return JpegDecoder(f"{name}, pixels as by {pillow}", decode, kinds)


def tried_kinds(decode: Decode) -> frozenset[Kind] | str:
    """Return the kinds of the trial images when all are decoded as by Pillow, else the reason why this decoder cannot
    be used."""
    kinds = set()
    try:
        for content in trial_images():
            header = read_header(content)
            if header is None:  # an encoder that writes something else
                continue
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
                wanted = np.asarray(image.convert("RGB"))
            if not np.array_equal(decode(content), wanted):
                return f"its pixels differ from Pillow's, first in a trial image of {header.width}×{header.height}, {header.kind}"
            kinds.add(header.kind)
    except Exception as error:  # of either library: a reason to stay with Pillow, as is any
        return f"a trial image cannot be decoded: {type(error).__name__}: {error}"
    return frozenset(kinds)


def trial_images() -> Iterator[bytes]:
    """Make JPEG files in which decoders can differ: odd sizes, each sampling, coarse and fine quantisation of noise
    that overflows, progressive scans, restart markers, and the three ways to say that colours are YCbCr."""
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
                    # JFIF's marker left out, and Adobe's (transform 1) in its place.
                    rest = content[4 + int.from_bytes(content[4:6], "big") :]
                    yield _SOI + rest
                    yield _SOI + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01" + rest
