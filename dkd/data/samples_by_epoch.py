"""Load training images by transforms that change with the epoch: the size of the images is a function of the epoch."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from dkd.data.samples import Batch, FilledSlot, Samples
from dkd.data.worker_memory import BatchSlots, Marks


class SamplesByEpoch(Dataset[Batch]):
    """Load the samples of one batch, as Samples does, each batch by what belongs to its epoch. All keys of a batch are
    of one epoch.

    Args:
        stages: the first epoch of each stage, rising from 0, and what loads its samples; all state an image size.
        repeats: draws of an epoch, R of the order.
    """

    def __init__(self, stages: Sequence[tuple[int, Samples]], repeats: int) -> None:
        self._stages, self._repeats = list(stages), repeats

    @property
    def image_size(self) -> int:
        """Return the largest side of an image, in pixels."""
        return max(samples.image_size or 0 for _, samples in self._stages)

    def size_at(self, epoch: int) -> int:
        """Return the side of an epoch's images, in pixels."""
        return self._of(epoch).image_size or 0

    def with_memory(self, marks: Marks, slots: BatchSlots | None) -> SamplesByEpoch:
        """Return a copy for worker processes. Arguments as Samples.with_memory."""
        return SamplesByEpoch([(epoch, each.with_memory(marks, slots)) for epoch, each in self._stages], self._repeats)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | FilledSlot:
        return self._of(keys[0][0] // self._repeats).__getitems__(keys)

    def _of(self, epoch: int) -> Samples:
        return next(samples for first, samples in reversed(self._stages) if first <= epoch)
