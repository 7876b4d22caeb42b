"""Count what a relational loss moves, holds and takes on a grid of ranks, and choose a grid.

W = r·c·k ranks hold b rows each, B = W·b, of d features. Elements that a rank receives for one tensor, by the axis of
the grid along which they move:

    slices     features (k−1)/k·b·d      products (k−1)/k·B²/(r·c)     M (k−1)/k·B²/(r·c)     gradient (k−1)/k·b·d
    columns    features (c−1)·b·d                                                             gradient (c−1)·b·d
    rows       features (r−1)·b·d

and on all ranks the norms of the samples and the sums of rows: a few numbers a sample. M and the gradient are the
student's alone. gather, (W, 1, 1), moves features once and nothing back; exchange, (1, 1, W), moves B² numbers twice.

The communication lower bound of a product Q Qᵀ on W ranks (`syrk_bound`) is theorem 3.1 of Al Daas, Ballard, Grigori,
Kumar & Rouse, "Parallel Memory-Independent Communication Bounds for SYRK", SPAA 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dkd.errors import InputError
from dkd.global_batch.grid import Grid, all_grids, corner


class Link(NamedTuple):
    """Hold the speed of a connection, as one rank sees it while all ranks use it.

    Args:
        latency: seconds that a collective of two ranks takes to start; one of n ranks takes (1 + log2 n)/2 times that.
        bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float


class Links(NamedTuple):
    """Hold the speeds of a launch: between ranks inside a machine, and between machines."""

    inside: Link
    between: Link


# Assumed where nothing was measured; `dkd launch-check --json` measures. GPUs: NVLink and one network adapter of
# 100 Gbit/s for each two GPUs. CPUs: loopback under gloo, and 10 Gbit/s.
DEFAULT_LINKS = {
    "cuda": Links(Link(2e-5, 1e11), Link(4e-5, 6e9)),
    "cpu": Links(Link(1.5e-4, 1e9), Link(2e-4, 1e9)),
}
"""Speeds by the type of device."""


@dataclass(frozen=True)
class GramTensor:
    """Describe one tensor whose relations are compared.

    Args:
        width: d, features of a row.
        backward: whether the tensor has a gradient (the student's has, the teacher's has not).
        feature_bytes: bytes of one feature on its way between ranks; features of one size share their messages.
        gram_bytes: bytes of one element of the Gram matrix.
        gradient_bytes: bytes of one number of the gradient on its way home; 0: as `gram_bytes`.
    """

    width: int
    backward: bool
    feature_bytes: int = 4
    gram_bytes: int = 4
    gradient_bytes: int = 0


class LossSums(NamedTuple):
    """Hold how many sums a loss adds over ranks, for each pair.

    Args:
        rows: sums of rows, of one number a sample.
        totals: sums over all samples.
        distances: whether the loss compares distances, which need the sums of the rows of M.
        centers: whether the mean of the features is subtracted first.
    """

    rows: int = 3
    totals: int = 0
    distances: bool = False
    centers: bool = False


class Move(NamedTuple):
    """Hold what a rank receives in one collective.

    Args:
        what: the numbers that move.
        axis: the axis of the grid along which they move, or `all`.
        ranks: number of ranks that take part.
        elements: numbers received.
        bytes: bytes received.
    """

    what: str
    axis: str
    ranks: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """State what a loss compares on a number of ranks.

    Args:
        tensors: the student's, then the teacher's, one of each for a pair.
        rows: b, the rows that a rank holds.
        world_size: W.
        sums: what the loss adds over ranks.
    """

    tensors: Sequence[GramTensor]
    rows: int
    world_size: int
    sums: LossSums = field(default_factory=LossSums)

    @property
    def pairs(self) -> int:
        """Return the number of pairs."""
        return len(self.tensors) // 2

    @property
    def batch(self) -> int:
        """Return B."""
        return self.rows * self.world_size

    def messages(self) -> list[list[GramTensor]]:
        """Return the tensors that travel side by side: those of one model and one type."""
        found: dict[tuple[bool, int, int], list[GramTensor]] = {}
        for i, tensor in enumerate(self.tensors):
            found.setdefault((i < self.pairs, tensor.feature_bytes, tensor.gram_bytes), []).append(tensor)
        return list(found.values())


def moves(work: Work, grid: Grid, chunks: int = 1) -> list[Move]:
    """Return the collectives of a step.

    Args:
        work: what is compared.
        grid: of the ranks.
        chunks: the parts in which features are sent and multiplied, one after another.
    """
    if work.world_size == 1:
        return []
    tensors = [move for message in work.messages() for move in _tensor_moves(message, work, grid, chunks)]
    return [*_vector_moves(work, grid), *tensors]


def _tensor_moves(message: Sequence[GramTensor], work: Work, grid: Grid, chunks: int) -> list[Move]:
    (r, c, k), b = grid, work.rows
    feature, gram = message[0].feature_bytes, message[0].gram_bytes
    product = (k - 1) * c * b * r * k * b * len(message)
    found = [_move("products", "slices", k, product, gram)]
    if message[0].backward:
        found.append(_move("derivatives", "slices", k, product, gram))
    for number in range(chunks):
        width = sum(-(-_chunk(tensor.width, number, chunks) // k) for tensor in message)
        found += [
            _move("features", "slices", k, (k - 1) * b * width, feature),
            _move("features", "columns", c, (c - 1) * k * b * width, feature),
            _move("features", "rows", r, (r - 1) * k * b * width, feature),
        ]
        if message[0].backward:
            found += [
                _move("gradient", "columns", c, (c - 1) * k * b * width, gram),
                _move("gradient", "slices", k, (k - 1) * b * width, message[0].gradient_bytes or gram),
            ]
    return [move for move in found if move.ranks > 1]


def _chunk(width: int, number: int, chunks: int) -> int:
    """Return the columns of one of several chunks."""
    each = -(-width // chunks)
    return max(min(each, width - number * each), 0)


def _vector_moves(work: Work, grid: Grid) -> list[Move]:
    world, size = work.world_size, work.tensors[0].gram_bytes
    rows, totals, distances, centers = work.sums
    learns, kept = any(tensor.backward for tensor in work.tensors), grid.column_blocks * work.rows
    numbers = [
        ("norms", 2 * work.rows),
        ("sums of rows", rows * kept),
        ("totals", totals),
        ("sums of M", kept if distances and learns else 0),
    ]
    means = []
    for tensors in (work.tensors[work.pairs :], work.tensors[: work.pairs]) if centers else ():
        elements = 2 * (world - 1) * sum(tensor.width for tensor in tensors)
        means.append(Move("means", "all", world, elements // world, elements * size // world))
    return means + [_move(what, "all", world, (world - 1) * each * work.pairs, size) for what, each in numbers if each]


def _move(what: str, axis: str, ranks: int, elements: int, size: int) -> Move:
    return Move(what, axis, ranks, elements, elements * size)


def received_bytes(work: Work, grid: Grid, chunks: int = 1) -> int:
    """Return the bytes that a rank receives in a step. Arguments as of `moves`."""
    return sum(move.bytes for move in moves(work, grid, chunks))


def seconds(work: Work, grid: Grid, links: Links, local_world_size: int, chunks: int = 1) -> float:
    """Return the expected seconds that the collectives of a step take, one after another."""
    total = 0.0
    for move in moves(work, grid, chunks):
        near = _near_ranks(move, grid, local_world_size)
        link = links.inside if near == move.ranks else links.between
        # Of what a rank receives, the share of each other rank is the same.
        far = move.bytes * (move.ranks - near) / (move.ranks - 1)
        total += link.latency * (1 + math.log2(move.ranks)) / 2
        total += far / links.between.bandwidth + (move.bytes - far) / links.inside.bandwidth
    return total


def _near_ranks(move: Move, grid: Grid, local_world_size: int) -> int:
    """Return how many of the ranks of a collective are of one machine, this rank included."""
    apart = {"slices": 1, "columns": grid.slices, "rows": grid.slices * grid.column_blocks, "all": 1}[move.axis]
    return min(move.ranks, max(1, local_world_size // apart))


class MemoryUse(NamedTuple):
    """Count the bytes that a rank holds at the same time, at most, beside its own features and their gradient.

    Args:
        features: of features and their gradients.
        gram: of Gram matrices and their derivatives.
    """

    features: int
    gram: int

    @property
    def bytes(self) -> int:
        """Return bytes in all."""
        return self.features + self.gram

    def plus(self, features: int, gram: int) -> MemoryUse:
        """Return this with more of both."""
        return MemoryUse(self.features + features, self.gram + gram)


def held(work: Work, grid: Grid, chunks: int = 1) -> MemoryUse:
    """Count what a rank holds at once, at most: while the teacher's or the student's features are multiplied, while
    blocks are compared, or in the backward. `benchmarks.relations_memory` measures it."""
    if work.world_size == 1:
        return MemoryUse(0, (3 * work.pairs + 3) * work.batch**2 * work.tensors[0].gram_bytes)
    teachers, students = (_Held(work, grid, i, chunks) for i in (1, 0))
    kept, one = teachers.kept, students.kept // max(work.pairs, 1)
    return max(
        MemoryUse(teachers.in_flight + students.in_flight + students.copied, 0),
        *(use.plus(students.in_flight, 0) for use in teachers.multiplying()),
        *(use.plus(0, kept) for use in students.multiplying()),
        # Both blocks, the derivatives of all pairs but the last, and three temporaries of that one.
        MemoryUse(students.columns, 3 * kept + 2 * one),
        students.sending_home(),
        key=lambda use: use.bytes,
    )


class _Held:
    """Count what a rank holds of one model's features and their products.

    Args:
        work: what is compared.
        grid: of the ranks.
        model: 0: the student, 1: the teacher.
        chunks: as of `moves`. What is sent, arrives and is multiplied is one chunk; the student's columns are kept.
    """

    def __init__(self, work: Work, grid: Grid, model: int, chunks: int) -> None:
        tensors = work.tensors[: work.pairs] if model == 0 else work.tensors[work.pairs :]
        (r, c, k), b = grid, work.rows
        gram = tensors[0].gram_bytes
        widths = [k * -(-_chunk(tensor.width, 0, chunks) // k) for tensor in tensors]
        self._grid, self._tensors, self._keeps = grid, len(tensors), tensors[0].backward
        self._chunks = chunks
        self._own = sum(b * w * t.feature_bytes for w, t in zip(widths, tensors, strict=True))
        self._own_full = sum(b * w * gram for w in widths)
        half = [b * w * gram for w, t in zip(widths, tensors, strict=True) if t.feature_bytes < gram]
        self._half = max(half, default=0)
        self._product = c * b * k * r * b * k * gram * len(tensors)
        self.kept = self._product // k
        """Bytes of the rows of the products that a rank keeps."""
        # Several tensors are copied side by side, and chunks out of their features; what slices exchange is copied too,
        # and arrives beside it.
        self._sent = self._own if k > 1 or self._tensors > 1 or chunks > 1 else 0
        arriving = self._own if k > 1 else r * self._own if r > 1 and c == 1 else 0
        self.in_flight = self._sent + arriving
        """Bytes of what is sent and arrives, before it is waited for."""
        padded = sum(b * w * t.feature_bytes for w, t in zip(widths, tensors, strict=True) if w * chunks != t.width)
        self.copied = padded + (self._own if k > 1 and self._tensors > 1 else 0)
        """Bytes of copies that live only until the features are sent."""
        one = r * self._own if r > 1 else self._own if k > 1 else 0
        self.columns = chunks * one
        """Bytes of the columns' features, of which own ones are not counted."""

    def multiplying(self) -> list[MemoryUse]:
        """Return what is held while features arrive, are multiplied, and products are added."""
        r, c, k = self._grid
        arrived = self._own if k > 1 else self._sent
        panels = (c * self._own if c > 1 else 0) + (r * self._own if r > 1 else 0)
        alive = panels + (arrived if min(r, c) == 1 else 0)
        promoted = (r + c) * self._half
        # The columns of the chunks before, the next chunk on its way, and the products of this one beside their sum.
        before = self.columns * (self._chunks - 1) // self._chunks if self._keeps else 0
        following = before + (self.in_flight if self._chunks > 1 else 0)
        products = self._product * (2 if self._chunks > 1 else 1)
        return [
            MemoryUse(arrived + panels + before, 0),
            MemoryUse(alive + promoted + following, products),
            MemoryUse(self.columns * self._keeps, 2 * self._product + self.kept if k > 1 else self._product),
        ]

    def sending_home(self) -> MemoryUse:
        """Return what is held while the gradient is made."""
        r, c, k = self._grid
        whole = self._product if k > 1 else 0
        sums = c * self._own_full
        done = (self._chunks - 1) * self._own_full
        multiplied = MemoryUse(self.columns + (r * self._half) + sums + done, self.kept + whole)
        added = sums + (sums + self._own_full if c > 1 else sums if self._tensors > 1 else 0) + done
        home = self._own_full * (2 if k > 1 else 1) * (1 if self._chunks == 1 else 2 * self._chunks)
        return max(
            multiplied,
            MemoryUse(self.columns + added, self.kept + whole),
            MemoryUse(self.columns + home, self.kept),
            key=lambda use: use.bytes,
        )


def syrk_bound(width: int, batch: int, world_size: int) -> float:
    """Return the elements that some rank must receive at least for one product Q Qᵀ, where Q (B, d) and the lower
    triangle of the result lie evenly on W ranks.

    A rank with an even share of the B(B−1)d/2W products, which reads x elements of Q and adds to y elements of the
    result, has x √(2y) ≥ B(B−1)d/W (the symmetric Loomis-Whitney inequality); y is at least B(B−1)/2W, its share of the
    result, and at most all of it. The least x + y, less what the rank holds of both, is what it must receive. Source:
    Al Daas et al., SPAA 2023: three cases, in which their 1-, 2- and 3-dimensional algorithms are optimal.
    """
    if world_size == 1:
        return 0.0
    triangle, share = batch * (batch - 1) / 2, batch * width / world_size
    products = 2 * triangle * width / world_size
    if not products:
        return 0.0
    # More than what its own share of Q is read for need not be added to.
    enough = products**2 / (2 * share**2)
    added = max(min(products ** (2 / 3) / 2, enough, triangle), triangle / world_size)
    return max(products / math.sqrt(2 * added) - share, 0.0) + added - triangle / world_size


class Choice(NamedTuple):
    """Hold a grid, and the number of chunks in which features are sent."""

    grid: Grid
    chunks: int


MOST_CHUNKS = 64
"""The largest number of chunks: each is a set of collectives."""


def fewest_chunks(work: Work, grid: Grid, memory: float) -> int | None:
    """Return the smallest power of 2 of chunks by which a grid fits into `memory` bytes; None: none does."""
    chunks = 1
    while held(work, grid, chunks).bytes > memory:
        chunks *= 2
        if chunks > MOST_CHUNKS or work.world_size == 1:
            return None
    return chunks


def choose(work: Work, links: Links, local_world_size: int, memory: float = math.inf, name: str = "the loss") -> Choice:
    """Return the grid, and the chunks, that should take the least time of those that fit into `memory` bytes.

    Raises:
        InputError: none fits.
    """
    found = all_grids(work.world_size)
    fitting = [Choice(grid, n) for grid in found if (n := fewest_chunks(work, grid, memory)) is not None]
    if not fitting:
        least, bytes_ = min(
            ((grid, held(work, grid, n).bytes) for grid in found for n in (1, MOST_CHUNKS)), key=lambda each: each[1]
        )
        raise InputError(
            f"{name} compares {work.batch:,} samples on {work.world_size} ranks: the grid {least.name} needs "
            f"{bytes_ / 1e9:.3g} GB a rank, the least of all, and {memory / 1e9:.3g} GB are allowed; allow more "
            "(memory), take a smaller scope, or compare narrower features"
        )
    return min(
        fitting,
        key=lambda each: (
            seconds(work, each.grid, links, local_world_size, each.chunks),
            held(work, each.grid, each.chunks).bytes,
        ),
    )


__all__ = [
    "DEFAULT_LINKS",
    "Choice",
    "GramTensor",
    "Link",
    "Links",
    "LossSums",
    "MemoryUse",
    "Move",
    "Work",
    "choose",
    "corner",
    "fewest_chunks",
    "held",
    "moves",
    "received_bytes",
    "seconds",
    "syrk_bound",
]
