"""Compute the centred kernel alignment (CKA) of linear kernels as a loss. Sources: Cortes, Mohri & Rostamizadeh, JMLR
2012; Kornblith et al., ICML 2019; as a loss for distillation Saha, Bialkowski & Khalifa, BMVC 2022.

With G = Q Qᵀ, H = 1 − 11ᵀ/B, X = H G_S H and Y = H G_T H:

    L_CKA = 1 − ⟨X, Y⟩ / (‖X‖ ‖Y‖) = ½ ‖X/‖X‖ − Y/‖Y‖‖_F²

The second form does not cancel where both agree. The derivative by S_ij is −(Y_ij/‖Y‖ − X_ij ⟨X, Y⟩/(‖X‖² ‖Y‖)) / ‖X‖.
The loss does not depend on the batch.
"""

from __future__ import annotations

import torch

from dkd.global_batch.relational import Sums
from dkd.losses.relational import RelationalLoss

_LEAST = 1e-30  # of ‖X‖² with elements of at most 1: all samples are alike


class CKA(RelationalLoss):
    """Compute 1 − CKA over the global batch, between 0 and 1.

    Args:
        **base: scope, grid, weights, comm_dtype, memory, links, channels_last: as RelationalLoss.
    """

    relation = "product"
    adds = (2, 3)

    def __init__(self, **base: object) -> None:
        super().__init__(**base)  # type: ignore[arg-type]

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return s.sum(1), t.sum(1)

    def totals(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> tuple[torch.Tensor, ...]:
        """Return ‖X‖², ‖Y‖² and ⟨X, Y⟩."""
        x, y = _centre(s, at.rows[0], at), _centre(t, at.rows[1], at)
        return (x * x).sum(), (y * y).sum(), (x * y).sum()

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        xx, yy, _ = (number.clamp_min(_LEAST) for number in at.totals)
        x, y = _centre(s, at.rows[0], at), _centre(t, at.rows[1], at)
        return (x / xx.sqrt() - y / yy.sqrt()).square().sum() / 2

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        xx, yy = (number.clamp_min(_LEAST) for number in at.totals[:2])
        xy = at.totals[2]
        x, y = _centre(s, at.rows[0], at), _centre(t, at.rows[1], at)
        # The derivative is symmetric: twice one half of it.
        return x.mul_(2 * xy / (xx * (xx * yy).sqrt())).sub_(y.mul_(2 / (xx * yy).sqrt()))


def _centre(relations: torch.Tensor, row_sums: torch.Tensor, at: Sums) -> torch.Tensor:
    """Return the elements less the means of their row and of their column, plus the mean of all."""
    means = row_sums / at.batch
    return relations - at.of_both(means - means.mean() / 2)
