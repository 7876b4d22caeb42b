"""Heartbeats: each rank reports where it is, so that the others can name a rank that is lost, and whether it still
runs.

A thread of each rank writes its status into the launch's key-value store once a second, over a connection of its own:
training itself sends nothing for it, and a store that is out of reach does not slow training down. When a collective
fails, a rank reads the statuses of all ranks, twice.

With gloo, a collective fails when a rank is gone. NCCL's fails at its timeout, or ends the process without an
exception. So where ranks meet by NCCL, the thread also looks, at each heartbeat, whether a rank has reported its end,
and whether the next rank still has a heartbeat: it names a lost rank before the process may be ended.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dkd import console
from dkd.config import RecipeError
from dkd.distributed import stop_signals
from dkd.errors import LostRankError, OutOfMemoryError, Stopped, TrainingError
from dkd.global_batch import AbsentRankError, BatchMismatchError
from dkd.global_batch.collectives import all_gather_objects
from dkd.launch import Launch, report_to_launcher
from dkd.text import first_line

T = TypeVar("T")

BEAT = 1.0
"""Seconds between two heartbeats."""
_READ_LIMIT = 6.0  # seconds that reading all statuses takes at most
_SILENT_BEATS = 10  # heartbeats of this rank in which the next one has had none: then it is reported
_MOST_SHOWN = 8
_GAVE_UP = "gave up waiting"
_ENDED = "ended"


@dataclass(frozen=True)
class RankStatus:
    """Holds what a rank reports of itself."""

    count: int
    """Number of the heartbeat."""
    host: str
    place: tuple[int, ...]
    """Numbers that grow as training advances, equal on all ranks at the same place."""
    what: str
    """The place in words."""
    end: str = ""
    """The reason why this rank ends; empty while it runs."""
    left: bool = False
    """Whether this rank has done its part, and has no heartbeat any more."""


class Heartbeat:
    """Reports this rank's status, and reads those of the others. All ranks make one together.

    Args:
        launch: of this process.
        warn_after: seconds at one place after which this rank reports where all ranks are; None: never. A number is for
            backends whose watchdog ends the process where gloo raises an error: then this rank also reports the next
            one where that has no heartbeat, and ends when another rank has reported that it ended.
    """

    def __init__(self, launch: Launch, warn_after: float | None = None) -> None:
        self._rank, self._world_size, self.warn_after = launch.rank, launch.world_size, warn_after
        self._host = platform.node()
        self._place: tuple[tuple[int, ...], str, float] = ((-1,), "starting", time.monotonic())
        self._end = ""
        self._left = False
        self._count = 0
        self._next, self._next_unchanged = RankStatus(0, "", (), ""), 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._store: dist.Store | None = None
        self._address, self._named_address = launch.address, launch.named_address
        if launch.world_size == 1 or launch.address is None:
            return
        self._name = f"dkd/heartbeat/{all_gather_objects(uuid.uuid4().hex)[0]}"
        try:
            self._store = self._connect()
            self._beat()
        except (RuntimeError, OSError) as error:
            console.say(f"dkd: rank {self._rank}: heartbeats cannot be written to {self._named_address}: {error}")
            return
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _connect(self) -> dist.Store:
        """Open a client of its own: calls over one connection wait for each other. Raises RuntimeError or OSError."""
        assert self._address is not None
        # Tried first, since torch's client prints at length that it cannot connect.
        socket.create_connection(self._address, timeout=_READ_LIMIT / 2).close()
        timeout = timedelta(seconds=_READ_LIMIT)
        return dist.PrefixStore(self._name, dist.TCPStore(*self._address, is_master=False, timeout=timeout))

    def reach(self, place: Sequence[int], what: str) -> None:
        """Note that this rank is at `place`. Costs nothing.

        Args:
            place: numbers that grow, compared as tuples are.
            what: the place in words.
        """
        self._place = (tuple(place), what, time.monotonic())

    @contextmanager
    def names_lost_ranks(self) -> Iterator[None]:
        """Turn a failed collective inside into a LostRankError that names the missing rank. An error that makes this
        rank leave alone is reported to the others; what all ranks raise together passes."""
        try:
            yield
        except (TrainingError, Stopped):
            raise
        except RecipeError as error:
            # Mostly raised by all ranks together; if not, the others learn why this one leaves.
            self.report_end("; ".join(map(str, error.problems)))
            raise
        except BatchMismatchError as error:
            raise TrainingError(str(error)) from error
        except BaseException as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.report_end(reason := describe_full_memory(error))
                raise OutOfMemoryError(f"{reason}; this is rank {self._rank} on {self._host}") from error
            if self._world_size > 1 and is_lost_connection(error):
                self.report_end()
                raise LostRankError(f"{first_line(error)} | {self.describe()}") from error
            self.report_end(f"{type(error).__name__}: {first_line(error)}")
            raise

    def report_end(self, reason: str | None = None) -> None:
        """Report that this rank ends, for that reason or because another rank is lost."""
        self._end = reason or _GAVE_UP
        _within(_READ_LIMIT, self._beat)
        self.close()

    def close(self) -> None:
        """Stop the heartbeats. Where another rank looks for them, it learns that this rank is not lost."""
        running = not self._stopped.is_set()
        self._stopped.set()
        if running and not self._end and self._store is not None and self.warn_after is not None:
            self._left = True
            _within(_READ_LIMIT, self._beat)

    def describe(self) -> str:
        """Describe, after a failure, which ranks ended, have no heartbeat or are late, and where this rank is. Takes a
        few seconds."""
        here = f"this is rank {self._rank} on {self._host}: {self._place[1]}"
        if self._world_size == 1:
            return here
        if self._address is None:
            return f"no heartbeats are exchanged, since no launcher has set MASTER_ADDR; {here}"
        read = _within(_READ_LIMIT, self._read_twice) if self._store is not None else None
        if read is None:
            return (
                f"the key-value store of the launch at {self._named_address} does not answer: the machine of rank 0 is "
                f"gone, or the network between it and this one; {here}"
            )
        return "; ".join([*compare(*read, self._rank, self._world_size), here])

    def _read_twice(self) -> tuple[dict[int, RankStatus], dict[int, RankStatus]]:
        before = self._read()
        time.sleep(2.5 * BEAT)
        return before, self._read()

    def _read(self) -> dict[int, RankStatus]:
        store = self._connect()  # the thread's own connection may be stuck
        keys = [str(rank) for rank in range(self._world_size)]
        if not store.check(keys):  # some rank never joined; reading its key would wait for it
            keys = [key for key in keys if store.check([key])]
        found = {}
        for key, text in zip(keys, store.multi_get(keys), strict=True):
            values = json.loads(text)
            found[int(key)] = RankStatus(**{**values, "place": tuple(values["place"])})
        return found

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            place, what, _ = self._place
            if self._store is not None:
                status = RankStatus(self._count, self._host, place, what, self._end, self._left)
                self._store.set(str(self._rank), json.dumps(asdict(status)))
                if self._end:
                    self._store.set(_ENDED, "")

    def _run(self) -> None:
        warned: tuple[int, ...] = ()
        while not self._stopped.wait(BEAT):
            try:
                self._beat()
                self._end_with_launch()
                if self.warn_after is not None:
                    self._end_with_others()
                    self._look_at_next_rank()
            except RuntimeError:
                # The store is gone, and with it the launch; a rank that waits for this one learns that from its own
                # connection.
                return
            place, what, since = self._place
            waited = time.monotonic() - since
            if self.warn_after is not None and waited > self.warn_after and place != warned:
                warned = place
                # In a thread of its own: this one has to continue its heartbeats, which the others read now, too.
                threading.Thread(target=self._warn, args=(what, waited), name="warning", daemon=True).start()

    def _warn(self, what: str, waited: float) -> None:
        console.say(f"dkd: rank {self._rank} has been at {what} for {waited:.0f} s | {self.describe()}")

    def _look_at_next_rank(self) -> None:
        """Report the next rank when it has had no heartbeat during several of this rank's. One rank reads one other, so
        that a thousand ranks read no more of each other than two do.

        Heartbeats are counted, not seconds: where all processes were suspended, this rank's have stood still, too.
        """
        assert self._store is not None
        other = str((self._rank + 1) % self._world_size)
        if not self._store.check([other]):
            return
        status = RankStatus(**json.loads(self._store.get(other)))
        self._next_unchanged = self._next_unchanged + 1 if status.count == self._next.count else 0
        self._next = status
        if self._next_unchanged == _SILENT_BEATS and not status.end and not status.left:
            console.say(
                f"dkd: rank {self._rank} at {self._place[1]}: rank {other} on {status.host}: no heartbeat, last seen "
                f"at {status.what}"
            )

    def _end_with_others(self) -> None:
        """End this process when another rank has reported that it ended, and this rank does not end by itself: it waits
        in a collective, which that rank will not join."""
        assert self._store is not None
        if self._end or not self._store.check([_ENDED]):
            return
        # Several ranks may be ending together, each with its own message; this one continues its heartbeats meanwhile.
        end = time.monotonic() + _READ_LIMIT
        while time.monotonic() < end and not self._end and not self._stopped.wait(BEAT):
            self._beat()
        if self._end or self._stopped.is_set():
            return
        reason = f"dkd: rank {self._rank} cannot continue: another rank has ended | {self.describe()}"
        console.say(reason)
        report_to_launcher(console.printable(reason))
        self.report_end()
        os._exit(1)

    def _end_with_launch(self) -> None:
        """End this process when its launcher has sent SIGTERM and another rank has reported that it ended.

        SIGTERM alone asks for a checkpoint. A launcher that has lost a rank sends it, too, and then there will be no
        checkpoint: a rank that hangs in a collective must not be waited for. A rank that has reported its own end is
        about to exit by itself.
        """
        if self._end or stop_signals.signalled() is None or self._store is None or not self._store.check([_ENDED]):
            return
        time.sleep(_READ_LIMIT)  # this rank may be about to report its own end
        if not self._end:
            console.say(f"dkd: rank {self._rank} ends at {self._place[1]}, since another rank cannot continue")
            os._exit(1)


def compare(before: dict[int, RankStatus], now: dict[int, RankStatus], own: int, world_size: int) -> list[str]:
    """Return what two readings of all statuses, a few heartbeats apart, show of the other ranks: those that ended, then
    those without a heartbeat, then those at an earlier place than the furthest; if there are none, one sentence that
    all ranks had reached the same place.

    Args:
        own: the rank that reads; it is not among those described.
    """
    furthest = max((status.place for status in now.values()), default=())
    ended, silent, late = [], [], []
    for rank in range(world_size):
        if rank == own:
            continue
        if rank not in now:
            silent.append(f"rank {rank}: has not joined")
            continue
        status, name = now[rank], f"rank {rank} on {now[rank].host}"
        if status.end and status.end != _GAVE_UP:
            ended.append(f"{name}: ended at {status.what}: {status.end}")
        elif not status.end and rank in before and before[rank].count == status.count:
            silent.append(f"{name}: no heartbeat, last seen at {status.what}")
        elif status.place < furthest:
            late.append(f"{name}: {status.what}")
    found = [*ended, *silent, *late]
    if len(found) > _MOST_SHOWN:
        found[_MOST_SHOWN:] = [f"and {len(found) - _MOST_SHOWN} more"]
    return found or ["all other ranks had reached the same place"]


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """Return what `action` returns, or None when it fails or takes longer: a dead network may hold it for ever."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(action())
        except (RuntimeError, OSError, ValueError):
            return  # as when it takes too long: there is no result

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def describe_full_memory(error: BaseException) -> str:
    """Describe that the memory of a rank's GPU is full, and what to do."""
    return (
        f"the GPU's memory is full ({first_line(error)}); take a smaller train.micro_batch (the global batch stays), "
        "or an engine that shards more"
    )


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed because of another rank: gloo raises plain RuntimeErrors that name its own
    files, or its pairs."""
    if isinstance(error, dist.DistError | AbsentRankError):
        return True
    marks = ("gloo/transport", "connection closed by peer", "pair closure")
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in marks)
