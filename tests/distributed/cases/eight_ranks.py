"""Eight ranks, forked from one process that has imported torch: two halves, each a batch of its own, with SP over
groups of two ranks.

Writes the relative error of each rank's value to FOLDER/rankN, or why there is none.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dkd import SimilarityPreserving
from dkd.global_batch import BatchLayout

RANKS, HALF, ROWS = 8, 4, 3


def plain_sp(student, teacher):
    grams = [F.normalize(rows @ rows.T) for rows in (student, teacher)]
    return (grams[0] - grams[1]).square().sum() / len(student) ** 2


def error_of(rank, folder):
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=20),
    )
    group, _ = dist.new_subgroups(HALF)
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(RANKS * ROWS, width, generator=g, dtype=torch.float64) for width in (6, 8))
    mine = student[rank * ROWS : (rank + 1) * ROWS], teacher[rank * ROWS : (rank + 1) * ROWS]
    layout = BatchLayout.agree(mine, group)
    value = SimilarityPreserving(scope=2)(*mine, layout=layout)
    dist.all_reduce(value, group=group)
    first = rank // HALF * HALF * ROWS
    pairs = [slice(first, first + 2 * ROWS), slice(first + 2 * ROWS, first + 4 * ROWS)]
    wanted = sum(plain_sp(student[rows], teacher[rows]) for rows in pairs) / len(pairs)
    dist.barrier()
    return f"{abs(value.item() / HALF / wanted.item() - 1):.1e}"


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            try:
                found = error_of(rank, folder)
            except Exception:
                found = traceback.format_exc()
            (folder / f"rank{rank}").write_text(found)
            # At once: what this process was forked from still runs.
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
