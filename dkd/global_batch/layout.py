"""Who holds which rows of a global batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dkd.global_batch import collectives

_UNEVEN_WITHIN_RANK = -1


class BatchMismatchError(ValueError):
    """Ranks came to a loss with features of different shapes. Raised on every rank, naming ranks and shapes."""


@dataclass(frozen=True)
class BatchLayout:
    """The rows of one global batch: rank r holds `rows[r]` of them, in rank order.

    Args:
        rows: rows held by each rank, W numbers.
        rank: the rank that holds this object.
        group: the process group of the W ranks; None is the default one.
    """

    rows: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def even(cls, rows: int, group: dist.ProcessGroup | None = None) -> BatchLayout:
        """Every rank holds `rows` rows. No communication: the caller knows it, as the trainer does."""
        return cls((rows,) * collectives.world_size(group), collectives.rank(group), group)

    @classmethod
    def agree(cls, features: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None) -> BatchLayout:
        """Ask all ranks how many rows they hold, and check that all else of the shapes agrees. One small all-gather.

        Args:
            features: tensors of shape (b, ...), the same number on every rank; b may differ between ranks.

        Raises:
            BatchMismatchError: on every rank, when shapes beyond the rows differ between ranks, or rows differ within one.
        """
        shapes = [tuple(f.shape) for f in features]
        rows = shapes[0][0] if len({shape[0] for shape in shapes}) == 1 else _UNEVEN_WITHIN_RANK
        if not collectives.is_distributed():
            table = [(rows, 0)]
        else:
            # Shapes travel as one number; only when the numbers differ, which all ranks see alike, are the shapes themselves sent.
            signature = zlib.crc32(repr([shape[1:] for shape in shapes]).encode())
            row = torch.tensor([[rows, signature]], dtype=torch.int64, device=features[0].device)
            table = [(r, s) for r, s in collectives.all_gather_rows(row, group).tolist()]
        if len({s for _, s in table}) > 1 or any(r == _UNEVEN_WITHIN_RANK for r, _ in table):
            raise BatchMismatchError(_describe_mismatch(collectives.all_gather_objects(shapes, group)))
        layout = cls(tuple(r for r, _ in table), collectives.rank(group), group)
        if layout.total == 0:
            raise BatchMismatchError("the global batch is empty: no rank holds a row")
        return layout

    @property
    def world_size(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        """B, the rows of the global batch."""
        return sum(self.rows)

    def mean(self, per_row: torch.Tensor) -> torch.Tensor:
        """The share of this rank in the mean over all B rows, times W.

        Its mean over ranks is the global mean, and so is its gradient once averaged over ranks as DDP, FSDP and ZeRO do.
        With even batches it is the local mean.

        Args:
            per_row: (b,) values of the rows held here.

        Returns:
            A scalar.
        """
        return per_row.sum() * (self.world_size / self.total)


def _describe_mismatch(every: list[list[tuple[int, ...]]]) -> str:
    for r, shapes in enumerate(every):
        if len({shape[0] for shape in shapes}) != 1:
            return f"rank {r}: features of one batch have different numbers of rows: {_show(shapes)}"
        if [shape[1:] for shape in shapes] != [shape[1:] for shape in every[0]]:
            return f"features differ between ranks: rank 0 has {_show(every[0])}, rank {r} has {_show(shapes)}"
    return "features differ between ranks"


def _show(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes)
