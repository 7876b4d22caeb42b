"""A small data set on disk, for tests that read one."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

BROKEN = {"truncated": lambda content: content[:-40], "of zero bytes": lambda content: b"", "no image": lambda content: b"not an image"}


def write_images(path, count, pixels=16, row_group=16, seed=0, broken=()):
    """`count` random images as PNG in row groups, with labels 0 … 9.

    Args:
        broken: pairs of an index and a key of BROKEN.
    """
    generator = np.random.default_rng(seed)
    images = [encoded(generator.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)) for _ in range(count)]
    for index, how in broken:
        images[index] = BROKEN[how](images[index])
    table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(generator.integers(0, 10, count), pa.int64())})
    parquet.write_table(table, path, row_group_size=row_group)


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
