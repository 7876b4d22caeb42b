"""Where the teacher computes: before the student, or beside it on a CUDA stream of its own.

A GPU computes what one stream is asked for in order. On a stream of its own the teacher's forward, and the collectives
that it begins, run while the student's forward runs, where either leaves a part of the GPU idle.

Which stream waits for which:

    beside    The teacher's stream first waits for everything that the current stream was asked for.
    join      The current stream waits for everything that the teacher's stream was asked for. It comes before anything
              reads what the teacher has yielded, and before the images of the micro-batch may become free.

Memory needs no more than that. torch gives memory of a stream that has become free to the next tensor of that stream at
once, and the other stream may not have read it yet. What the teacher's stream has yielded is read by the current stream
and by collectives, for which the current stream waits; and the next tensors of the teacher's stream are made after the
next `beside` has waited for the current stream. A step's backward must have begun before the next `beside`.

A collective of the student's forward (SyncBatchNorm, FSDP2) that NCCL starts in order waits for those of the teacher,
and so for the teacher's forward: little is left of the overlap then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class TeacherStream(Protocol):
    """Decides when the teacher computes."""

    def beside(self) -> AbstractContextManager[None]:
        """Inside, the teacher is asked for what it is to compute."""
        ...

    def join(self) -> None:
        """Let what follows see what the teacher has computed."""
        ...


class InOrder:
    """Lets the teacher compute before the student."""

    def beside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        """Has nothing to do."""


class OwnStream:
    """Lets the teacher compute beside the student.

    Args:
        device: of both.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
