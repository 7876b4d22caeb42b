"""Decide which ranks share one Gram matrix, by a scope.

    global    all ranks
    node      the ranks of one machine
    n         groups of n neighbouring ranks; n divides W
    local     each rank alone: another loss than the published one, for comparison

All groups have one size, so the mean over ranks of W_group · share is the mean of the groups' losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist

from dkd import launch
from dkd.global_batch import collectives
from dkd.global_batch.layout import BatchLayout, BatchMismatchError
from dkd.global_batch.placement import check_group_counts


def ranks_per_group(scope: str | int, world_size: int, local_world_size: int | None = None) -> int:
    """Return the number of ranks that share a Gram matrix.

    Args:
        scope: as above.
        world_size: W.
        local_world_size: ranks on one machine; None: the launch's LOCAL_WORLD_SIZE.

    Raises:
        ValueError: an unknown scope, or a group that does not divide the ranks.
    """
    if scope == "global":
        return world_size
    if scope == "local":
        return 1
    size = scope
    if scope == "node":
        local = local_world_size or launch.local_world_size() or (1 if world_size == 1 else 0)
        if local == 0:
            raise ValueError("scope='node': LOCAL_WORLD_SIZE is not set; torchrun and accelerate launch set it")
        size = local
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"scope={scope!r}: must be global, node, local or a number of ranks")
    if world_size % size:
        raise ValueError(f"scope={scope!r}: groups of {size} ranks do not divide {world_size} ranks")
    return size


class GramScope:
    """Hold a scope, and the process groups of this rank's part of each layout once they are made.

    A copy or a pickle holds the scope alone: the first call of the copy makes its own process groups.

    Args:
        scope: as above.

    Raises:
        ValueError: an unknown scope.
    """

    def __init__(self, scope: str | int) -> None:
        if isinstance(scope, str):
            ranks_per_group(scope, 1, 1)
        self.scope = scope
        self._parts: WeakKeyDictionary[dist.ProcessGroup, _Part] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return repr(self.scope)

    def __getstate__(self) -> dict[str, str | int]:
        return {"scope": self.scope}

    def __setstate__(self, state: Mapping[str, str | int]) -> None:
        self.scope, self._parts = state["scope"], WeakKeyDictionary()

    def within(self, layout: BatchLayout) -> BatchLayout:
        """Return the part of `layout` that this rank's group holds. The first call makes the process groups: all ranks
        of `layout` make that call together.

        Raises:
            ValueError: the number of ranks of a group does not divide those of `layout`.
            BatchMismatchError: on all ranks, when a group holds no row, or machines run different numbers of ranks.
        """
        if self.scope == "node" and layout.world_size > 1:
            part = self._make_part(layout)
            size = part.size
        else:
            size, part = ranks_per_group(self.scope, layout.world_size, 1), None
        groups = [layout.rows[first : first + size] for first in range(0, layout.world_size, size)]
        if not all(map(sum, groups)):
            raise BatchMismatchError(f"a group of ranks holds no row: {groups}")
        if size == layout.world_size:
            return layout
        part = part or self._make_part(layout)
        return BatchLayout(tuple(layout.rows[rank] for rank in part.ranks), part.ranks.index(layout.rank), part.group)

    def _make_part(self, layout: BatchLayout) -> _Part:
        """Return this rank's part of the ranks of `layout`; the first call with their process group makes the part."""
        whole = layout.group or dist.group.WORLD
        assert whole is not None
        if whole not in self._parts:
            size = self._agree_on_size(layout)
            group: dist.ProcessGroup | None = None
            first = layout.rank // size * size
            ranks = list(range(first, first + size))
            if 1 < size < layout.world_size:
                # `new_group` expects ranks of the job, and sorts them.
                of_the_job = dist.get_process_group_ranks(whole)
                ranks.sort(key=of_the_job.__getitem__)
                check_group_counts(layout)
                group = collectives.make_group(ranks, layout.group)
            self._parts[whole] = _Part(size, tuple(ranks), group)
        return self._parts[whole]

    def _agree_on_size(self, layout: BatchLayout) -> int:
        """Return the number of ranks that share a Gram matrix. All ranks return the same number, or all raise."""
        # An error of one rank must be an error of all ranks, so a wrong value is sent as 0.
        mine = self.scope, launch.local_world_size() or 0, dist.get_rank()
        found = collectives.all_gather_objects(mine, layout.group)
        scopes = [scope for scope, _, _ in found]
        if len(set(scopes)) > 1:
            raise BatchMismatchError(f"ranks ask for different scopes: {scopes}")
        if self.scope != "node":
            return ranks_per_group(self.scope, layout.world_size)
        locals_ = [local for _, local, _ in found]
        if 0 in locals_:
            raise BatchMismatchError(
                f"scope 'node': LOCAL_WORLD_SIZE is no number on rank {locals_.index(0)}; torchrun and accelerate "
                "launch set it"
            )
        # A launcher numbers the ranks of one machine consecutively.
        machines = [rank // local for _, local, rank in found]
        sizes = [len(list(ranks)) for _, ranks in itertools.groupby(machines)]
        if len(set(locals_)) > 1 or len(set(sizes)) > 1 or len(sizes) > len(set(machines)):
            raise BatchMismatchError(
                f"scope 'node': each machine must run the same number of ranks of a batch, one after the other; "
                f"LOCAL_WORLD_SIZE of the ranks is {locals_}, and their machines are {machines}"
            )
        return sizes[0]


class _Part(NamedTuple):
    """Hold the ranks that share a Gram matrix with this rank.

    Args:
        size: their number.
        ranks: their ranks in the whole layout, in the order of the group.
        group: their process group; None where a rank is alone or shares with all ranks.
    """

    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
