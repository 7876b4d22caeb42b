"""Where each rank is, so that when a collective fails the others can say who did not come.

A collective that one rank does not join ends, on the ranks that wait, at the process group's timeout, with an error
that names nobody. Ranks therefore leave their place in the group's key-value store, one small message without an
answer, and read those of all when one fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch.distributed as dist

from dkd.global_batch import collectives

_MOST_SHOWN = 8


class Arrivals:
    """The place of every rank in a sequence that all go through together.

    Args:
        sequence: its name; every rank's the same.
        group: the process group of the ranks; None is the default one.
    """

    def __init__(self, sequence: str, group: dist.ProcessGroup | None = None) -> None:
        self._sequence = sequence
        self._store: dist.Store | None = None
        if collectives.world_size(group) > 1:
            group = group or dist.group.WORLD
            # torch 2.9 and later; without it, errors name no ranks.
            find = getattr(group, "get_group_store", None)
            self._store = find() if find is not None else None
            self._rank, self._world_size = collectives.rank(group), collectives.world_size(group)
            # An earlier sequence of that name in this process is over.
            self.reach([-1], "not begun")

    def reach(self, place: Sequence[int], what: str) -> None:
        """This rank is at `place`, about to meet the others there.

        Args:
            place: numbers that grow, compared as tuples are.
            what: the place in words.
        """
        if self._store is None:
            return
        try:
            self._store.set(self._key(self._rank), json.dumps([*place, what]))
        except RuntimeError:
            # The process that holds the store is gone; the next collective will say so better than this message could.
            self._store = None

    def describe(self) -> str:
        """After a failure: which ranks are behind, and where this one is."""
        if self._store is None:
            return "where the ranks are cannot be known: their store is gone"
        try:
            places = self._places(self._store)
        except RuntimeError:
            return "where the ranks are cannot be known: their store, which rank 0 holds, is gone"
        furthest = max(place for place, _ in places.values())
        behind = [f"rank {rank}: {what}" for rank, (place, what) in places.items() if place < furthest]
        if len(behind) > _MOST_SHOWN:
            behind[_MOST_SHOWN:] = [f"and {len(behind) - _MOST_SHOWN} more"]
        return "; ".join(
            [*(behind or ["all ranks had come as far"]), f"this is rank {self._rank}: {places[self._rank][1]}"]
        )

    def _places(self, store: dist.Store) -> dict[int, tuple[tuple[int, ...], str]]:
        places: dict[int, tuple[tuple[int, ...], str]] = {}
        for rank in range(self._world_size):
            # A rank that never came has no entry, and reading that would wait for it.
            if store.check([self._key(rank)]):
                *place, what = json.loads(store.get(self._key(rank)))
                places[rank] = tuple(place), what
            else:
                places[rank] = (), "not yet here"
        return places

    def _key(self, rank: int) -> str:
        return f"dkd/{self._sequence}/{rank}"
