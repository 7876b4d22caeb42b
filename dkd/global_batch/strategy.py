"""What each way to the rows of the global Gram matrix moves and holds, and which is cheaper.

W ranks with b rows each, B = W·b, d features. Elements that a rank receives:

                forward                          backward
    gather      (W−1)·b·d                        (W−1)·b²
    exchange    (W−1)/W·b·d' + (W−1)·b·B         (W−1)·b·B + (W−1)/W·b·d'           d' = d padded to a multiple of W

`exchange` wins for wide features and batches that are not huge: its Gram matrices are B×B, but its features cross the network once.
"""

from __future__ import annotations

STRATEGIES = ("gather", "exchange")

# What starting a collective costs, as elements that could be received meanwhile: half a megabyte, 4 ms at 1 Gbit/s. Measured: with 4 ranks
# of 64 rows and 2,048 features, `exchange` receives fewer elements, and yet `gather` with half as many collectives is faster.
ELEMENTS_PER_COLLECTIVE = 2**17


def received_elements(strategy: str, rows: int, width: int, world_size: int, backward: bool) -> int:
    """Elements that each rank receives for the Gram rows of one tensor.

    Args:
        strategy: `gather` or `exchange`.
        rows: b, rows a rank holds.
        width: d, features of a row.
        world_size: W.
        backward: with the backward pass (the student's tensor), or without (the teacher's).
    """
    others = world_size - 1
    if strategy == "gather":
        return others * rows * width + backward * others * rows**2
    slice_ = -(-width // world_size)
    one_way = others * rows * slice_ + others * rows * rows * world_size
    return one_way * (1 + backward)


def collectives(strategy: str, backward: bool) -> int:
    """How many collectives one tensor's Gram rows take. Arguments as `received_elements`."""
    return (1 if strategy == "gather" else 2) * (1 + backward)


def cheaper_strategy(rows: int, width: int, world_size: int, backward: bool) -> str:
    """The strategy that should take less time; `gather` at a tie. Arguments as `received_elements`."""

    def cost(strategy: str) -> int:
        elements = received_elements(strategy, rows, width, world_size, backward)
        return elements + ELEMENTS_PER_COLLECTIVE * collectives(strategy, backward)

    return min(STRATEGIES, key=cost)
