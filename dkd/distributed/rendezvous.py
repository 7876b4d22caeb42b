"""The rendezvous: the ranks of one start find each other, however many starts the key-value store has seen before.

A launcher that restarts its workers may keep its store, and then the addresses that the workers before left in it are
still there: a
process group made from them connects to processes that are gone. Counters of restarts do not help, since the machines
of a job do not count alike. So the ranks agree on a name that no start had before, and the process group keeps its keys
under it:

    every rank     writes a word of its own to join/RANK, over whatever an earlier start left there
    rank 0         offers its name to each word it finds, and again to one that takes the place of another
    every rank     acknowledges the offer; only a living process does
    rank 0         when all have acknowledged, starts them
"""

from __future__ import annotations

import json
import platform
import time
import uuid
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from dkd import console
from dkd.errors import RunError

_POLL = 0.05  # seconds
_REPORT_AFTER = 60.0  # seconds that rank 0 waits before it reports for whom
_MOST_SHOWN = 8


class RendezvousError(RunError):
    """Not all ranks arrived in time. The message names those that did not."""


class Refused(RunError):
    """A rank arrived only to report that it cannot take part. Raised on every rank.

    Args:
        reasons: rank and machine -> why.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        self.reasons = reasons
        super().__init__("; ".join(f"{who}: {why}" for who, why in reasons.items()))


def meet(
    store: dist.Store, rank: int, world_size: int, timeout: float, refusal: str | None = None, gpu: str | None = None
) -> str:
    """Wait for all ranks of this start.

    Args:
        store: reached by all ranks.
        timeout: seconds.
        refusal: why this rank cannot take part; it is reported to the others.
        gpu: a name that no other GPU of the launch has, of the GPU that this rank alone is to use; None: none.

    Returns:
        A name for this start, the same on every rank, and never used before in this store.

    Raises:
        RendezvousError: a rank did not arrive.
        Refused: a rank cannot take part, this one or another; or two ranks have one GPU.
    """
    word = uuid.uuid4().hex
    entry = {"word": word, "host": platform.node(), "refusal": refusal, "gpu": gpu}
    store.set(f"dkd/join/{rank}", json.dumps(entry))
    waiting = _lead(store, world_size, timeout) if rank == 0 else iter(())
    deadline = time.monotonic() + timeout
    offered = ""
    while True:
        # Rank 0 is one of those it leads.
        absent = next(waiting, None)
        name = _read(store, f"dkd/offer/{word}")
        if name and name != offered:
            offered = name
            store.set(f"dkd/acknowledged/{name}/{rank}", word)
        start = _read(store, f"dkd/start/{offered}") if offered else None
        if start is not None:
            reasons = json.loads(start)
            if reasons:
                raise Refused(reasons)
            return offered
        if time.monotonic() > deadline:
            if rank == 0:
                raise RendezvousError(
                    f"{absent} did not arrive within {timeout:g} s; this is rank 0 on "
                    f"{platform.node()}{_list_refusals(store, world_size)}"
                )
            raise RendezvousError(
                f"rank 0 did not {'start' if offered else 'see'} this rank within {timeout:g} s: it is gone, or waits "
                f"for another; this is rank {rank} on {platform.node()}"
            )
        time.sleep(_POLL)


def _lead(store: dist.Store, world_size: int, timeout: float) -> Iterator[str]:
    """Do rank 0's part, a step each time it is asked; yield the ranks that are still waited for."""
    name = uuid.uuid4().hex
    words: dict[int, str] = {}
    joined: dict[int, dict[str, str]] = {}
    begun, reported = time.monotonic(), False
    while True:
        missing = []
        for rank in range(world_size):
            entry = _read(store, f"dkd/join/{rank}")
            if entry is None:
                missing.append(rank)
                continue
            joined[rank] = json.loads(entry)
            if words.get(rank) != joined[rank]["word"]:
                words[rank] = joined[rank]["word"]
                store.set(f"dkd/offer/{words[rank]}", name)
            if _read(store, f"dkd/acknowledged/{name}/{rank}") != words[rank]:
                missing.append(rank)
        if not missing:
            # After all are there, not before: the word of a refusal may be that of an earlier start.
            reasons = {
                f"rank {rank} on {who['host']}": who["refusal"] for rank, who in joined.items() if who["refusal"]
            }
            store.set(f"dkd/start/{name}", json.dumps(reasons or _find_shared_gpus(joined)))
            return
        absent = ", ".join(f"rank {rank}" for rank in missing[:_MOST_SHOWN])
        if len(missing) > _MOST_SHOWN:
            absent += f" and {len(missing) - _MOST_SHOWN} more"
        if not reported and time.monotonic() - begun > _REPORT_AFTER:
            reported = True
            console.say(f"dkd: rank 0 waits for {absent} of {world_size} ranks, {timeout:g} s at most")
        yield absent


def _find_shared_gpus(joined: Mapping[int, Mapping[str, str]]) -> dict[str, str]:
    """Return a refusal of each rank whose GPU another rank has, too. NCCL would refuse it with less of a reason, or
    wait."""
    first: dict[str, int] = {}
    found = {}
    for rank, who in sorted(joined.items()):
        if who["gpu"] is not None and (other := first.setdefault(who["gpu"], rank)) != rank:
            found[f"rank {rank} on {who['host']}"] = (
                f"it has the same GPU as rank {other}: start one process for each GPU, or let the launcher show each "
                "process a GPU of its own"
            )
    return dict(list(found.items())[:_MOST_SHOWN])


def _list_refusals(store: dist.Store, world_size: int) -> str:
    """Return the refusal of a rank that may have arrived and left before this rank could read it."""
    entries = [(rank, _read(store, f"dkd/join/{rank}")) for rank in range(world_size)]
    reasons = [
        f"; rank {rank} reported: {refusal}"
        for rank, entry in entries
        if entry and (refusal := json.loads(entry)["refusal"])
    ]
    return "".join(reasons[:1])


def _read(store: dist.Store, key: str) -> str | None:
    # Reading a key that is not there would wait for it.
    return store.get(key).decode() if store.check([key]) else None
