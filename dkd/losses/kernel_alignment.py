"""Compute the centred kernel alignment (CKA) of linear kernels as a loss. Sources: Cortes, Mohri & Rostamizadeh, JMLR
2012; Kornblith et al., ICML 2019; as a loss for distillation Saha, Bialkowski & Khalifa, BMVC 2022.

With G = Q Qᵀ, H = 1 − 11ᵀ/B, X = H G_S H and Y = H G_T H:

    L_CKA = 1 − ⟨X, Y⟩ / (‖X‖ ‖Y‖) = ½ ‖X/‖X‖ − Y/‖Y‖‖_F²

The second form does not cancel where both agree. The derivative by S_ij is −(Y_ij/‖Y‖ − X_ij ⟨X, Y⟩/(‖X‖² ‖Y‖)) / ‖X‖.
The loss does not depend on the batch, and not on a vector that is added to all features, whose mean is therefore
subtracted first. Where all samples of a model are alike, the loss is 1, without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dkd.global_batch.relational import Sums
from dkd.losses.relational import RelationalLoss


class CKA(RelationalLoss):
    """Compute 1 − CKA over the global batch, between 0 and 1.

    Args:
        **base: scope, grid, weights, comm_dtype, memory, links, channels_last: as RelationalLoss.
    """

    relation = "product"
    shift_invariant = True
    adds = (2, 3)

    def __init__(self, **base: object) -> None:
        super().__init__(**base)  # type: ignore[arg-type]

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return s.sum(1), t.sum(1)

    def totals(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> tuple[torch.Tensor, ...]:
        """Return ‖X‖², ‖Y‖² and ⟨X, Y⟩."""
        x, y = _centre(s, 0, at), _centre(t, 1, at)
        return (x * x).sum(), (y * y).sum(), (x * y).sum()

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        x, y = _centre(s, 0, at), _centre(t, 1, at)
        # A kernel that is constant is aligned with nothing: its half of the value is ½ all the same.
        x_inverse, y_inverse = _inverse_norms(at)
        constant = (x_inverse == 0).to(s.dtype) + (y_inverse == 0).to(s.dtype)
        share = s.numel() / (2 * at.batch**2)
        return (x * x_inverse - y * y_inverse).square().sum() / 2 + share * constant

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        x_inverse, y_inverse = _inverse_norms(at)
        alignment = at.totals[2] * x_inverse * y_inverse
        x, y = _centre(s, 0, at), _centre(t, 1, at)
        # The derivative is symmetric: twice one half of it.
        return x.mul_(2 * alignment * x_inverse**2).sub_(y.mul_(2 * x_inverse * y_inverse))


def _inverse_norms(at: Sums) -> Sequence[torch.Tensor]:
    """Return 1/‖X‖ and 1/‖Y‖, and 0 where a norm is no more than the rounding of B² elements of at most 1."""
    if "inverse norms" not in at.kept:
        squares = torch.stack(at.totals[:2])
        is_some = squares > (8 * torch.finfo(squares.dtype).eps * at.batch) ** 2
        at.kept["inverse norms"] = torch.where(is_some, torch.where(is_some, squares, 1.0).rsqrt(), 0.0).unbind()
    found: Sequence[torch.Tensor] = at.kept["inverse norms"]
    return found


def _centre(relations: torch.Tensor, which: int, at: Sums) -> torch.Tensor:
    """Return the elements less the means of their row and of their column, plus the mean of all.

    Args:
        which: 0: of S; 1: of T.
    """
    if "means" not in at.kept:
        means = torch.stack(at.rows) / at.batch
        at.kept["means"] = means - means.mean(1, keepdim=True) / 2
    return relations - at.of_both(at.kept["means"][which])
