"""Batches of uint8 images and labels, for training and for evaluation.

Each sample's augmentation is seeded by (seed, epoch, index): neither workers nor ranks change what it is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from dkd.data.order import SampleOrder, StreamedOrder, mix
from dkd.data.row_groups import RowGroups
from dkd.data.sources import DataError, ImageSource, pixels_in_memory
from dkd.data.transforms import BatchTransform

Transform = Callable[[torch.Tensor], torch.Tensor]


class Batch(NamedTuple):
    """uint8 images (b, 3, H, W), int64 labels (b,), and how many of the b rows are samples; the rest is padding."""

    images: torch.Tensor
    labels: torch.Tensor
    valid: int
    unreadable: tuple[str, ...] = ()
    """One message a sample of this batch whose image could not be read. In training another image stands in the place of each, or a blank
    one. In evaluation they are left out."""
    failure: str = ""
    """Why the batch could not be made at all; its images are then blank. The ranks are to end together, not where one of them met it."""


ATTEMPTS = 100
"""Images that are tried in the place of one that cannot be read."""


class _Samples(Dataset[Batch]):
    """Loads the samples of one batch. A key is (epoch, index); an index of −1 is a blank image that does not count."""

    def __init__(
        self, source: ImageSource, transform: Transform, seed: int | None, replace: bool = False, image_size: int | None = None
    ) -> None:
        self.source, self.transform, self.seed, self.replace, self.image_size = source, transform, seed, replace, image_size

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        # The default generator is the one that torchvision's transforms draw from. torch.manual_seed would also queue a call for a GPU
        # that was not used yet, once for every image.
        generator = torch.default_generator
        before = generator.get_state()
        try:
            return self._batch(keys)
        except MemoryError:
            raise
        except Exception as error:  # of a user's transform, too
            if self.image_size is None:
                raise
            message = str(error) if isinstance(error, DataError) else f"{type(error).__name__} in loading: {error}"
            blank = torch.zeros(len(keys), 3, self.image_size, self.image_size, dtype=torch.uint8)
            return Batch(blank, torch.zeros(len(keys), dtype=torch.int64), 0, (), one_line(message))
        finally:
            generator.set_state(before)

    def _batch(self, keys: Sequence[tuple[int, int]]) -> Batch:
        pixels = pixels_in_memory(self.source)
        if pixels is not None and isinstance(self.transform, BatchTransform):
            return self._batch_in_memory(pixels, self.transform, keys)
        images: list[torch.Tensor | None] = []
        labels: list[int] = []
        unreadable: list[str] = []
        for epoch, index in keys:
            if index < 0:
                continue
            image, used = self._image(epoch, index, unreadable)
            if image is None and self.seed is None:
                continue
            images.append(image)
            labels.append(int(self.source.labels[used]))
        readable = [image for image in images if image is not None]
        if len({image.shape for image in readable}) > 1:
            raise DataError(
                f"images of one batch have different sizes: {sorted({tuple(i.shape) for i in readable})}; add a Resize or a crop"
            )
        shape = readable[0].shape if readable else self._any_shape()
        if self.image_size is not None and tuple(shape[-2:]) != (self.image_size, self.image_size):
            # The other ranks' batches have the usual size; a model that takes any would let them meet with features that do not fit.
            raise DataError(f"images of {shape[-1]}×{shape[-2]} pixels, not {self.image_size}×{self.image_size}; add a Resize or a crop")
        stacked = torch.zeros(len(keys), *shape, dtype=torch.uint8)
        if len(readable) == len(images) > 0:
            torch.stack(readable, out=stacked[: len(readable)])
        else:
            for place, image in enumerate(images):
                if image is not None:
                    stacked[place] = image
        counted = torch.zeros(len(keys), dtype=torch.int64)
        counted[: len(labels)] = torch.tensor(labels, dtype=torch.int64)
        return Batch(stacked, counted, len(images), tuple(unreadable))

    def _batch_in_memory(self, pixels: torch.Tensor, transform: BatchTransform, keys: Sequence[tuple[int, int]]) -> Batch:
        """All at once; the same as one by one."""
        samples = [(epoch, index) for epoch, index in keys if index >= 0]
        indices = torch.tensor([index for _, index in samples], dtype=torch.int64)
        images = transform.of_batch(pixels[indices], [self._seed_of(*sample) for sample in samples])
        labels = torch.from_numpy(self.source.labels[indices.numpy()].astype("int64"))
        if blank := len(keys) - len(samples):
            images = torch.cat([images, images.new_zeros(blank, *images.shape[1:])])
            labels = torch.cat([labels, labels.new_zeros(blank)])
        return Batch(images, labels, len(samples))

    def _seed_of(self, epoch: int, index: int) -> int:
        return 0 if self.seed is None else mix(self.seed, epoch, index)

    def _image(self, epoch: int, index: int, unreadable: list[str]) -> tuple[torch.Tensor | None, int]:
        """A sample's image and the index that it came from; None when it cannot be read, and none is to stand in for it."""
        tried, reason = index, ""
        for attempt in range(ATTEMPTS):
            try:
                decoded = self.source.image(tried)
                break
            except DataError as error:
                reason = one_line(str(error))
                if attempt == 0:
                    unreadable.append(reason)
                if not self.replace:
                    return None, index
                # As everything that is drawn: the same for any number of ranks and workers.
                nearby = self.source.neighbours(index)
                tried = nearby[mix(self.seed or 0, epoch, index, attempt) % len(nearby)]
        else:
            raise DataError(f"{ATTEMPTS} images one after the other cannot be read, the last: {reason}")
        if isinstance(self.transform, BatchTransform):
            return self.transform.of_batch(decoded[None], [self._seed_of(epoch, tried)])[0], tried
        if self.seed is not None:
            torch.default_generator.manual_seed(mix(self.seed, epoch, tried))
        return self.transform(decoded), tried

    def _any_shape(self) -> torch.Size:
        if self.image_size is not None:
            return torch.Size((3, self.image_size, self.image_size))
        return self.transform(self.source.image(0)).shape


def one_line(text: str) -> str:
    return " ".join(text.split())


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _loader(samples: _Samples, keys: Sequence[list[tuple[int, int]]] | _Keys, workers: int, pin: bool) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        batch_sampler=keys,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_end_with_rank if workers else None,
    )


def _end_with_rank(worker: int) -> None:
    """In a worker process: only the rank that it loads for ends it. Batch systems and launchers send signals to all processes of a job; a
    worker that obeyed would take its rank along, before that could write a checkpoint."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_obey_rank, name="signals", daemon=True).start()


def _obey_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    # A signal handler would not learn who sent the signal.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank.pid:
        pass
    os._exit(0)


class _Keys:
    """An iterable of a rank's keys, made anew for each iteration."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()


class TrainingBatches:
    """The micro-batches of one rank, from any global step on, over all epochs without a pause between them.

    Args:
        source: images and labels.
        transform: one image's augmentation.
        order: who computes which samples.
        workers: worker processes; 0 loads in this one.
        pin: page-locked memory, for a faster copy to a GPU.
        replace: another image stands in for one that cannot be read; else a blank one does. `Batch.unreadable` tells.
        image_size: pixels, that the transform makes. Given, nothing raises in here: `Batch.failure` tells.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        order: SampleOrder,
        workers: int = 0,
        pin: bool = False,
        replace: bool = False,
        image_size: int | None = None,
    ) -> None:
        self.order = order
        self._samples = _Samples(source, transform, order.seed, replace, image_size)
        if isinstance(order, StreamedOrder) and isinstance(source, RowGroups):
            source.keep(order.row_groups_of_a_worker(workers))
        self._workers, self._pin = workers, pin

    def steps(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The micro-batches of steps first_step … last_step − 1, `order.micro_steps` of them a step."""
        keys = _Keys(lambda: self.order.micro_batches(first_step, last_step))
        return iter(_loader(self._samples, keys, self._workers, self._pin))


class EvaluationBatches:
    """Each sample once over all ranks, in batches of one shape. All ranks get equally many batches: a short one is filled up with blank
    images, and so is one without any sample; only its first `valid` rows count. A rank's samples are neighbours in the data set, and so are
    those of each of its worker processes.

    Args:
        batch: rows a batch, per rank.
        rank, world_size: whose batches.
        image_size: as for TrainingBatches.
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
    ) -> None:
        self.total = len(source)
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
        self._keys = [by_turn[number] for number in range(count)]
        self._samples, self._workers, self._pin = _Samples(source, transform, None, image_size=image_size), workers, pin

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        return iter(_loader(self._samples, self._keys, self._workers, self._pin))
