"""Write and read the files of a cache.

A part is a safetensors file: for each value one tensor (rows, ...), and as metadata a JSON text that lists the pieces
of each tensor: consecutive rows that belong to consecutive positions of an epoch, with a digest of each. A part appears
complete or not at all. A digest covers the piece's numbers and what they are: its key, value, epoch and positions. So
whatever happens to a file, a piece is either what was written for these positions, or is found to be damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from dkd.atomic_files import open_to_read, replacing
from dkd.errors import RunError
from dkd.teacher_cache.value import Value

SUFFIX = ".safetensors"
_META, _FORMAT = "dkd_teacher_cache", 1
_DIGEST_BYTES = 12
_MOST_HEADER = 2**28
_TYPES = {
    name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8")
}


class DamagedPartError(RunError):
    """A part, or a piece of it, is not what was written."""


class OtherFormatError(DamagedPartError):
    """A part was written by another version of dkd."""


class Piece(NamedTuple):
    """Hold where in a tensor some positions of an epoch are.

    Args:
        position: the first one.
        rows: their number.
        first_row: in the tensor.
        digest: hexadecimal.
    """

    position: int
    rows: int
    first_row: int
    digest: str


class Written(NamedTuple):
    """Hold numbers that are to be written.

    Args:
        position: of the first row, in the epoch.
        stored: (rows, ...) on the CPU, as Value.encode returns them.
        dtype: of the numbers before they were encoded.
        order: of their dimensions in memory, as `memory_order`.
    """

    position: int
    stored: torch.Tensor
    dtype: torch.dtype
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class StoredValue:
    """Hold where a part has one value.

    Args:
        begin: byte of the file.
        row_bytes: bytes of one row.
        dtype: of the numbers before they were encoded.
        pieces: in the order of their rows.
        order: of the dimensions of the numbers in memory, as `memory_order`.
    """

    begin: int
    row_bytes: int
    dtype: torch.dtype
    pieces: Sequence[Piece]
    order: tuple[int, ...] | None


def write_part(
    folder: Path, key: str, epoch: int, content: Mapping[Value, Sequence[Written]], made_by: Mapping[str, Any]
) -> int:
    """Write a new part, and return its bytes. Raises OSError.

    Args:
        folder: of the epoch; made where it is missing.
        key: name of the key's folder.
        content: pieces of each value.
        made_by: plain values that describe this process, for people.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, (value, written) in enumerate(content.items()):
        dtype, orders = written[0].dtype, {each.order for each in written}
        if any(each.dtype != dtype for each in written):
            raise ValueError(f"{value.name}: numbers of several types")
        order = orders.pop() if len(orders) == 1 else None
        what = _Described(key, value.id, epoch, dtype, order)
        pieces = [
            [each.position, len(each.stored), what.digest(each.position, _bytes_of(each.stored))] for each in written
        ]
        tensors[str(number)] = torch.cat([each.stored for each in written])
        values[value.id] = {
            "tensor": str(number), "name": value.name, "form": value.form, "facts": dict(value.facts),
            "dtype": str(dtype).removeprefix("torch."), "order": order, "pieces": pieces,
        }  # fmt: skip
    meta = {"format": _FORMAT, "key": key, "epoch": epoch, "values": values, "made_by": dict(made_by)}
    first = min(piece[0] for value in values.values() for piece in value["pieces"])
    folder.mkdir(exist_ok=True)
    path = folder / f"part_{first:010d}_{secrets.token_hex(6)}{SUFFIX}"
    with replacing(path) as unfinished:
        try:
            save_file(tensors, unfinished, {_META: json.dumps(meta)})
        except OSError:
            raise
        except Exception as error:  # safetensors has an error of its own for everything
            raise OSError(str(error)) from error
        size = unfinished.stat().st_size
    return size


class Part:
    """Read one part. Making the object reads what the part lists, and no numbers.

    Args:
        path: the file.
        key: name of the key's folder.
        epoch: of its folder.

    Raises:
        DamagedPartError: it is no part of that key and epoch, or not as it was written.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, key: str, epoch: int) -> None:
        self.path, self._key, self._epoch = path, key, epoch
        with open_to_read(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(_read(file, 0, 8), "little")
            if length > min(_MOST_HEADER, size - 8):
                raise DamagedPartError("its header is longer than the file")
            header = _read(file, 8, length)
        try:
            tensors = json.loads(header)
            meta = json.loads(tensors["__metadata__"][_META])
            if meta["format"] != _FORMAT:
                raise OtherFormatError(f"it is of format {meta['format']!r}, not {_FORMAT}")
            if meta["key"] != key or meta["epoch"] != epoch:
                raise DamagedPartError("it is of another key or epoch")
            self.values = {
                name: _locate(tensors[entry["tensor"]], entry, 8 + length, size)
                for name, entry in meta["values"].items()
            }
            self.made_by: dict[str, Any] = dict(meta["made_by"])
            self.described: dict[str, dict[str, Any]] = {
                name: {"name": str(entry["name"]), "form": str(entry["form"]), "facts": dict(entry["facts"])}
                for name, entry in meta["values"].items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise DamagedPartError(f"its header is damaged ({type(error).__name__})") from error
        self.bytes = size

    def read(self, value: str, numbers: Iterable[int]) -> dict[int, bytearray]:
        """Return the bytes of pieces by their numbers. Consecutive pieces are read together.

        Raises:
            DamagedPartError: a piece is not what was written.
            OSError: the file cannot be read.
        """
        stored, found = self.values[value], dict[int, bytearray]()
        what = _Described(self._key, value, self._epoch, stored.dtype, stored.order)
        with open_to_read(self.path) as file:
            for run in _runs(sorted(set(numbers))):
                first, last = stored.pieces[run[0]], stored.pieces[run[-1]]
                begin = stored.begin + first.first_row * stored.row_bytes
                end = stored.begin + (last.first_row + last.rows) * stored.row_bytes
                together = memoryview(_read(file, begin, end - begin))
                for number in run:
                    piece = stored.pieces[number]
                    place = (piece.first_row - first.first_row) * stored.row_bytes
                    content = together[place : place + piece.rows * stored.row_bytes]
                    if what.digest(piece.position, content) != piece.digest:
                        raise DamagedPartError(f"positions {piece.position} … are not what was written")
                    found[number] = bytearray(content)
        return found


def _locate(tensor: Mapping[str, Any], entry: Mapping[str, Any], begin: int, size: int) -> StoredValue:
    """Return where a value is in a file of `size` bytes whose tensors begin at byte `begin`. Raises ValueError."""
    first, last = tensor["data_offsets"]
    order = None if entry["order"] is None else tuple(entry["order"])
    if order is not None and sorted(order) != list(range(len(tensor["shape"]))):
        raise ValueError("an order")
    rows = tensor["shape"][0]
    if not all(type(number) is int for number in (first, last, rows)):
        raise ValueError("an offset")
    listed, row = [], 0
    for position, count, digest in entry["pieces"]:
        if not all(type(number) is int and number >= 0 for number in (position, count)) or not isinstance(digest, str):
            raise ValueError("a piece")
        listed.append(Piece(position, count, row, digest))
        row += count
    if row != rows or rows < 1 or (last - first) % rows or not 0 <= first <= last <= size - begin:
        raise ValueError("rows")
    return StoredValue(begin + first, (last - first) // rows, _TYPES[entry["dtype"]], listed, order)


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Return sorted numbers as lists of consecutive ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _read(file: FileIO, begin: int, length: int) -> bytearray:
    """Read some bytes. Not by mapping the file: a file that another process cuts would end this one. Raises
    DamagedPartError."""
    content, filled = bytearray(length), 0
    view = memoryview(content)
    while filled < length:
        count = os.preadv(file.fileno(), [view[filled:]], begin + filled)
        if count == 0:
            raise DamagedPartError("it is shorter than it was")
        filled += count
    return content


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


class _Described(NamedTuple):
    """Hold what a digest covers beside the numbers and their position."""

    key: str
    value: str
    epoch: int
    dtype: torch.dtype
    order: tuple[int, ...] | None

    def digest(self, position: int, content: bytearray | memoryview) -> str:
        """Return the digest of a piece."""
        text = f"{self.key}/{self.value}/{self.epoch}/{self.dtype}/{self.order}/{position}/"
        digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES)
        digest.update(content)
        return digest.hexdigest()
