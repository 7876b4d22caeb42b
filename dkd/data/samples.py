"""Load the samples of one batch, and write them to where the batch stays.

Each sample's augmentation is seeded by (seed, draw, index), so that the number of workers and ranks changes nothing.
The draw is the epoch, or where an epoch augments an image several times a number of its own (GlobalBatchSampler).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from dkd.data.sources import DataError, ImageSource, pixels_in_memory
from dkd.data.transforms import BatchTransform, Transform
from dkd.data.worker_memory import BatchSlots, Marks, batch_bytes, empty_batch, new_shared_memory
from dkd.rng import derive_seed, derive_seeds
from dkd.text import one_line


class Batch(NamedTuple):
    """Hold the images and labels of one batch."""

    images: torch.Tensor
    """uint8 (b, 3, H, W)."""
    labels: torch.Tensor
    """int64 (b,)."""
    valid: int
    """Number of rows that are samples; the rows after them are padding."""
    unreadable: tuple[str, ...] = ()
    """One message for each sample of this batch whose image could not be read. In training, another image or a blank
    image stands in its place. In evaluation, the sample is left out."""
    failure: str = ""
    """The reason why the batch could not be made at all; its images are then blank. No exception is raised, since all
    ranks are to stop together and not where one rank met the failure."""


EMPTY = Batch(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), 0)
"""A batch without rows."""


@dataclass(frozen=True)
class FilledSlot:
    """Stand for a batch that a worker process has written into a slot. The worker sends this object in place of the
    batch. Fields that are not described here are those of Batch."""

    slots: int
    """`number` of the BatchSlots."""
    slot: int
    """Index of the slot."""
    channels_last: bool
    """Whether the three colours of a pixel lie together in memory."""
    valid: int
    unreadable: tuple[str, ...]
    shape: torch.Size | None = None
    """(3, H, W) of the images; None: that of the BatchSlots."""

    def batch(self) -> Batch:
        """Return the batch, in the process that made the slots. The slot becomes free when the batch's tensors are
        gone."""
        images, labels = BatchSlots.of(self.slots).tensors(self.slot, self.channels_last, True, self.shape)
        return Batch(images, labels, self.valid, self.unreadable)

    def pin_memory(self) -> Batch:
        """Return a copy of the batch in page-locked memory. DataLoader's thread for pinning calls this method."""
        batch = self.batch()
        return batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())


ATTEMPTS = 100
"""Images that are tried, one after the other, in the place of an image that cannot be read."""
_SMALL = 3 * 128 * 128
"""Largest image, in numbers, that is augmented together with the others of its batch, where the transform can do so."""


def augmentation_seeds(seed: int | None, keys: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the seeds, uint64 (b,), that the augmentations of samples are drawn from.

    Args:
        seed: of the run; None: nothing is drawn.
        keys: (draw, index) of each sample.
    """
    indices = np.array([index for _, index in keys], dtype=np.int64)
    if seed is None or not len(keys):
        return np.zeros(len(keys), dtype=np.uint64)
    draws = {draw for draw, _ in keys}
    if len(draws) == 1:
        return derive_seeds((seed, *draws), indices)
    return np.array([derive_seed(seed, draw, index) for draw, index in keys], dtype=np.uint64)


class Samples(Dataset[Batch]):
    """Load the samples of one batch. A key is (draw, index); an index of −1 is a blank image that does not count.

    Args:
        source: images and labels.
        transform: the augmentation of one image.
        seed: the run's seed; None: nothing is drawn, as in evaluation.
        replace: whether another image stands in for an image that cannot be read; else a blank image does.
        image_size: pixels of a side that the transform makes; given, only MemoryError is raised, and `Batch.failure`
            reports everything else.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int | None,
        replace: bool = False,
        image_size: int | None = None,
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.replace, self.image_size = replace, image_size
        self._of_batches = transform if isinstance(transform, BatchTransform) else None
        self.slots: BatchSlots | None = None
        self.marks: Marks | None = None

    def with_memory(self, marks: Marks, slots: BatchSlots | None) -> Samples:
        """Return a copy for worker processes.

        Args:
            marks: where a worker notes how far it is.
            slots: where it writes batches; None: into memory of its own.
        """
        made = copy.copy(self)
        made.marks, made.slots = marks, slots
        return made

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | FilledSlot:
        # torchvision's transforms draw from the default generator. torch.manual_seed would also queue a call for a GPU
        # that was not used yet, once for every image.
        generator = torch.default_generator
        before = generator.get_state()
        writer = Writer(len(keys), self.slots)
        try:
            return self._load(keys, writer)
        except BaseException as error:  # a user's transform may raise anything
            writer.give_up()
            if self.image_size is None or isinstance(error, MemoryError) or not isinstance(error, Exception):
                raise
            return EMPTY._replace(failure=describe_failure(error))
        finally:
            generator.set_state(before)

    def _load(self, keys: Sequence[tuple[int, int]], writer: Writer) -> Batch | FilledSlot:
        pixels = pixels_in_memory(self.source)
        if pixels is not None and self._of_batches is not None:
            return self._load_from_memory(pixels, self._of_batches, keys, writer)
        labels: list[int] = []
        unreadable: list[str] = []
        small: dict[torch.Size, list[tuple[int, torch.Tensor, int]]] = {}  # by size: rows, images and their seeds
        for draw, index in keys:
            if index < 0:
                continue
            image, used = self._read_image(draw, index, unreadable)
            if image is None and self.seed is None:
                continue
            if image is not None:
                if self._of_batches is not None and image.numel() <= _SMALL:
                    small.setdefault(image.shape, []).append((len(labels), image, self._seed_of(draw, used)))
                else:
                    self._write(writer, len(labels), self._augment(image, draw, used))
            labels.append(int(self.source.labels[used]))
        for of_one_size in small.values():
            rows, images, seeds = zip(*of_one_size, strict=True)
            assert self._of_batches is not None
            for row, image in zip(rows, self._of_batches.of_batch(torch.stack(images), seeds), strict=True):
                self._write(writer, row, image)
        if not writer.begun:
            writer.begin(self._find_shape())
        return writer.finish(labels, tuple(unreadable))

    def _augment(self, image: torch.Tensor, draw: int, index: int) -> torch.Tensor:
        if self._of_batches is not None:
            return self._of_batches.of_batch(image[None], [self._seed_of(draw, index)])[0]
        if self.seed is not None:
            torch.default_generator.manual_seed(self._seed_of(draw, index))
        return self.transform(image)

    def _write(self, writer: Writer, row: int, image: torch.Tensor) -> None:
        if self.image_size is not None and tuple(image.shape[-2:]) != (self.image_size, self.image_size):
            # The other ranks' batches have the usual size. A model that takes any size would bring features to the
            # collectives that do not fit those of the other ranks.
            size = f"{image.shape[-1]}×{image.shape[-2]}"
            raise DataError(f"images of {size} pixels, not {self.image_size}×{self.image_size}; add a Resize or a crop")
        writer.write(row, image)

    def _load_from_memory(
        self, pixels: torch.Tensor, transform: BatchTransform, keys: Sequence[tuple[int, int]], writer: Writer
    ) -> Batch | FilledSlot:
        """Load all samples at once, to the same pixels as one by one."""
        samples = [(draw, index) for draw, index in keys if index >= 0]
        indices = torch.tensor([index for _, index in samples], dtype=torch.int64)
        images = transform.of_batch(pixels[indices], augmentation_seeds(self.seed, samples))
        writer.write_all(images)
        return writer.finish(self.source.labels[indices.numpy()].tolist())

    def _seed_of(self, draw: int, index: int) -> int:
        return int(augmentation_seeds(self.seed, [(draw, index)])[0])

    def _read_image(self, draw: int, index: int, unreadable: list[str]) -> tuple[torch.Tensor | None, int]:
        """Decode a sample's image. Returns the image and the index that the image was read at; None in place of the
        image when it cannot be read and no other image is to replace it."""
        tried, reason = index, ""
        for attempt in range(ATTEMPTS):
            self._mark(tried)
            try:
                return self.source.image(tried), tried
            except DataError as error:
                reason = one_line(str(error))
                if attempt == 0:
                    unreadable.append(reason)
                if not self.replace:
                    return None, index
                # Drawn from the position, so that the choice is the same for any number of ranks and workers.
                nearby = self.source.neighbours(index)
                tried = nearby[derive_seed(self.seed or 0, draw, index, attempt) % len(nearby)]
        raise DataError(f"{ATTEMPTS} images one after the other cannot be read, the last: {reason}")

    def _mark(self, index: int) -> None:
        if self.marks is not None and (worker := get_worker_info()) is not None:
            self.marks.reach(worker.id, index)

    def _find_shape(self) -> torch.Size:
        if self.image_size is not None:
            return torch.Size((3, self.image_size, self.image_size))
        return self.transform(self.source.image(0)).shape


class Writer:
    """Write the images of one batch to the memory where they stay: this process's own memory, or in a worker process
    the memory that the worker shares with its rank.

    Args:
        rows: rows of the batch.
        slots: slots of this worker's rank; None: there are none.
    """

    def __init__(self, rows: int, slots: BatchSlots | None) -> None:
        self._rows, self._slots = rows, slots
        self._slot: int | None = None
        self._blank = set(range(rows))
        self._channels_last = False
        self._images, self._labels = EMPTY.images, EMPTY.labels
        self.begun = False

    def begin(self, shape: torch.Size, channels_last: bool = False) -> None:
        """Take memory for images of a shape (3, H, W). Raises DataError when a worker has no memory left to share."""
        self.begun, self._channels_last = True, channels_last
        worker = get_worker_info()
        if worker is not None and self._slots is not None and self._slots.hold(self._rows, shape):
            self._slot = self._slots.take(worker.id)
            if self._slot is not None:
                self._images, self._labels = self._slots.tensors(self._slot, channels_last, shape=shape)
                return
        memory = None if worker is None else _take_memory(batch_bytes(self._rows, shape))
        self._images, self._labels = empty_batch(self._rows, shape, channels_last, memory)

    def write(self, row: int, image: torch.Tensor) -> None:
        """Copy a uint8 image (3, H, W) into a row. Raises DataError for an image of another shape or type than the
        first."""
        if not self.begun:
            # The batch takes the first image's layout in memory: transposing an image costs more than copying it.
            self.begin(image.shape, image.dim() == 3 and image.stride(0) == 1)
        if image.shape != self._images.shape[1:]:
            sizes = sorted({tuple(image.shape), tuple(self._images.shape[1:])})
            raise DataError(f"images of one batch have different sizes: {sizes}; add a Resize or a crop")
        if image.dtype != torch.uint8:
            raise DataError(f"the transforms make {image.dtype} of an image, not torch.uint8")
        self._images[row].copy_(image)
        self._blank.discard(row)

    def write_all(self, images: torch.Tensor) -> None:
        """Copy uint8 images (n, 3, H, W) into the first n rows."""
        self.begin(images.shape[1:])
        self._images[: len(images)].copy_(images)
        self._blank.difference_update(range(len(images)))

    def finish(self, labels: Sequence[int], unreadable: tuple[str, ...] = ()) -> Batch | FilledSlot:
        """Return the batch. Rows that were not written become blank; `labels` belong to the first rows."""
        for row in self._blank:
            self._images[row].zero_()
        self._labels[: len(labels)] = torch.tensor(labels, dtype=torch.int64)
        self._labels[len(labels) :] = 0
        if self._slot is not None and self._slots is not None:
            shape = self._images.shape[1:]
            return FilledSlot(self._slots.number, self._slot, self._channels_last, len(labels), unreadable, shape)
        return Batch(self._images, self._labels, len(labels), unreadable)

    def give_up(self) -> None:
        """Give the memory back, when no batch is made."""
        if self._slot is not None and self._slots is not None:
            self._slots.give_back(self._slot)


def _take_memory(size: int) -> torch.Tensor:
    """Take memory for a batch that no slot is free for. The worker takes the memory itself, since a batch that
    DataLoader's thread cannot send is lost without an error. Raises DataError."""
    try:
        return new_shared_memory(size)
    except RuntimeError as error:
        shared = shutil.disk_usage("/dev/shm")
        raise DataError(
            f"a batch of {size / 1e6:.1f} MB does not fit /dev/shm, which has {shared.free / 1e6:.1f} of "
            f"{shared.total / 1e6:.1f} MB free: make it larger (docker run --shm-size=8g, or --ipc=host), or take "
            "fewer data.workers or a smaller batch"
        ) from error


def describe_failure(error: Exception) -> str:
    """Return one line that describes what went wrong in loading."""
    return one_line(str(error) if isinstance(error, DataError) else f"{type(error).__name__} in loading: {error}")
