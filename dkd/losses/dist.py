"""Compute DIST, knowledge distillation from a stronger teacher. Source: Huang et al., NeurIPS 2022.

p = softmax(z / τ) are probabilities (B, C), and ρ is Pearson's correlation:

    L_DIST = τ² [ β (1 − mean_i ρ(p_S,i·, p_T,i·)) + γ (1 − mean_c ρ(p_S,·c, p_T,·c)) ]

The first part, between the classes of a sample, is a mean over samples. The second, between the samples of a class,
needs five sums over the global batch for each class: Σp_S, Σp_T, Σp_S², Σp_T², Σp_S p_T. They are computed and added in
float64, since a variance is a small difference of two of them.

For n pairs of numbers, v_S = Σp_S² − (Σp_S)²/n, v_T alike and v_ST = Σp_S p_T − Σp_S Σp_T / n, ρ = v_ST a with
a = (v_S v_T)^(−1/2), and its derivative by p_S is a (p_T − mean p_T) − b (p_S − mean p_S) with b = ρ / v_S. Rows and
columns of both models go through the same operations, of which a GPU then launches few. What is constant in a row of
the derivative by p_S does not reach the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dkd.global_batch import BatchLayout, GramScope, add_over_ranks
from dkd.global_batch.gram import promoted_dtype
from dkd.losses.feature_pairs import as_list, check_logit_pair, needs_plain_autograd, no_autocast
from dkd.losses.kept_numbers import numbers_beside

_LEAST = 64 * torch.finfo(torch.float64).eps  # share of Σp² below which a variance is rounding
_SMALLEST = 1e-200  # the power of −3/2 of a variance, its inverse root's derivative, fits float64


class DIST(nn.Module):
    """Compute L_DIST over the global batch.

    Args:
        beta: β, the weight of the part between classes.
        gamma: γ, the weight of the part between samples.
        tau: τ, which divides the logits.
        scope: the ranks whose samples are one batch, as RelationalLoss.

    The module is called with logits (b, C) of the student and of the teacher. It returns a scalar whose mean over ranks
    is L_DIST of the global batch, and whose gradient, averaged over ranks, is its gradient; every rank gives it the
    same weight. A class with the same probability for all samples has correlation 0.

    Raises:
        ValueError: the logits differ in shape, or have another shape than (b, C); tau is not above 0.
        BatchMismatchError: on all ranks, when shapes or settings differ between ranks.
    """

    relational = True

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0, scope: str | int = "global") -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau={tau}: must be above 0")
        self.beta, self.gamma, self.tau, self.scope = beta, gamma, tau, GramScope(scope)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, gamma={self.gamma}, tau={self.tau}, scope={self.scope!r}"

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        check_logit_pair(student, teacher)
        layout.check(student)
        layout = self.scope.within(layout)
        with no_autocast(student.device):
            if needs_plain_autograd([student, teacher]):
                value = self.plainly(student, teacher.detach(), layout)
            else:
                value = _Correlations.apply(self, student, teacher.detach(), layout)
            return value.to(promoted_dtype(student.dtype))

    def plainly(self, student: torch.Tensor, teacher: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Return the loss in float64 by operations that autograd follows. A collective."""
        # In float64: rare classes have probabilities below the rounding of a float32 softmax.
        s, t = ((logits.double() / self.tau).softmax(1) for logits in (student, teacher))
        s_centered, t_centered = (p - p.mean(1, keepdim=True) for p in (s, t))
        inter = layout.mean(1 - _correlate(_sums(s_centered, t_centered, dim=1), s.shape[1]))
        sums = add_over_ranks(_sums(s, t, dim=0), layout)
        intra = 1 - _correlate(sums, layout.total).mean()
        return self.tau**2 * (self.beta * inter + self.gamma * intra)


class _Correlations(torch.autograd.Function):
    """Compute the loss in float64, and its derivative, as the head of this file has them."""

    @staticmethod
    def forward(
        ctx: Any, loss: DIST, student: torch.Tensor, teacher: torch.Tensor, layout: BatchLayout
    ) -> torch.Tensor:
        p = torch.stack([student, teacher]).double().div_(loss.tau).softmax(2)  # (2, b, C)
        _, rows, classes = p.shape
        of_rows = _sums_of_both(p - p.mean(2, keepdim=True), dim=2)
        of_columns = _sums_of_both(p, dim=1)
        if layout.world_size > 1:
            of_columns = layout.sum(of_columns)
        # (5, b + C): everything that follows is of rows and columns at once.
        sums = torch.cat([of_rows, of_columns], 1)
        first, squares, cross = sums[:2], sums[2:4], sums[4]
        inverse = numbers_beside(p, ((1 / classes, rows), (1 / layout.total, classes)))
        variances = torch.addcmul(squares, first * first, inverse, value=-1)
        # What is left of equal numbers is rounding.
        fixed = (variances <= torch.rsub(squares, _SMALLEST, alpha=-_LEAST)).any(0)
        a = variances.rsqrt().prod(0).masked_fill_(fixed, 0.0)
        correlations = torch.addcmul(cross, first[0] * first[1], inverse, value=-1).mul_(a)
        b = (correlations / variances[0]).masked_fill_(fixed, 0.0)
        # By these, the gradient averaged over ranks is that of the global batch.
        square, share = loss.tau**2, loss.beta * layout.factor
        weights = numbers_beside(p, ((square * share, rows), (square * loss.gamma / classes, classes)))
        slopes = torch.stack([a, b, b * first[0], a * first[1]])
        ctx.save_for_backward(student, p, slopes * weights)
        # Not saved: it may come from torch.inference_mode, and no gradient reaches it.
        ctx.loss, ctx.teacher, ctx.layout = loss, teacher, layout
        return torch.rsub(torch.dot(correlations, weights), square * (share * rows + loss.gamma))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, p, slopes = ctx.saved_tensors
        loss, layout = ctx.loss, ctx.layout
        if torch.is_grad_enabled():  # for second derivatives
            value = loss.plainly(student, ctx.teacher, layout)
            return None, *torch.autograd.grad(value, student, grads[0], create_graph=True), None, None
        rows = len(student)
        of_rows, of_columns = slopes[:2, :rows, None], slopes[:, rows:] * layout.world_size
        s, t = p
        a, b = of_rows + of_columns[:2, None]
        by_s = (s * b).addcmul_(t, a, value=-1)
        # The means of the columns: those of the rows are constant in their rows.
        by_s.add_(of_columns[3] - of_columns[2], alpha=1 / layout.total)
        by_s.mul_(s)
        by_s.addcmul_(s, by_s.sum(1, keepdim=True), value=-1)
        return None, by_s.mul_(grads[0] / loss.tau).to(student.dtype), None, None


def _sums_of_both(p: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the five sums along a dimension, (5, n), of numbers (2, b, C) of both models."""
    return torch.cat([p, p * p, p[:1] * p[1:]]).sum(dim)


def _sums(s: torch.Tensor, t: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the five sums along a dimension."""
    return torch.stack([s.sum(dim), t.sum(dim), (s * s).sum(dim), (t * t).sum(dim), (s * t).sum(dim)])


def _correlate(sums: torch.Tensor, count: int) -> torch.Tensor:
    """Return Pearson's correlation of `count` pairs of numbers from their five sums."""
    s, t, ss, tt, st = sums.unbind()
    s_variance, t_variance = ss - s * s / count, tt - t * t / count
    # What is left of equal numbers is rounding.
    varies = (s_variance > _SMALLEST + _LEAST * ss) & (t_variance > _SMALLEST + _LEAST * tt)
    inverse = torch.where(varies, s_variance, 1.0).rsqrt() * torch.where(varies, t_variance, 1.0).rsqrt()
    return torch.where(varies, (st - s * t / count) * inverse, 0.0)
