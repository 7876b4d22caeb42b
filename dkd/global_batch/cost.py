"""Count what each strategy for the rows of the global Gram matrix moves and holds, and choose the cheaper strategy.

W ranks hold b rows each, B = W·b, of d features. Elements that a rank receives for one tensor:

                forward                          backward
    gather      (W−1)·b·d                        (W−1)·b²
    exchange    (W−1)·b·d'/W + (W−1)·b·B         (W−1)·b·B + (W−1)·b·d'/W           d' = d padded to a multiple of W

`exchange` is cheaper for wide features and batches that are not huge: its Gram matrices are B×B, but its features cross
the network once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

STRATEGIES = ("gather", "exchange")

# The cost of starting a collective, in bytes that could be received meanwhile: half a millisecond at 1 Gbit/s, where a
# wrong choice costs most. With this number, `auto` chooses the faster strategy in `python -m benchmarks.global_batch`,
# or one as fast.
BYTES_PER_COLLECTIVE = 2**16


@dataclass(frozen=True)
class GramTensor:
    """Describe one tensor whose Gram rows are wanted.

    Args:
        width: d, features of a row.
        backward: whether the tensor has a gradient (the student's has, the teacher's has not).
        feature_bytes: bytes of one feature on its way between ranks; features of one size share their collectives.
        gram_bytes: bytes of one element of the Gram matrix.
    """

    width: int
    backward: bool
    feature_bytes: int = 4
    gram_bytes: int = 4


@dataclass(frozen=True)
class Traffic:
    """Count the elements that a rank receives."""

    features: int
    """Elements of features and their gradients."""
    gram: int
    """Elements of Gram matrices and their gradients."""

    @property
    def elements(self) -> int:
        """Elements in all."""
        return self.features + self.gram


def received(strategy: str, tensor: GramTensor, rows: int, world_size: int) -> Traffic:
    """Count what each rank receives for one tensor, forward and, where the tensor has a gradient, backward.

    Args:
        strategy: `gather` or `exchange`.
        tensor: which tensor.
        rows: b, the rows that a rank holds.
        world_size: W.
    """
    others = world_size - 1
    if strategy == "gather":
        return Traffic(others * rows * tensor.width, tensor.backward * others * rows**2)
    passes = 1 + tensor.backward
    slice_ = -(-tensor.width // world_size)
    return Traffic(passes * others * rows * slice_, passes * others * rows * rows * world_size)


def received_bytes(strategy: str, tensor: GramTensor, rows: int, world_size: int) -> int:
    """Return the result of `received` in bytes."""
    elements = received(strategy, tensor, rows, world_size)
    return elements.features * tensor.feature_bytes + elements.gram * tensor.gram_bytes


def collectives(strategies: Sequence[str], tensors: Sequence[GramTensor]) -> int:
    """Count the collectives of several tensors, each with its strategy. Tensors of one strategy and one size of
    features share their collectives."""
    shared: dict[tuple[str, int], bool] = {}
    for strategy, tensor in zip(strategies, tensors, strict=True):
        key = strategy, tensor.feature_bytes
        shared[key] = shared.get(key, False) or tensor.backward
    return sum((1 if strategy == "gather" else 2) * (1 + backward) for (strategy, _), backward in shared.items())


@dataclass(frozen=True)
class MemoryUse:
    """Count the bytes that a rank holds at the same time, at most."""

    features: int
    """Bytes of features and their gradients."""
    gram: int
    """Bytes of Gram matrices and their gradients."""

    @property
    def bytes(self) -> int:
        """Bytes in all."""
        return self.features + self.gram


def held(strategies: Sequence[str], tensors: Sequence[GramTensor], rows: int, world_size: int) -> MemoryUse:
    """Count what a rank holds beside its own features and their gradient. Arguments as for `received`.

    With m = b·d numbers of a message, `gather` holds (W + 1)·m for student and teacher. `exchange` holds 2·m forward,
    and backward m for both and 3·m for the student: the gradient as it is computed, received, and put in order. Gram
    matrices take 2·b·B for each tensor by `gather`, and 4·B² by `exchange`. Half-precision features are promoted one
    tensor at a time.
    """
    batch = rows * world_size
    gathered = promoted = forward = backward = gram = 0
    for strategy, tensor in zip(strategies, tensors, strict=True):
        message = rows * tensor.width * tensor.feature_bytes
        if strategy == "gather" or world_size == 1:
            gathered += (world_size + 1) * message * (world_size > 1)
            gram += 2 * rows * batch * tensor.gram_bytes
        else:
            forward += 2 * message
            backward += (1 + 3 * tensor.backward) * message
            gram += 4 * batch**2 * tensor.gram_bytes
        if tensor.feature_bytes < tensor.gram_bytes:
            # The promoted copy, and the gradient as it is computed, before it is rounded again.
            copies = (world_size if strategy == "gather" else 1) + tensor.backward
            promoted = max(promoted, copies * rows * tensor.width * tensor.gram_bytes)
    return MemoryUse(gathered + max(forward, backward) + promoted, gram)


def cost(strategies: Sequence[str], tensors: Sequence[GramTensor], rows: int, world_size: int) -> int:
    """Return the bytes that each rank receives, plus the cost of starting the collectives, in bytes."""
    moved = sum(received_bytes(s, tensor, rows, world_size) for s, tensor in zip(strategies, tensors, strict=True))
    return moved + BYTES_PER_COLLECTIVE * collectives(strategies, tensors)


def cheapest_strategies(tensors: Sequence[GramTensor], rows: int, world_size: int) -> tuple[str, ...]:
    """Return a strategy for each tensor of one loss: the strategies that together should take the least time. Arguments
    as for `received`."""
    # Either one strategy for all tensors, or for each tensor the strategy that moves less: mixing the two takes more
    # collectives, whose cost the mix must save.
    each = tuple(min(STRATEGIES, key=lambda s: received_bytes(s, tensor, rows, world_size)) for tensor in tensors)
    candidates = [*itertools.chain(((s,) * len(tensors) for s in STRATEGIES), [each])]
    return min(candidates, key=lambda strategies: cost(strategies, tensors, rows, world_size))
