"""Describe which rank holds which rows of a global batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from dkd.errors import InputError, RunError
from dkd.global_batch import collectives
from dkd.global_batch.arrivals import Arrivals
from dkd.text import first_line

# Sent in the place of a number of rows.
_UNEVEN_WITHIN_RANK, _NO_TENSORS = -1, -2


class BatchMismatchError(InputError):
    """Ranks called different losses, or one loss with features of different shapes. Raised on every rank; the message
    names ranks and what differs."""


class AbsentRankError(RunError):
    """A rank did not join a loss within the process group's timeout, or is gone. Raised on the ranks that joined; the
    message names the absent rank."""


_arrivals: dict[str, tuple[Arrivals, int]] = {}
"""By the name of a process group: the arrivals of its ranks, and how often they were asked to agree."""


class _Kind(NamedTuple):
    """Hold what ranks must agree on for a tensor (its shape except the rows, dtype, gradient), and its rows."""

    shape: tuple[int, ...]
    dtype: str
    gradient: bool

    @property
    def rows(self) -> int:
        """Return the first number of the shape; a scalar has no rows."""
        return self.shape[0] if self.shape else _UNEVEN_WITHIN_RANK

    @property
    def beyond_rows(self) -> tuple[bool, tuple[int, ...], str, bool]:
        """Return what must be equal on all ranks."""
        return bool(self.shape), self.shape[1:], self.dtype, self.gradient


@dataclass(frozen=True)
class _Call:
    """Hold what one rank brings to an agreement.

    Args:
        loss: the loss that the rank calls, and its settings; empty where the caller does not name them.
        kinds: the tensors.
    """

    loss: str
    kinds: tuple[_Kind, ...]

    @property
    def rows(self) -> int:
        rows = {kind.rows for kind in self.kinds}
        return _NO_TENSORS if not rows else rows.pop() if len(rows) == 1 else _UNEVEN_WITHIN_RANK

    @property
    def signature(self) -> int:
        """Return one number that is equal where all but the rows agrees, so that ranks agree by one small message."""
        return zlib.crc32(repr((self.loss, [kind.beyond_rows for kind in self.kinds])).encode())


@dataclass(frozen=True)
class BatchLayout:
    """Describe the rows of one global batch: rank r holds `rows[r]` rows, in rank order.

    Args:
        rows: number of rows held by each rank, W numbers.
        rank: the rank that holds this object.
        group: the process group of the W ranks; None: the default one.
    """

    rows: tuple[int, ...]
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def even(cls, rows: int, group: dist.ProcessGroup | None = None) -> BatchLayout:
        """Return the layout in which every rank holds `rows` rows. Nothing is communicated: the caller knows the
        number, as the trainer does. Raises ValueError: this rank is not in the group."""
        collectives.check_member(group)
        return cls((rows,) * collectives.world_size(group), collectives.rank(group), group)

    @classmethod
    def agree(
        cls, features: Sequence[torch.Tensor], group: dist.ProcessGroup | None = None, loss: object = ""
    ) -> BatchLayout:
        """Ask all ranks how many rows they hold, and check that they agree on everything else: the loss, shapes,
        dtypes, and which tensors have a gradient. Costs one small all-gather.

        Args:
            features: tensors of shape (b, ...), the same number on every rank; b may differ between ranks.
            group: the process group of the ranks whose rows make one batch; None: the default one, all ranks.
            loss: the loss that is called, such as a module that calls `agree` with itself: str(loss), its name and
                settings, must be the same on every rank.

        Raises:
            BatchMismatchError: on every rank, when anything but the rows differs between ranks, or rows differ within
                one.
            ValueError: on every rank, when `features` is empty; on a rank that is not in the group.
            AbsentRankError: when a rank does not join within the group's timeout (under gloo; NCCL ends the process
                itself).
        """
        collectives.check_member(group)
        kinds = tuple(
            _Kind(tuple(f.shape), str(f.dtype), f.requires_grad and torch.is_grad_enabled()) for f in features
        )
        if not collectives.is_distributed():
            call = _Call("", kinds)
            table = [(call.rows, 0)]
        else:
            call = _Call(str(loss), kinds)
            # Each rank sends one number that stands for all else. Only when the numbers differ, which all ranks see,
            # the ranks send everything.
            device = features[0].device if len(features) else collectives.message_device(group)
            row = torch.tensor([[call.rows, call.signature]], dtype=torch.int64, device=device)
            arrivals = _arrive(call.kinds, group)
            try:
                table = [(r, s) for r, s in collectives.all_gather_rows(row, group).tolist()]
            except RuntimeError as error:
                reason = first_line(error)
                raise AbsentRankError(
                    f"not all ranks joined this loss ({arrivals.describe()}); every rank must make the same calls to "
                    f"the loss [{reason}]"
                ) from error
        if len({s for _, s in table}) > 1 or any(r == _UNEVEN_WITHIN_RANK for r, _ in table):
            raise BatchMismatchError(_describe_mismatch(collectives.all_gather_objects(call, group)))
        if table[0][0] == _NO_TENSORS:
            raise ValueError("a loss needs at least one tensor of each model, and got none")
        layout = cls(tuple(r for r, _ in table), collectives.rank(group), group)
        if layout.total == 0:
            raise BatchMismatchError("the global batch is empty: no rank holds a row")
        return layout

    @property
    def world_size(self) -> int:
        """W, the number of ranks."""
        return len(self.rows)

    @property
    def total(self) -> int:
        """B, the rows of the global batch."""
        return sum(self.rows)

    @property
    def first_row(self) -> int:
        """Place of this rank's first row among the rows of all ranks."""
        return sum(self.rows[: self.rank])

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Sum a few numbers over the ranks of this layout, by a collective. Carries no gradient."""
        return collectives.sum_over_ranks(numbers.detach(), self.group) if self.world_size > 1 else numbers.detach()

    def check(self, tensor: torch.Tensor) -> None:
        """Check that a tensor (b, ...) holds the rows of this rank: a layout of another batch would scale the loss.
        Raises ValueError."""
        own = self.rows[self.rank]
        if tensor.dim() == 0 or tensor.shape[0] != own:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} for a layout in which this rank holds {own} rows: make a "
                "layout for each batch whose number of rows differs"
            )

    @property
    def factor(self) -> float:
        """Return W/B, by which a sum over the rows of a rank is multiplied: the mean over ranks is then the global
        mean, of values and of gradients."""
        return self.world_size / self.total

    def mean(self, per_row: torch.Tensor) -> torch.Tensor:
        """Return the share of this rank in the mean over all B rows, times W.

        The mean of the result over ranks is the global mean; the gradient, averaged over ranks as DDP, FSDP and ZeRO
        do, is the gradient of the global mean. With even batches the result is the local mean.

        Args:
            per_row: (b,) values of the rows held here.

        Returns:
            A scalar.

        Raises:
            ValueError: these are not the rows of this rank.
        """
        self.check(per_row)
        return per_row.sum() * self.factor


def _arrive(kinds: Sequence[_Kind], group: dist.ProcessGroup | None) -> Arrivals:
    group = group or dist.group.WORLD
    name = group.group_name if group is not None else ""
    arrivals, calls = _arrivals.get(name, (None, 0))
    _arrivals[name] = arrivals, calls = arrivals or Arrivals("loss", group), calls + 1
    arrivals.reach([calls], f"call {calls} of it, with {_show(kinds)}")
    return arrivals


def _describe_mismatch(every: Sequence[_Call]) -> str:
    def show(kinds: Sequence[_Kind], other: Sequence[_Kind]) -> str:
        return _show(
            kinds,
            [k.dtype for k in kinds] != [k.dtype for k in other],
            [k.gradient for k in kinds] != [k.gradient for k in other],
        )

    first = every[0]
    for r, call in enumerate(every):
        if call.loss != first.loss:
            return (
                f"losses differ between ranks: rank 0 calls {first.loss or 'a loss without a name'}, "
                f"rank {r} calls {call.loss or 'a loss without a name'}; every rank must make the same calls"
            )
    for r, call in enumerate(every):
        if any(not kind.shape for kind in call.kinds):
            return (
                f"rank {r}: a loss needs tensors of shape (b, ...), b rows, and got one without dimensions: "
                f"{_show(call.kinds)}"
            )
        if call.rows == _UNEVEN_WITHIN_RANK:
            return f"rank {r}: features of one batch have different numbers of rows: {_show(call.kinds)}"
        if call.signature != first.signature:
            ours, theirs = show(first.kinds, call.kinds), show(call.kinds, first.kinds)
            return f"features differ between ranks: rank 0 has {ours}, rank {r} has {theirs}"
    return "features differ between ranks"


def _show(kinds: Sequence[_Kind], dtypes: bool = False, gradients: bool = False) -> str:
    def one(kind: _Kind) -> str:
        dtype = f" {kind.dtype.removeprefix('torch.')}" if dtypes else ""
        gradient = (" with gradient" if kind.gradient else " without gradient") if gradients else ""
        return ("×".join(map(str, kind.shape)) or "a scalar") + dtype + gradient

    return ", ".join(map(one, kinds)) or "no tensors"
