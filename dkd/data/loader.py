"""Give the batches of one rank, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dkd.data.loading import Keys, Loading, shared_bytes
from dkd.data.parquet_stream import RowGroups
from dkd.data.sampler import GlobalBatchSampler, StreamedBatchSampler
from dkd.data.samples import Batch, Samples
from dkd.data.samples_by_epoch import SamplesByEpoch
from dkd.data.sources import ImageSource
from dkd.data.transforms import EpochTransform, Transform

_HELD = 2
"""Batches that an evaluation holds at a time: one, and the next one."""


class TrainLoader:
    """Give the micro-batches of one rank, from any global step on, over all epochs without a pause between them.

    Args:
        source: images and labels.
        transform: the augmentation of one image.
        order: which rank computes which samples.
        workers: worker processes; 0 loads in this process.
        pin: whether batches lie in page-locked memory, for a faster copy to a GPU.
        replace: whether another image stands in for an image that cannot be read; else a blank image does.
            `Batch.unreadable` reports either.
        image_size: pixels of a side that the transform makes. Given, failures are not raised: `Batch.failure` reports
            them.
        timeout: seconds after which a worker process that reads no further image is given up; None: never. The
            attribute may be set later.
        by_epoch: transforms and sizes that change with the epoch, in the place of `transform` and `image_size`; None:
            they do not change.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        order: GlobalBatchSampler,
        workers: int = 0,
        pin: bool = False,
        replace: bool = False,
        image_size: int | None = None,
        timeout: float | None = None,
        by_epoch: Sequence[EpochTransform] | None = None,
    ) -> None:
        self.order, self.timeout = order, timeout
        self._samples: Samples | SamplesByEpoch = Samples(source, transform, order.seed, replace, image_size)
        if by_epoch is not None:
            stages = [
                (each.epoch, Samples(source, each.transform, order.seed, replace, each.image_size)) for each in by_epoch
            ]
            self._samples = SamplesByEpoch(stages, order.repeats)
        if isinstance(order, StreamedBatchSampler) and isinstance(source, RowGroups):
            source.keep(order.row_groups_of_a_worker(workers), order.repeats)
        self._workers, self._pin = workers, pin

    def steps(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of steps first_step … last_step − 1, `order.micro_steps` of them a step."""
        keys = Keys(lambda: self.order.micro_batches(first_step, last_step))
        count = (last_step - first_step) * self.order.micro_steps
        rows, timeout = self.order.micro_batch, lambda: self.timeout
        samples, workers, pin, size_of = self._samples, self._workers, self._pin, None
        if isinstance(samples, SamplesByEpoch):

            def size_of(number: int) -> int:
                return samples.size_at(self.order.drawn_epoch(first_step + number // self.order.micro_steps))

        return Loading(samples, keys, count, rows, workers, pin, self._held, timeout, size_of)

    @property
    def _held(self) -> int:
        """Count the batches that the trainer holds at a time: those of a step, and the next one."""
        return self.order.micro_steps + 1

    @property
    def shared_bytes(self) -> int:
        """Bytes that this rank shares with its worker processes for batches, at most; 0 without workers."""
        return shared_bytes(self._samples, self.order.micro_batch, self._held, self._workers)


class EvaluationLoader:
    """Give each sample once over all ranks, in batches of one shape.

    All ranks get equally many batches: a short batch is filled up with blank images, and so is a batch without any
    sample; only the first `valid` rows of a batch count. A rank's samples are neighbours in the data set, and so are
    the samples of each of the rank's worker processes.

    Args:
        batch: rows of a batch, per rank.
        rank, world_size: the rank whose batches are given.
        source, transform, workers, pin, image_size, timeout: as for TrainLoader.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin: bool = False,
        image_size: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self.total, self.timeout = len(source), timeout
        batch = min(batch, -(-self.total // world_size))  # no more rows than a rank can have
        count = -(-self.total // (batch * world_size))
        batches = [
            [(0, index if index < self.total else -1) for index in range(start, start + batch)]
            for start in range(rank * count * batch, (rank + 1) * count * batch, batch)
        ]
        # Worker w of n gets the batches w, w + n, w + 2n, ...
        turns = [range(worker, count, max(1, workers)) for worker in range(max(1, workers))]
        neighbours = iter(batches)
        by_turn = {number: next(neighbours) for turn in turns for number in turn}
        self.keys = [by_turn[number] for number in range(count)]
        """(0, index) of the samples of each batch, in the order of batches; the index is -1 for a blank image."""
        self._rows = batch
        self._samples, self._workers, self._pin = Samples(source, transform, None, image_size=image_size), workers, pin

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        return Loading(
            self._samples, self.keys, len(self), self._rows, self._workers, self._pin, _HELD, lambda: self.timeout
        )

    @property
    def shared_bytes(self) -> int:
        """Bytes that this rank shares with its worker processes for batches, at most; 0 without workers."""
        return shared_bytes(self._samples, self._rows, _HELD, self._workers)
