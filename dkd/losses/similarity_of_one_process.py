"""Compute SP where one process holds all samples, by few operations, with its derivative in closed form.

With the Gram matrices S and T, whose rows are divided by n and m as `SimilarityPreserving.divisors` has them,
R_S = S/n, R_T = T/m and D = R_S − R_T,

    L     = (1/B²) Σ D²
    M     = A + Aᵀ,   A_i = (2 / (B² n_i)) (D_i − k_i R_S,i Σ_j R_S,ij D_ij)
    ∂L/∂Q = M Q

where k_i is 0 for a row below the floor, whose divisor is a constant, and else 1. It is what `value` and `slope` of
SimilarityPreserving state for blocks; here both matrices lie in one tensor, and each step is one operation for both: on
a GPU the launches of many small operations take longer than what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dkd.global_batch.gram import multiply
from dkd.global_batch.scale import least_norm, scale_products
from dkd.losses.relational import WholeBatch


def compare(students: Sequence[torch.Tensor], whole: WholeBatch, floor: float) -> torch.Tensor:
    """Return the sum over pairs of weight · L, a scalar. Differentiable.

    Args:
        students: features (B, d).
        whole: what they are compared with.
        floor: as SimilarityPreserving.
    """
    value: torch.Tensor = _Compare.apply(whole, floor, *students)
    return value


class _Compare(torch.autograd.Function):
    """Compute value and derivative by the Gram matrices together, and the gradient of features in the backward."""

    @staticmethod
    def forward(ctx: Any, whole: WholeBatch, floor: float, *students: torch.Tensor) -> torch.Tensor:
        shares, slopes, scales = [], [], []
        for student, type_, teacher, weight in zip(students, whole.types, whole.teachers, whole.weights, strict=True):
            own = student.to(type_)
            own, scale = scale_products(multiply(own, own), own)
            theirs = teacher if whole.are_relations else scale_products(multiply(teacher, teacher), teacher)[0]
            share, slope = _compare_gram(torch.stack([own, theirs]), floor)
            shares.append(share * (weight / len(student) ** 2))
            slopes.append(slope)
            scales.append(scale)
        ctx.save_for_backward(*slopes, *scales, *students)
        ctx.whole = whole
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, pairs = ctx.saved_tensors, len(ctx.needs_input_grad) - 2
        slopes, scales, students = saved[:pairs], saved[pairs:-pairs], saved[-pairs:]
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            wanted = [student for student, asked in zip(students, needed, strict=True) if asked]
            by_autograd = iter(torch.autograd.grad(ctx.whole.plainly(students), wanted, grads[0], create_graph=True))
            return None, None, *(next(by_autograd) if asked else None for asked in needed)
        found: list[torch.Tensor | None] = []
        parts = zip(students, slopes, scales, ctx.whole.weights, ctx.whole.types, needed, strict=True)
        for student, slope, scale, weight, type_, asked in parts:
            with torch.autocast(student.device.type, enabled=False):
                own = student.to(type_).to(slope.dtype)
                sums = (slope @ own).div_(scale).div_(scale).mul_(grads[0] * (2 * weight / len(student) ** 2))
            found.append(sums.to(student.dtype) if asked else None)
        return None, None, *found


def _compare_gram(both: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ D², and B²/2 · M (B, B), of S and T (2, B, B)."""
    norms = torch.linalg.vector_norm(both, dim=2)
    divisors = torch.maximum(norms, least_norm(norms, floor))
    own, theirs = both.div_(divisors[:, :, None])
    share = torch.nn.functional.mse_loss(own, theirs, reduction="sum")
    difference = own - theirs
    # A row below the floor is divided by a constant: nothing of its derivative is projected away.
    along = (own * difference).sum(1).masked_fill_(divisors[0] > norms[0], 0.0)
    half = difference.addcmul_(own, along[:, None], value=-1).div_(divisors[0, :, None])
    return share, half + half.T
