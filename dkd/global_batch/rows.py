"""Bring rows of all ranks together, or add numbers of all ranks, with the exact gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dkd.global_batch import collectives
from dkd.global_batch.layout import BatchLayout


def gather_rows(rows: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the rows of all ranks, in rank order: (B, ...) from (b, ...) on each rank. Every rank calls it, and where
    `rows` has a gradient, every rank uses the result in what it back-propagates.

    The gradient of a rank's rows is the sum of what all ranks have computed for them. With a loss whose mean over ranks
    is the value on the global batch, and gradients that are averaged over ranks as DDP, FSDP and ZeRO do, that makes
    the gradient of the global loss. `torch.distributed.all_gather` alone carries no gradient.

    Args:
        rows: (b, ...), b as in `layout`; all but b equal on all ranks. Of any type: labels and indices, too. Sent in
            their own type.
        layout: which rank holds which rows. This rank's rows begin at `layout.first_row` of the result.

    Raises:
        ValueError: b is not the number of rows that `layout` has for this rank.
    """
    layout.check(rows)
    if layout.world_size == 1:
        return rows
    # Also where nothing is to be differentiated, so that ranks communicate alike.
    gathered: torch.Tensor = _GatheredRows.apply(rows, layout)
    return gathered


def add_over_ranks(numbers: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the sums over ranks of a few numbers, with their gradient. Every rank computes the same loss of the sums,
    with the same weight in what it back-propagates.

    Args:
        numbers: of this rank, of the same shape on all ranks.
        layout: names the ranks.
    """
    if layout.world_size == 1:
        return numbers
    added: torch.Tensor = _SumOverRanks.apply(numbers, layout)
    return added


class _SumOverRanks(torch.autograd.Function):
    """Add numbers over ranks. Every rank computes the same loss of the sums, with the same weight, so the gradient of
    the sum of their losses is W times that of one of them."""

    @staticmethod
    def forward(ctx: Any, numbers: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        ctx.world_size = layout.world_size
        return layout.sum(numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.world_size, None


class _GatheredRows(torch.autograd.Function):
    """Gather rows; sum over ranks, in the backward, the gradient of each rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        ctx.layout = layout
        most = max(layout.rows)
        # Booleans are sent as bytes: not every backend knows them.
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        parts = collectives.all_gather_rows(_pad(sent, most), layout.group).split(most)
        gathered = torch.cat([part[:count] for part, count in zip(parts, layout.rows, strict=True)])
        return gathered.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout: BatchLayout = ctx.layout
        most = max(layout.rows)
        padded = torch.cat([_pad(part, most) for part in gradient.split(layout.rows)])
        return collectives.reduce_scatter_rows(padded, layout.group)[: layout.rows[layout.rank]], None


def _pad(rows: torch.Tensor, most: int) -> torch.Tensor:
    """Return (most, ...) with rows of zeros at the end."""
    missing = most - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows.contiguous()
