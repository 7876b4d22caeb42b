"""Collect what a teacher computes, and write it in parts by a thread, while training continues."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dkd.teacher_cache.key import epoch_folder
from dkd.teacher_cache.part import Written, write_part
from dkd.teacher_cache.value import Value, memory_order

PART_BYTES = 64 * 2**20
"""Bytes of a part, about: enough for a network file system to be fast, and little enough to be kept in memory."""


PIECE_ROWS = 64
"""Rows of a piece, at most: a rank that needs some of them reads all of them."""


class _OnItsWay:
    """Hold encoded numbers that are copied to the CPU while the device computes on."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            self._here = numbers.detach().to("cpu", copy=True)
            return
        self._here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._here.copy_(numbers.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> torch.Tensor:
        """Return the numbers on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._here


class _Numbers(NamedTuple):
    """Hold numbers from a position on, and what Written holds of them."""

    position: int
    stored: _OnItsWay
    dtype: torch.dtype
    order: tuple[int, ...] | None


class PartWriter:
    """Write what this rank has computed. A file system that refuses ends the writing, and nothing else.

    Args:
        folder: of the key.
        made_by: as write_part.
        part_bytes: as PART_BYTES.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any], part_bytes: int = PART_BYTES) -> None:
        self._folder, self._made_by, self._part_bytes = folder, made_by, part_bytes
        self._unconfirmed: deque[tuple[int, int, Value, _Numbers]] = deque()
        self._ready: dict[int, dict[Value, list[Written]]] = {}
        self._ready_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache-writer")
        self._writing: list[Future[int]] = []
        self.written_bytes = 0
        """Bytes that this process has written."""
        self.problem: str | None = None
        """The reason why nothing is written any more."""

    def add(self, step: int, epoch: int, value: Value, position: int, numbers: torch.Tensor) -> None:
        """Take numbers (b, ...) of consecutive positions.

        Args:
            step: that has computed them: they are written once it is known to be right.
            epoch: of the period.
            value: what they are.
            position: of the first row.
            numbers: as they were computed.
        """
        if self.problem is None:
            stored = _OnItsWay(value.encode(numbers.detach()))
            taken = _Numbers(position, stored, numbers.dtype, memory_order(numbers))
            self._unconfirmed.append((step, epoch, value, taken))

    def confirm(self, steps: int) -> None:
        """Note that all steps before `steps` were right, so that what they have computed can be written."""
        while self._unconfirmed and self._unconfirmed[0][0] < steps:
            _, epoch, value, (position, on_its_way, dtype, order) = self._unconfirmed.popleft()
            stored = on_its_way.wait()
            pieces = self._ready.setdefault(epoch, {}).setdefault(value, [])
            for first in range(0, len(stored), PIECE_ROWS):
                pieces.append(Written(position + first, stored[first : first + PIECE_ROWS], dtype, order))
            self._ready_bytes += stored.numel() * stored.element_size()
        if self._ready_bytes >= self._part_bytes:
            self._send(list(self._ready))
        elif len(self._ready) > 1:
            self._send(list(self._ready)[:-1])  # the last epoch has just begun

    def flush(self) -> None:
        """Write everything that is confirmed, and wait until it is on the disk."""
        self._send(list(self._ready))
        self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        for writing in self._writing:
            self._finish(writing)
        self._writing = []

    def close(self) -> None:
        """Wait until nothing is being written, and end the thread. What is not confirmed is lost."""
        self.wait()
        self._thread.shutdown()

    def _send(self, epochs: Sequence[int]) -> None:
        ready = {epoch: self._ready.pop(epoch) for epoch in epochs}
        kept = [each.stored for values in self._ready.values() for pieces in values.values() for each in pieces]
        self._ready_bytes = sum(stored.numel() * stored.element_size() for stored in kept)
        if self.problem is not None:
            return
        while len(self._writing) > 1:  # a disk slower than the teacher must not fill the memory
            self._finish(self._writing.pop(0))
        self._writing += [
            self._thread.submit(
                write_part, epoch_folder(self._folder, epoch), self._folder.name, epoch, content, self._made_by
            )
            for epoch, content in ready.items()
        ]

    def _finish(self, writing: Future[int]) -> None:
        try:
            self.written_bytes += writing.result()
        except OSError as error:
            self.problem = self.problem or f"{self._folder}: {error.strerror or error}"
            self._unconfirmed.clear()
