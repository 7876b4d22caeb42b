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

from dkd.global_batch.layout import BatchLayout


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
    local = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    size = local if scope == "node" else scope
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

    def within(self, layout: BatchLayout) -> BatchLayout:
        """The part of `layout` that this rank's group holds. The first call makes the groups: all ranks make it together."""
        size = ranks_per_group(self.scope, layout.world_size)
        if size == layout.world_size:
            return layout
        if self._group is None and size > 1:
            self._group, _ = dist.new_subgroups(size)
        first = layout.rank // size * size
        return BatchLayout(layout.rows[first : first + size], layout.rank - first, self._group)
