"""Work out, for one rank of a grid, which samples it meets and with which ranks it communicates."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from dkd.global_batch import collectives
from dkd.global_batch.grid import Grid
from dkd.global_batch.layout import BatchLayout, BatchMismatchError
from dkd.library_internals.torch import groups_made


class Axis(NamedTuple):
    """Hold the ranks along one axis of a grid, of which this rank is one.

    Args:
        size: number of ranks.
        group: their process group; None: the default one, or no group where the rank is alone.
    """

    size: int
    group: dist.ProcessGroup | None


class Axes(NamedTuple):
    """Hold the three axes of a grid that pass through this rank."""

    slices: Axis
    columns: Axis
    rows: Axis


# Kept while the process group of the layout lives: a group that is held longer than torch's own records would end with
# the interpreter, whose threads it cannot join there.
_axes: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Grid, bool], Axes]] = WeakKeyDictionary()


def axes_through(grid: Grid, layout: BatchLayout, device: torch.device) -> Axes:
    """Return the axes of a grid through this rank. The first call for a process group and a grid makes the groups of
    the axes: all ranks of `layout` make that call together.

    Raises:
        BatchMismatchError: on all ranks, when ranks have made different numbers of process groups before.
    """
    if layout.world_size == 1:
        return Axes(*(Axis(1, None) for _ in range(3)))
    whole = layout.group or dist.group.WORLD
    assert whole is not None
    known, key = _axes.setdefault(whole, {}), (grid, collectives.acts_as_on_gpus(device))
    if key not in known:
        members = grid.along_slices(layout.rank), grid.along_columns(layout.rank), grid.along_rows(layout.rank)
        if any(_needs_group(each, layout, device) for each in members):
            check_group_counts(layout)
        known[key] = Axes(*(_make_axis(each, layout, device) for each in members))
    return known[key]


def check_group_counts(layout: BatchLayout) -> None:
    """Check that the ranks of `layout` can make groups among themselves: torch names such a group by how many groups
    the process has made. A collective. Raises BatchMismatchError on all ranks."""
    counts = collectives.all_gather_objects(groups_made(), layout.group)
    if len(set(counts)) > 1:
        raise BatchMismatchError(
            f"ranks have made different numbers of process groups before this loss ({counts}), so that they cannot "
            "make further ones together: make each group on all ranks, or call the loss before"
        )


def _needs_group(members: list[int], layout: BatchLayout, device: torch.device) -> bool:
    # NCCL runs the collectives of one communicator one after another: those of an axis are not to wait for the
    # gradients of the student, nor the gradients for them.
    return len(members) > 1 and (len(members) < layout.world_size or collectives.acts_as_on_gpus(device))


def _make_axis(members: list[int], layout: BatchLayout, device: torch.device) -> Axis:
    if _needs_group(members, layout, device):
        return Axis(len(members), collectives.make_group(members, layout.group))
    return Axis(len(members), layout.group if len(members) > 1 else None)


@dataclass(frozen=True)
class Placement:
    """Describe the block of the Gram matrix that one rank computes.

    Features travel with the same number of rows from every rank, the most that any rank holds; what was added is left
    out on arrival, so blocks have exactly the samples of their ranks.

    Args:
        grid: which ranks compute which blocks.
        layout: which rank holds which samples.
        axes: the ranks that this rank communicates with.
        device: where the indices of samples are kept.
        chunks: the number of parts in which features are sent and multiplied, one after another.
    """

    grid: Grid
    layout: BatchLayout
    axes: Axes
    device: torch.device
    chunks: int = 1

    @cached_property
    def most_rows(self) -> int:
        """Return the most samples that a rank holds."""
        return max(self.layout.rows)

    @cached_property
    def is_even(self) -> bool:
        """Return whether all ranks hold the same number of samples."""
        return min(self.layout.rows) == self.most_rows

    @property
    def is_whole(self) -> bool:
        """Return whether this rank's block is the whole matrix: all samples, in their order."""
        return self.layout.world_size == 1

    @cached_property
    def row_samples(self) -> torch.Tensor:
        """Return the samples (m,) that are the rows of this rank's block, by their places in the global batch."""
        return self._samples(self.grid.samples_of_rows(self.layout.rank))

    @cached_property
    def column_samples(self) -> torch.Tensor:
        """Return the samples (n,) that are the columns of this rank's block, by their places in the global batch."""
        return self._samples(self.grid.samples_of_columns(self.layout.rank))

    def column_samples_of(self, rank: int) -> torch.Tensor:
        """Return the samples that are the columns of another rank's block."""
        return self._samples(self.grid.samples_of_columns(rank))

    @cached_property
    def rows_to_keep(self) -> torch.Tensor | None:
        """Return which rows of a panel of rows hold samples; None: all of them."""
        return self._places_of_samples(self.grid.samples_of_rows(self.layout.rank))

    @cached_property
    def columns_to_keep(self) -> torch.Tensor | None:
        """Return which rows of a panel of columns hold samples; None: all of them."""
        return self._places_of_samples(self.grid.samples_of_columns(self.layout.rank))

    @cached_property
    def part_rows(self) -> int:
        """Return the rows of a block that a rank keeps, at most, of the k ranks that have added their products."""
        return -(-len(self.row_samples) // self.grid.slices)

    @cached_property
    def part(self) -> slice:
        """Return the rows of the block that this rank keeps."""
        first = self.grid.place(self.layout.rank).slice_ * self.part_rows
        return slice(min(first, len(self.row_samples)), min(first + self.part_rows, len(self.row_samples)))

    @cached_property
    def most_part_rows(self) -> int:
        """Return the rows of a block that any rank keeps, at most."""
        return max(-(-samples // self.grid.slices) for samples in self._row_block_samples)

    @cached_property
    def row_of_sample(self) -> torch.Tensor | None:
        """Return where in all row blocks, each of k parts of `most_part_rows` rows, the samples (B,) are; None: in
        their order."""
        if self.is_even:
            return None
        parts, most = [], self.most_part_rows
        for block, samples in enumerate(self._row_block_samples):
            rows, part_rows = torch.arange(samples), -(-samples // self.grid.slices)
            within = rows // max(part_rows, 1) * most + rows % max(part_rows, 1)
            parts.append(block * self.grid.slices * most + within)
        return torch.cat(parts).to(self.device)

    @cached_property
    def _row_block_samples(self) -> list[int]:
        """Return the number of samples of each row block, whose ranks are consecutive."""
        ranks = self.grid.column_blocks * self.grid.slices
        return [sum(self.layout.rows[first : first + ranks]) for first in range(0, self.layout.world_size, ranks)]

    @cached_property
    def part_samples(self) -> torch.Tensor:
        """Return the samples of the rows that this rank keeps."""
        return self.row_samples[self.part]

    def _samples(self, ranks: Sequence[int]) -> torch.Tensor:
        if self.layout.world_size == 1:
            return torch.arange(self.layout.total, device=self.device)
        firsts = [sum(self.layout.rows[:rank]) for rank in ranks]
        parts = [torch.arange(first, first + self.layout.rows[rank]) for first, rank in zip(firsts, ranks, strict=True)]
        return torch.cat(parts).to(self.device)

    def _places_of_samples(self, ranks: Sequence[int]) -> torch.Tensor | None:
        if self.is_even:
            return None
        most = self.most_rows
        parts = [torch.arange(i * most, i * most + self.layout.rows[rank]) for i, rank in enumerate(ranks)]
        return torch.cat(parts).to(self.device)


_placements: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], Placement]] = WeakKeyDictionary()
_alone: dict[tuple[object, ...], Placement] = {}
_MOST_KEPT = 64


def place(grid: Grid, layout: BatchLayout, device: torch.device, chunks: int = 1) -> Placement:
    """Return the placement of this rank. A collective in the first call for a process group and a grid."""
    axes = axes_through(grid, layout, device)
    known = _alone
    if layout.world_size > 1:
        whole = layout.group or dist.group.WORLD
        assert whole is not None
        known = _placements.setdefault(whole, {})
    key = grid, layout.rows, layout.rank, device, chunks
    if key not in known:
        if len(known) >= _MOST_KEPT:  # uneven batches may differ in every call
            known.clear()
        known[key] = Placement(grid, layout, axes, device, chunks)
    return known[key]


@atexit.register
def _let_go() -> None:
    """Let go of process groups before the interpreter ends."""
    _axes.clear()
    _placements.clear()
