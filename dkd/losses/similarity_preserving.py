"""Compute Similarity-Preserving (SP) knowledge distillation. Source: Tung & Mori, ICCV 2019, equations 1 to 4.

Q is the (B, d) matrix of a layer's flattened features over the global batch:

    G = Q Qᵀ,   Ĝ[i, :] = G[i, :] / ‖G[i, :]‖₂,   L_SP = (1/B²) Σ_pairs ‖Ĝ_T − Ĝ_S‖_F²

Row i of Ĝ needs only row i of G, so the loss splits exactly into the row blocks that the ranks own.

The gradient of row i grows as 1/‖G[i, :]‖₂, without bound for a sample whose features are all zero. Rows are therefore
divided by

    max(‖G[i, :]‖₂, floor · mean_j ‖G[j, :]‖₂)

whose second part is a constant to the gradient. The floor does not change a row whose norm is larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dkd.global_batch import STRATEGIES, BatchLayout, GramScope, gram_rows
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast

FLOOR = 1e-2
"""The default of `floor`; docs/reference/losses.md gives the reason."""
_ZERO_ROW = 1e-12  # public implementations divide a row of zeros by it (torch.nn.functional.normalize)
_SMALLEST = 1e-19  # smaller numbers have no square in float32


class SimilarityPreserving(nn.Module):
    """Compute the unweighted L_SP over the global batch.

    Args:
        scope: the ranks whose rows make one Gram matrix: `global`, all ranks; `node`, the ranks of one machine; a
            number n, n neighbouring ranks; `local`, this rank alone, which other code computes and which is not the
            published loss. The groups' losses are averaged.
        strategy: how ranks bring the rows together: `gather`, `exchange`, or `auto`, the one that moves less. The
            results are equal up to rounding.
        weights: one weight for each pair; None: 1.
        comm_dtype: torch.bfloat16 rounds features, and with `exchange` their gradients, to that type on their way
            between ranks, which halves float32's bytes; None: they keep their own type. Gram matrices are computed and
            summed in full precision either way.
        floor: a row of G shorter than this share of the mean row is divided by that share instead of its own norm: a
            sample whose features are nearly zero then gets no more than 1/floor times the gradient of the others. 0:
            the published formula.

    The module is called with one tensor (b, ...) of the student and one of the teacher, or with equal-length lists of
    tensors. All dimensions but the rows are flattened; neither widths nor resolutions of a pair need agree. It returns
    a scalar whose mean over ranks is L_SP of the global batch, and whose gradient, averaged over ranks as DDP, FSDP and
    ZeRO do, is L_SP's gradient. Without a process group, the scalar is the single-process loss. `layout` states which
    rank holds which rows. Without `layout`, the ranks agree on one by one small all-gather, and local batches may be
    uneven.

    The weight γ has no meaning without its batch, since L_SP falls as 1/B. See `effective_gamma`.

    Raises:
        ValueError: the tensors make no pair.
        BatchMismatchError: on all ranks, when shapes differ between ranks.

    Example:
        >>> sp = SimilarityPreserving()
        >>> loss = cross_entropy + 3000 * sp(student_feature, teacher_feature)
    """

    def __init__(
        self,
        scope: str | int = "global",
        strategy: str = "auto",
        weights: Sequence[float] | None = None,
        comm_dtype: torch.dtype | None = None,
        floor: float = FLOOR,
    ) -> None:
        super().__init__()
        if strategy not in ("auto", *STRATEGIES):
            raise ValueError(f"strategy={strategy!r}: must be one of auto, {', '.join(STRATEGIES)}")
        if comm_dtype not in (None, torch.bfloat16):
            # float16's range is too small for a Gram matrix's gradient, and for features above 65,504.
            raise ValueError(f"comm_dtype={comm_dtype}: must be torch.bfloat16 or None")
        if not 0 <= floor < 1:
            raise ValueError(f"floor={floor}: must be at least 0 and below 1, a share of the mean norm of the rows")
        self.scope, self.strategy, self.weights, self.comm_dtype = GramScope(scope), strategy, weights, comm_dtype
        self.floor = floor

    def extra_repr(self) -> str:
        return (
            f"scope={self.scope!r}, strategy={self.strategy!r}, weights={self.weights}, comm_dtype={self.comm_dtype}, "
            f"floor={self.floor}"
        )

    def forward(self, student: Features, teacher: Features, layout: BatchLayout | None = None) -> torch.Tensor:
        # Ranks agree before anything else may raise, so that one rank's wrong shape is every rank's error.
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        pairs = as_pairs(student, teacher, self.weights)
        layout.check(pairs[0][0])
        layout = self.scope.within(layout)
        with no_autocast(pairs[0][0].device):
            # flatten, not view: channels_last tensors are not viewable. All pairs in one call: they share the
            # collectives.
            flat = [*(s.flatten(1) for s, _, _ in pairs), *(t.detach().flatten(1) for _, t, _ in pairs)]
            rows = self._normalize(gram_rows(flat, layout, self.strategy, self.comm_dtype), layout)
            differences = [s - t for s, t in zip(rows[: len(pairs)], rows[len(pairs) :], strict=True)]
            # W · ‖Ĝ_T[r] − Ĝ_S[r]‖_F² / B², r the rows held here.
            shares = [w * d.square().sum() for d, (_, _, w) in zip(differences, pairs, strict=True)]
            return torch.stack(shares).sum() * (layout.world_size / layout.total**2)

    def _normalize(self, matrices: Sequence[torch.Tensor], layout: BatchLayout) -> list[torch.Tensor]:
        """Divide the rows of Gram matrices (b, W·b_max) by their norms, or by the floor."""
        norms = [_compute_row_norms(g) for g in matrices]
        if self.floor == 0:
            return [g / n.clamp_min(_ZERO_ROW) for g, n in zip(matrices, norms, strict=True)]
        means = layout.sum(torch.stack([n.detach().sum() for n in norms])) / layout.total
        # The floor of a Gram matrix of zeros is zero as well.
        floors = torch.where(means > 0, self.floor * means, _ZERO_ROW).unbind()
        return [g / n.clamp_min(floor.to(n.dtype)) for g, n, floor in zip(matrices, norms, floors, strict=True)]


def _compute_row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms (b, 1) of rows (b, B) of any scale. float32 squares only numbers between 1e-19 and 1e19, so a
    row is divided by its largest element first."""
    largest = rows.detach().abs().amax(1, keepdim=True).clamp_min(_SMALLEST)
    return torch.linalg.vector_norm(rows / largest, dim=1, keepdim=True) * largest


def effective_gamma(gamma: float, reference_batch: int, gram_size: int) -> float:
    """Return γ_eff = γ · B_G / reference_batch, which keeps the weight per row that γ had in a Gram matrix of
    `reference_batch` rows.

    Args:
        gamma: γ as published.
        reference_batch: the batch that γ was published with (128 in the paper; 64 in RepDistiller and mdistiller).
        gram_size: B_G, the number of rows of the Gram matrix formed here.
    """
    return gamma * gram_size / reference_batch
