"""Offer the collectives of flat tensors that this project uses, under one name on every supported torch.

torch 2.14 renames `all_gather_into_tensor` and similar functions to `*_single`, and warns at the old names; earlier
releases have only the old names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dkd.library_internals.torch import group_timeout, members_alone

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")

# Of rows that an all-gather by all-to-all sends W times.
_SMALL_BYTES = 2**16
_as_on_gpus: list[None] = []


def is_distributed() -> bool:
    """Return whether a process group exists. Without one, every function of this package computes the single-process
    form."""
    return dist.is_available() and dist.is_initialized()


def check_member(group: dist.ProcessGroup | None) -> None:
    """Refuse a group that this rank is not in: torch gives such a rank a number in its place. Raises ValueError."""
    if group is not None and (group == dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0):
        raise ValueError("this rank is not in the process group of the loss: only the group's ranks call the loss")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks of a group; 1 without a process group."""
    return dist.get_world_size(group) if is_distributed() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in a group; 0 without a process group."""
    return dist.get_rank(group) if is_distributed() else 0


def timeout(group: dist.ProcessGroup | None) -> timedelta | None:
    """Return the timeout of a group's collectives, which its subgroups are to have too; None, torch's default, where
    torch does not report it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return None if group is None else group_timeout(group, device)


def acts_as_on_gpus(device: torch.device) -> bool:
    """Return whether collectives of tensors on `device` are made in the way of GPUs: the one place that decides it, for
    all that differs.

    On GPUs, a reduce-scatter and an all-gather are those of the backend, and an axis of a grid that holds all ranks has
    a communicator of its own. On CPUs, gloo's reduce-scatter is an all-reduce, and its all-gather passes rows around a
    ring. Its all-to-all sends every block directly to its rank, in a half or a third of the time, and takes the place
    of both, but for large rows, which an all-gather by all-to-all would send W times.
    """
    return device.type != "cpu" or bool(_as_on_gpus)


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Inside, collectives of CPU tensors are made in the way of GPUs, which gloo can do, too. All ranks enter it
    together. For tests and measurements of that way on machines without a GPU."""
    _as_on_gpus.append(None)
    try:
        yield
    finally:
        _as_on_gpus.pop()


class Pending:
    """Hold a collective that has begun, and its result.

    Args:
        out: what the collective fills.
        work: what torch waits for.
        sent: what is being sent, which must live until then.
    """

    def __init__(self, out: torch.Tensor, work: dist.Work | None, sent: torch.Tensor) -> None:
        self._out, self._work, self._sent = out, work, sent

    def wait(self) -> torch.Tensor:
        """Return the result, once it is there."""
        if self._work is not None:
            self._work.wait()
        return self._out


def begin_all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """Begin `all_gather_rows`."""
    world = world_size(group)
    out = rows.new_empty(world * rows.shape[0], *rows.shape[1:])
    count(out, group)
    if not acts_as_on_gpus(rows.device) and rows.numel() * rows.element_size() <= _SMALL_BYTES:
        sent = rows.repeat(world, *[1] * (rows.dim() - 1))
        return Pending(out, dist.all_to_all_single(out, sent, group=group, async_op=True), sent)
    sent = rows.contiguous()
    return Pending(out, _all_gather(out, sent, group=group, async_op=True), sent)


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Gather (b, ...) from each of W ranks, b equal, to (W·b, ...) on all ranks, in rank order. Carries no gradient."""
    return begin_all_gather_rows(rows, group).wait()


def reduce_scatter_rows(rows: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Reduce (W·b, ...) on each of W ranks to (b, ...): the sum over ranks of this rank's rows. Carries no gradient."""
    world = world_size(group)
    count(rows, group)
    if not acts_as_on_gpus(rows.device):
        blocks = torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.all_to_all_single(blocks, rows.contiguous(), group=group)
        return blocks.view(world, rows.shape[0] // world, *rows.shape[1:]).sum(0)
    out = rows.new_empty(rows.shape[0] // world, *rows.shape[1:])
    _reduce_scatter(out, rows.contiguous(), group=group)
    return out


def begin_all_to_all_blocks(blocks: torch.Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """Begin `all_to_all_blocks`."""
    out = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    count(out, group)
    sent = blocks.contiguous()
    return Pending(out, dist.all_to_all_single(out, sent, group=group, async_op=True), sent)


def all_to_all_blocks(blocks: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Exchange (W, ...) of each rank: block i goes to rank i. Returns (W, ...) with block i from rank i. Carries no
    gradient."""
    return begin_all_to_all_blocks(blocks, group).wait()


def sum_over_ranks(numbers: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum a few numbers over the ranks of a process group. Carries no gradient."""
    total = numbers.detach().clone()
    count(total, group, times=2)
    dist.all_reduce(total, group=group)
    return total


def make_group(members: list[int], parent: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return a new process group of ranks of `parent`, given by their ranks there. The members alone call it, together:
    other ranks of the job may belong to other process groups."""
    whole = parent or dist.group.WORLD
    assert whole is not None
    # `new_group` expects ranks of the job.
    of_the_job = dist.get_process_group_ranks(whole)
    ranks = [of_the_job[member] for member in members]
    with members_alone():
        made = dist.new_group(ranks, timeout=timeout(whole), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def message_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return the device where a message of this rank must lie that belongs to no tensor: NCCL reads GPU memory only."""
    if is_distributed() and "nccl" in dist.get_backend_config(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather small Python values of all ranks, in rank order. The values are pickled between the ranks of one job: use
    this for messages, not for data."""
    if not is_distributed():
        return [value]
    out: list[T | None] = [None] * world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out  # type: ignore[return-value]


@dataclass
class ReceivedBytes:
    """Count what this rank has received from other ranks."""

    bytes: int = 0
    """Bytes received."""
    collectives: int = 0
    """Number of collectives."""


_counters: list[ReceivedBytes] = []


@contextmanager
def count_received() -> Iterator[ReceivedBytes]:
    """Count what the calls inside receive from other ranks. A reduce-scatter counts as W − 1 received blocks, and a sum
    over ranks as a reduce-scatter and an all-gather of it."""
    counter = ReceivedBytes()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def count(whole: torch.Tensor, group: dist.ProcessGroup | None = None, times: int = 1) -> None:
    """Count a collective that brings all of `whole` except this rank's own part, `times` times."""
    for counter in _counters:
        world = world_size(group)
        counter.bytes += times * whole.numel() * whole.element_size() * (world - 1) // world
        counter.collectives += 1
