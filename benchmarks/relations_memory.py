"""What one rank of many allocates for a loss of relations: measured, and by the formula.

    python -m benchmarks.relations_memory --world 512 --rows 64 --widths 25088,25088 --grid 16,4,8
    python -m benchmarks.relations_memory --world 16 --rows 32 --widths 2048,4096       every grid

Forward and backward of SimilarityPreserving as one rank of torch's fake process group, whose collectives move nothing:
every tensor is allocated as on a real rank, and followed. `--widths` are (student, teacher) features of each pair. Exit
code 1 where measured and calculated bytes differ by more than `--within`, or where a tensor has more elements than the
grid calls for: than a block, B × B / (r · c), a message, and the features that the rank brings. A matrix of B × B
elements is one of these only where the grid has one block, or where features are as many.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.peak_memory import PeakMemory
from dkd import SimilarityPreserving
from dkd.global_batch import BatchLayout, GramTensor, Grid, Work, all_grids
from dkd.global_batch.cost import fewest_chunks, held, moves


class LargestTensor(PeakMemory):
    """Follow the largest number of elements of one tensor, too."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def measure(
    grid: Grid, rows: int, widths: list[tuple[int, int]], dtype: torch.dtype, memory: int | None
) -> tuple[int, int]:
    """Return the most bytes that are allocated at once, and the elements of the largest tensor."""
    students = [torch.zeros(rows, s).requires_grad_() for s, _ in widths]
    teachers = [torch.zeros(rows, t, dtype=dtype) for _, t in widths]
    loss, layout = SimilarityPreserving(grid=grid, memory=memory), BatchLayout.even(rows)
    loss(students, teachers, layout=layout)  # process groups and indices are made once
    with LargestTensor() as followed:
        loss(students, teachers, layout=layout).backward()
    return followed.peak, followed.largest


def numbers(text: str) -> tuple[int, ...]:
    """Convert 2048,4096 to numbers."""
    return tuple(int(number) for number in text.split(","))


def main() -> int:
    """Print one line for each grid, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=16, help="W, ranks (default 16)")
    parser.add_argument("--rows", type=int, default=32, help="b, samples of a rank (default 32)")
    parser.add_argument("--widths", type=numbers, nargs="+", default=[(2048, 4096)], metavar="STUDENT,TEACHER")
    parser.add_argument("--grid", type=numbers, default=None, metavar="R,C,K", help="one grid; default: all")
    parser.add_argument("--bf16-teacher", action="store_true", help="the teacher's features are bfloat16")
    parser.add_argument("--memory", type=float, default=None, metavar="MB", help="memory that is allowed; default: all")
    parser.add_argument("--within", type=float, default=0.1, help="share by which the two may differ (default 0.1)")
    options = parser.parse_args()
    dist.init_process_group("fake", rank=0, world_size=options.world, store=FakeStore())
    dtype = torch.bfloat16 if options.bf16_teacher else torch.float32
    tensors = [*(GramTensor(s, True) for s, _ in options.widths)]
    tensors += [GramTensor(t, False, dtype.itemsize) for _, t in options.widths]
    work, failed = Work(tensors, options.rows, options.world), False
    allowed = None if options.memory is None else int(options.memory * 1e6)
    for grid in [Grid(*options.grid)] if options.grid else all_grids(options.world):
        if (chunks := fewest_chunks(work, grid, math.inf if allowed is None else allowed)) is None:
            print(f"{grid.name:<14} does not fit")
            continue
        calculated = held(work, grid, chunks).bytes
        peak, largest = measure(grid, options.rows, options.widths, dtype, allowed)
        wrong = abs(calculated / peak - 1) > options.within
        large = largest > _find_largest(work, grid, chunks)
        failed = failed or wrong or large
        remark = ("  <- differs" if wrong else "") + ("  <- larger than the grid calls for" if large else "")
        print(
            f"{grid.name:<14} {chunks} chunks, measured {peak / 1e6:10.2f} MB, formula {calculated / 1e6:10.2f} MB, "
            f"{calculated / peak:.3f} times; largest tensor {largest:,} elements, "
            f"{largest / work.batch**2:.3g} of B × B{remark}"
        )
    return 1 if failed else 0


def _find_largest(work: Work, grid: Grid, chunks: int) -> int:
    """Return the most elements of one tensor that the grid calls for."""
    block = work.batch**2 // (grid.row_blocks * grid.column_blocks)
    messages = [move.elements * move.ranks // (move.ranks - 1) for move in moves(work, grid, chunks)]
    return max(block, *messages, work.rows * max(tensor.width for tensor in work.tensors))


if __name__ == "__main__":
    sys.exit(main())
