"""Find the nearest neighbours of each rank's queries among the rows of all ranks, exactly.

Each rank keeps its own part of the bank. In turns, all ranks gather a few queries of every rank, compare them with
their own parts, and send each rank the k best of its queries. What moves are queries and k candidates for each: the
bank stays where it is, and no rank ever holds the similarities of more than one block.

A candidate is one whole number, the similarity above and the place below, so that the order of candidates is total:
larger similarities come first, and of equal ones the smaller place. Similarities are computed in float64 and rounded to
float32, so that they do not depend on the block that a row is in: the result is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from dkd.global_batch import collectives

QUERY_ROWS = 1024
"""Queries of a turn, of all ranks together."""
BANK_ROWS = 8192
"""Rows of the bank that are compared at a time: with `QUERY_ROWS`, 200 MB."""
_PLACES = 2**32 - 1  # the largest place
_NONE = torch.iinfo(torch.int64).min  # a candidate that comes after all others


def nearest(
    queries: torch.Tensor,
    bank: torch.Tensor,
    places: torch.Tensor,
    k: int,
    group: dist.ProcessGroup | None = None,
    before_turn: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k rows with the largest inner products, for each of this rank's queries. A collective; ranks may have
    different numbers of rows, or none.

    Args:
        queries: (q, C), this rank's.
        bank: (n, C), this rank's part.
        places: int64 (n,), from 0 to 2³² − 1, the number of each row of the bank, unique over all ranks.
        k: neighbours; fewer where the whole bank has fewer rows.
        group: the ranks; None: all.
        before_turn: called before each turn, with its number.

    Returns:
        Inner products, float32 (q, k), and places, int64 (q, k), the nearest first.
    """
    world = collectives.world_size(group)
    counts = collectives.all_gather_objects((len(queries), len(bank)), group)
    most, k = max(q for q, _ in counts), min(k, sum(n for _, n in counts))
    rows = max(1, min(QUERY_ROWS // world, most))
    found = [torch.empty(0, k, dtype=torch.int64, device=queries.device)]
    for turn, start in enumerate(range(0, most, rows)):
        if before_turn is not None:
            before_turn(turn)
        own = queries[start : start + rows]
        asked = queries.new_zeros(rows, queries.shape[1])
        asked[: len(own)] = own
        best = _candidates(asked if world == 1 else collectives.all_gather_rows(asked, group), bank, places, k)
        if world > 1:
            of_ranks = collectives.all_to_all_blocks(best.view(world, rows, k), group)
            best = of_ranks.transpose(0, 1).reshape(rows, world * k).topk(k).values
        found.append(best[: len(own)])
    return _unpack(torch.cat(found))


def _candidates(queries: torch.Tensor, bank: torch.Tensor, places: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k best candidates of a part of the bank, int64 (q, k), the best first; `_NONE` where it has fewer."""
    best = torch.full((len(queries), k), _NONE, dtype=torch.int64, device=queries.device)
    wide = queries.double()
    for start in range(0, len(bank), BANK_ROWS):
        rows = slice(start, start + BANK_ROWS)
        packed = _pack((wide @ bank[rows].double().T).float(), places[rows])
        best = torch.cat([best, packed], 1).topk(k).values
    return best


def _pack(similarities: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return candidates, int64 (q, n). Numbers that are not finite are the least similar ones."""
    finite = similarities.nan_to_num(nan=-torch.inf, posinf=-torch.inf) + 0.0  # of the two zeros, one
    return (_as_order(finite.view(torch.int32)).long() << 32) + (_PLACES - places)


def _unpack(candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    similarities = _as_order((candidates >> 32).int()).view(torch.float32)
    return similarities, _PLACES - (candidates & _PLACES)


def _as_order(bits: torch.Tensor) -> torch.Tensor:
    """Turn the bits of float32 numbers into whole numbers of the same order, and back. Bits of negative numbers grow
    with their size."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
