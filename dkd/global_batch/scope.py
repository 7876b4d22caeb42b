"""Which ranks share one Gram matrix.

    global    all ranks
    node      the ranks of one machine
    n         groups of n neighbouring ranks; n divides W
    local     each rank alone: another loss than the published one, for comparison

Groups are of one size, so the mean over ranks of W_group · share is the mean of the groups' losses.
"""

from __future__ import annotations

import os

import torch.distributed as dist

from dkd.global_batch import collectives
from dkd.global_batch.layout import BatchLayout, BatchMismatchError


def ranks_per_group(scope: str | int, world_size: int, local_world_size: int | None = None) -> int:
    """How many ranks share a Gram matrix.

    Args:
        scope: as above.
        world_size: W.
        local_world_size: ranks on one machine; None: as the launch says in LOCAL_WORLD_SIZE.

    Raises:
        ValueError: an unknown scope, or a group that does not divide the ranks.
    """
    if scope == "global":
        return world_size
    if scope == "local":
        return 1
    size = scope
    if scope == "node":
        local = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1" if world_size == 1 else "0"))
        if local == 0:
            raise ValueError("scope='node': LOCAL_WORLD_SIZE is not set; torchrun and accelerate launch set it")
        size = local
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"scope={scope!r}: must be global, node, local or a number of ranks")
    if world_size % size:
        raise ValueError(f"scope={scope!r}: groups of {size} ranks do not divide {world_size} ranks")
    return size


class GramScope:
    """A scope, and the process group of this rank's part of it once it is made.

    Args:
        scope: as above.

    Raises:
        ValueError: an unknown scope.
    """

    def __init__(self, scope: str | int) -> None:
        if isinstance(scope, str):
            ranks_per_group(scope, 1)
        self.scope = scope
        self._group: dist.ProcessGroup | None = None
        self._whole: dist.ProcessGroup | None = None

    def within(self, layout: BatchLayout) -> BatchLayout:
        """The part of `layout` that this rank's group holds. The first call makes the groups: all ranks make it together.

        Raises:
            BatchMismatchError: on all ranks, when a group holds no row, or machines run different numbers of ranks.
        """
        size = ranks_per_group(self.scope, layout.world_size)
        groups = [layout.rows[first : first + size] for first in range(0, layout.world_size, size)]
        if not all(map(sum, groups)):
            raise BatchMismatchError(f"a group of ranks holds no row: {groups}")
        if size == layout.world_size and self.scope != "node":
            return layout
        whole = layout.group or dist.group.WORLD
        if self._whole is not whole:
            sizes = collectives.all_gather_objects(size, layout.group)
            if len(set(sizes)) > 1:
                raise BatchMismatchError(f"scope {self.scope!r}: the machines run different numbers of ranks: {sizes}")
            if 1 < size < layout.world_size:
                self._group, _ = dist.new_subgroups(size, group=layout.group, timeout=collectives.timeout(whole))
            self._whole = whole
        if size == layout.world_size:
            return layout
        first = layout.rank // size * size
        return BatchLayout(layout.rows[first : first + size], layout.rank - first, self._group)
