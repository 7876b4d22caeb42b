"""Compute Correlation Congruence (CC). Source: Peng et al., ICCV 2019, with the Gaussian kernel by its Taylor series.

On unit rows ‖q_i − q_j‖² = 2 − 2 cos_ij, so exp(−γ‖q_i − q_j‖²) = e^{−2γ} Σ_p (2γ)^p/p! · cos_ij^p, here up to max_p:

    K_ij = e^{−2γ} Σ_{p ≤ max_p} (2γ)^p/p! · cos_ij^p,   L_CC = (1/B²) ‖K_T − K_S‖_F²

The mean over pairs does not depend on the batch.
"""

from __future__ import annotations

import math

import torch

from dkd.global_batch.relational import Sums
from dkd.losses.relational import RelationalLoss
from dkd.losses.similarity_preserving import FLOOR, check_floor


class CorrelationCongruence(RelationalLoss):
    """Compute the unweighted L_CC over the global batch.

    Args:
        gamma: γ of the Gaussian kernel.
        max_p: the last power of its series.
        floor: a norm of features below this share of the mean norm counts as this share; 0: the published formula.
        **base: scope, grid, weights, comm_dtype, memory, links, channels_last: as RelationalLoss.

    Raises:
        ValueError: gamma is not above 0, or max_p is below 1.
    """

    relation = "cosine"

    def __init__(self, gamma: float = 0.4, max_p: int = 2, floor: float = FLOOR, **base: object) -> None:
        super().__init__(**base)  # type: ignore[arg-type]
        if not gamma > 0 or max_p < 1:
            raise ValueError(f"gamma={gamma}, max_p={max_p}: gamma must be above 0, and max_p at least 1")
        check_floor(floor)
        self.gamma, self.max_p, self.floor = gamma, max_p, floor
        factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(max_p + 1)]
        self._powers, self._slopes = factors, [p * factor for p, factor in enumerate(factors)][1:]

    def settings(self) -> dict[str, object]:
        return {"gamma": self.gamma, "max_p": self.max_p, "floor": self.floor}

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        return self._difference(s, t).square().sum() / at.batch**2

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return 2 · (2/B²) (K_S − K_T) K′(cos_ij): the derivative is symmetric."""
        return self._difference(s, t).mul_(_polynomial(self._slopes, s)).mul_(4 / at.batch**2)

    def _difference(self, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return _polynomial(self._powers, s) - _polynomial(self._powers, t)


def _polynomial(factors: list[float], x: torch.Tensor) -> torch.Tensor:
    """Return Σ_p factors[p] x^p, by Horner's rule."""
    result = torch.full_like(x, factors[-1])
    for factor in reversed(factors[:-1]):
        result = result * x + factor
    return result
