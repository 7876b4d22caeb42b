"""Compute Probabilistic Knowledge Transfer (PKT). Source: Passalis & Tefas, ECCV 2018, with the cosine kernel.

K_ij = (1 + cos(q_i, q_j)) / 2, and P_ij = K_ij / z_i with z_i = Σ_j K_ij, the probability that i chooses j:

    L_PKT = (1/B²) Σ_ij P_T,ij log(P_T,ij / P_S,ij)

Since the rows of P_S and P_T have the same sum, the terms x − 1 − log x with x = P_S/P_T, times P_T, have the same sum;
none of them is negative, so they do not cancel. The derivative by cos_ij is (1/2B²) (1/z_S,i − P_T,ij / K_S,ij).
"""

from __future__ import annotations

import torch

from dkd.global_batch.relational import Sums
from dkd.losses.relational import RelationalLoss
from dkd.losses.similarity_preserving import FLOOR, check_floor

_LEAST = 1e-6  # of K: opposite samples; float32 knows a cosine to 1e-7


class PKT(RelationalLoss):
    """Compute the unweighted L_PKT over the global batch. It is a mean over B² pairs of numbers whose rows add up to 1,
    and falls as 1/B: a published weight has no meaning without its batch (`scaled_weight`).

    Args:
        floor: a norm of features below this share of the mean norm counts as this share, so that the gradient of a
            sample whose features are nearly zero is bounded. 0: the published formula.
        **base: scope, grid, weights, comm_dtype, memory, links, channels_last: as RelationalLoss.
    """

    relation = "cosine"
    adds = (2, 0)

    def __init__(self, floor: float = FLOOR, **base: object) -> None:
        super().__init__(**base)  # type: ignore[arg-type]
        check_floor(floor)
        self.floor = floor

    def settings(self) -> dict[str, object]:
        return {"floor": self.floor}

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return z_S and z_T."""
        return _kernel(s).sum(1), _kernel(t).sum(1)

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        p_s, p_t = _kernel(s) / at.of_rows(at.rows[0]), _kernel(t) / at.of_rows(at.rows[1])
        excess = (p_s - p_t) / p_t
        return (p_t * (excess - torch.log1p(excess))).sum() / at.batch**2

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        z_s, z_t = at.rows
        k_s = _kernel(s)
        slope = at.of_both(1 / z_s) - _kernel(t) / k_s * at.of_both(1 / z_t)
        return slope.masked_fill_(k_s <= _LEAST, 0.0).mul_(1 / (2 * at.batch**2))


def _kernel(cosines: torch.Tensor) -> torch.Tensor:
    return ((1 + cosines) / 2).clamp_min(_LEAST)
