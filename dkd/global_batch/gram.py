"""Rows of the global Gram matrix G = Q Qᵀ, when the rows of Q are spread over ranks.

Rank r holds Q_r and needs G[r, :] = Q_r Qᵀ. With D = ∂L/∂G, whose rows D[r, :] are on rank r, the gradient is

    ∂L/∂Q_r = D[r, :] Q + (D[:, r])ᵀ Q .

Strategy `gather`: the forward gathers Q; the backward then has Q and lacks only the columns D[:, r], b×b numbers from each rank, which one
all-to-all brings. No gradient of features is ever moved.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dkd.global_batch import collectives
from dkd.global_batch.layout import BatchLayout


def gram_rows(features: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """The rows of the global Gram matrix that belong to the rows held here. Differentiable.

    Args:
        features: Q_r, (b, d); d equal on all ranks, b as `layout` says.
        layout: who holds which rows.

    Returns:
        (b, W·b_max), b_max the most rows any rank holds: the columns of rank s begin at s·b_max, and a rank with fewer rows leaves
        zeros behind its own. Zero columns change neither a row's norm nor a difference of rows.
    """
    if layout.world_size == 1:
        return features @ features.T
    most = max(layout.rows)
    padded = F.pad(features, (0, 0, 0, most - features.shape[0]))
    rows: torch.Tensor = _GatheredGramRows.apply(padded, layout)
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
