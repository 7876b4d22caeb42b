"""Choose the grid of a loss, alike on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from dkd import launch, machine
from dkd.errors import InputError
from dkd.global_batch import collectives
from dkd.global_batch.cost import (
    DEFAULT_LINKS,
    Choice,
    GramTensor,
    Links,
    LossSums,
    Work,
    choose,
    fewest_chunks,
    held,
)
from dkd.global_batch.gram import promoted_dtype
from dkd.global_batch.grid import STRATEGIES, Grid, corner
from dkd.global_batch.layout import BatchLayout, BatchMismatchError
from dkd.global_batch.placement import Placement, place

MEMORY_SHARE = 0.25
"""The share of a device's memory that a loss may hold, where nothing else is said."""


class _Agreed(NamedTuple):
    """Hold what all ranks of a process group have agreed on."""

    memory: float
    local_world_size: int
    links: Links | None


class GridChoice:
    """Hold what a loss asks for: a grid, a corner's name or `auto`; and the grids that were chosen.

    Args:
        grid: (r, c, k), `gather`, `exchange` or `auto`.
        memory: bytes that a rank may hold; None: a quarter of its device's.
        links: the speeds that `auto` chooses by; None: those of the kind of device.

    Raises:
        ValueError: not a grid.
    """

    def __init__(self, grid: str | Sequence[int], memory: int | None = None, links: Links | None = None) -> None:
        if isinstance(grid, str):
            if grid not in ("auto", *STRATEGIES):
                raise ValueError(f"grid={grid!r}: must be one of auto, {', '.join(STRATEGIES)}, or three numbers")
            self.grid: str | Grid = grid
        else:
            if len(grid) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid):
                raise ValueError(f"grid={list(grid)}: must be three whole numbers above 0, r, c and k")
            self.grid = Grid(*grid)
        if memory is not None and memory <= 0:
            raise ValueError(f"memory={memory}: must be a number of bytes above 0")
        self.memory, self.links = memory, links
        # As in placement.py: a loss that lives as long as the program must not keep process groups alive.
        self._agreed: WeakKeyDictionary[dist.ProcessGroup, _Agreed] = WeakKeyDictionary()
        self._chosen: WeakKeyDictionary[dist.ProcessGroup, dict[object, Choice]] = WeakKeyDictionary()

    def __repr__(self) -> str:
        shown = repr(self.grid) if isinstance(self.grid, str) else repr(list(self.grid))
        limits = [f"memory {self.memory}"] * (self.memory is not None) + [f"{self.links}"] * (self.links is not None)
        return f"{shown} ({', '.join(limits)})" if limits else shown

    def __getstate__(self) -> dict[str, object]:
        # A copy or a pickle holds what was asked for alone.
        return {"grid": self.grid, "memory": self.memory, "links": self.links}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._agreed, self._chosen = WeakKeyDictionary(), WeakKeyDictionary()

    def place(
        self,
        layout: BatchLayout,
        tensors: Sequence[GramTensor],
        sums: LossSums,
        device: torch.device,
        name: str,
        whole: BatchLayout | None = None,
    ) -> Placement:
        """Return the placement of this rank. All ranks of `whole` call it together.

        Args:
            layout: which rank holds which rows.
            tensors: what is compared.
            sums: what the loss adds over ranks.
            device: of the features.
            name: of the loss, in messages.
            whole: the layout that `layout` is a part of, where a scope has parts; None: there is but one. All parts
                take one grid, chosen for the part with the most rows: so every rank makes as many process groups.

        Raises:
            ValueError: the grid asked for is one of another number of ranks.
            BatchMismatchError: ranks differ in what the choice depends on.
            InputError: no grid fits into the memory.
        """
        choice = self._choose(layout, tensors, sums, device, name, whole or layout)
        return place(choice.grid, layout, device, choice.chunks)

    def _choose(
        self,
        layout: BatchLayout,
        tensors: Sequence[GramTensor],
        sums: LossSums,
        device: torch.device,
        name: str,
        whole: BatchLayout,
    ) -> Choice:
        world = layout.world_size
        grid = self.asked(world)
        if grid is not None and (world == 1 or self.memory is None):
            return Choice(grid, 1)
        work = Work(tuple(tensors), max(whole.rows), world, sums)
        group = whole.group or dist.group.WORLD
        assert group is not None
        known, key = self._chosen.setdefault(group, {}), (work, device.type)
        if key not in known:
            agreed = self._agree(whole, device)
            links = agreed.links or DEFAULT_LINKS.get(device.type, DEFAULT_LINKS["cuda"])
            local = math.gcd(agreed.local_world_size, world)
            known[key] = choose_within(work, grid, links, local, agreed.memory, name)
        return known[key]

    def asked(self, world_size: int) -> Grid | None:
        """Return the grid that is asked for; None: one is to be chosen. Raises ValueError: it is one of another number
        of ranks."""
        if world_size == 1:
            return Grid(1, 1, 1)
        if isinstance(self.grid, Grid):
            check_size(self.grid, world_size)
            return self.grid
        return None if self.grid == "auto" else corner(self.grid, world_size)

    def _agree(self, layout: BatchLayout, device: torch.device) -> _Agreed:
        """Return what the choice depends on, the same on all ranks. A collective in the first call."""
        whole = layout.group or dist.group.WORLD
        assert whole is not None
        if whole not in self._agreed:
            mine = self.memory or memory_share(device), launch.local_world_size() or 1, self.links
            found = collectives.all_gather_objects(mine, layout.group)
            links = {each for _, _, each in found}
            if len(links) > 1:
                raise BatchMismatchError(f"ranks have different speeds of links: {sorted(map(str, links))}")
            locals_ = {local for _, local, _ in found}
            # Machines with different numbers of ranks: no axis lies in one machine for sure.
            local = locals_.pop() if len(locals_) == 1 else 1
            self._agreed[whole] = _Agreed(min(memory for memory, _, _ in found), local, self.links)
        return self._agreed[whole]


def choose_within(
    work: Work, asked: Grid | None, links: Links, local_world_size: int, memory: float, name: str
) -> Choice:
    """Return the grid that is asked for, or else the one that `choose` takes, with the chunks by which it fits.

    Raises:
        InputError: the grid that is asked for, or every grid, needs more memory.
    """
    if asked is None:
        return choose(work, links, local_world_size, memory, name)
    chunks = fewest_chunks(work, asked, memory)
    if chunks is None:
        raise InputError(
            f"{name} on the grid {asked.name} needs {held(work, asked).bytes / 1e9:.3g} GB a rank, and in any number "
            f"of chunks more than the {memory / 1e9:.3g} GB that are allowed; allow more (memory), or take grid: auto"
        )
    return Choice(asked, chunks)


def check_size(grid: Grid, world_size: int) -> None:
    """Check that a grid is one of `world_size` ranks. Raises ValueError."""
    if grid.size != world_size:
        raise ValueError(f"grid={list(grid)} is for {grid.size} ranks, and {world_size} ranks share a batch here")


def memory_share(device: torch.device) -> float:
    """Return the bytes that a loss may hold on this rank where nothing else is said."""
    if device.type == "cuda":
        return MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return MEMORY_SHARE * machine.memory() / (launch.local_world_size() or 1)
    return math.inf


def describe_tensor(
    width: int, backward: bool, dtype: torch.dtype, sent_as: torch.dtype, gradient: torch.dtype | None = None
) -> GramTensor:
    """Return what the choice of a grid must know of a tensor.

    Args:
        width: d.
        backward: whether it has a gradient.
        dtype: its type.
        sent_as: the type in which it is sent.
        gradient: the type in which its gradient is sent; None: full precision.
    """
    full = promoted_dtype(dtype)
    return GramTensor(width, backward, sent_as.itemsize, full.itemsize, (gradient or full).itemsize if backward else 0)
