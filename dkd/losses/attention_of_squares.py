"""Compute AT of squared features by few operations, with its derivative in closed form.

This is AttentionTransfer with `map: sum_p`, p = 2 and `reduction: mean_squared`, as published, where the two features
of each pair have one resolution. With F = Σ_c A_c², Q = F / ‖F‖₂ over the positions and
D = Q_S − Q_T, the loss and its gradient are, for pairs p of weight w_p and n_p = h·w positions,

    L      = Σ_p c_p Σ D²,   c_p = w_p / (B n_p)
    ∂L/∂A  = A · (4 c_p / ‖F_S‖₂) (D − Q_S Σ Q_S D)

where sums are over the positions of a sample. The maps of all pairs lie in one tensor (P, b, n), filled with zeros up
to the largest resolution, so that each step is one operation for all of them: on a GPU the launches of many small
operations take longer than what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dkd.global_batch.gram import promoted_dtype
from dkd.losses.kept_numbers import numbers_beside

SMALLEST = 1e-30
"""The smallest norm that a map is divided by. A map of zeros stays zero; the inverse of a norm must fit float32, so
that its product with features of zero is zero."""


def pack_maps(features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised attention maps Q (P, b, n) of features (b, C, h, w), and ‖F‖₂ (P, b, 1) of them, in
    float64."""
    packed = _room(features, [feature.shape[2] * feature.shape[3] for feature in features])
    # One pass over the features. On CPUs torch's norm over a dimension whose elements are far apart takes 75 times as
    # long as squares and their sum.
    by_norm = [feature.device.type != "cpu" or feature.stride(1) == 1 for feature in features]
    for place, feature, norm in zip(_places(packed, features), features, by_norm, strict=True):
        if norm:
            torch.linalg.vector_norm(feature, dim=1, dtype=packed.dtype, out=place)
        else:
            torch.sum(feature.to(packed.dtype).square(), dim=1, out=place)
    for part in [packed] if all(by_norm) else [packed[i] for i, norm in enumerate(by_norm) if norm]:
        part.square_()
    # In float64, where the squares of all numbers of float32 fit.
    norms = torch.linalg.vector_norm(packed, dim=2, keepdim=True, dtype=torch.float64).clamp_min_(SMALLEST)
    return packed.div_(norms), norms


def pack_normalized(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return normalised attention maps (b, n_p) as `pack_maps` does."""
    packed = _room(maps, [each.shape[1] for each in maps])
    for pair, each in enumerate(maps):
        packed[pair, :, : each.shape[1]] = each
    return packed


def unpack(packed: torch.Tensor, positions: Sequence[int]) -> list[torch.Tensor]:
    """Return the maps (b, n_p) of each pair."""
    return [packed[pair, :, :count].contiguous() for pair, count in enumerate(positions)]


def compare(
    students: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor] | torch.Tensor,
    factors: Sequence[float],
    plainly: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return Σ_p factor_p Σ (Q_S − Q_T)², a scalar. Differentiable.

    Args:
        students: features (b, C, h, w).
        teacher: features (b, C, h, w), whose type is promoted to that of the students'; or maps (P, b, n), as
            `pack_maps` returns them. No gradient reaches them.
        factors: c_p, one for each pair.
        plainly: returns the same of the students' features and the teacher's maps by operations that autograd follows,
            for second derivatives.
    """
    value: torch.Tensor = _Compare.apply(teacher, tuple(factors), plainly, *students)
    return value


def _room(like: Sequence[torch.Tensor], positions: Sequence[int]) -> torch.Tensor:
    first, shape = like[0], (len(like), len(like[0]), max(positions))
    make = first.new_empty if min(positions) == max(positions) else first.new_zeros
    return make(shape, dtype=promoted_dtype(first.dtype))


def _places(packed: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the room of each pair's map, (b, h, w)."""
    shapes = [feature.shape for feature in features]
    return [packed[pair, :, : h * w].unflatten(1, (h, w)) for pair, (_, _, h, w) in enumerate(shapes)]


class _Compare(torch.autograd.Function):
    """Compute the value, and in the backward the gradient of the features."""

    @staticmethod
    def forward(
        ctx: Any,
        teacher: Sequence[torch.Tensor] | torch.Tensor,
        factors: tuple[float, ...],
        plainly: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor],
        *students: torch.Tensor,
    ) -> torch.Tensor:
        if isinstance(teacher, torch.Tensor):
            maps, norms = pack_maps(students)
            difference = maps - teacher.to(maps.dtype)
        else:
            both, norms = pack_maps([*students, *teacher])
            (maps, theirs), norms = both.chunk(2), norms[: len(students)]
            difference = torch.sub(maps, theirs, out=theirs)
        lengths = torch.linalg.vector_norm(difference, dim=(1, 2))
        ctx.factors, ctx.plainly = factors, plainly
        ctx.save_for_backward(maps, norms, difference, *students)
        return torch.dot(lengths * numbers_beside(maps, tuple((factor, 1) for factor in factors)), lengths)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        maps, norms, difference, *students = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            wanted = [student for student, asked in zip(students, needed, strict=True) if asked]
            # Kept are the maps, and not the teacher's features.
            value = ctx.plainly(students, maps - difference)
            found = iter(torch.autograd.grad(value, wanted, grads[0], create_graph=True))
            return None, None, None, *(next(found) if asked else None for asked in needed)
        fours = numbers_beside(maps, tuple((4 * factor, 1) for factor in ctx.factors))
        along = (maps * difference).sum(2, keepdim=True)
        across = torch.addcmul(difference, maps, along, value=-1)
        across.mul_((fours * grads[0])[:, None, None] / norms)
        slopes = [place[:, None] for place in _places(across, students)]
        pairs = zip(students, slopes, needed, strict=True)
        return None, None, None, *(_gradient(student, slope) if asked else None for student, slope, asked in pairs)


def _gradient(student: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return student · slope in the type of the student's features, which is rounded to as the product is written."""
    return torch.mul(student, slope, out=torch.empty_like(student))
