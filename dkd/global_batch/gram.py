"""Compute rows of the global Gram matrix G = Q Qᵀ, when the rows of Q are spread over ranks.

Rank r holds Q_r (b, d) and needs G[r, :] = Q_r Qᵀ. With D = ∂L/∂G, whose rows D[r, :] are on rank r, the gradient is

    ∂L/∂Q_r = D[r, :] Q + (D[:, r])ᵀ Q .

There are two exact strategies; cost.py counts which one moves less.

    gather     Forward: all-gather Q, and multiply the rank's own rows. Backward: Q is here already; D[:, r] is
               missing, b×b numbers from each rank, which one all-to-all brings. No gradient of features is moved.
    exchange   Forward: an all-to-all gives each rank all B rows of d/W features; the rank multiplies them, and a
               reduce-scatter adds the partial Gram matrices into row blocks. Backward: all-gather D, multiply (D + Dᵀ)
               by the slice of features, and an all-to-all takes the gradients back.

Several tensors (student and teacher, several taps) share the collectives: they lie side by side in one flat message.

Features are sent in their own dtype, and promoted on arrival: a bfloat16 feature loses nothing by that, and a gradient
of a bfloat16 feature would be rounded to bfloat16 on arrival anyway. Gram matrices and their gradients are sent as they
are computed, in float32 or float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dkd.global_batch import collectives
from dkd.global_batch.cost import GramTensor, cheapest_strategies
from dkd.global_batch.layout import BatchLayout

Backward = TypeVar("Backward", bound=Callable[..., Any])


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Promote float16 and bfloat16 to float32; float32 and float64 stay as they are."""
    return x.to(_promote_dtype(x.dtype))


def gram_rows(
    features: Sequence[torch.Tensor], layout: BatchLayout, strategy: str = "auto", comm_dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Compute, for each of several tensors, the rows of its global Gram matrix that belong to the rows held here.
    Differentiable.

    Args:
        features: Q_r of each tensor, (b, d); each d equal on all ranks, b as in `layout`. Half precision is promoted
            to float32.
        layout: which rank holds which rows.
        strategy: `gather`, `exchange`, or `auto` for the one that moves less. The results are equal up to rounding.
        comm_dtype: features and their gradients are rounded to this dtype while they are sent; None: they keep their
            own.

    Returns:
        For each tensor (b, W·b_max), b_max the most rows that any rank holds: the columns of rank s begin at s·b_max,
        and zeros follow the columns of a rank with fewer rows. Zero columns change neither a row's norm nor a
        difference of rows.
    """
    if layout.world_size == 1:
        return [f @ f.T for f in map(full_precision, features)]
    most = max(layout.rows)
    transports = [comm_dtype or f.dtype for f in features]
    if strategy == "auto":
        tensors = [
            GramTensor(
                f.shape[1],
                f.requires_grad and torch.is_grad_enabled(),
                dtype.itemsize,
                _promote_dtype(f.dtype).itemsize,
            )
            for f, dtype in zip(features, transports, strict=True)
        ]
        strategies = cheapest_strategies(tensors, most, layout.world_size)
    else:
        strategies = (strategy,) * len(features)
    together: dict[tuple[str, torch.dtype, torch.dtype], list[int]] = {}
    for i, (feature, name, transport) in enumerate(zip(features, strategies, transports, strict=True)):
        together.setdefault((name, transport, _promote_dtype(feature.dtype)), []).append(i)
    rows: list[torch.Tensor] = [torch.empty(0)] * len(features)
    for (name, transport, full), members in together.items():
        padded = [_pad(features[i], rows=most) for i in members]
        function = _ExchangedGramRows if name == "exchange" else GatheredGramRows
        for i, own in zip(members, function.apply(layout, transport, full, *padded), strict=True):
            rows[i] = own[: features[i].shape[0]]
    return rows


def _promote_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _full_precision_backward(backward: Backward) -> Backward:
    """Keep a backward from computing in half precision where it is called under autocast."""

    @functools.wraps(backward)
    def without_autocast(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return without_autocast  # type: ignore[return-value]


def _multiply_own_rows(part: torch.Tensor, own: slice, full: torch.dtype) -> torch.Tensor:
    # This is a function so that the promoted copy is freed before the next tensor's copy is made.
    promoted = part.to(full)
    return promoted[own] @ promoted.T


def _multiply_all_rows(part: torch.Tensor, full: torch.dtype) -> torch.Tensor:
    promoted = part.to(full)
    return promoted @ promoted.T


class GatheredGramRows(torch.autograd.Function):
    """Compute Gram rows by the strategy `gather`."""

    @staticmethod
    def forward(
        ctx: Any, layout: BatchLayout, transport: torch.dtype, full: torch.dtype, *features: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        everyone = collectives.all_gather_rows(_concat([f.to(transport) for f in features]), layout.group)
        parts = everyone.split([f.shape[1] for f in features], dim=1)
        kept = _select(parts, ctx.needs_input_grad[3:])
        ctx.layout, ctx.full, ctx.dtypes = layout, full, [f.dtype for f in features]
        ctx.save_for_backward(*kept)
        own = slice(layout.rank * features[0].shape[0], (layout.rank + 1) * features[0].shape[0])
        return _mark(ctx, [_multiply_own_rows(part, own, full) for part in parts])

    @staticmethod
    @once_differentiable
    @_full_precision_backward
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout: BatchLayout = ctx.layout
        needed = ctx.needs_input_grad[3:]
        own_rows = [grad for grad, n in zip(grads, needed, strict=True) if n]  # D[r, :] of each, (b, W·b)
        rows, world = own_rows[0].shape[0], layout.world_size
        # Block (i, j) of D is on rank i; rank j needs it: D[:, r] arrives as W blocks of b×b.
        to_ranks = [d.view(rows, world, rows).transpose(0, 1) for d in own_rows]
        own_columns = collectives.all_to_all_blocks(_concat(to_ranks), layout.group).split(rows, dim=2)
        gradients = iter(
            ((d + columns.reshape(world * rows, rows).T) @ everyone.to(ctx.full)).to(dtype)
            for d, columns, everyone, dtype in zip(
                own_rows, own_columns, ctx.saved_tensors, _select(ctx.dtypes, needed), strict=True
            )
        )
        return None, None, None, *(next(gradients) if n else None for n in needed)


class _ExchangedGramRows(torch.autograd.Function):
    """Compute Gram rows by the strategy `exchange`."""

    @staticmethod
    def forward(
        ctx: Any, layout: BatchLayout, transport: torch.dtype, full: torch.dtype, *features: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        world, rows = layout.world_size, features[0].shape[0]
        # Zero features add nothing to a Gram matrix: d is padded to a multiple of W.
        sliced = [
            _pad(f.to(transport), width=-(-f.shape[1] // world) * world).view(rows, world, -1).transpose(0, 1)
            for f in features
        ]
        received = collectives.all_to_all_blocks(_concat(sliced), layout.group).view(world * rows, -1)
        widths = [s.shape[2] for s in sliced]
        slices = received.split(widths, dim=1)  # for each tensor: all B rows of d/W features
        partial = [_multiply_all_rows(slice_, full).view(world, rows, -1) for slice_ in slices]
        # The blocks of rank r are the rows that it owns; their sum over ranks is complete.
        own = collectives.reduce_scatter_rows(_concat(partial), layout.group)[0]
        kept = _select(slices, ctx.needs_input_grad[3:])
        ctx.layout, ctx.transport, ctx.full = layout, transport, full
        ctx.dtypes, ctx.widths = [f.dtype for f in features], [f.shape[1] for f in features]
        ctx.save_for_backward(*kept)
        return _mark(ctx, [block.contiguous() for block in own.split(world * rows, dim=1)])

    @staticmethod
    @once_differentiable
    @_full_precision_backward
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout: BatchLayout = ctx.layout
        needed = ctx.needs_input_grad[3:]
        own_rows = [grad for grad, n in zip(grads, needed, strict=True) if n]  # D[r, :] of each, (b, W·b)
        rows, world = own_rows[0].shape[0], layout.world_size
        everyones_rows = collectives.all_gather_rows(_concat(own_rows), layout.group).split(
            world * rows, dim=1
        )  # D of each
        to_ranks = [
            ((d + d.T) @ slice_.to(ctx.full)).to(ctx.transport).view(world, rows, -1)
            for d, slice_ in zip(everyones_rows, ctx.saved_tensors, strict=True)
        ]
        own = collectives.all_to_all_blocks(_concat(to_ranks), layout.group).split(
            [t.shape[2] for t in to_ranks], dim=2
        )
        gradients = iter(
            part.transpose(0, 1).reshape(rows, -1)[:, :width].to(dtype)
            for part, width, dtype in zip(own, _select(ctx.widths, needed), _select(ctx.dtypes, needed), strict=True)
        )
        return None, None, None, *(next(gradients) if n else None for n in needed)


def _pad(features: torch.Tensor, rows: int = 0, width: int = 0) -> torch.Tensor:
    """Append zeros to (b, d), up to `rows` and `width`. Returns the tensor itself where it is large enough."""
    b, d = features.shape
    return features if rows <= b and width <= d else F.pad(features, (0, max(width - d, 0), 0, max(rows - b, 0)))


def _concat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate several tensors, equal but for the last dimension, into one message."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def _mark(ctx: Any, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the outputs, after marking those of tensors without gradient (the teacher's) as not differentiable."""
    ctx.mark_non_differentiable(*_select(rows, [not needed for needed in ctx.needs_input_grad[3:]]))
    return tuple(rows)


def _select(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [value for value, w in zip(values, wanted, strict=True) if w]
