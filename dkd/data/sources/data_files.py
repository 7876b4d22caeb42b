"""Read `train-*.parquet` and `train-*.tar`: files, or globs of files, in the layouts of Hugging Face and WebDataset."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dkd.data.sources.base import DataError, ImageSource
from dkd.data.sources.hugging_face import HuggingFaceSource
from dkd.user_code import describe_error

_BLOCK, _BLOCKS_A_FILE, _SMALL = 4096, 8, 2**20
BLOCKS_IN_ALL = 4096
"""Blocks that `content_mark` reads of all large files together, at least 8 of each."""


def open_data_files(
    kind: str, pattern: str, image_column: str | None, label_column: str | None, labels: bool = True
) -> ImageSource:
    """Open files by the reader of `datasets` for their kind, `parquet` or `webdataset`. Raises DataError."""
    files = matching_files(pattern)
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        # `datasets` keeps a copy by name, paths and times of change. A file replaced by one with an old time would be
        # read from the copy.
        dataset = load_dataset(kind, name=f"dkd_{content_mark(files)}", data_files={"train": files}, split="train")
    except (DatasetGenerationError, pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{pattern!r} cannot be read as {kind}: {error.__cause__ or error}") from error
    except Exception as error:  # a .pth or .json in a tar raises what the library for such files raises
        raise DataError(f"{pattern!r} cannot be read as {kind}: {describe_error(error)}") from error
    return HuggingFaceSource(dataset, pattern, image_column, label_column, common_folder(files), labels)


def content_mark(files: Sequence[str]) -> str:
    """Compute a digest that differs when a file has been replaced, without reading terabytes.

    Of each file it covers the size and time of change, the end (where parquet keeps its footer, with the sizes and
    statistics of all row groups), and blocks spread evenly over the file; of a file up to 1 MiB, all of it. Inode
    numbers and times of status changes are left out: they differ between machines that hold copies of the same files.

    Raises:
        OSError: a file cannot be read.
    """
    blocks = max(_BLOCKS_A_FILE, BLOCKS_IN_ALL // len(files))
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        digests = list(pool.map(lambda path: _digest(path, blocks), files))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _digest(path: str, blocks: int) -> bytes:
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        if facts.st_size <= _SMALL:
            digest.update(file.read())
            return digest.digest()
        tail = os.pread(file.fileno(), 8, facts.st_size - 8)
        footer = int.from_bytes(tail[:4], "little") + 8 if tail[4:] == b"PAR1" else _BLOCK
        digest.update(os.pread(file.fileno(), min(footer, facts.st_size), max(0, facts.st_size - footer)))
        for number in range(blocks):
            digest.update(os.pread(file.fileno(), _BLOCK, number * (facts.st_size - _BLOCK) // (blocks - 1)))
        return digest.digest()


def common_folder(files: Sequence[str]) -> str:
    """Return the innermost folder that holds all files, in subfolders or not."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])


def matching_files(pattern: str) -> list[str]:
    """Return the sorted paths of the files that match a glob. Raises DataError when there is none."""
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise DataError(f"no file matches {pattern!r}")
    return files
