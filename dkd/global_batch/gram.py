"""Rows of the global Gram matrix G = Q Qᵀ, when the rows of Q are spread over ranks.

Rank r holds Q_r (b, d) and needs G[r, :] = Q_r Qᵀ. With D = ∂L/∂G, whose rows D[r, :] are on rank r, the gradient is

    ∂L/∂Q_r = D[r, :] Q + (D[:, r])ᵀ Q .

Two exact ways; `strategy.py` says which moves less.

    gather     forward: all-gather Q, multiply own rows. Backward: Q is here already; what is missing, D[:, r], is b×b numbers from each
               rank, which one all-to-all brings. No gradient of features is moved.
    exchange   forward: an all-to-all gives each rank all B rows of d/W features; it multiplies those, and a reduce-scatter adds the
               partial Gram matrices into row blocks. Backward: all-gather D, multiply (D + Dᵀ) by the slice of
               features, and an all-to-all takes the gradients back.

Several tensors (student and teacher, several taps) share the collectives: side by side in one flat message.

Features travel in their own dtype, and are promoted on arrival: a bfloat16 feature loses nothing by that, and a
gradient on its way to one
would be rounded to bfloat16 there anyway. Gram matrices and their gradients travel as they are computed, in float32 or
float64.
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
    """float16 and bfloat16 become float32; float32 and float64 stay what they are."""
    return x.to(_full(x.dtype))


def gram_rows(
    features: Sequence[torch.Tensor], layout: BatchLayout, strategy: str = "auto", comm_dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """For each of several tensors the rows of its global Gram matrix that belong to the rows held here. Differentiable.

    Args:
        features: Q_r of each, (b, d); each d equal on all ranks, b as `layout` says. Half precision is promoted to
            float32.
        layout: who holds which rows.
        strategy: `gather`, `exchange`, or `auto` for those that move less. The numbers are the same but for rounding.
        comm_dtype: features and their gradients are rounded to this dtype for the way; None: they travel in their own.

    Returns:
        For each (b, W·b_max), b_max the most rows any rank holds: the columns of rank s begin at s·b_max, and a rank
        with fewer rows leaves zeros behind its own. Zero columns change neither a row's norm nor a difference of rows.
    """
    if layout.world_size == 1:
        return [f @ f.T for f in map(full_precision, features)]
    most = max(layout.rows)
    transports = [comm_dtype or f.dtype for f in features]
    if strategy == "auto":
        tensors = [
            GramTensor(f.shape[1], f.requires_grad and torch.is_grad_enabled(), dtype.itemsize, _full(f.dtype).itemsize)
            for f, dtype in zip(features, transports, strict=True)
        ]
        strategies = cheapest_strategies(tensors, most, layout.world_size)
    else:
        strategies = (strategy,) * len(features)
    together: dict[tuple[str, torch.dtype, torch.dtype], list[int]] = {}
    for i, (feature, name, transport) in enumerate(zip(features, strategies, transports, strict=True)):
        together.setdefault((name, transport, _full(feature.dtype)), []).append(i)
    rows: list[torch.Tensor] = [torch.empty(0)] * len(features)
    for (name, transport, full), members in together.items():
        padded = [_padded(features[i], rows=most) for i in members]
        function = _ExchangedGramRows if name == "exchange" else GatheredGramRows
        for i, own in zip(members, function.apply(layout, transport, full, *padded), strict=True):
            rows[i] = own[: features[i].shape[0]]
    return rows


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _full_precision_backward(backward: Backward) -> Backward:
    """A backward that does not compute in half precision, even where it is called under autocast."""

    @functools.wraps(backward)
    def without_autocast(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return without_autocast  # type: ignore[return-value]


def _own_rows_times_all(part: torch.Tensor, own: slice, full: torch.dtype) -> torch.Tensor:
    # A function, so that a promoted copy is gone before the next tensor's is made.
    promoted = part.to(full)
    return promoted[own] @ promoted.T


def _all_times_all(part: torch.Tensor, full: torch.dtype) -> torch.Tensor:
    promoted = part.to(full)
    return promoted @ promoted.T


class GatheredGramRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: BatchLayout, transport: torch.dtype, full: torch.dtype, *features: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        everyone = collectives.all_gather_rows(_beside([f.to(transport) for f in features]), layout.group)
        parts = everyone.split([f.shape[1] for f in features], dim=1)
        kept = _only(parts, ctx.needs_input_grad[3:])
        ctx.layout, ctx.full, ctx.dtypes = layout, full, [f.dtype for f in features]
        ctx.save_for_backward(*kept)
        own = slice(layout.rank * features[0].shape[0], (layout.rank + 1) * features[0].shape[0])
        return _marked(ctx, [_own_rows_times_all(part, own, full) for part in parts])

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
        own_columns = collectives.all_to_all_blocks(_beside(to_ranks), layout.group).split(rows, dim=2)
        gradients = iter(
            ((d + columns.reshape(world * rows, rows).T) @ everyone.to(ctx.full)).to(dtype)
            for d, columns, everyone, dtype in zip(
                own_rows, own_columns, ctx.saved_tensors, _only(ctx.dtypes, needed), strict=True
            )
        )
        return None, None, None, *(next(gradients) if n else None for n in needed)


class _ExchangedGramRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layout: BatchLayout, transport: torch.dtype, full: torch.dtype, *features: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        world, rows = layout.world_size, features[0].shape[0]
        # Zero features add nothing to a Gram matrix: d is padded to a multiple of W.
        sliced = [
            _padded(f.to(transport), width=-(-f.shape[1] // world) * world).view(rows, world, -1).transpose(0, 1)
            for f in features
        ]
        received = collectives.all_to_all_blocks(_beside(sliced), layout.group).view(world * rows, -1)
        widths = [s.shape[2] for s in sliced]
        slices = received.split(widths, dim=1)  # of each tensor: all B rows of d/W features
        partial = [_all_times_all(slice_, full).view(world, rows, -1) for slice_ in slices]
        # The blocks of rank r are the rows it owns; the sum over ranks makes them whole.
        own = collectives.reduce_scatter_rows(_beside(partial), layout.group)[0]
        kept = _only(slices, ctx.needs_input_grad[3:])
        ctx.layout, ctx.transport, ctx.full = layout, transport, full
        ctx.dtypes, ctx.widths = [f.dtype for f in features], [f.shape[1] for f in features]
        ctx.save_for_backward(*kept)
        return _marked(ctx, [block.contiguous() for block in own.split(world * rows, dim=1)])

    @staticmethod
    @once_differentiable
    @_full_precision_backward
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout: BatchLayout = ctx.layout
        needed = ctx.needs_input_grad[3:]
        own_rows = [grad for grad, n in zip(grads, needed, strict=True) if n]  # D[r, :] of each, (b, W·b)
        rows, world = own_rows[0].shape[0], layout.world_size
        everyones_rows = collectives.all_gather_rows(_beside(own_rows), layout.group).split(
            world * rows, dim=1
        )  # D of each
        to_ranks = [
            ((d + d.T) @ slice_.to(ctx.full)).to(ctx.transport).view(world, rows, -1)
            for d, slice_ in zip(everyones_rows, ctx.saved_tensors, strict=True)
        ]
        own = collectives.all_to_all_blocks(_beside(to_ranks), layout.group).split(
            [t.shape[2] for t in to_ranks], dim=2
        )
        gradients = iter(
            part.transpose(0, 1).reshape(rows, -1)[:, :width].to(dtype)
            for part, width, dtype in zip(own, _only(ctx.widths, needed), _only(ctx.dtypes, needed), strict=True)
        )
        return None, None, None, *(next(gradients) if n else None for n in needed)


def _padded(features: torch.Tensor, rows: int = 0, width: int = 0) -> torch.Tensor:
    """(b, d) with zeros behind, up to `rows` and `width`; the tensor itself where it is as large already."""
    b, d = features.shape
    return features if rows <= b and width <= d else F.pad(features, (0, max(width - d, 0), 0, max(rows - b, 0)))


def _beside(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Several tensors, equal but for the last dimension, as one message."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def _marked(ctx: Any, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs; those of tensors without gradient, the teacher's, have none either."""
    ctx.mark_non_differentiable(*_only(rows, [not needed for needed in ctx.needs_input_grad[3:]]))
    return tuple(rows)


def _only(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [value for value, w in zip(values, wanted, strict=True) if w]
