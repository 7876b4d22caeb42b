"""Arrange ranks in a grid, in which each rank computes a block of the global Gram matrix from a slice of the features.

W = r·c·k ranks. The Gram matrix is cut into r × c blocks, the features of all samples into k slices. Rank
(i·c + j)·k + l is at place (i, j, l): it needs the samples of the ranks whose first number is i for the rows of its
block, and those of the ranks whose second number is j for the columns, both of slice l. The ranks of a machine are
consecutive, and l changes first, so ranks that differ in l share a machine where k ranks fit.

Two corners have names:

    gather     (W, 1, 1): each rank has its own rows of the Gram matrix, and gathers the features of all samples
    exchange   (1, 1, W): each rank multiplies a slice of the features of all samples, and the products are added
"""

from __future__ import annotations

from typing import NamedTuple

STRATEGIES = ("gather", "exchange")
"""The corners of the grid that have names."""


class Place(NamedTuple):
    """Hold the place of a rank: the numbers of its row block, column block and slice."""

    row_block: int
    column_block: int
    slice_: int


class Grid(NamedTuple):
    """Hold the numbers r, c and k of a grid."""

    row_blocks: int
    column_blocks: int
    slices: int

    @property
    def size(self) -> int:
        """Return W, the number of ranks."""
        return self.row_blocks * self.column_blocks * self.slices

    @property
    def name(self) -> str:
        """Return the grid as people write it: `r × c × k`."""
        return " × ".join(map(str, self))

    def place(self, rank: int) -> Place:
        """Return the place of a rank."""
        block, slice_ = divmod(rank, self.slices)
        return Place(*divmod(block, self.column_blocks), slice_)

    def rank(self, place: Place) -> int:
        """Return the rank at a place."""
        return (place.row_block * self.column_blocks + place.column_block) * self.slices + place.slice_

    def along_slices(self, rank: int) -> list[int]:
        """Return the k ranks with the same block, in the order of their slices."""
        at = self.place(rank)
        return [self.rank(at._replace(slice_=number)) for number in range(self.slices)]

    def along_columns(self, rank: int) -> list[int]:
        """Return the c ranks with the same row block and slice, in the order of their column blocks."""
        at = self.place(rank)
        return [self.rank(at._replace(column_block=number)) for number in range(self.column_blocks)]

    def along_rows(self, rank: int) -> list[int]:
        """Return the r ranks with the same column block and slice, in the order of their row blocks."""
        at = self.place(rank)
        return [self.rank(at._replace(row_block=number)) for number in range(self.row_blocks)]

    def samples_of_rows(self, rank: int) -> list[int]:
        """Return the ranks whose samples are the rows of this rank's block, in the order of the rows."""
        return [other for beside in self.along_columns(rank) for other in self.along_slices(beside)]

    def samples_of_columns(self, rank: int) -> list[int]:
        """Return the ranks whose samples are the columns of this rank's block, in the order of the columns."""
        return [other for above in self.along_rows(rank) for other in self.along_slices(above)]


def corner(strategy: str, world_size: int) -> Grid:
    """Return the grid of a strategy, `gather` or `exchange`."""
    return Grid(world_size, 1, 1) if strategy == "gather" else Grid(1, 1, world_size)


def all_grids(world_size: int) -> list[Grid]:
    """Return every grid of W ranks."""
    divisors = [number for number in range(1, world_size + 1) if world_size % number == 0]
    return [Grid(r, c, world_size // (r * c)) for r in divisors for c in divisors if world_size % (r * c) == 0]
