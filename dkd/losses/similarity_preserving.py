"""Similarity-Preserving knowledge distillation. Tung & Mori, ICCV 2019, equations 1 to 4.

Q is the (B, d) matrix of a layer's flattened features over the global batch:

    G = Q Qᵀ,   Ĝ[i, :] = G[i, :] / ‖G[i, :]‖₂,   L_SP = (1/B²) Σ_pairs ‖Ĝ_T − Ĝ_S‖_F²

Row i of Ĝ needs row i of G only, so the loss splits exactly into the row blocks that the ranks own.

The gradient of row i grows as 1/‖G[i, :]‖₂: without bound for a sample whose features are all zero. So rows are divided
by

    max(‖G[i, :]‖₂, floor · mean_j ‖G[j, :]‖₂)

whose second part is a constant to the gradient. A row above it is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dkd.global_batch import STRATEGIES, BatchLayout, GramScope, gram_rows
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast

FLOOR = 1e-2
"""The default of `floor`. See docs/reference/losses.md for why it is this one."""
_ZERO_ROW = 1e-12  # what public implementations divide a row of zeros by (torch.nn.functional.normalize)
_SMALLEST = 1e-19  # what is below it has no square in float32


class SimilarityPreserving(nn.Module):
    """The unweighted L_SP over the global batch.

    Args:
        scope: whose rows make one Gram matrix: `global`, those of all ranks; `node`, of one machine; a number n, of n
            neighbouring ranks; `local`, of this rank alone, which is what other code computes and not the published
            loss. The groups' losses are averaged.
        strategy: how ranks bring the rows together: `gather`, `exchange`, or `auto`, the one that moves less. The
            numbers are the same.
        weights: one weight a pair; default 1.
        comm_dtype: torch.bfloat16 rounds features, and with `exchange` their gradients, to that type on their way
            between ranks, which halves float32's bytes; None: they travel in their own. Gram matrices are computed and
            summed in full precision either way.
        floor: a row of G shorter than this share of the mean row is divided by that share instead of its own norm: a
            sample whose features are nearly zero then gets no more than 1/floor times the gradient of the others. 0:
            the published formula.

    Called with one tensor (b, ...) for the student and one for the teacher, or equal-length lists of them. All but the
    rows is flattened, and neither widths nor resolutions of a pair need agree. Returns a scalar whose mean over ranks
    is L_SP of the global batch, and whose gradient, averaged over ranks as DDP, FSDP and ZeRO do, is L_SP's gradient.
    Without a process group it is the single-process loss. `layout` says who holds which rows; left out, the ranks agree
    on it by one small all-gather, and uneven local batches are right too.

    The weight γ means nothing without its batch: L_SP falls as 1/B. See `effective_gamma`.

    Raises:
        ValueError: tensors that make no pair.
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
        return f"scope={self.scope!r}, strategy={self.strategy!r}, weights={self.weights}, comm_dtype={self.comm_dtype}, floor={self.floor}"

    def forward(self, student: Features, teacher: Features, layout: BatchLayout | None = None) -> torch.Tensor:
        # Ranks agree before anything else may raise, so that one rank's wrong shape is every rank's error.
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        pairs = as_pairs(student, teacher, self.weights)
        layout = self.scope.within(layout)
        with no_autocast(pairs[0][0].device):
            # flatten, not view: channels_last tensors are not viewable. All pairs in one call: they share the
            # collectives.
            flat = [*(s.flatten(1) for s, _, _ in pairs), *(t.detach().flatten(1) for _, t, _ in pairs)]
            rows = self._normalised(gram_rows(flat, layout, self.strategy, self.comm_dtype), layout)
            differences = [s - t for s, t in zip(rows[: len(pairs)], rows[len(pairs) :], strict=True)]
            # W · ‖Ĝ_T[r] − Ĝ_S[r]‖_F² / B², r the rows held here.
            shares = [w * d.square().sum() for d, (_, _, w) in zip(differences, pairs, strict=True)]
            return torch.stack(shares).sum() * (layout.world_size / layout.total**2)

    def _normalised(self, matrices: Sequence[torch.Tensor], layout: BatchLayout) -> list[torch.Tensor]:
        """Rows of Gram matrices (b, W·b_max) divided by their norms, or by the floor."""
        norms = [_row_norms(g) for g in matrices]
        if self.floor == 0:
            return [g / n.clamp_min(_ZERO_ROW) for g, n in zip(matrices, norms, strict=True)]
        means = layout.sum(torch.stack([n.detach().sum() for n in norms])) / layout.total
        # Of a Gram matrix of zeros, the floor is zero as well.
        floors = torch.where(means > 0, self.floor * means, _ZERO_ROW).unbind()
        return [g / n.clamp_min(floor.to(n.dtype)) for g, n, floor in zip(matrices, norms, floors, strict=True)]


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """(b, B) -> (b, 1), L2 norms, whatever the scale: the squares of float32 end at 1e19 and begin at 1e-19, so a row
    is divided by its largest element first."""
    largest = rows.detach().abs().amax(1, keepdim=True).clamp_min(_SMALLEST)
    return torch.linalg.vector_norm(rows / largest, dim=1, keepdim=True) * largest


def effective_gamma(gamma: float, reference_batch: int, gram_rows: int) -> float:
    """γ_eff = γ · B_G / reference_batch: the weight per row that `gamma` had in a Gram matrix of `reference_batch`
    rows.

    Args:
        gamma: γ as published.
        reference_batch: the batch it was published with (128 in the paper; 64 in RepDistiller and mdistiller).
        gram_rows: B_G, the rows of the Gram matrix formed here.
    """
    return gamma * gram_rows / reference_batch
