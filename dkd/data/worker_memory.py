"""Hold memory that a rank shares with the worker processes that it forks: for batches, and for signs of how far each
worker is.

A batch that goes through DataLoader's own queues is a file in /dev/shm, made, zeroed and mapped each time, which costs
as much as decoding its images. Where the file does not fit, a thread of the worker drops the batch, and the rank waits
forever. The slots here are mapped once, before the fork. They are no files, and so need no space in /dev/shm.
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
    """Return uninitialised uint8 images (rows, 3, H, W) and int64 labels (rows,), in one piece of memory.

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
    """Return uint8 (size,) in a file of /dev/shm, which can be sent to another process without a copy. Raises
    RuntimeError where the file does not fit."""
    return torch.empty(0, dtype=torch.uint8).set_(shared_storage(size), 0, (size,), (1,))


class BatchSlots:
    """Hold slots for batches of one number of rows. Each worker process has slots of its own.

    A worker fills a free slot and sends the slot's number. The rank reads the batch in the slot, and when the last
    tensor of the batch is gone, the slot is free.

    Args:
        workers: number of worker processes.
        slots: slots of each worker.
        rows, shape: size of the largest batch; images are uint8 (rows, *shape).
    """

    _known: ClassVar[weakref.WeakValueDictionary[int, BatchSlots]] = weakref.WeakValueDictionary()
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, workers: int, slots: int, rows: int, shape: torch.Size) -> None:
        self.rows, self.shape, self.slots = rows, shape, slots
        self._size = batch_bytes(rows, shape)
        # No memory is used before a worker writes to a slot: slots that are not needed cost nothing.
        self._memory = mmap.mmap(-1, workers * slots * self._size)
        self._states = mmap.mmap(-1, workers * slots)
        self._owner = os.getpid()
        self.number = next(self._numbers)
        self._known[self.number] = self

    @classmethod
    def of(cls, number: int) -> BatchSlots:
        """Return the slots of that number, in the process that made them."""
        return cls._known[number]

    def hold(self, rows: int, shape: torch.Size) -> bool:
        """Return whether a batch of images (rows, *shape) fits into a slot, and has the slots' number of rows."""
        return rows == self.rows and batch_bytes(rows, shape) <= self._size

    def take(self, worker: int) -> int | None:
        """Take one of the worker's free slots, in the worker process. Returns None when the rank still uses all."""
        for slot in range(worker * self.slots, (worker + 1) * self.slots):
            if self._states[slot] == _FREE:
                self._states[slot] = _TAKEN
                return slot
        return None

    def give_back(self, slot: int) -> None:
        """Give back a slot that was not sent, in a worker process."""
        self._states[slot] = _FREE

    def _free(self, slot: int) -> None:
        # A worker that was forked meanwhile holds copies of the rank's objects, which must not free the rank's slots.
        if os.getpid() == self._owner:
            self._states[slot] = _FREE

    def taken(self) -> int:
        """Count the slots that are taken."""
        return sum(self._states[:])

    def tensors(
        self, slot: int, channels_last: bool, to_be_freed: bool = False, shape: torch.Size | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels as `empty_batch` does, in a slot.

        Args:
            slot: the slot's number.
            channels_last: whether the three colours of a pixel lie together.
            to_be_freed: whether the slot becomes free once no tensor is left that shares its memory.
            shape: (3, H, W) of the images; None: of the largest.
        """
        array = np.frombuffer(self._memory, dtype=np.uint8, count=self._size, offset=slot * self._size)
        if to_be_freed:
            # Tensors keep their memory alive, and the memory keeps this array alive, from which it was made.
            weakref.finalize(array, self._free, slot).atexit = False
        return empty_batch(self.rows, shape or self.shape, channels_last, torch.from_numpy(array))


class Marks:
    """Hold how far worker processes are: each worker writes its process id, how many images it has begun to read, and
    the index of the last of them."""

    def __init__(self, workers: int) -> None:
        self._memory = mmap.mmap(-1, workers * 3 * 8)
        self._marks = np.frombuffer(self._memory, dtype=np.int64).reshape(workers, 3)

    def begin(self, worker: int) -> None:
        """Write the process id, in worker process `worker`."""
        self._marks[worker, 0] = os.getpid()

    def reach(self, worker: int, index: int) -> None:
        """Write, in worker process `worker`, that it begins to read image `index`."""
        self._marks[worker, 2] = index
        self._marks[worker, 1] += 1

    def has_begun(self, worker: int) -> bool:
        """Return whether a worker has written its process id."""
        return bool(self._marks[worker, 0])

    def count(self, worker: int) -> int:
        """Count the images that a worker has begun to read."""
        return int(self._marks[worker, 1])

    def describe(self, worker: int) -> str:
        """Return which process a worker is and at which image, in words."""
        pid, count, index = self._marks[worker].tolist()
        if not pid:
            return f"worker process {worker}, which has not started"
        return f"worker process {worker} (pid {pid}), " + (f"at image {index}" if count else "before its first image")
