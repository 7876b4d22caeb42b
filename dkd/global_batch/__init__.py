"""The arithmetic of a batch spread over ranks: who holds which rows, means over all of them, rows of the global Gram matrix.

Knows tensors and `torch.distributed` process groups; knows no model, recipe or trainer.
"""

from dkd.global_batch.gram import gram_rows
from dkd.global_batch.layout import BatchLayout, BatchMismatchError
from dkd.global_batch.scope import GramScope, ranks_per_group
from dkd.global_batch.strategy import STRATEGIES, cheaper_strategy, received_elements

__all__ = [
    "STRATEGIES",
    "BatchLayout",
    "BatchMismatchError",
    "GramScope",
    "cheaper_strategy",
    "gram_rows",
    "ranks_per_group",
    "received_elements",
]
