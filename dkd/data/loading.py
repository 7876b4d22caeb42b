"""Load batches one after the other, by worker processes or without them.

Worker processes are forked, share memory with their rank, and are given up when they hang.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader

from dkd import console
from dkd.data.samples import EMPTY, Batch, FilledSlot, Samples, describe_failure
from dkd.data.samples_by_epoch import SamplesByEpoch
from dkd.data.sources import DataError
from dkd.data.worker_memory import BatchSlots, Marks, batch_bytes
from dkd.text import one_line

PREFETCH = 2
"""Batches that each worker process loads ahead."""
_LOOK_EVERY = 1.0  # seconds between looks at a worker that is waited for
START_SECONDS = 30.0
"""Seconds after which a worker process that has not begun counts as stuck in a lock that it inherited: all workers are
forked again, and have twice as long."""


class Loading(Iterator[Batch]):
    """Iterate over the batches of some keys. Worker processes, where there are any, load the batches, and are forked at
    once.

    Where `samples.image_size` is known, only MemoryError is raised: a failure of the workers becomes the `failure` of
    that batch and of all later ones.

    Args:
        samples: loads one batch.
        keys: the keys of each batch.
        count: number of batches.
        rows: rows of each batch.
        workers: worker processes; 0 loads in this process.
        pin: whether batches are copied to page-locked memory.
        held: number of batches that the consumer may hold at a time.
        timeout: returns the seconds after which a worker that reads no further image is given up; None: never.
        size_of: returns the side of a batch's images, in pixels, from the number of the batch; None: all have that of
            `samples`.
    """

    def __init__(
        self,
        samples: Samples | SamplesByEpoch,
        keys: Iterable[list[tuple[int, int]]],
        count: int,
        rows: int,
        workers: int,
        pin: bool,
        held: int,
        timeout: Callable[[], float | None],
        size_of: Callable[[int], int] | None = None,
    ) -> None:
        self._samples, self._keys, self._pin, self._held = samples, keys, pin, held
        self._count, self._rows, self._workers, self._timeout = count, rows, workers, timeout
        self._size, self._size_of = samples.image_size, size_of
        self._given = 0
        self._failure = ""
        self._start_seconds = START_SECONDS
        self._start()

    def _start(self) -> None:
        """Fork the workers, where there are any, to load the batches that were not given yet."""
        self._first = self._given
        self._marks = Marks(max(1, self._workers))
        samples = self._samples
        if self._workers:
            slots = None
            if self._size is not None:
                count, shape = _count_slots(self._held, self._workers), torch.Size((3, self._size, self._size))
                slots = BatchSlots(self._workers, count, self._rows, shape)
            samples = samples.with_memory(self._marks, slots)
        loader = DataLoader(
            samples,
            batch_sampler=Keys(lambda: itertools.islice(iter(self._keys), self._first, None)),
            collate_fn=_keep,  # type: ignore[arg-type]
            num_workers=self._workers,
            pin_memory=self._pin,
            worker_init_fn=_Begin(self._marks) if self._workers else None,
            prefetch_factor=PREFETCH if self._workers else None,
            timeout=_LOOK_EVERY if self._workers else 0,
            # Workers inherit the memory that they share with their rank.
            multiprocessing_context="fork" if self._workers else None,
        )
        before = {process.pid for process in multiprocessing.active_children()}
        with _keep_garbage():
            self._iterator: Iterator[Batch | FilledSlot] | None = iter(loader)
        self._pids = [process.pid for process in multiprocessing.active_children() if process.pid not in before]

    def __next__(self) -> Batch:
        if self._iterator is None and self._given == self._count:
            raise StopIteration
        found: Batch | FilledSlot = EMPTY
        if self._iterator is not None:
            try:
                found = self._wait_for_batch()
            except (StopIteration, MemoryError):
                raise
            except Exception as error:  # a worker was killed, or DataLoader's queues are broken
                if self._size is None:
                    raise
                self._failure = (
                    describe_failure(error)
                    if isinstance(error, DataError)
                    else one_line(f"a worker process is lost: {error}")
                )
            if self._failure:
                self._stop_workers()
        self._given += 1
        batch = found.batch() if isinstance(found, FilledSlot) else found
        failure = self._failure or batch.failure
        return self._make_blank(failure) if failure else batch

    def _wait_for_batch(self) -> Batch | FilledSlot:
        # DataLoader gives batches to its workers in turn, and takes them back in the same order.
        worker = (self._given - self._first) % max(1, self._workers)
        seen, looked, waited, started = self._marks.count(worker), time.monotonic(), 0.0, 0.0
        while True:
            assert self._iterator is not None
            try:
                return next(self._iterator)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            # A job that was suspended as a whole did not wait during that time.
            now = time.monotonic()
            waited, looked = waited + min(now - looked, 2 * _LOOK_EVERY), now
            count, limit = self._marks.count(worker), self._timeout()
            if count != seen:
                seen, waited = count, 0.0
            elif limit is not None and waited >= limit:
                raise DataError(
                    f"{self._marks.describe(worker)}, has read nothing for {waited:.0f} s: it hangs, or its disk does"
                )
            elif not self._marks.has_begun(worker) and waited - started >= self._patience(limit):
                console.say(
                    f"warning: a worker process has not begun to load after {waited:.0f} s; the worker processes are "
                    "started again"
                )
                self._stop_workers()
                self._start_seconds *= 2
                self._start()
                # What was waited counts against the limit: the other ranks wait for this one all the time.
                worker, seen, started = 0, 0, waited

    def _patience(self, limit: float | None) -> float:
        """Return the seconds that workers have to begin: few enough that they can be replaced before the limit."""
        return self._start_seconds if limit is None else min(self._start_seconds, limit / 3)

    def _make_blank(self, failure: str) -> Batch:
        # Of the size that the other ranks' batches have.
        size = self._size if self._size_of is None else self._size_of(self._given - 1)
        assert size is not None
        images = torch.zeros(self._rows, 3, size, size, dtype=torch.uint8)
        return Batch(images, torch.zeros(self._rows, dtype=torch.int64), 0, (), failure)

    def _stop_workers(self) -> None:
        """Stop the workers in a thread: stopping takes a while, and the other ranks wait for this one."""
        held, self._iterator = [self._iterator], None
        threading.Thread(target=_abandon, args=(held, self._pids), name="stopping workers").start()


def _count_slots(held: int, workers: int) -> int:
    """Count the slots that each worker process of a rank needs: for the batches that the worker loads ahead, and for
    its share of the batches held."""
    return PREFETCH + -(-held // max(1, workers))


def shared_bytes(samples: Samples | SamplesByEpoch, rows: int, held: int, workers: int) -> int:
    """Return the bytes that a rank shares with its worker processes for batches, at most; 0 without workers. Arguments
    are those of Loading."""
    if samples.image_size is None:
        return 0
    return (
        workers
        * _count_slots(held, workers)
        * batch_bytes(rows, torch.Size((3, samples.image_size, samples.image_size)))
    )


def _abandon(held: list[Iterator[Batch | FilledSlot] | None], pids: Collection[int | None]) -> None:
    """Give up a DataLoader's iterator, of which `held` has the only reference, and kill the workers that are left:
    Python would wait at its exit for a worker that hangs."""
    held.clear()
    for process in multiprocessing.active_children():
        if process.pid in pids:
            process.kill()


def _keep(batch: Batch) -> Batch:
    return batch


@contextmanager
def _keep_garbage() -> Iterator[None]:
    """Keep processes that are forked inside from ever collecting the objects that they inherit.

    Some of these objects are the rank's garbage, whose finalizers would join threads that no fork has, and wait
    forever. A collector that visits all objects of a rank would also copy the rank's memory.
    """
    frozen_before = gc.get_freeze_count() > 0  # a host program that does the same
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


class _Begin:
    """Prepare a worker process, when it begins."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def __call__(self, worker: int) -> None:
        self._marks.begin(worker)
        _leave_signals_to_rank()


def _leave_signals_to_rank() -> None:
    """Let a worker process be stopped by its rank alone. Batch systems and launchers send signals to all processes of a
    job; a worker that obeyed would stop its rank before the rank could write a checkpoint."""
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_obey_rank, name="signals", daemon=True).start()


def _obey_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    # sigwaitinfo reports who sent the signal, which a signal handler would not learn.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank.pid:
        pass
    os._exit(0)


class Keys:
    """Iterate over a rank's keys, which `make` makes anew for each iteration."""

    def __init__(self, make: Callable[[], Iterator[list[tuple[int, int]]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.make()
