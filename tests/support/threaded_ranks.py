"""Ranks that are threads of one process: the collectives of dkd.global_batch, computed from what every thread brings.

They show the arithmetic of 64 ranks on any machine; real process groups are the subject of tests/distributed.
"""

import threading
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from dkd.global_batch import BatchLayout, collectives
from dkd.global_batch.collectives import Pending

_COUNTING = threading.Lock()
_THREAD = threading.local()


class _Board:
    """Where the threads of a group lay down what they bring, and find what the others brought."""

    def __init__(self, size):
        self._barrier, self._brought = threading.Barrier(size), [None] * size

    def exchange(self, place, value):
        self._brought[place] = value
        self._barrier.wait(60)
        found = list(self._brought)
        self._barrier.wait(60)  # nobody overwrites before all have read
        return found

    def abort(self):
        self._barrier.abort()


class Group:
    """A process group, as one of its threads sees it."""

    def __init__(self, boards, ranks, place):
        self.boards, self.ranks, self.place = boards, tuple(ranks), place
        with _COUNTING:
            self.board = boards.setdefault(self.ranks, _Board(len(self.ranks)))

    def exchange(self, value):
        return self.board.exchange(self.place, value)

    def part(self, members):
        ranks = [self.ranks[member] for member in members]
        return Group(self.boards, ranks, ranks.index(self.ranks[self.place]))


def _count(whole, group, times=1):
    with _COUNTING:
        collectives.count(whole, group, times)


def _all_gather(rows, group=None):
    found = torch.cat(group.exchange(rows.clone()))
    _count(found, group)
    return found


def _all_to_all(blocks, group=None):
    found = torch.stack([theirs[group.place] for theirs in group.exchange(blocks.clone())])
    _count(found, group)
    return found


def _reduce_scatter(rows, group=None):
    _count(rows, group)
    return torch.stack([each.chunk(len(group.ranks))[group.place] for each in group.exchange(rows.clone())]).sum(0)


def _sum(numbers, group=None):
    total = torch.stack(group.exchange(numbers.detach().clone())).sum(0)
    _count(total, group, 2)
    return total


def _even(rows, group=None):
    group = group or _THREAD.group
    return BatchLayout((rows,) * len(group.ranks), group.place, group)


_DOUBLES = {
    "world_size": lambda group=None: 1 if group is None else len(group.ranks),
    "rank": lambda group=None: 0 if group is None else group.place,
    "all_gather_rows": _all_gather,
    "begin_all_gather_rows": lambda rows, group=None: Pending(_all_gather(rows, group), None, rows),
    "all_to_all_blocks": _all_to_all,
    "begin_all_to_all_blocks": lambda blocks, group=None: Pending(_all_to_all(blocks, group), None, blocks),
    "reduce_scatter_rows": _reduce_scatter,
    "sum_over_ranks": _sum,
    "all_gather_objects": lambda value, group=None: [value] if group is None else group.exchange(value),
    "make_group": lambda members, parent: parent.part(members),
}


@contextmanager
def _doubles():
    with ExitStack() as stack:
        for name, double in _DOUBLES.items():
            stack.enter_context(mock.patch.object(collectives, name, double))
        stack.enter_context(mock.patch.object(BatchLayout, "even", _even))
        yield


def on_ranks(world_size, function):
    """Return what `function(rank, group)` returns on each of the threads. `BatchLayout.even` without a group is that of
    all threads, so that a DistillationStep of each thread takes part in the batch of all."""
    boards, results, errors = {}, [None] * world_size, []

    def work(rank):
        try:
            _THREAD.group = Group(boards, range(world_size), rank)
            results[rank] = function(rank, _THREAD.group)
        except BaseException as error:
            errors.append(error)
            for board in list(boards.values()):
                board.abort()

    with _doubles():
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
