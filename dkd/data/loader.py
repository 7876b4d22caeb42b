"""Batches of uint8 images and labels, for training and for evaluation.

Each sample's augmentation is seeded by (seed, epoch, index): neither workers nor ranks change what it is.
"""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dkd import console
from dkd.data.parquet_stream import RowGroups
from dkd.data.sampler import GlobalBatchSampler, StreamedBatchSampler
from dkd.data.sources import DataError, ImageSource, pixels_in_memory
from dkd.data.transforms import BatchTransform
from dkd.data.worker_memory import BatchSlots, Marks, batch_bytes, empty_batch, new_shared_memory
from dkd.rng import derive_seed
from dkd.text import one_line

Transform = Callable[[torch.Tensor], torch.Tensor]


class Batch(NamedTuple):
    """uint8 images (b, 3, H, W), int64 labels (b,), and how many of the b rows are samples; the rest is padding."""

    images: torch.Tensor
    labels: torch.Tensor
    valid: int
    unreadable: tuple[str, ...] = ()
    """One message a sample of this batch whose image could not be read. In training another image stands in the place
    of each, or a blank one. In evaluation they are left out."""
    failure: str = ""
    """Why the batch could not be made at all; its images are then blank. The ranks are to end together, not where one
    of them met it."""


@dataclass(frozen=True)
class FilledSlot:
    """Stands for a batch that a worker process has written into a slot, and is sent in its place. The other fields are
    those of Batch."""

    slots: int
    """Tells which BatchSlots: their number."""
    slot: int
    channels_last: bool
    valid: int
    unreadable: tuple[str, ...]

    def batch(self) -> Batch:
        """Read the batch, in the process that made the slots. The slot becomes free when the batch's tensors are
        gone."""
        images, labels = BatchSlots.of(self.slots).tensors(self.slot, self.channels_last, to_be_freed=True)
        return Batch(images, labels, self.valid, self.unreadable)

    def pin_memory(self) -> Batch:
        """Copy the batch into page-locked memory. DataLoader's thread for that calls this method."""
        batch = self.batch()
        return batch._replace(images=batch.images.pin_memory(), labels=batch.labels.pin_memory())


ATTEMPTS = 100
"""Images that are tried in the place of one that cannot be read."""
PREFETCH = 2
"""Each worker process loads so many batches ahead."""
_SMALL = 3 * 128 * 128
"""Images of up to so many numbers are augmented a batch at a time, where the transform can do that."""
_HELD = 2
"""An evaluation has so many batches at a time: one, and the next one that it takes."""
_LOOK_EVERY = 1.0  # seconds between looks at a worker that is waited for
START_SECONDS = 30.0
"""A worker process that has not begun after so many seconds is stuck in a lock that it inherited: all workers are
forked again, and have twice as long."""


class _Samples(Dataset[Batch]):
    """Loads the samples of one batch. A key is (epoch, index); an index of −1 is a blank image that does not count."""

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int | None,
        replace: bool = False,
        image_size: int | None = None,
    ) -> None:
        self.source, self.transform, self.seed, self.replace, self.image_size = (
            source,
            transform,
            seed,
            replace,
            image_size,
        )
        self._of_batches = transform if isinstance(transform, BatchTransform) else None
        self.slots: BatchSlots | None = None
        self.marks: Marks | None = None

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | FilledSlot:
        # The default generator is the one that torchvision's transforms draw from. torch.manual_seed would also queue a
        # call for a GPU that was not used yet, once for every image.
        generator = torch.default_generator
        before = generator.get_state()
        writer = _Writer(len(keys), self.slots)
        try:
            return self._batch(keys, writer)
        except BaseException as error:  # of a user's transform, too
            writer.give_up()
            if self.image_size is None or isinstance(error, MemoryError) or not isinstance(error, Exception):
                raise
            return Batch(*_NOTHING, 0, (), described(error))
        finally:
            generator.set_state(before)

    def _batch(self, keys: Sequence[tuple[int, int]], writer: _Writer) -> Batch | FilledSlot:
        pixels = pixels_in_memory(self.source)
        if pixels is not None and self._of_batches is not None:
            return self._batch_in_memory(pixels, self._of_batches, keys, writer)
        labels: list[int] = []
        unreadable: list[str] = []
        small: dict[torch.Size, list[tuple[int, torch.Tensor, int]]] = {}  # of each size: rows, images and their seeds
        for epoch, index in keys:
            if index < 0:
                continue
            image, used = self._image(epoch, index, unreadable)
            if image is None and self.seed is None:
                continue
            if image is not None:
                if self._of_batches is not None and image.numel() <= _SMALL:
                    small.setdefault(image.shape, []).append((len(labels), image, self._seed_of(epoch, used)))
                else:
                    self._write(writer, len(labels), self._augmented(image, epoch, used))
            labels.append(int(self.source.labels[used]))
        for of_one_size in small.values():
            rows, images, seeds = zip(*of_one_size, strict=True)
            assert self._of_batches is not None
            for row, image in zip(rows, self._of_batches.of_batch(torch.stack(images), seeds), strict=True):
                self._write(writer, row, image)
        if not writer.begun:
            writer.begin(self._any_shape())
        return writer.finished(labels, tuple(unreadable))

    def _augmented(self, image: torch.Tensor, epoch: int, index: int) -> torch.Tensor:
        if self._of_batches is not None:
            return self._of_batches.of_batch(image[None], [self._seed_of(epoch, index)])[0]
        if self.seed is not None:
            torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
        return self.transform(image)

    def _write(self, writer: _Writer, row: int, image: torch.Tensor) -> None:
        if self.image_size is not None and tuple(image.shape[-2:]) != (self.image_size, self.image_size):
            # The other ranks' batches have the usual size; a model that takes any would let them meet with features
            # that do not fit.
            size = f"{image.shape[-1]}×{image.shape[-2]}"
            raise DataError(f"images of {size} pixels, not {self.image_size}×{self.image_size}; add a Resize or a crop")
        writer.write(row, image)

    def _batch_in_memory(
        self, pixels: torch.Tensor, transform: BatchTransform, keys: Sequence[tuple[int, int]], writer: _Writer
    ) -> Batch | FilledSlot:
        """All at once; the same as one by one."""
        samples = [(epoch, index) for epoch, index in keys if index >= 0]
        indices = torch.tensor([index for _, index in samples], dtype=torch.int64)
        images = transform.of_batch(pixels[indices], [self._seed_of(*sample) for sample in samples])
        writer.write_all(images)
        return writer.finished(self.source.labels[indices.numpy()].tolist())

    def _seed_of(self, epoch: int, index: int) -> int:
        return 0 if self.seed is None else derive_seed(self.seed, epoch, index)

    def _image(self, epoch: int, index: int, unreadable: list[str]) -> tuple[torch.Tensor | None, int]:
        """Decode a sample's image. Returns it with the index that it came from; None when it cannot be read and none is
        to replace it."""
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
                # As everything that is drawn: the same for any number of ranks and workers.
                nearby = self.source.neighbours(index)
                tried = nearby[derive_seed(self.seed or 0, epoch, index, attempt) % len(nearby)]
        raise DataError(f"{ATTEMPTS} images one after the other cannot be read, the last: {reason}")

    def _mark(self, index: int) -> None:
        if self.marks is not None and (worker := get_worker_info()) is not None:
            self.marks.reach(worker.id, index)

    def _any_shape(self) -> torch.Size:
        if self.image_size is not None:
            return torch.Size((3, self.image_size, self.image_size))
        return self.transform(self.source.image(0)).shape


_NOTHING = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)


class _Writer:
    """Writes the images of one batch to where they stay: this process's own memory, or in a worker process what it
    shares with its rank.

    Args:
        rows: of the batch.
        slots: of this worker's rank, if there are any.
    """

    def __init__(self, rows: int, slots: BatchSlots | None) -> None:
        self._rows, self._slots = rows, slots
        self._slot: int | None = None
        self._blank = set(range(rows))
        self._channels_last = False
        self._images, self._labels = _NOTHING
        self.begun = False

    def begin(self, shape: torch.Size, channels_last: bool = False) -> None:
        """Take memory for images of that shape. Raises DataError when a worker has none that it could share."""
        self.begun, self._channels_last = True, channels_last
        worker = get_worker_info()
        if (
            worker is not None
            and self._slots is not None
            and (self._slots.rows, self._slots.shape) == (self._rows, shape)
        ):
            self._slot = self._slots.take(worker.id)
            if self._slot is not None:
                self._images, self._labels = self._slots.tensors(self._slot, channels_last)
                return
        memory = None if worker is None else _memory_to_send(batch_bytes(self._rows, shape))
        self._images, self._labels = empty_batch(self._rows, shape, channels_last, memory)

    def write(self, row: int, image: torch.Tensor) -> None:
        """Copy a uint8 image (3, H, W) into that row. Raises DataError for an image that is not like the first."""
        if not self.begun:
            # As the image lies in memory: to transpose it costs more than the copy.
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

    def finished(self, labels: Sequence[int], unreadable: tuple[str, ...] = ()) -> Batch | FilledSlot:
        """Return the batch: rows that were not written are blank, and `labels` belong to its first rows."""
        for row in self._blank:
            self._images[row].zero_()
        self._labels[: len(labels)] = torch.tensor(labels, dtype=torch.int64)
        self._labels[len(labels) :] = 0
        if self._slot is not None and self._slots is not None:
            return FilledSlot(self._slots.number, self._slot, self._channels_last, len(labels), unreadable)
        return Batch(self._images, self._labels, len(labels), unreadable)

    def give_up(self) -> None:
        """Give the memory back: there will be no batch."""
        if self._slot is not None and self._slots is not None:
            self._slots.give_back(self._slot)


def _memory_to_send(size: int) -> torch.Tensor:
    """Take memory for a batch that no slot is free for. The worker takes it itself, since a batch that DataLoader's
    thread cannot send is lost without a word. Raises DataError."""
    try:
        return new_shared_memory(size)
    except RuntimeError as error:
        shared = shutil.disk_usage("/dev/shm")
        raise DataError(
            f"a batch of {size / 1e6:.1f} MB does not fit /dev/shm, which has {shared.free / 1e6:.1f} of "
            f"{shared.total / 1e6:.1f} MB free: "
            "make it larger (docker run --shm-size=8g, or --ipc=host), or take fewer data.workers or a smaller batch"
        ) from error


def described(error: Exception) -> str:
    """Describe what went wrong in loading, in one line."""
    return one_line(str(error) if isinstance(error, DataError) else f"{type(error).__name__} in loading: {error}")


class _Loading(Iterator[Batch]):
    """Iterates over the batches of some keys. Worker processes, where there are any, load them, and are forked at once.

    Where image sizes are known, nothing raises but MemoryError: what goes wrong with the workers is the `failure` of
    all batches from there
    on.

    Args:
        keys: of each batch.
        count: batches.
        rows: of each batch.
        held: batches that whoever takes them may hold on to at a time.
        timeout: tells the seconds after which a worker that reads no further image is given up; None: never.
    """

    def __init__(
        self,
        samples: _Samples,
        keys: Iterable[list[tuple[int, int]]],
        count: int,
        rows: int,
        workers: int,
        pin: bool,
        held: int,
        timeout: Callable[[], float | None],
    ) -> None:
        self._samples, self._keys, self._pin, self._held = samples, keys, pin, held
        self._count, self._rows, self._workers, self._timeout = count, rows, workers, timeout
        self._size = samples.image_size
        self._given = 0
        self._failure = ""
        self._start_seconds = START_SECONDS
        self._start()

    def _start(self) -> None:
        """Fork the workers, where there are any, to load from the next batch on."""
        self._first = self._given
        self._marks = Marks(max(1, self._workers))
        samples = copy.copy(self._samples)
        if self._workers:
            samples.marks = self._marks
            if self._size is not None:
                slots = _slots(self._held, self._workers)
                samples.slots = BatchSlots(self._workers, slots, self._rows, torch.Size((3, self._size, self._size)))
        loader = DataLoader(
            samples,
            batch_sampler=_Keys(lambda: itertools.islice(iter(self._keys), self._first, None)),
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            num_workers=self._workers,
            pin_memory=self._pin,
            worker_init_fn=_Beginning(self._marks) if self._workers else None,
            prefetch_factor=PREFETCH if self._workers else None,
            timeout=_LOOK_EVERY if self._workers else 0,
            # What workers share with their rank is inherited.
            multiprocessing_context="fork" if self._workers else None,
        )
        before = {process.pid for process in multiprocessing.active_children()}
        with _garbage_stays():
            self._iterator: Iterator[Batch | FilledSlot] | None = iter(loader)
        self._pids = [process.pid for process in multiprocessing.active_children() if process.pid not in before]

    def __next__(self) -> Batch:
        if self._iterator is None and self._given == self._count:
            raise StopIteration
        found: Batch | FilledSlot = Batch(*_NOTHING, 0)
        if self._iterator is not None:
            try:
                found = self._waited_for()
            except (StopIteration, MemoryError):
                raise
            except Exception as error:  # of a worker that was killed, and of DataLoader's queues
                if self._size is None:
                    raise
                self._failure = (
                    described(error) if isinstance(error, DataError) else one_line(f"a worker process is lost: {error}")
                )
            if self._failure:
                self._end_workers()
        self._given += 1
        batch = found.batch() if isinstance(found, FilledSlot) else found
        failure = self._failure or batch.failure
        return self._blank(failure) if failure else batch

    def _waited_for(self) -> Batch | FilledSlot:
        # DataLoader gives out and takes back batches in turn.
        worker = (self._given - self._first) % max(1, self._workers)
        seen, looked, waited = self._marks.count(worker), time.monotonic(), 0.0
        while True:
            assert self._iterator is not None
            try:
                return next(self._iterator)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            # A job that was suspended as a whole has not waited for all that time.
            now = time.monotonic()
            waited, looked = waited + min(now - looked, 2 * _LOOK_EVERY), now
            count, limit = self._marks.count(worker), self._timeout()
            if count != seen:
                seen, waited = count, 0.0
            elif limit is not None and waited >= limit:
                raise DataError(
                    f"{self._marks.describe(worker)}, has read nothing for {waited:.0f} s: it hangs, or its disk does"
                )
            elif not self._marks.has_begun(worker) and waited >= self._start_seconds:
                console.say(
                    f"warning: a worker process has not begun to load after {waited:.0f} s; the worker processes are "
                    "started again"
                )
                stuck: list[Iterator[Batch | FilledSlot] | None] = [self._iterator]
                self._iterator = None
                _end(stuck, self._pids)
                self._start_seconds *= 2
                self._start()
                worker, seen, waited = 0, 0, 0.0

    def _blank(self, failure: str) -> Batch:
        assert self._size is not None
        images = torch.zeros(self._rows, 3, self._size, self._size, dtype=torch.uint8)
        return Batch(images, torch.zeros(self._rows, dtype=torch.int64), 0, (), failure)

    def _end_workers(self) -> None:
        """End the workers in a thread: it takes a while, and the other ranks wait for this one."""
        held, self._iterator = [self._iterator], None
        threading.Thread(target=_end, args=(held, self._pids), name="ending workers").start()


def _slots(held: int, workers: int) -> int:
    """Count the slots that each worker process of a rank needs: for the batches that it loads ahead, and its share of
    those held."""
    return PREFETCH + -(-held // max(1, workers))


def _shared_bytes(samples: _Samples, rows: int, held: int, workers: int) -> int:
    if samples.image_size is None:
        return 0
    return workers * _slots(held, workers) * batch_bytes(rows, torch.Size((3, samples.image_size, samples.image_size)))


def _end(held: list[Iterator[Batch | FilledSlot] | None], pids: Collection[int | None]) -> None:
    """Give up a DataLoader's iterator, of which `held` has the only reference, and kill what it leaves: Python would
    wait for a worker that hangs before it exits."""
    held.clear()
    for process in multiprocessing.active_children():
        if process.pid in pids:
            process.kill()


def _as_it_is(batch: Batch) -> Batch:
    return batch


@contextmanager
def _garbage_stays() -> Iterator[None]:
    """Processes forked inside never collect objects that they inherit. Some of these are the rank's garbage, whose
    finalizers join threads that no fork has, and wait for ever; and a collector that visits all that a rank holds makes
    copies of its memory."""
    frozen_before = gc.get_freeze_count() > 0  # a host program that does the same
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


class _Beginning:
    """Prepares a worker process for its work."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def __call__(self, worker: int) -> None:
        self._marks.begin(worker)
        _end_with_rank()


def _end_with_rank() -> None:
    """In a worker process: only the rank that it loads for ends it. Batch systems and launchers send signals to all
    processes of a job; a worker that obeyed would take its rank along, before that could write a checkpoint."""
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
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
    """Iterates over a rank's keys, made anew for each iteration."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()


class TrainLoader:
    """The micro-batches of one rank, from any global step on, over all epochs without a pause between them.

    Args:
        source: images and labels.
        transform: one image's augmentation.
        order: who computes which samples.
        workers: worker processes; 0 loads in this one.
        pin: page-locked memory, for a faster copy to a GPU.
        replace: another image stands in for one that cannot be read; else a blank one does. `Batch.unreadable` tells.
        image_size: pixels, that the transform makes. Given, nothing raises in here: `Batch.failure` tells.
        timeout: seconds after which a worker process that reads no further image is given up; None: never. May be set
            later.
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
    ) -> None:
        self.order, self.timeout = order, timeout
        self._samples = _Samples(source, transform, order.seed, replace, image_size)
        if isinstance(order, StreamedBatchSampler) and isinstance(source, RowGroups):
            source.keep(order.row_groups_of_a_worker(workers))
        self._workers, self._pin = workers, pin

    def steps(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The micro-batches of steps first_step … last_step − 1, `order.micro_steps` of them a step."""
        keys = _Keys(lambda: self.order.micro_batches(first_step, last_step))
        count = (last_step - first_step) * self.order.micro_steps
        return _Loading(
            self._samples,
            keys,
            count,
            self.order.micro_batch,
            self._workers,
            self._pin,
            self._held,
            lambda: self.timeout,
        )

    @property
    def _held(self) -> int:
        """Count the batches that the trainer has at a time: those of a step, and the next one that it takes."""
        return self.order.micro_steps + 1

    @property
    def shared_bytes(self) -> int:
        """Tells how many bytes this rank shares with its worker processes for batches, at most; 0 without workers."""
        return _shared_bytes(self._samples, self.order.micro_batch, self._held, self._workers)


class EvaluationLoader:
    """Each sample once over all ranks, in batches of one shape. All ranks get equally many batches: a short one is
    filled up with blank images, and so is one without any sample; only its first `valid` rows count. A rank's samples
    are neighbours in the data set, and so are those of each of its worker processes.

    Args:
        batch: rows a batch, per rank.
        rank, world_size: whose batches.
        image_size, timeout: as for TrainLoader.
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
        self._keys = [by_turn[number] for number in range(count)]
        self._rows = batch
        self._samples, self._workers, self._pin = _Samples(source, transform, None, image_size=image_size), workers, pin

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        return _Loading(
            self._samples, self._keys, len(self), self._rows, self._workers, self._pin, _HELD, lambda: self.timeout
        )

    @property
    def shared_bytes(self) -> int:
        """As for TrainLoader."""
        return _shared_bytes(self._samples, self._rows, _HELD, self._workers)
