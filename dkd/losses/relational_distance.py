"""Compute the distance part of Relational Knowledge Distillation (RKD). Source: Park et al., CVPR 2019, equation 5.

d_ij = ‖q_i − q_j‖, and μ is its mean over the B(B − 1) pairs of different samples:

    L = (1/B²) Σ_ij h(d_S,ij/μ_S − d_T,ij/μ_T),   h the Huber loss (½x² for |x| ≤ 1, else |x| − ½)

With x_ij = d_S,ij/μ_S, the derivative by d_S,ij is (1/(B² μ_S)) (h′_ij − Σ_kl h′_kl x_kl / (B(B − 1))). The loss
depends on the batch only by (B − 1)/B.
"""

from __future__ import annotations

import torch

from dkd.global_batch.relational import Sums
from dkd.losses.feature_pairs import needs_plain_autograd
from dkd.losses.relational import RelationalLoss


class RKDDistance(RelationalLoss):
    """Compute the unweighted distance loss over the global batch.

    Args:
        **base: scope, grid, weights, comm_dtype, memory, links, channels_last: as RelationalLoss.
    """

    relation = "distance"
    shift_invariant = True
    adds = (2, 1)

    def __init__(self, **base: object) -> None:
        super().__init__(**base)  # type: ignore[arg-type]

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _root(s).sum(1), _root(t).sum(1)

    def totals(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> tuple[torch.Tensor, ...]:
        """Return Σ h′ x."""
        x, difference, _ = _scale(s, t, at)
        return ((x * difference.clamp(-1, 1)).sum(),)

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        _, difference, _ = _scale(s, t, at)
        return torch.nn.functional.huber_loss(difference, torch.zeros_like(difference), reduction="sum") / at.batch**2

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return the derivative by d_ij² and d_ji², which is that by d_ij, divided by d_ij."""
        x, difference, mean = _scale(s, t, at)
        slope = difference.clamp_(-1, 1) - at.totals[0] / _pairs(at)
        # μ² x = μ d: one μ of the derivative, and one that turns x into d.
        return torch.where(x > 0, slope / x, 0.0).mul_(1 / (at.batch * mean).square())


def _root(squares: torch.Tensor) -> torch.Tensor:
    """Return the square roots, 0 at 0 with no derivative there."""
    if not squares.requires_grad and not needs_plain_autograd([squares]):
        return squares.sqrt()
    return torch.where(squares > 0, squares, 1.0).sqrt().where(squares > 0, 0.0)


def _pairs(at: Sums) -> int:
    """Return the pairs of different samples."""
    return max(at.batch * (at.batch - 1), 1)


def _scale(s: torch.Tensor, t: torch.Tensor, at: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x = d_S/μ_S, the difference x − d_T/μ_T, and μ_S."""
    if "means" not in at.kept:
        at.kept["means"] = [(sums.sum() / _pairs(at)).clamp_min(1e-12) for sums in at.rows]
    means = at.kept["means"]
    x = _root(s) / means[0]
    return x, x - _root(t) / means[1], means[0]
