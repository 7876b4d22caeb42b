"""Compute Similarity-Preserving (SP) knowledge distillation. Source: Tung & Mori, ICCV 2019, equations 1 to 4.

Q is the (B, d) matrix of a layer's flattened features over the global batch:

    G = Q Qᵀ,   Ĝ[i, :] = G[i, :] / ‖G[i, :]‖₂,   L_SP = (1/B²) Σ_pairs ‖Ĝ_T − Ĝ_S‖_F²

With S = G_S, T = G_T, a_i = ‖S_i‖², e_i = ‖T_i‖² and p_i = ⟨S_i, T_i⟩, the derivative by S_ij is α_i S_ij + β_i T_ij:

    α_i = (2/B²) p_i / (a_i^{3/2} e_i^{1/2}),   β_i = −(2/B²) / √(a_i e_i)

It grows as 1/‖S_i‖, without bound for a sample whose features are all zero. Rows are therefore divided by

    n_i = max(‖S_i‖₂, floor · mean_j ‖S_j‖₂)

whose second part is a constant to the gradient: there α_i = (2/B²) / n_i². The floor does not change a row whose norm
is larger. The teacher's rows are divided likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dkd.global_batch import Links
from dkd.global_batch.relational import Sums
from dkd.global_batch.scale import least_norm
from dkd.losses import similarity_of_one_process
from dkd.losses.relational import RelationalLoss, WholeBatch

FLOOR = 1e-2
"""The default of `floor`; docs/reference/losses.md gives the reason."""


class SimilarityPreserving(RelationalLoss):
    """Compute the unweighted L_SP over the global batch.

    Args:
        scope, weights, comm_dtype, memory, links, channels_last: as RelationalLoss.
        strategy: `gather`, `exchange` or `auto`, where `grid` is left out.
        floor: a row of G shorter than this share of the mean row is divided by that share instead of its own norm: a
            sample whose features are nearly zero then gets no more than 1/floor times the gradient of the others. 0:
            the published formula.
        grid: as RelationalLoss; None: `strategy`.

    The module is called as RelationalLoss is. The weight γ has no meaning without its batch, since L_SP falls as 1/B:
    see `scaled_weight`.

    Raises:
        ValueError: the tensors make no pair.
        BatchMismatchError: on all ranks, when shapes or settings differ between ranks.

    Example:
        >>> sp = SimilarityPreserving()
        >>> loss = cross_entropy + 3000 * sp(student_feature, teacher_feature)
    """

    relation = "product"
    adds = (3, 0)

    def __init__(
        self,
        scope: str | int = "global",
        strategy: str = "auto",
        weights: Sequence[float] | None = None,
        comm_dtype: torch.dtype | None = None,
        floor: float = FLOOR,
        grid: str | Sequence[int] | None = None,
        memory: int | None = None,
        links: Links | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(scope, strategy if grid is None else grid, weights, comm_dtype, memory, links, channels_last)
        check_floor(floor)
        self.floor = floor

    def settings(self) -> dict[str, object]:
        return {"floor": self.floor}

    def compare_whole(self, students: Sequence[torch.Tensor], whole: WholeBatch) -> torch.Tensor:
        return similarity_of_one_process.compare(students, whole, self.floor)

    def row_sums(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return a, e and p."""
        return (s * s).sum(1), (t * t).sum(1), (s * t).sum(1)

    def value(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return Σ (S_ij/n_i − T_ij/m_i)² / B²: the difference is taken before the square, so equal rows give 0."""
        (n, _), (m, _) = self._divisors(at)
        difference = torch.nn.functional.mse_loss(s / at.of_rows(n), t / at.of_rows(m), reduction="sum")
        return difference / at.batch**2

    def slope(self, s: torch.Tensor, t: torch.Tensor, at: Sums) -> torch.Tensor:
        """Return (α_i + α_j) S_ij + (β_i + β_j) T_ij."""
        (n, norms), (m, _) = self._divisors(at)
        nm = n * m
        # A row below the floor is divided by a constant: its α is 1/n².
        alpha = (at.rows[2] / nm).masked_fill_(n > norms, 1.0).div_(n.square()).mul_(2 / at.batch**2)
        beta = nm.reciprocal_().mul_(-2 / at.batch**2)
        return (s * at.of_both(alpha)).addcmul_(t, at.of_both(beta))

    def _divisors(self, at: Sums) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Return, for S and for T, the divisors (B,) of the rows, and the norms of the rows, which the divisors are
        where the floor is not larger."""
        if "divisors" not in at.kept:
            at.kept["divisors"] = [self.divisors(squares) for squares in at.rows[:2]]
        found: Sequence[tuple[torch.Tensor, torch.Tensor]] = at.kept["divisors"]
        return found

    def divisors(self, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the divisors (B,) of rows, given the sums of their squares, and their norms."""
        if squares.requires_grad:
            # The square root has no derivative at 0, where the divisor is a constant.
            norms = torch.where(squares > 0, squares, 1.0).sqrt().where(squares > 0, 0.0)
        else:
            norms = squares.sqrt()
        return torch.maximum(norms, least_norm(norms.detach(), self.floor)), norms


def check_floor(floor: float) -> None:
    """Check that a floor is a share. Raises ValueError."""
    if not 0 <= floor < 1:
        raise ValueError(f"floor={floor}: must be at least 0 and below 1, a share of the mean norm of the rows")
