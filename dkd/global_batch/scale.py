"""Turn products of features into relations, and derivatives by relations into gradients of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from dkd.global_batch import collectives
from dkd.global_batch.collectives import Pending
from dkd.global_batch.gram import promoted_dtype
from dkd.global_batch.layout import BatchLayout
from dkd.global_batch.placement import Placement

Kind = Literal["product", "cosine", "distance"]

ZERO_NORM = 1e-12
"""The smallest divisor where there is no floor, as of torch.nn.functional.normalize."""
_ALL_ZERO = 1e-18
"""The smallest divisor where there is a floor: of vectors that are all zero. Its square fits float32."""
NEAREST = 1e-12
"""The smallest squared distance of two samples, as a share of the number that distances are divided by."""


class Norms:
    """Gather the L2 norms of the samples of all ranks, for each of several tensors (b, d), in full precision. Making
    the object begins the collective, of one number a sample and tensor."""

    def __init__(self, features: Sequence[torch.Tensor], layout: BatchLayout) -> None:
        self._layout = layout
        self._own = [torch.linalg.vector_norm(f, dim=1, dtype=promoted_dtype(f.dtype)) for f in features]
        self._pending: Pending | None = None
        if layout.world_size > 1:
            own = torch.stack(self._own, dim=1)
            missing = max(layout.rows) - len(own)
            padded = torch.cat([own, own.new_zeros(missing, own.shape[1])]) if missing else own
            self._pending = collectives.begin_all_gather_rows(padded, layout.group)

    def wait(self) -> list[torch.Tensor]:
        """Return (B,) norms of each tensor."""
        if self._pending is None:
            return self._own
        everyone, rows = self._pending.wait(), self._layout.rows
        if min(rows) < max(rows):
            parts = everyone.split(max(rows))
            everyone = torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])
        return list(everyone.T.contiguous().unbind())


def least_norm(norms: torch.Tensor, floor: float) -> torch.Tensor:
    """Return the number (..., 1) that stands for smaller norms (..., B): `floor` times the mean of all norms; without a
    floor, what public implementations divide a vector of zeros by."""
    if floor == 0:
        return torch.full((1,), ZERO_NORM, dtype=norms.dtype, device=norms.device)
    return (floor * norms.mean(-1, keepdim=True)).clamp_min(_ALL_ZERO)


class Scale:
    """Turns products q_i · q_j into relations, and derivatives by relations into gradients of features.

    Products are divided by numbers first that keep their squares within float32's range: for cosines the norms of both
    samples, else the square of the power of two that follows the largest norm, which rounds nothing.

    Args:
        kind: the relation.
        norms: of all samples, (B,).
        floor: of cosines: a norm below this share of the mean norm counts as this share, a constant.
        placement: of this rank.
    """

    def __init__(self, kind: Kind, norms: torch.Tensor, floor: float, placement: Placement) -> None:
        self._kind, self._norms, self._at = kind, norms, placement
        # (B,) for cosines, else one number.
        self._divisors = (
            torch.maximum(norms, least_norm(norms, floor)) if kind == "cosine" else next_power_of_two(norms.max())
        )

    def relate(self, products: torch.Tensor) -> torch.Tensor:
        """Return the relations (m, n) of products (m, n), which are overwritten."""
        at = self._at
        relations = products.div_(self._of_rows(self._divisors)).div_(self._of_columns(self._divisors))
        if self._kind != "distance":
            return relations
        squares = (self._norms / self._divisors).square()
        relations.mul_(-2).add_(self._of_rows(squares)).add_(self._of_columns(squares))
        same = at.part_samples[:, None] == at.column_samples[None, :]
        return relations.clamp_min_(NEAREST).masked_fill_(same, 0.0)

    def through(self, slope: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
        """Return the derivative by q_i · q_j / divisor_i of a derivative by relations, which is overwritten."""
        if self._kind == "distance":
            slope.masked_fill_(relations <= NEAREST, 0.0).mul_(-2)
        return slope.div_(self._of_columns(self._divisors))

    def home(self, sums: torch.Tensor, own: torch.Tensor, row_totals: torch.Tensor | None) -> torch.Tensor:
        """Return the gradient (b, d) of this rank's samples.

        Args:
            sums: Σ_j M_ij q_j of them, (b, d), M as `through` returns it; they are overwritten.
            own: q of them, (b, d).
            row_totals: Σ_j M_ij of all samples, (B,), for distances.
        """
        layout = self._at.layout
        here = slice(layout.first_row, layout.first_row + layout.rows[layout.rank])
        divisors = self._divisors[here, None] if self._kind == "cosine" else self._divisors
        if self._kind == "cosine":
            units = own.to(sums.dtype) / divisors
            # A norm below the floor is a constant: nothing is projected away.
            kept = (self._norms[here, None] >= divisors).to(sums.dtype)
            sums.sub_(kept * (sums * units).sum(1, keepdim=True) * units)
        elif self._kind == "distance":
            # q_i · q_i is a part of every distance of i.
            assert row_totals is not None
            sums.sub_(row_totals[here, None] * own.to(sums.dtype))
        return sums.div_(divisors)

    def _of_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return, of numbers (B,) of all samples, those of the rows of the block, (m, 1); one number as it is."""
        return numbers if numbers.dim() == 0 else of_rows(numbers, self._at)

    def _of_columns(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return, of numbers (B,) of all samples, those of the columns of the block, (1, n); one number as it is."""
        return numbers if numbers.dim() == 0 else of_columns(numbers, self._at)


def next_power_of_two(number: torch.Tensor) -> torch.Tensor:
    """Return the power of two that follows a norm, and a small one for 0."""
    # A number is its mantissa, from ½ to 1, times that power.
    number = number.clamp_min(_ALL_ZERO)
    return number / torch.frexp(number).mantissa


def of_rows(numbers: torch.Tensor, at: Placement) -> torch.Tensor:
    """Return, of numbers (B,) of all samples, those of the rows that this rank keeps of its block: (m, 1)."""
    return numbers[:, None] if at.is_whole else numbers[at.part_samples, None]


def of_columns(numbers: torch.Tensor, at: Placement) -> torch.Tensor:
    """Return, of numbers (B,) of all samples, those of the columns of this rank's block: (1, n)."""
    return numbers[None, :] if at.is_whole else numbers[None, at.column_samples]
