"""The order of samples: a function of (seed, epoch), and of nothing else.

An epoch is one list of all N indices. It is cut into global batches of B, these into B/b contiguous micro-batches of b. W ranks and A
micro-steps only say who computes which: rank r in micro-step a takes micro-batch a·W + r. The N mod B samples at the end of the list are
left to later epochs, each of which draws a new list. The position in all of this is one integer, the global step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_MASK = 2**64 - 1


def mix(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers, equal on every machine (splitmix64 of each in turn)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class SampleOrder:
    """Who computes which samples when.

    Args:
        samples: N.
        seed: the run's seed.
        global_batch: B.
        micro_batch: b, which divides B/W.
        rank, world_size: whose slice.

    Raises:
        ValueError: N < B, or b·W does not divide B.
    """

    samples: int
    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(f"{self.samples} samples do not fill one global batch of {self.global_batch}")
        if self.global_batch % (self.micro_batch * self.world_size):
            raise ValueError(f"micro-batches of {self.micro_batch} on {self.world_size} ranks do not divide {self.global_batch}")

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    @property
    def micro_steps(self) -> int:
        """A."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def epoch(self, epoch: int) -> torch.Tensor:
        """(N,) int64, the list of an epoch."""
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(mix(self.seed, epoch)))

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """This rank's micro-batches of the global steps first_step … last_step − 1, as lists of (epoch, index)."""
        drawn, indices = -1, torch.empty(0)
        for step in range(first_step, last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, indices = epoch, self.epoch(epoch)
            for micro_step in range(self.micro_steps):
                start = position * self.global_batch + (micro_step * self.world_size + self.rank) * self.micro_batch
                yield [(epoch, index) for index in indices[start : start + self.micro_batch].tolist()]
