"""Compute SP where one process holds all samples, by few operations, with its derivative in closed form.

With the Gram matrices S and T, whose rows are divided by n and m as `SimilarityPreserving.divisors` has them,
R_S = S/n, R_T = T/m and D = R_S − R_T,

    L     = (1/B²) Σ D²
    M     = A + Aᵀ,   A_i = (1 / n_i) (D_i − k_i R_S,i Σ_j R_S,ij D_ij)
    ∂L/∂Q = (2 / B²) M Q

where k_i is 0 for a row below the floor, whose divisor is a constant, and else 1. It is what `value` and `slope` of
SimilarityPreserving state for blocks; here both matrices lie in one tensor, and each step is one operation for both: on
a GPU the launches of many small operations take longer than what they compute.

The norms of rows are in float64, where the squares of all products that float32 holds fit: nothing needs to be divided
by the largest of them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dkd.global_batch.gram import multiply, promoted_dtype
from dkd.global_batch.scale import ZERO_NORM, next_power_of_two
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
        shares, slopes = [], []
        for student, type_, teacher, weight in zip(students, whole.types, whole.teachers, whole.weights, strict=True):
            both = _gram(student.to(type_), teacher, whole.are_relations)
            share, slope = _compare_gram(both, floor, _factor(weight, len(student)))
            # A number of its own: torch's reduced loss keeps the memory of all B² that it was reduced from.
            shares.append(share * weight)
            slopes.append(slope)
        ctx.save_for_backward(*slopes, *students)
        ctx.whole = whole
        return shares[0] if len(shares) == 1 else torch.stack(shares).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole, saved, needed = ctx.whole, ctx.saved_tensors, ctx.needs_input_grad[2:]
        slopes, students = saved[: len(needed)], saved[len(needed) :]
        if torch.is_grad_enabled():
            wanted = [student for student, asked in zip(students, needed, strict=True) if asked]
            by_autograd = iter(torch.autograd.grad(whole.plainly(students), wanted, grads[0], create_graph=True))
            return None, None, *(next(by_autograd) if asked else None for asked in needed)
        found: list[torch.Tensor | None] = []
        for student, slope, weight, type_, asked in zip(
            students, slopes, whole.weights, whole.types, needed, strict=True
        ):
            own = (student.to(type_) if whole.rounds else student).to(slope.dtype)
            with torch.autocast(student.device.type, enabled=False):
                # The first argument is not added, since beta is 0; alpha saves an operation.
                sums = torch.addmm(grads[0].to(slope.dtype), slope, own, beta=0, alpha=_factor(weight, len(student)))
            found.append(sums.mul_(grads[0]).to(student.dtype) if asked else None)
        return None, None, *found


def _gram(own: torch.Tensor, teacher: torch.Tensor, is_relation: bool) -> torch.Tensor:
    """Return S and T, (2, B, B), of features (B, d) of the student and of the teacher, or T itself."""
    rows = len(own)
    both = own.new_empty((2, rows, rows), dtype=promoted_dtype(own.dtype))
    multiply(own, own, both[0])
    if is_relation:
        both[1].copy_(teacher)
    elif promoted_dtype(teacher.dtype) == both.dtype:
        multiply(teacher, teacher, both[1])
    else:  # one of the models computes in float64
        both[1].copy_(multiply(teacher, teacher))
    return both


def _factor(weight: float, batch: int) -> float:
    """Return by what M Q is multiplied."""
    return 2 * weight / batch**2


def _compare_gram(both: torch.Tensor, floor: float, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ D² / B², and M (B, B), of S and T (2, B, B), which are overwritten. M times the factor is finite."""
    norms = torch.linalg.vector_norm(both, dim=2, dtype=torch.float64)
    divisors = torch.maximum(norms, least_norms(both, norms, floor, factor))
    own, theirs = both.div_(divisors[:, :, None])
    share = torch.nn.functional.mse_loss(own, theirs)
    difference = own - theirs
    # A row below the floor is divided by a constant: nothing of its derivative is projected away.
    along = (own * difference).sum(1).masked_fill_(divisors[0] > norms[0], 0.0)
    half = difference.addcmul_(own, along[:, None], value=-1).div_(divisors[0, :, None])
    return share, half + half.T


def least_norms(both: torch.Tensor, norms: torch.Tensor, floor: float, factor: float) -> torch.Tensor:
    """Return the numbers (2, 1) that stand for smaller norms (2, B) of the rows of S and T (2, B, B), as
    `dkd.global_batch.scale.least_norm` has them for relations that Scale has divided."""
    # Of a matrix of zeros. What is divided by it must fit the type, so that its product with features of zero is zero.
    smallest = torch.finfo(both.dtype).tiny * max(1.0, abs(factor))
    if floor == 0:
        longest = both.diagonal(dim1=1, dim2=2).amax(1, keepdim=True).double().sqrt_()
        floor, typical = ZERO_NORM, next_power_of_two(longest).square()
    else:
        typical = norms.mean(1, keepdim=True)
    return torch.rsub(typical, smallest, alpha=-floor)  # smallest + floor · typical
