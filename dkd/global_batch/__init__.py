"""Compute with a batch that is spread over ranks: which rank holds which rows, means over all rows, and rows of the
global Gram matrix.

This package knows tensors and `torch.distributed` process groups, and no model, recipe or trainer.
"""

from dkd.global_batch.arrivals import Arrivals
from dkd.global_batch.cost import GramTensor, Link, Links, LossSums, Work, received_bytes
from dkd.global_batch.gram import full_precision
from dkd.global_batch.grid import STRATEGIES, Grid, all_grids, corner
from dkd.global_batch.groups import GramScope, ranks_per_group
from dkd.global_batch.layout import AbsentRankError, BatchLayout, BatchMismatchError
from dkd.global_batch.rows import add_over_ranks, gather_rows

__all__ = [
    "STRATEGIES",
    "AbsentRankError",
    "Arrivals",
    "BatchLayout",
    "BatchMismatchError",
    "GramScope",
    "GramTensor",
    "Grid",
    "Link",
    "Links",
    "LossSums",
    "Work",
    "add_over_ranks",
    "all_grids",
    "corner",
    "full_precision",
    "gather_rows",
    "ranks_per_group",
    "received_bytes",
]
