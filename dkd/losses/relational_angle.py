"""Compute the angle part of Relational Knowledge Distillation (RKD). Source: Park et al., CVPR 2019, equation 7.

c_ijk is the cosine of the angle at sample i between samples j and k:

    c_ijk = ⟨q_j − q_i, q_k − q_i⟩ / (‖q_j − q_i‖ ‖q_k − q_i‖),   L = (1/B³) Σ_ijk h(c_S,ijk − c_T,ijk)

with h the Huber loss. From products alone: ⟨q_j − q_i, q_k − q_i⟩ = S_jk − S_ij − S_ik + S_ii. Every rank computes the
angles at its own samples, which takes all of S: B² numbers on each rank, and B³/W angles. A batch above `MOST_SAMPLES`
is therefore refused; a smaller `scope` is the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from dkd.errors import InputError
from dkd.global_batch import BatchLayout, GramScope, full_precision, gather_rows
from dkd.global_batch.cost import GramTensor
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast
from dkd.losses.relational import RelationPlace, TeacherRelations

MOST_SAMPLES = 2048
"""The largest batch: 4 million products and 4 billion angles for each 1,024 samples of a rank."""
ANGLES_AT_ONCE = 2**26
"""Angles that are computed at once: 256 MB of each of a few tensors in float32."""


class RKDAngle(nn.Module):
    """Compute the unweighted angle loss over the global batch.

    Args:
        scope: the ranks whose samples are compared, as RelationalLoss.
        weights: one weight for each pair; None: 1.

    The module is called with features as RelationalLoss is, and returns a scalar with the same meaning over ranks.

    Raises:
        InputError: a batch above MOST_SAMPLES.
        ValueError: the tensors make no pair.
        BatchMismatchError: on all ranks, when shapes or settings differ between ranks.
    """

    relational = True

    def __init__(self, scope: str | int = "global", weights: list[float] | None = None) -> None:
        super().__init__()
        self.scope, self.weights = GramScope(scope), weights

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, weights={self.weights}"

    def relation_facts(self) -> dict[str, Any]:
        """Return, as plain values, on which settings the teacher's products depend."""
        return {"relation": "product", "centred": True, "scaled": True}

    def settle(self, tensors: Sequence[GramTensor], layout: BatchLayout, device: torch.device) -> RelationPlace:
        """Return where this rank stands: it needs the rows of its own samples. A collective, as RelationalLoss's."""
        layout = self.scope.within(layout)
        own = torch.arange(layout.first_row, layout.first_row + layout.rows[layout.rank], device=device)
        return RelationPlace(layout, own)

    def relate_teacher(
        self, teacher: Features, at: RelationPlace
    ) -> tuple[TeacherRelations, torch.Tensor, list[torch.Tensor]]:
        """Compute the teacher's products. As RelationalLoss's, but that each block is the whole matrix (B, B). A
        collective."""
        with torch.no_grad(), no_autocast(as_list(teacher)[0].device):
            products = [_products(t.detach().flatten(1), at.layout) for t in as_list(teacher)]
        return TeacherRelations(at, products), at.needed, [each[at.needed] for each in products]

    def give_rows(self, rows: Sequence[torch.Tensor], at: RelationPlace) -> TeacherRelations:
        """Return what the loss is called with in the place of the teacher's features. A collective."""
        return TeacherRelations(at, [gather_rows(each, at.layout) for each in rows])

    def forward(
        self, student: Features, teacher: Features | TeacherRelations, layout: BatchLayout | None = None
    ) -> torch.Tensor:
        if isinstance(teacher, TeacherRelations):
            return self._compare(as_list(student), teacher.blocks, teacher.place.layout)
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        pairs = as_pairs(student, teacher, self.weights)
        layout.check(pairs[0][0])
        layout = self.scope.within(layout)
        check_batch(layout.total)
        with no_autocast(pairs[0][0].device):
            products = [_products(t.detach().flatten(1), layout) for _, t, _ in pairs]
        return self._compare([s for s, _, _ in pairs], products, layout)

    def _compare(
        self, students: Sequence[torch.Tensor], products: Sequence[torch.Tensor], layout: BatchLayout
    ) -> torch.Tensor:
        weights = [1.0] * len(students) if self.weights is None else self.weights
        with no_autocast(students[0].device):
            shares = [
                w * _compare_angles(s.flatten(1), t, layout)
                for s, t, w in zip(students, products, weights, strict=True)
            ]
            return torch.stack(shares).sum() * (layout.world_size / layout.total**3)


def check_batch(samples: int) -> None:
    """Check that a batch is small enough. Raises InputError."""
    if samples > MOST_SAMPLES:
        raise InputError(
            f"RKD's angles are counted in B³, and B = {samples:,} samples are above {MOST_SAMPLES:,}: take a smaller "
            "scope, such as node or a number of ranks, or the distance loss alone"
        )


def _compare_angles(student: torch.Tensor, products: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the sum over the angles at this rank's samples, of a student's features and a teacher's products."""
    s = _products(student, layout)
    t = products.to(s.dtype)
    own = range(layout.first_row, layout.first_row + layout.rows[layout.rank])
    at_once = max(1, ANGLES_AT_ONCE // layout.total**2)
    parts = [torch.tensor(own[i : i + at_once], device=s.device) for i in range(0, len(own), at_once)]
    if not parts:
        return s.sum() * 0
    # The angles of some samples at a time are computed again in the backward, rather than kept.
    sums = [torch.utils.checkpoint.checkpoint(_sum_at, s, t, part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


def _products(features: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return Q Qᵀ of all samples, of features less their mean, divided by their largest norm: angles do not change."""
    everyone = full_precision(gather_rows(features, layout))
    everyone = everyone - everyone.detach().mean(0)
    largest = torch.linalg.vector_norm(everyone.detach(), dim=1).max()
    scaled = everyone / torch.where(largest > 0, largest, 1.0)
    return scaled @ scaled.T


def _sum_at(s: torch.Tensor, t: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(_cosines(s, samples), _cosines(t, samples), reduction="sum")


def _cosines(products: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Return c (n, B, B) at n samples; 0 where a direction is that of a sample to itself."""
    to_all = products[samples]  # S_ij, (n, B)
    squares = products.diagonal()
    differences = (products[None] - to_all[:, :, None] - to_all[:, None, :]) + squares[samples, None, None]
    both = squares[None] + squares[samples, None]
    lengths = both - 2 * to_all
    other = torch.arange(len(squares), device=products.device)[None] != samples[:, None]
    # What is left of equal samples is rounding, and no direction.
    other = other & (lengths > 16 * torch.finfo(lengths.dtype).eps * both)
    inverse = torch.where(other, torch.where(other, lengths, 1.0).rsqrt(), 0.0)
    return differences * inverse[:, :, None] * inverse[:, None, :]
