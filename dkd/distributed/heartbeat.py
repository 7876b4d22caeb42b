"""Signs of life of every rank, so that when one is lost the others can say which, where it was, and whether it is
alive.

A thread of each rank leaves its place in the launch's key-value store once a second, over a connection of its own:
training itself sends nothing for it, and a store that is out of reach does not hold it up. When a collective fails, a
rank reads those of all, twice.
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

import torch.distributed as dist

from dkd import console
from dkd.config import RecipeError
from dkd.distributed import stop_signals
from dkd.errors import LostRankError, Stopped, TrainingError
from dkd.global_batch import AbsentRankError, BatchMismatchError
from dkd.global_batch.collectives import all_gather_objects
from dkd.text import first_line

T = TypeVar("T")

BEAT = 1.0  # seconds
_READ_LIMIT = 6.0  # seconds that a description takes at most
_MOST_SHOWN = 8
_GAVE_UP = "gave up waiting"
_ENDED = "ended"


@dataclass(frozen=True)
class RankStatus:
    """What a rank leaves of itself."""

    count: int
    host: str
    place: tuple[int, ...]
    """Numbers that grow as training goes on; the same on all ranks at the same place."""
    what: str
    """The place in words."""
    end: str = ""
    """Why this rank ends."""


class Heartbeat:
    """This rank's signs of life, and those of the others. All ranks make one together.

    Args:
        rank, world_size: of this process.
        warn_after: seconds at one place after which to say where all ranks are; None: never. For backends whose
            watchdog ends the process where gloo raises an error.
    """

    def __init__(self, rank: int, world_size: int, warn_after: float | None = None) -> None:
        self._rank, self._world_size, self.warn_after = rank, world_size, warn_after
        self._host = platform.node()
        self._place: tuple[tuple[int, ...], str, float] = ((-1,), "starting", time.monotonic())
        self._end = ""
        self._count = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._store: dist.Store | None = None
        if world_size == 1:
            return
        self._name = f"dkd/watch/{all_gather_objects(uuid.uuid4().hex)[0]}"
        self._address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            self._store = self._connect()
            self._beat()
        except (RuntimeError, OSError, KeyError) as error:
            console.say(f"dkd: rank {rank}: signs of life cannot be left at {self._address}: {error}")
            return
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _connect(self) -> dist.Store:
        """A client of its own: calls over one connection wait for each other. Raises RuntimeError or OSError."""
        # Asked first, since torch's client says at length that it cannot connect.
        socket.create_connection(
            (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=_READ_LIMIT / 2
        ).close()
        timeout = timedelta(seconds=_READ_LIMIT)
        return dist.PrefixStore(
            self._name,
            dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout),
        )

    def reach(self, place: Sequence[int], what: str) -> None:
        """This rank is at `place`. Costs nothing.

        Args:
            place: numbers that grow, compared as tuples are.
            what: the place in words.
        """
        self._place = (tuple(place), what, time.monotonic())

    @contextmanager
    def names_lost_ranks(self) -> Iterator[None]:
        """Inside, a failed collective becomes a LostRankError that says who is missing. What makes this rank leave
        alone, it tells the others; what all ranks raise together goes through."""
        try:
            yield
        except (TrainingError, Stopped):
            raise
        except RecipeError as error:
            # Mostly of all ranks together; if not, the others hear why this one leaves.
            self.leave_word("; ".join(map(str, error.problems)))
            raise
        except BatchMismatchError as error:
            raise TrainingError(str(error)) from error
        except BaseException as error:
            if self._world_size > 1 and is_lost_connection(error):
                self.leave_word()
                raise LostRankError(f"{first_line(error)} | {self.describe()}") from error
            self.leave_word(f"{type(error).__name__}: {first_line(error)}")
            raise

    def leave_word(self, reason: str | None = None) -> None:
        """This rank ends: for that reason, or because another is lost."""
        self._end = reason or _GAVE_UP
        _within(_READ_LIMIT, self._beat)
        self.close()

    def close(self) -> None:
        """Leave no more signs."""
        self._stopped.set()

    def describe(self) -> str:
        """After a failure: which ranks ended, give no sign of life or are behind, and where this one is. Takes a few
        seconds."""
        here = f"this is rank {self._rank} on {self._host}: {self._place[1]}"
        if self._world_size == 1:
            return here
        read = _within(_READ_LIMIT, self._read_twice) if self._store is not None else None
        if read is None:
            return (
                f"the key-value store of the launch at {self._address} does not answer: the machine of rank 0 is gone, "
                "or the network "
                f"between it and this one; {here}"
            )
        return "; ".join([*told(*read, self._rank, self._world_size), here])

    def _read_twice(self) -> tuple[dict[int, RankStatus], dict[int, RankStatus]]:
        before = self._read()
        time.sleep(2.5 * BEAT)
        return before, self._read()

    def _read(self) -> dict[int, RankStatus]:
        store = self._connect()  # the thread's may be stuck
        keys = [str(rank) for rank in range(self._world_size)]
        if not store.check(keys):  # some rank never came; reading its key would wait for it
            keys = [key for key in keys if store.check([key])]
        signs = {}
        for key, text in zip(keys, store.multi_get(keys), strict=True):
            values = json.loads(text)
            signs[int(key)] = RankStatus(**{**values, "place": tuple(values["place"])})
        return signs

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            place, what, _ = self._place
            if self._store is not None:
                sign = RankStatus(self._count, self._host, place, what, self._end)
                self._store.set(str(self._rank), json.dumps(asdict(sign)))
                if self._end:
                    self._store.set(_ENDED, "")

    def _watch(self) -> None:
        warned: tuple[int, ...] = ()
        while not self._stopped.wait(BEAT):
            try:
                self._beat()
                self._end_with_the_launch()
            except RuntimeError:
                return  # the store is gone, and with it the launch; whoever waits for this rank hears that from its own connection
            place, what, since = self._place
            waited = time.monotonic() - since
            if self.warn_after is not None and waited > self.warn_after and place != warned:
                warned = place
                # In a thread of its own: this one has to go on giving signs of life to the others, which read them now
                # too.
                threading.Thread(target=self._warn, args=(what, waited), name="warning", daemon=True).start()

    def _warn(self, what: str, waited: float) -> None:
        console.say(f"dkd: rank {self._rank} has been at {what} for {waited:.0f} s | {self.describe()}")

    def _end_with_the_launch(self) -> None:
        """A launcher that has lost a rank asks the others to end by SIGTERM, which alone asks for a checkpoint. Where
        another rank has left word that it cannot go on, there will be none, and a rank that hangs somewhere is not to
        be waited for. One that has left word itself is about to end."""
        if self._end or stop_signals.signalled() is None or self._store is None or not self._store.check([_ENDED]):
            return
        time.sleep(_READ_LIMIT)  # it may be about to say so, too
        if not self._end:
            console.say(f"dkd: rank {self._rank} ends at {self._place[1]}, since another rank cannot go on")
            os._exit(1)


def told(before: dict[int, RankStatus], now: dict[int, RankStatus], own: int, world_size: int) -> list[str]:
    """What two readings of all signs, a few beats apart, say of the other ranks: those that ended, then those without a
    sign of life, then those behind the furthest; if there are none, that all had come as far.

    Args:
        own: the rank that tells; it is not among them.
    """
    furthest = max((sign.place for sign in now.values()), default=())
    ended, lifeless, behind = [], [], []
    for rank in range(world_size):
        if rank == own:
            continue
        if rank not in now:
            lifeless.append(f"rank {rank}: has not come")
            continue
        sign, name = now[rank], f"rank {rank} on {now[rank].host}"
        if sign.end and sign.end != _GAVE_UP:
            ended.append(f"{name}: ended at {sign.what}: {sign.end}")
        elif not sign.end and rank in before and before[rank].count == sign.count:
            lifeless.append(f"{name}: no sign of life, last seen at {sign.what}")
        elif sign.place < furthest:
            behind.append(f"{name}: {sign.what}")
    found = [*ended, *lifeless, *behind]
    if len(found) > _MOST_SHOWN:
        found[_MOST_SHOWN:] = [f"and {len(found) - _MOST_SHOWN} more"]
    return found or ["all ranks had come as far"]


def _within(seconds: float, action: Callable[[], T]) -> T | None:
    """What `action` returns, or None when it fails or takes longer: a dead network may hold it for ever."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(action())
        except (RuntimeError, OSError, ValueError):
            return  # as a result that does not come

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank: gloo raises plain RuntimeErrors that name its own files, or
    its pairs."""
    if isinstance(error, dist.DistError | AbsentRankError):
        return True
    marks = ("gloo/transport", "connection closed by peer", "pair closure")
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in marks)
