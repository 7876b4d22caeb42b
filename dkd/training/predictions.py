"""Write what a student predicts for each image into one parquet file, in the order of the data set.

All ranks send the rows of each batch to the main process. It keeps them in a file without a name, at the place of each
image, and writes the parquet file from there at the end: the memory of one batch of all ranks is enough. The other
ranks never wait for a disk: what the main process cannot write is reported at the end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dkd.atomic_files import replacing
from dkd.config import RecipeError
from dkd.data import DataError, EvaluationLoader, ImageSource
from dkd.data.samples import Batch
from dkd.data.sources import NO_LABEL

_GROUP_BYTES = 2**26  # scores in a row group of the file
_ABSENT = -1


def check_destination(path: Path, overwrite: bool) -> None:
    """Check that a file of predictions can be written.

    Args:
        overwrite: whether an existing file may be replaced.

    Raises:
        RecipeError: it cannot.
    """
    option = f"--predictions {str(path)!r}"
    if path.suffix != ".parquet":
        raise RecipeError.at("", f"{option} must end in .parquet")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise RecipeError.at("", f"{option}: the folder {str(path.parent)!r} is not there or cannot be written to")
    if path.is_dir():
        raise RecipeError.at("", f"{option} is a folder; name a file in it")
    if not overwrite and (path.exists() or path.is_symlink()):
        raise RecipeError.at("", f"{option} exists; add --overwrite to replace it, or name another file")


class Predictions:
    """Collects the predictions of all ranks. All ranks hold one, and call `add` together for each batch, in order.

    Args:
        path: the file, which only the main process writes.
        source: the images.
        batches: of this rank.
        classes: K.
        device: of the logits.
        main: whether this is the main process, rank 0.
        overwrite: whether the file may exist, and be replaced.
    """

    def __init__(
        self,
        path: Path,
        source: ImageSource,
        batches: EvaluationLoader,
        classes: int,
        device: torch.device,
        main: bool,
        overwrite: bool = False,
    ) -> None:
        self.path, self._source, self._batches, self._classes = path, source, batches, classes
        self._device, self._number, self._main, self._overwrite = device, 0, main, overwrite
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._open = ExitStack()
        self._scores: Any = None
        self._problem: str | None = None
        # By image: label and prediction. Images without labels have the label of absent ones.
        self._classified = np.full((len(source) if main else 0, 2), _ABSENT, dtype=np.int64)
        if main:
            try:
                self._scores = self._open.enter_context(tempfile.TemporaryFile(dir=path.parent, buffering=0))  # noqa: SIM115
            except OSError as error:
                self._problem = str(error)

    def add(self, logits: torch.Tensor, batch: Batch) -> None:
        """Send the predictions of a batch to the main process. A collective.

        Args:
            logits: (b, K); its first `batch.valid` rows are samples.
        """
        rows, valid = len(logits), batch.valid
        scores = torch.zeros(rows, self._classes, dtype=torch.float32, device=self._device)
        scores[:valid] = logits[:valid].double().softmax(1).float()
        facts = torch.full((rows, 3), _ABSENT, dtype=torch.int64)
        facts[:valid, 0] = torch.tensor(self._indices(batch), dtype=torch.int64)
        facts[:valid, 1] = batch.labels[:valid]
        facts = facts.to(self._device)
        facts[:valid, 2] = logits[:valid].double().argmax(1)
        self._number += 1
        for part_facts, part_scores in zip(self._gather(facts), self._gather(scores), strict=True):
            self._keep(part_facts.cpu().numpy(), part_scores.cpu().numpy())

    def write(self, names: Sequence[str] | None, samples: int) -> None:
        """Write the file. Called on the main process alone, after the last batch.

        Args:
            names: of the classes; None: they have none.
            samples: that were evaluated.

        Raises:
            OSError: the file, or what was collected before, cannot be written; or it would not hold each sample.
        """
        import pyarrow.parquet as parquet

        with self._open:
            if self._problem is not None:
                raise OSError(self._problem)
            if not self._overwrite and self.path.exists():
                raise OSError("the file was made meanwhile")
            found = int((self._classified[:, 1] != _ABSENT).sum())
            if found != samples:
                raise OSError(f"{found} of {samples} rows are known: images changed while they were read")
            with replacing(self.path) as unfinished, ExitStack() as inside:
                writer: Any = None
                for table in self._tables(names):
                    if writer is None:
                        writer = inside.enter_context(parquet.ParquetWriter(unfinished, table.schema))
                    writer.write_table(table)

    def close(self) -> None:
        """Give back the disk space of what was collected."""
        self._open.close()

    def _indices(self, batch: Batch) -> list[int]:
        """Return the index of each sample of a batch. Which of its images are unreadable is found by reading them
        again."""
        indices = [index for _, index in self._batches.keys[self._number] if index >= 0]
        if len(indices) == batch.valid or batch.failure:
            return indices[: batch.valid]
        readable = [index for index in indices if self._is_readable(index)]
        # Where a file changed between the two readings, which row is which is not known.
        return readable if len(readable) == batch.valid else [_ABSENT] * batch.valid

    def _is_readable(self, index: int) -> bool:
        try:
            self._source.image(index)
        except DataError:
            return False
        return True

    def _gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the rows of all ranks on the main process, and nothing on the others."""
        if self._world_size == 1:
            return [rows]
        parts = [torch.empty_like(rows) for _ in range(self._world_size)] if self._main else None
        dist.gather(rows.contiguous(), parts)
        return parts or []

    def _keep(self, facts: np.ndarray, scores: np.ndarray) -> None:
        """Keep rows of one rank, on the main process. Raises nothing: the other ranks are in the next batch."""
        present = [(row, int(index)) for row, index in enumerate(facts[:, 0]) if index != _ABSENT]
        for _, run in groupby(present, key=lambda found: found[1] - found[0]):
            neighbours = list(run)
            (row, index), count = neighbours[0], len(neighbours)
            self._classified[index : index + count] = facts[row : row + count, 1:]
            if self._problem is None:
                try:
                    self._write_at(index, np.ascontiguousarray(scores[row : row + count]).tobytes())
                except OSError as error:
                    self._problem = str(error)

    def _write_at(self, index: int, content: bytes) -> None:
        offset, view = index * 4 * self._classes, memoryview(content)
        while view:
            written = os.pwrite(self._scores.fileno(), view, offset)
            offset, view = offset + written, view[written:]

    def _tables(self, names: Sequence[str] | None) -> Iterator[Any]:
        """Yield the rows of the file, a row group at a time; one empty table where there are none."""
        import pyarrow as pa

        rows = max(1, _GROUP_BYTES // (4 * self._classes))
        present = np.flatnonzero(self._classified[:, 1] != _ABSENT)
        for start in range(0, max(1, len(present)), rows):
            indices = present[start : start + rows]
            labels, predicted = self._classified[indices].T
            scores = b"".join(self._read_at(int(index)) for index in indices)
            offsets = np.arange(0, (len(indices) + 1) * self._classes, self._classes, dtype=np.int32)
            columns: dict[str, Any] = {
                "path": pa.array([self._source.name_of(int(index)) for index in indices], pa.string()),
                "label": pa.array(labels, pa.int64(), mask=labels == NO_LABEL),
                "prediction": pa.array(predicted, pa.int64()),
                "scores": pa.ListArray.from_arrays(offsets, np.frombuffer(scores, dtype=np.float32)),
            }
            if names is not None:
                for column, classes in (("label", labels), ("prediction", predicted)):
                    columns[f"{column}_name"] = pa.array([_name(names, int(each)) for each in classes], pa.string())
            yield pa.table(columns)

    def _read_at(self, index: int) -> bytes:
        size = 4 * self._classes
        return os.pread(self._scores.fileno(), size, index * size)


def _name(names: Sequence[str], label: int) -> str | None:
    """Return the name of a class; None where there are fewer names, and without a label."""
    return names[label] if 0 <= label < len(names) else None
