"""A small data set on disk, for tests that read one."""

import io
import os
import signal
import struct
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image, ImageOps


def with_damaged_exif(content):
    """A JPEG with a byte of its EXIF block changed such that Pillow raises struct.error: not every error of a decoder
    is an OSError."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    exif[0x010F] = "a camera"
    Image.open(io.BytesIO(content)).convert("RGB").save(buffer, "JPEG", exif=exif.tobytes())
    start = buffer.getvalue().index(b"Exif")
    for position in range(start, start + 60):
        for value in range(256):
            changed = bytearray(buffer.getvalue())
            changed[position] = value
            try:
                with warnings.catch_warnings(action="ignore") if sys.version_info >= (3, 11) else nullcontext():
                    ImageOps.exif_transpose(Image.open(io.BytesIO(changed)))
            except struct.error:
                return bytes(changed)
            except Exception:
                continue
    raise AssertionError("no change of a byte makes Pillow raise struct.error")


BROKEN = {
    "truncated": lambda content: content[:-40],
    "of zero bytes": lambda content: b"",
    "no image": lambda content: b"not an image",
    "damaged in its EXIF": with_damaged_exif,
}


def write_images(path, count, pixels=16, row_group=16, seed=0, broken=(), larger=()):
    """`count` random images as PNG in row groups, with labels 0 … 9.

    Args:
        broken: pairs of an index and a key of BROKEN.
        larger: indices of images that are of 8 pixels more.
    """
    generator = np.random.default_rng(seed)
    images = [encoded(generator.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)) for _ in range(count)]
    for index in larger:
        images[index] = encoded(generator.integers(0, 256, (pixels + 8, pixels + 8, 3), dtype=np.uint8))
    for index, how in broken:
        images[index] = BROKEN[how](images[index])
    table = pa.table(
        {"image": pa.array(images, pa.binary()), "label": pa.array(generator.integers(0, 10, count), pa.int64())}
    )
    parquet.write_table(table, path, row_group_size=row_group)


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png(mode, size=(6, 4), color=0):
    """Return an image of one colour as a cell of a parquet file: PNG, or TIFF, which CMYK needs."""
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "TIFF" if mode == "CMYK" else "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(path, images, labels, label_name="label"):
    """Write cells such as `png` makes, with Hugging Face's metadata."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), label_name: Value("int64")})
    Dataset.from_dict({"image": images, label_name: labels}, features=features).to_parquet(str(path))


class Hanging:
    """Forty images for `python:few_images:hanging`; the process that reads the one numbered 20 stops."""

    def __init__(self):
        self.labels = [index % 10 for index in range(40)]

    def __getitem__(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGSTOP)
        return np.full((8, 8, 3), index, dtype=np.uint8)


def hanging(training):
    return Hanging()
