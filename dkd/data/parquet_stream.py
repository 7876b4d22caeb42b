"""Read parquet files in place, a row group at a time, on local disks or the hub, without the copy in Arrow format that
`datasets` makes.

In the order of `StreamedBatchSampler`, each row group is read about once an epoch, by one worker of one rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from dkd.data.sources.base import DataError, no_labels
from dkd.data.sources.data_files import common_folder, matching_files
from dkd.data.sources.decoding import decode_cell
from dkd.data.sources.hugging_face import (
    check_text_labels,
    find_image_column,
    find_label_column,
    hub_name,
    loading_from_hub,
)
from dkd.data.sources.labels import encode_labels
from dkd.data.sources.names import split_spec

_FILES_AT_ONCE = 16  # files whose footers and labels are read in parallel from the hub, which answers slowly


class _File(NamedTuple):
    """Hold what is read of a file at once."""

    path: str
    footer: Any
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    labels: Any
    """The Arrow column; None where labels are not read."""

    @property
    def rows(self) -> int:
        """Number of images."""
        return int(self.footer.num_rows)


class RowGroups:
    """Read images with labels, in the order of files and rows. Labels are read at once, images by row groups. Row
    groups that still have images to give are kept.

    Args:
        files: paths, or URLs that fsspec knows.
        name: what messages call the data set.
        image_column, label_column: None: the only columns that fit.
        folder: the only place where a cell that holds a path instead of bytes may lead; None: nowhere.
        labels: whether labels are read; else a column of labels may be missing.

    Raises:
        DataError: a file cannot be read or has no such columns, or files differ in columns or class names.
    """

    def __init__(
        self,
        files: list[str],
        name: str,
        image_column: str | None = None,
        label_column: str | None = None,
        folder: str | None = None,
        labels: bool = True,
    ) -> None:
        self.name, self._folder, self.places = name, folder, b""
        with ThreadPoolExecutor(_FILES_AT_ONCE if any(map(_is_remote, files)) else 1) as pool:
            opened = list(pool.map(lambda path: _read_file(path, image_column, label_column, labels), files))
        opened = [file for file in opened if file.rows]
        if not opened:
            raise DataError(f"{name}: no file has any row")
        first = opened[0]
        for file in opened[1:]:
            for what in ("image_column", "label_column", "class_names"):
                if getattr(file, what) != getattr(first, what):
                    message = f"{name}: {file.path} has another {what.replace('_', ' ')} than {first.path}"
                    raise DataError(f"{message}: {getattr(file, what)}, not {getattr(first, what)}")
        self.image_column, self.label_column = first.image_column, first.label_column
        self.labels, self.class_names = no_labels(sum(file.rows for file in opened)), first.class_names
        self.has_text_labels = False
        if first.label_column is not None:
            self.labels, self.class_names = _join_labels(name, opened, first.label_column)
            self.has_text_labels = first.class_names is None and self.class_names is not None
            asked = label_column is not None
            check_text_labels(len(self.labels), self.class_names, name, first.label_column, asked=asked)
        self._footers = {file.path: file.footer for file in opened}
        groups = [
            (file, number, file.footer.row_group(number))
            for file in opened
            for number in range(file.footer.num_row_groups)
        ]
        groups = [(file, number, group) for file, number, group in groups if group.num_rows]
        self._groups = [(file.path, number) for file, number, _ in groups]
        self.sizes = np.array([group.num_rows for _, _, group in groups], dtype=np.int64)
        """Rows of each row group."""
        self.bytes_per_group = sum(group.total_byte_size for _, _, group in groups) / len(groups)
        self._ends = np.cumsum(self.sizes)
        rows = np.cumsum([0, *(file.rows for file in opened)])
        self._first_rows = {file.path: int(row) for file, row in zip(opened, rows, strict=False)}
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._unread: dict[int, int] = {}
        self._broken: dict[int, str] = {}
        self._capacity, self._reads = 2, 1

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, groups: int, reads: int = 1) -> None:
        """Set how many row groups a process holds in memory at most: those that its order alternates between.

        Args:
            reads: how often the order may read a row in an epoch; a row group that was read so often is given up.
        """
        self._capacity, self._reads = groups, reads

    @property
    def kept(self) -> int:
        """Number of row groups that this process holds in memory now."""
        return len(self._kept)

    def cell(self, index: int) -> Any:
        """Return what the image column holds for an image: encoded bytes, or {bytes, path}. Raises DataError."""
        group, first = self._locate(index)
        cell = self._read_column(group)[index - first].as_py()
        self._unread[group] -= 1
        if self._unread[group] == 0:  # in a streamed order, the group is not needed again in this epoch
            del self._kept[group]
        return cell

    def image(self, index: int) -> torch.Tensor:
        """Return one image as uint8 (3, H, W). Raises DataError."""
        path = self._groups[self._locate(index)[0]][0]
        return decode_cell(path, index - self._first_rows[path], self.cell(index), self._folder)

    def images(self) -> Iterator[torch.Tensor]:
        """Yield all images in order. Raises DataError."""
        return (self.image(index) for index in range(len(self)))

    def neighbours(self, index: int) -> range:
        """Return the indices of images that cost little to read: those of the same row group, unless the row group
        cannot be read."""
        group, first = self._locate(index)
        return range(len(self)) if group in self._broken else range(first, int(self._ends[group]))

    def name_of(self, index: int) -> str:
        """Return the row of an image, and its file: the names inside image cells are not kept."""
        path = self._groups[self._locate(index)[0]][0]
        return f"{path}:{index - self._first_rows[path]}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the row group that holds a row, and the group's first row."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, int(self._ends[group] - self.sizes[group])

    def _read_column(self, group: int) -> Any:
        """Return the image column of a row group, from memory or from its file. Raises DataError."""
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        if group in self._broken:
            raise DataError(self._broken[group])
        import pyarrow.parquet as parquet

        while len(self._kept) >= self._capacity:
            self._kept.popitem(last=False)
        path, number = self._groups[group]
        try:
            # Worker processes must not share a file's position, so the file is opened each time.
            with _open(path) as raw:
                file = parquet.ParquetFile(raw, metadata=self._footers[path])
                column = file.read_row_group(number, columns=[self.image_column], use_threads=False)[self.image_column]
            if len(column) != self.sizes[group]:
                raise ValueError(
                    f"it holds {len(column)} rows, not the {self.sizes[group]} that the file's footer states"
                )
        except MemoryError:
            raise
        except Exception as error:  # damaged pages and lost connections: each library below has its own errors
            self._broken[group] = f"row group {number} of {path} cannot be read: {type(error).__name__}: {error}"
            raise DataError(self._broken[group]) from error
        self._kept[group], self._unread[group] = column, len(column) * self._reads
        return column


def open_row_groups(
    spec: str,
    *,
    training: bool,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = True,
) -> RowGroups:
    """Open the parquet files that `spec` names: files or globs, or a data set of the hub that is stored as parquet.
    Arguments as `open_source`. Raises DataError."""
    kind, rest = split_spec(spec)
    if kind == "parquet":
        files = matching_files(rest)
        return RowGroups(files, rest, image_column, label_column, common_folder(files), labels)
    if kind != "hub":
        raise DataError(
            f"data.streaming reads parquet files and hub:NAME, not {spec!r}; leave it out, or convert the data to "
            "parquet"
        )
    from datasets import load_dataset_builder

    with loading_from_hub(rest):
        name, configuration, split = hub_name(rest, training)
        files = [
            str(file) for file in (load_dataset_builder(name, configuration).config.data_files or {}).get(split, [])
        ]
        if not files or any(not file.endswith(".parquet") for file in files):
            raise DataError(
                f"hub:{name} is not stored as parquet, which data.streaming needs; leave it out, and it is downloaded"
            )
        return RowGroups(files, f"hub:{name}:{split}", image_column, label_column, labels=labels)


def _read_file(path: str, image_column: str | None, label_column: str | None, with_labels: bool) -> _File:
    """Read a file's footer, and its labels where they are asked for. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from datasets import Features

    try:
        with _open(path) as raw:
            file = parquet.ParquetFile(raw, pre_buffer=True)
            features = Features.from_arrow_schema(file.schema_arrow)
            image = find_image_column(features, path, image_column)
            if not with_labels:
                return _File(path, file.metadata, image, None, None, None)
            label = find_label_column(features, path, label_column)
            labels = file.read(columns=[label], use_threads=False)[label]
            if labels.null_count:
                raise DataError(f"{path}: {labels.null_count} labels of column {label!r} are null")
            return _File(path, file.metadata, image, label, getattr(features[label], "names", None), labels)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _join_labels(name: str, files: list[_File], column: str) -> tuple[np.ndarray, list[str] | None]:
    """Return the labels of all files, int64 (N,), and the names of the classes, or None. Raises DataError."""
    import pyarrow as pa

    columns = [chunk for file in files for chunk in file.labels.chunks]
    kinds = {chunk.type for chunk in columns}  # files may count their labels in numbers of several sizes
    if len(kinds) > 1:
        columns = [chunk.cast(_common_type(name, kinds)) for chunk in columns]
    return encode_labels(pa.chunked_array(columns), name, column, files[0].class_names)


def _common_type(name: str, kinds: set[Any]) -> Any:
    """Return the Arrow type that the labels of all files fit: text, or whole numbers. Raises DataError where files have
    both."""
    import pyarrow as pa

    texts = [pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds]
    if any(texts) and not all(texts):
        raise DataError(f"{name}: labels are text in some files, and numbers in others")
    return pa.large_string() if all(texts) else pa.int64()


def _is_remote(path: str) -> bool:
    return "://" in path


def _open(path: str) -> Any:
    if not _is_remote(path):
        return open(path, "rb")
    from fsspec.core import url_to_fs

    system, inside = url_to_fs(path)
    # Reading ahead would fetch most of a file for its labels, which are spread over the file.
    return system.open(inside, "rb", cache_type="none")
