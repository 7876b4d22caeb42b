"""Who holds which rows of a global batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from dkd.global_batch import collectives
from dkd.global_batch.attendance import Attendance

_UNEVEN_WITHIN_RANK = -1


class BatchMismatchError(ValueError):
    """Ranks came to a loss with features of different shapes. Raised on every rank, naming ranks and shapes."""


class AbsentRankError(RuntimeError):
    """A rank did not come to a loss within the process group's timeout, or is gone. Raised on the ranks that came, naming it."""


_arrivals: dict[str, tuple[Attendance, int]] = {}
"""Of each process group, by its name: how often its ranks were asked to agree."""


class _Kind(NamedTuple):
    """What ranks must agree on of a tensor: all but its rows."""

    shape: tuple[int, ...]
    dtype: str
    gradient: bool

    @property
    def beyond_rows(self) -> tuple[tuple[int, ...], str, bool]:
        return self.shape[1:], self.dtype, self.gradient


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
        """Ask all ranks how many rows they hold, and check that all else agrees: shapes, dtypes, gradient or none. One small all-gather.

        Args:
            features: tensors of shape (b, ...), the same number on every rank; b may differ between ranks.

        Raises:
            BatchMismatchError: on every rank, when anything but the rows differs between ranks, or rows differ within one.
            AbsentRankError: when a rank does not come within the group's timeout (a gloo group's; an NCCL group ends the process itself).
        """
        kinds = [_Kind(tuple(f.shape), str(f.dtype), f.requires_grad and torch.is_grad_enabled()) for f in features]
        rows = kinds[0].shape[0] if len({kind.shape[0] for kind in kinds}) == 1 else _UNEVEN_WITHIN_RANK
        if not collectives.is_distributed():
            table = [(rows, 0)]
        else:
            # Shapes travel as one number; only when the numbers differ, which all ranks see alike, are the shapes themselves sent.
            signature = zlib.crc32(repr([kind.beyond_rows for kind in kinds]).encode())
            row = torch.tensor([[rows, signature]], dtype=torch.int64, device=features[0].device)
            attendance = _arrive(kinds, group)
            try:
                table = [(r, s) for r, s in collectives.all_gather_rows(row, group).tolist()]
            except RuntimeError as error:
                reason = (str(error).splitlines() or [""])[0]
                raise AbsentRankError(
                    f"not all ranks came to this loss ({attendance.describe()}); every rank must make the same calls to it [{reason}]"
                ) from error
        if len({s for _, s in table}) > 1 or any(r == _UNEVEN_WITHIN_RANK for r, _ in table):
            raise BatchMismatchError(_describe_mismatch(collectives.all_gather_objects(kinds, group)))
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


def _arrive(kinds: list[_Kind], group: dist.ProcessGroup | None) -> Attendance:
    group = group or dist.group.WORLD
    name = group.group_name if group is not None else ""
    attendance, calls = _arrivals.get(name, (None, 0))
    _arrivals[name] = attendance, calls = attendance or Attendance("loss", group), calls + 1
    attendance.reach([calls], f"call {calls} of it, with {_show(kinds)}")
    return attendance


def _describe_mismatch(every: list[list[_Kind]]) -> str:
    def show(kinds: list[_Kind], other: list[_Kind]) -> str:
        return _show(
            kinds, [k.dtype for k in kinds] != [k.dtype for k in other], [k.gradient for k in kinds] != [k.gradient for k in other]
        )

    for r, kinds in enumerate(every):
        if len({kind.shape[0] for kind in kinds}) != 1:
            return f"rank {r}: features of one batch have different numbers of rows: {_show(kinds)}"
        if [kind.beyond_rows for kind in kinds] != [kind.beyond_rows for kind in every[0]]:
            return f"features differ between ranks: rank 0 has {show(every[0], kinds)}, rank {r} has {show(kinds, every[0])}"
    return "features differ between ranks"


def _show(kinds: list[_Kind], dtypes: bool = False, gradients: bool = False) -> str:
    def one(kind: _Kind) -> str:
        dtype = f" {kind.dtype.removeprefix('torch.')}" if dtypes else ""
        gradient = (" with gradient" if kind.gradient else " without gradient") if gradients else ""
        return "×".join(map(str, kind.shape)) + dtype + gradient

    return ", ".join(map(one, kinds))
