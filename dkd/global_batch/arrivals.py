"""Record where each rank is, so that the ranks can report who is missing when a collective fails.

If one rank never joins a collective, the other ranks time out with an error that does not name the missing rank. Ranks
therefore write their place to the process group's key-value store, one small message without an answer, and read the
places of all ranks when a collective fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch.distributed as dist

from dkd.global_batch import collectives

_MOST_SHOWN = 8


class Arrivals:
    """Record the place of every rank in a sequence that all ranks go through together.

    Args:
        sequence: the name of the sequence, the same on every rank.
        group: the process group of the ranks; None: the default one.
    """

    def __init__(self, sequence: str, group: dist.ProcessGroup | None = None) -> None:
        self._sequence = sequence
        self._store: dist.Store | None = None
        if collectives.world_size(group) > 1:
            group = group or dist.group.WORLD
            # In torch 2.9 and later; without it, errors name no ranks.
            find = getattr(group, "get_group_store", None)
            self._store = find() if find is not None else None
            self._rank, self._world_size = collectives.rank(group), collectives.world_size(group)
            # This overwrites the place of an earlier sequence of that name in this process.
            self.reach([-1], "not begun")

    def reach(self, place: Sequence[int], what: str) -> None:
        """Record that this rank has reached `place`, where it waits for the other ranks.

        Args:
            place: numbers that grow, compared as tuples are.
            what: the place in words.
        """
        if self._store is None:
            return
        try:
            self._store.set(self._key(self._rank), json.dumps([*place, what]))
        except RuntimeError:
            # The process that holds the store is gone, which the next collective reports better than an error here.
            self._store = None

    def describe(self) -> str:
        """Return, after a failure, which ranks have not come as far as the others, and where this rank is."""
        if self._store is None:
            return "where the ranks are cannot be known: their store is gone"
        try:
            places = self._read_places(self._store)
        except RuntimeError:
            return "where the ranks are cannot be known: their store, which rank 0 holds, is gone"
        furthest = max(place for place, _ in places.values())
        late = [f"rank {rank}: {what}" for rank, (place, what) in places.items() if place < furthest]
        if len(late) > _MOST_SHOWN:
            late[_MOST_SHOWN:] = [f"and {len(late) - _MOST_SHOWN} more"]
        return "; ".join(
            [
                *(late or ["all ranks have reached the same place"]),
                f"this is rank {self._rank}: {places[self._rank][1]}",
            ]
        )

    def _read_places(self, store: dist.Store) -> dict[int, tuple[tuple[int, ...], str]]:
        places: dict[int, tuple[tuple[int, ...], str]] = {}
        for rank in range(self._world_size):
            # A rank that never arrived has no entry, and reading a missing entry would wait for it.
            if store.check([self._key(rank)]):
                *place, what = json.loads(store.get(self._key(rank)))
                places[rank] = tuple(place), what
            else:
                places[rank] = (), "not yet here"
        return places

    def _key(self, rank: int) -> str:
        return f"dkd/{self._sequence}/{rank}"
