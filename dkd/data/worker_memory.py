"""Holds memory that a rank shares with the worker processes that it forks: for batches, and for signs of how far each
worker is.

A batch through DataLoader's own queues is a file in /dev/shm, made, zeroed and mapped anew each time, which costs as
much as decoding its images; where it does not fit, a thread of the worker drops it, and the rank waits for ever. The
slots here are mapped once, before the fork. They are no files, and so need no room in /dev/shm.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch

from dkd.library_internals.torch import shared_storage

_ALIGNMENT = 64  # bytes
_FREE, _TAKEN = 0, 1


def empty_batch(
    rows: int, shape: torch.Size, channels_last: bool, memory: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 images (rows, 3, H, W) and int64 labels (rows,), not set, in one piece of memory.

    Args:
        shape: (3, H, W).
        channels_last: whether the three colours of a pixel lie together.
        memory: uint8, `batch_bytes` long; None: new memory of this process.
    """
    if memory is None:
        memory = torch.empty(batch_bytes(rows, shape), dtype=torch.uint8)
    images, labels = memory[: rows * shape.numel()], memory[_aligned(rows * shape.numel()) :][: 8 * rows]
    if channels_last:
        return images.view(rows, shape[1], shape[2], shape[0]).permute(0, 3, 1, 2), labels.view(torch.int64)
    return images.view(rows, *shape), labels.view(torch.int64)


def batch_bytes(rows: int, shape: torch.Size) -> int:
    """Count the bytes of a batch's images and labels."""
    return _aligned(rows * shape.numel()) + _aligned(8 * rows)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def new_shared_memory(size: int) -> torch.Tensor:
    """Return uint8 (size,) in a file of /dev/shm, to be sent to another process as it is. Raises RuntimeError where it
    does not fit."""
    return torch.empty(0, dtype=torch.uint8).set_(shared_storage(size), 0, (size,), (1,))


class BatchSlots:
    """Holds slots for batches of one size, of which each worker process has its own. A worker fills a free slot and
    sends its number; the rank reads the batch there, and when the last tensor of it is gone, the slot is free.

    Args:
        workers: worker processes.
        slots: of each.
        rows, shape: of a batch; images are uint8 (rows, *shape).
    """

    _known: ClassVar[weakref.WeakValueDictionary[int, BatchSlots]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, workers: int, slots: int, rows: int, shape: torch.Size) -> None:
        self.rows, self.shape, self.slots = rows, shape, slots
        self._size = batch_bytes(rows, shape)
        # Not touched before a worker writes there: slots that are not needed cost nothing.
        self._memory = mmap.mmap(-1, workers * slots * self._size)
        self._states = mmap.mmap(-1, workers * slots)
        self._owner = os.getpid()
        self.number = next(self._numbers)
        self._known[self.number] = self

    @classmethod
    def of(cls, number: int) -> BatchSlots:
        """Return the slots of that number, in the process that made them."""
        return cls._known[number]

    def take(self, worker: int) -> int | None:
        """Take one of its free slots, in a worker process. Returns None when the rank holds on to all."""
        for slot in range(worker * self.slots, (worker + 1) * self.slots):
            if self._states[slot] == _FREE:
                self._states[slot] = _TAKEN
                return slot
        return None

    def give_back(self, slot: int) -> None:
        """Give back a slot of which nothing was sent, in a worker process."""
        self._states[slot] = _FREE

    def _free(self, slot: int) -> None:
        if (
            os.getpid() == self._owner
        ):  # a worker forked meanwhile holds copies of the rank's objects, but does not read for it
            self._states[slot] = _FREE

    def taken(self) -> int:
        """Count the slots that are taken."""
        return sum(self._states[:])

    def tensors(self, slot: int, channels_last: bool, to_be_freed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels as `empty_batch` does, in a slot.

        Args:
            to_be_freed: the slot is free once no tensor is left that shares this memory.
        """
        array = np.frombuffer(self._memory, dtype=np.uint8, count=self._size, offset=slot * self._size)
        if to_be_freed:
            # Tensors hold on to their memory, and that to this array, from which it was made.
            weakref.finalize(array, self._free, slot).atexit = False
        return empty_batch(self.rows, self.shape, channels_last, torch.from_numpy(array))


class Marks:
    """Tells how far worker processes are: each leaves its process id, how many images it has begun to read, and which
    one it is at."""

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, workers * 3 * 8)
        self._marks = np.frombuffer(self._memory, dtype=np.int64).reshape(workers, 3)

    def begin(self, worker: int) -> None:
        """Leave the process id, in worker process `worker`."""
        self._marks[worker, 0] = os.getpid()

    def reach(self, worker: int, index: int) -> None:
        """Note, in worker process `worker`, that it begins to read image `index`."""
        self._marks[worker, 2] = index
        self._marks[worker, 1] += 1

    def has_begun(self, worker: int) -> bool:
        """Tell whether a worker has left its process id."""
        return bool(self._marks[worker, 0])

    def count(self, worker: int) -> int:
        """Count the images that a worker has begun to read."""
        return int(self._marks[worker, 1])

    def describe(self, worker: int) -> str:
        """Describe which process a worker is, and at which image."""
        pid, count, index = self._marks[worker].tolist()
        if not pid:
            return f"worker process {worker}, which has not started"
        return f"worker process {worker} (pid {pid}), " + (f"at image {index}" if count else "before its first image")
