"""Rows of the global Gram matrix G = Q Qᵀ, when the rows of Q are spread over ranks.

Rank r holds Q_r (b, d) and needs G[r, :] = Q_r Qᵀ. With D = ∂L/∂G, whose rows D[r, :] are on rank r, the gradient is

    ∂L/∂Q_r = D[r, :] Q + (D[:, r])ᵀ Q .

Two exact ways; `strategy.py` says which moves less.

    gather     forward: all-gather Q, multiply own rows. Backward: Q is here already; what is missing, D[:, r], is b×b numbers from each
               rank, which one all-to-all brings. No gradient of features is moved.
    exchange   forward: an all-to-all gives each rank all B rows of d/W features; it multiplies those, and a reduce-scatter adds the
               partial Gram matrices into row blocks. Backward: all-gather D, multiply (D + Dᵀ) by the slice of features, and an
               all-to-all takes the gradients back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dkd.global_batch import collectives
from dkd.global_batch.layout import BatchLayout
from dkd.global_batch.strategy import cheaper_strategy


def gram_rows(features: torch.Tensor, layout: BatchLayout, strategy: str = "auto") -> torch.Tensor:
    """The rows of the global Gram matrix that belong to the rows held here. Differentiable.

    Args:
        features: Q_r, (b, d); d equal on all ranks, b as `layout` says.
        layout: who holds which rows.
        strategy: `gather`, `exchange`, or `auto` for the one that moves less. The numbers are the same but for rounding.

    Returns:
        (b, W·b_max), b_max the most rows any rank holds: the columns of rank s begin at s·b_max, and a rank with fewer rows leaves
        zeros behind its own. Zero columns change neither a row's norm nor a difference of rows.
    """
    if layout.world_size == 1:
        return features @ features.T
    most = max(layout.rows)
    if strategy == "auto":
        backward = features.requires_grad and torch.is_grad_enabled()
        strategy = cheaper_strategy(most, features.shape[1], layout.world_size, backward)
    padded = F.pad(features, (0, 0, 0, most - features.shape[0]))
    function = _ExchangedGramRows if strategy == "exchange" else _GatheredGramRows
    rows: torch.Tensor = function.apply(padded, layout)
    return rows[: features.shape[0]]


class _GatheredGramRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        everyone = collectives.all_gather_rows(features, layout.group)
        ctx.layout = layout
        ctx.save_for_backward(everyone)
        return features @ everyone.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (own_rows,) = grads  # D[r, :], (b, W·b)
        (everyone,) = ctx.saved_tensors
        layout: BatchLayout = ctx.layout
        rows = own_rows.shape[0]
        # Block (i, j) of D is on rank i; rank j needs it: D[:, r] arrives as W blocks of b×b.
        to_ranks = own_rows.view(rows, layout.world_size, rows).transpose(0, 1)
        own_columns = collectives.all_to_all_blocks(to_ranks, layout.group).view(layout.world_size * rows, rows)
        return (own_rows + own_columns.T) @ everyone, None


class _ExchangedGramRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        world, (rows, width) = layout.world_size, features.shape
        # Zero features add nothing to a Gram matrix: d is padded to a multiple of W.
        sliced = F.pad(features, (0, -width % world)).view(rows, world, -1).transpose(0, 1)
        everyones_slice = collectives.all_to_all_blocks(sliced, layout.group).view(world * rows, -1)
        ctx.layout, ctx.width = layout, width
        ctx.save_for_backward(everyones_slice)
        return collectives.reduce_scatter_rows(everyones_slice @ everyones_slice.T, layout.group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (own_rows,) = grads  # D[r, :], (b, W·b)
        (everyones_slice,) = ctx.saved_tensors
        layout: BatchLayout = ctx.layout
        rows = own_rows.shape[0]
        everyones_rows = collectives.all_gather_rows(own_rows, layout.group)  # D
        gradient = (everyones_rows + everyones_rows.T) @ everyones_slice
        to_ranks = gradient.view(layout.world_size, rows, -1)
        own = collectives.all_to_all_blocks(to_ranks, layout.group)
        return own.transpose(0, 1).reshape(rows, -1)[:, : ctx.width], None
