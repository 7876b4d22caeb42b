"""Write and read named tensors in a folder by torch.distributed.checkpoint: each rank writes its part, and any number
of ranks reads the parts back.

torch's reader unpickles `.metadata` without restrictions, and unpickles entries that the metadata calls bytes. Here the
metadata may name only torch's own classes of metadata, and every entry must be a tensor, which torch reads with
`weights_only=True`. So reading runs no code that a file holds.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

from dkd.checkpoints.folder import CheckpointError, SharedCheckpointError
from dkd.library_internals.pickle import PythonUnpickler
from dkd.library_internals.torch import METADATA_GLOBALS, METADATA_MEMORY_FORMAT


class SavedTensor(NamedTuple):
    """Describe a tensor in a folder, which has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Write `tensors`. This is a collective of `group`.

    Args:
        folder: on a file system that all ranks share; it may hold other files.
        tensors: plain tensors, equal on all ranks that name them, or DTensors, of which each rank writes its shards.
        group: the process group of the ranks that write; None: this process alone.

    Raises:
        SharedCheckpointError: on every rank, when a rank could not write.
    """
    try:
        with _no_warning_of_one_process():
            dcp.save(dict(tensors), storage_writer=FileSystemWriter(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise SharedCheckpointError(_first_reason(error)) from error


def missing_file(folder: Path) -> str | None:
    """Return which file that `save_tensors` wrote on any rank is missing or too short for this process; None: no file
    is.

    A network file system may show the file a little later.
    """
    try:
        lengths: dict[str, int] = {}
        for info in read_metadata(folder).storage_data.values():
            lengths[info.relative_path] = max(lengths.get(info.relative_path, 0), info.offset + info.length)
        for name, length in sorted(lengths.items()):
            path = folder / name
            if not path.is_file():
                return f"{name} is not in {str(folder)!r}"
            if path.stat().st_size < length:
                return f"{name} in {str(folder)!r} has {path.stat().st_size} bytes, not the {length} that were written"
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def load_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill `tensors` from the files that `save_tensors` wrote. This is a collective of `group`.

    Args:
        folder: the folder of the files.
        tensors: plain tensors, or DTensors of any sharding.
        group: the process group of the ranks that read; None: this process alone.

    Raises:
        SharedCheckpointError: on every rank, when a file is damaged, holds more than tensors, or lacks a tensor.
    """
    try:
        with _no_warning_of_one_process():
            dcp.load(dict(tensors), storage_reader=_Reader(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise SharedCheckpointError(_first_reason(error)) from error


def saved_tensors(folder: Path) -> dict[str, SavedTensor]:
    """Return the shape and dtype of every tensor in `folder`, by name. Raises CheckpointError when the metadata is
    damaged or holds more than tensors."""
    entries = read_metadata(folder).state_dict_metadata
    return {name: SavedTensor(tuple(entry.size), entry.properties.dtype) for name, entry in entries.items()}  # type: ignore[union-attr]


class _MetadataUnpickler(PythonUnpickler):
    """Unpickle metadata that names only what METADATA_GLOBALS lists. The base class is the unpickler written in Python,
    whose
    steps can be overridden: a pickle may change attributes of the objects that it names, classes included."""

    dispatch: ClassVar[dict[int, Any]] = dict(PythonUnpickler.dispatch)

    def load_build(self) -> None:
        if callable(self.stack[-2]):
            raise CheckpointError(".metadata changes a class; it was not loaded")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return _join_path  # the folder where the checkpoint was written, which is not used
        if (module, name) == ("builtins", "getattr"):
            return _find_memory_format  # some versions of Python pickle members of an Enum by getattr
        if name in METADATA_GLOBALS.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise CheckpointError(f".metadata names {module}.{name}, which is no part of a checkpoint; it was not loaded")


def _find_memory_format(encoding: Any, name: str) -> Any:
    if (
        getattr(encoding, "__name__", "") != METADATA_MEMORY_FORMAT
        or type(name) is not str
        or name not in encoding.__members__
    ):
        raise CheckpointError(
            f".metadata asks for {name!r} of {encoding!r}, which is no part of a checkpoint; it was not loaded"
        )
    return encoding[name]


def _join_path(*parts: str) -> str:
    return "/".join(map(str, parts))


def read_metadata(folder: Path) -> Metadata:
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        entries = metadata.state_dict_metadata
        tensors_only = all(
            type(name) is str and isinstance(entry, TensorStorageMetadata) for name, entry in entries.items()
        )
        tensors_only = tensors_only and all(
            isinstance(tuple(e.size), tuple) and e.properties.dtype for e in entries.values()
        )
        names = _list_files(metadata)
        here = all(type(name) is str and "/" not in name and name not in ("", ".", "..") for name in names)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # unpickling garbage raises anything
        raise CheckpointError(f".metadata is damaged: {type(error).__name__}: {error}") from error
    if not (tensors_only and here) or any((folder / name).is_symlink() for name in names):
        raise CheckpointError(".metadata lists more than tensors of this folder; it was not loaded")
    return metadata


def _list_files(metadata: Metadata) -> set[str]:
    return {info.relative_path for info in metadata.storage_data.values()}


class _Reader(FileSystemReader):
    """Read a folder by torch, with the metadata that `read_metadata` has checked."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def _no_warning_of_one_process() -> Iterator[None]:
    """Silence torch's warning that only one process takes part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_reason(error: CheckpointException) -> str:
    """Return the reason of the first rank that failed. torch's own text holds the stack of every rank."""
    rank, (reason, _) = sorted(error.failures.items())[0]
    text = " ".join(str(reason).split())[:300]
    # When the system stops torch's writer in the middle of a file, the writer's error hides the reason.
    hint = " (is the disk full?)" if "inline_container" in text else ""
    return f"rank {rank}: {type(reason).__name__}: {text}{hint}"
