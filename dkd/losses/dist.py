"""Compute DIST, knowledge distillation from a stronger teacher. Source: Huang et al., NeurIPS 2022.

p = softmax(z / τ) are probabilities (B, C), and ρ is Pearson's correlation:

    L_DIST = τ² [ β (1 − mean_i ρ(p_S,i·, p_T,i·)) + γ (1 − mean_c ρ(p_S,·c, p_T,·c)) ]

The first part, between the classes of a sample, is a mean over samples. The second, between the samples of a class,
needs five sums over the global batch for each class: Σp_S, Σp_T, Σp_S², Σp_T², Σp_S p_T. They are computed and added in
float64, since a variance is a small difference of two of them.
"""

from __future__ import annotations

import torch
from torch import nn

from dkd.global_batch import BatchLayout, GramScope, add_over_ranks, full_precision
from dkd.losses.feature_pairs import as_list, check_logit_pair, no_autocast

_LEAST = 64 * torch.finfo(torch.float64).eps  # share of Σp² below which a variance is rounding


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
            # In float64: rare classes have probabilities below the rounding of a float32 softmax.
            s, t = ((logits.double() / self.tau).softmax(1) for logits in (student, teacher.detach()))
            s_centered, t_centered = (p - p.mean(1, keepdim=True) for p in (s, t))
            inter = layout.mean(1 - _correlate(_sums(s_centered, t_centered, dim=1), s.shape[1]))
            sums = add_over_ranks(_sums(s, t, dim=0), layout)
            intra = 1 - _correlate(sums, layout.total).mean()
            value = self.tau**2 * (self.beta * inter + self.gamma * intra)
            return value.to(full_precision(student[:0]).dtype)


def _sums(s: torch.Tensor, t: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the five sums along a dimension."""
    return torch.stack([s.sum(dim), t.sum(dim), (s * s).sum(dim), (t * t).sum(dim), (s * t).sum(dim)])


def _correlate(sums: torch.Tensor, count: int) -> torch.Tensor:
    """Return Pearson's correlation of `count` pairs of numbers from their five sums."""
    s, t, ss, tt, st = sums.unbind()
    s_variance, t_variance = ss - s * s / count, tt - t * t / count
    # What is left of equal numbers is rounding.
    varies = (s_variance > _LEAST * ss) & (t_variance > _LEAST * tt)
    variances = torch.where(varies, s_variance, 1.0) * torch.where(varies, t_variance, 1.0)
    return torch.where(varies, (st - s * t / count) * variances.rsqrt(), 0.0)
