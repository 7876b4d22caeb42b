"""Parquet read where it lies, a row group at a time: without the copy in Arrow format that `datasets` makes, on local disks or the hub.

Read in the order of `StreamedOrder`, each row group is read about once an epoch, by one worker of one rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dkd.data.sources import (
    DataError,
    decode,
    hub_name,
    image_and_label_columns,
    loading_from_hub,
    matching_files,
    split_spec,
    whole_labels,
)


class RowGroups:
    """A sequence of images with labels, in the order of files and rows. Labels are read at once, images by row groups; the last few of
    those are kept.

    Args:
        files: paths, or URLs that fsspec knows.
        name: what messages call it.
        image_column, label_column: None: the only ones that fit.

    Raises:
        DataError: files that cannot be read, or have no such columns.
    """

    def __init__(self, files: list[str], name: str, image_column: str | None = None, label_column: str | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet
        from datasets import Features

        self.name = name
        self._groups: list[tuple[str, int]] = []
        self._footers: dict[str, Any] = {}
        sizes, labels, image_bytes = [], [], 0
        try:
            for path in files:
                with _opened(path) as raw:
                    file = parquet.ParquetFile(raw)
                    features = Features.from_arrow_schema(file.schema_arrow)
                    self.image_column, column = image_and_label_columns(features, name, image_column, label_column)
                    self._footers[path] = file.metadata
                    self._groups += [(path, group) for group in range(file.metadata.num_row_groups)]
                    sizes += [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                    image_bytes += sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
                    labels.append(whole_labels(file.read(columns=[column])[column], name, column))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{name}: {path} cannot be read as parquet: {error}") from error
        self.class_names = getattr(features[column], "names", None)
        self.labels = np.concatenate(labels)
        self.sizes = np.array(sizes, dtype=np.int64)
        """Rows of each row group."""
        self.bytes_per_group = image_bytes / max(1, len(sizes))
        self._ends = np.cumsum(self.sizes)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._capacity = 4

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, groups: int) -> None:
        """How many row groups a process holds in memory: those that its order goes to and fro between."""
        self._capacity = groups

    def image(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W). Raises DataError."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[group] - self.sizes[group])
        return decode(self.name, index, self._column(group)[row].as_py())

    def images(self) -> Iterator[torch.Tensor]:
        return (self.image(index) for index in range(len(self)))

    def _column(self, group: int) -> Any:
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        import pyarrow as pa
        import pyarrow.parquet as parquet

        while len(self._kept) >= self._capacity:
            self._kept.popitem(last=False)
        path, number = self._groups[group]
        try:
            # Opened anew each time: worker processes must not share a file's position.
            with _opened(path) as raw:
                file = parquet.ParquetFile(raw, metadata=self._footers[path])
                column = file.read_row_group(number, columns=[self.image_column], use_threads=False)[self.image_column]
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.name}: row group {number} of {path} cannot be read: {error}") from error
        self._kept[group] = column
        return column


def open_row_groups(spec: str, *, training: bool, image_column: str | None = None, label_column: str | None = None) -> RowGroups:
    """The parquet files that `spec` names: files or globs, or a data set of the hub that is stored as parquet. Raises DataError."""
    kind, rest = split_spec(spec)
    if kind == "parquet":
        return RowGroups(matching_files(rest), rest, image_column, label_column)
    if kind != "hub":
        raise DataError(f"data.streaming reads parquet files and hub:NAME, not {spec!r}; leave it out, or convert the data to parquet")
    from datasets import load_dataset_builder

    with loading_from_hub(rest):
        name, configuration, split = hub_name(rest, training)
        files = [str(file) for file in (load_dataset_builder(name, configuration).config.data_files or {}).get(split, [])]
    if not files or any(not file.endswith(".parquet") for file in files):
        raise DataError(f"hub:{name} is not stored as parquet, which data.streaming needs; leave it out, and it is downloaded")
    return RowGroups(files, f"hub:{name}:{split}", image_column, label_column)


def _opened(path: str) -> Any:
    import fsspec

    return fsspec.open(path, "rb")
