"""Regroup blocks of relations, as ranks of a grid compute them, to whole rows of samples, and back.

Row i holds the relations of sample i with all samples of the layout, in their order. Of the rows of a block, which the
c ranks beside each other have with other columns each, every one of these ranks takes a c-th: so each row is with one
rank, whatever the grid.
"""

from __future__ import annotations

import torch

from dkd.global_batch import collectives
from dkd.global_batch.placement import Placement


def to_rows(block: torch.Tensor, at: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples (n,) whose rows this rank takes, by their places in the layout, and these rows (n, B). Every
    rank holds as many samples. A collective where c is above 1.

    Args:
        block: (m, columns), the rows that this rank keeps of its block.
        at: of this rank.
    """
    axis = at.axes.columns
    if axis.size == 1:
        rows = torch.empty(len(block), at.layout.total, dtype=block.dtype, device=block.device)
        rows[:, at.column_samples] = block
        return at.part_samples, rows
    beside = collectives.all_gather_rows(block, axis.group).view(axis.size, *block.shape)
    share = len(block) // axis.size
    place = at.grid.place(at.layout.rank)
    mine = slice(place.column_block * share, (place.column_block + 1) * share)
    rows = torch.empty(share, at.layout.total, dtype=block.dtype, device=block.device)
    for rank, part in zip(at.grid.along_columns(at.layout.rank), beside, strict=True):
        rows[:, at.column_samples_of(rank)] = part[mine]
    return at.part_samples[mine], rows


def to_block(rows: torch.Tensor, at: Placement) -> torch.Tensor:
    """Return the block of this rank, (m, columns), given the rows (m, B) of the samples `at.part_samples`."""
    whole = at.grid.row_blocks == 1 and at.grid.column_blocks == 1 and at.grid.slices == 1
    return rows if whole else rows[:, at.column_samples]
