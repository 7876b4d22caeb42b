"""Decide the order of samples, a function of (seed, epoch) and of nothing else.

An epoch is one list of all N indices. The list is cut into global batches of B, and each global batch into B/b
contiguous micro-batches of b. W ranks and A micro-steps only decide who computes which micro-batch: rank r in
micro-step a computes micro-batch a·W + r. The N mod B samples at the end of the list are left to later epochs, each of
which draws a new list. The position in this order is one integer, the global step.

With repeated augmentation (Hoffer et al., "Augment Your Batch", CVPR 2020; sampled as in DeiT, Touvron et al., ICML
2021), a global batch holds B/R images, R times each. Copy k of the batch's image i is at place k·B/R + i, so that the
copies of an image lie in different micro-batches, and on different ranks, where b divides B/R. An epoch has N // B
steps as ever, and so B/R · (N // B) different images; the other images are left to later epochs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from dkd.rng import derive_seed


@dataclass(frozen=True)
class GlobalBatchSampler:
    """Decide which rank computes which samples in which step.

    Args:
        samples: N, the number of samples.
        seed: the run's seed.
        global_batch: B.
        micro_batch: b, which divides B/W.
        rank, world_size: the rank whose micro-batches are given, and W.
        period: epochs after which the order repeats: that of epoch e is that of e mod the period; None: no epoch is
            is like another.
        repeats: R, how many times a global batch holds each of its images.

    Raises:
        ValueError: N < B, or b·W or R does not divide B.
    """

    samples: int
    seed: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    period: int | None = field(default=None, kw_only=True)
    repeats: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(f"{self.samples} samples do not fill one global batch of {self.global_batch}")
        if self.global_batch % (self.micro_batch * self.world_size):
            raise ValueError(
                f"micro-batches of {self.micro_batch} on {self.world_size} ranks do not divide {self.global_batch}"
            )
        if self.global_batch % self.repeats:
            raise ValueError(f"{self.repeats} copies of each image do not divide {self.global_batch}")

    @property
    def steps_per_epoch(self) -> int:
        """Global steps of an epoch, N // B."""
        return self.samples // self.global_batch

    @property
    def micro_steps(self) -> int:
        """Return A, the number of micro-steps of a global step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    @property
    def images_per_step(self) -> int:
        """Return B/R, the number of different images of a global batch."""
        return self.global_batch // self.repeats

    @property
    def images_per_epoch(self) -> int:
        """Return the number of different images of an epoch."""
        return self.steps_per_epoch * self.images_per_step

    def drawn_step(self, step: int) -> int:
        """Return the first step that has the images of a step, augmented and mixed alike: the step itself in the first
        period."""
        return step if self.period is None else step % (self.period * self.steps_per_epoch)

    def drawn_epoch(self, step: int) -> int:
        """Return the epoch of the first period that a step's images are drawn and augmented for."""
        return self.drawn_step(step) // self.steps_per_epoch

    def epoch(self, epoch: int) -> torch.Tensor:
        """Return the list of an epoch's images, of the first period, int64, at least (N // B)·B/R long."""
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(derive_seed(self.seed, epoch)))

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's micro-batches of steps first_step … last_step − 1, as lists of (draw, index). The draw is
        the number that a sample's augmentation is drawn for: the epoch e of the period, or e·R + k of copy k."""
        drawn, indices = -1, torch.empty(0)
        for step in map(self.drawn_step, range(first_step, last_step)):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, indices = epoch, self.epoch(epoch)
            images = indices[position * self.images_per_step :][: self.images_per_step].tolist()
            for micro_step in range(self.micro_steps):
                start = (micro_step * self.world_size + self.rank) * self.micro_batch
                places = (divmod(start + row, len(images)) for row in range(self.micro_batch))
                yield [(epoch * self.repeats + copy, images[image]) for copy, image in places]


TURNS = 8
"""Number of consecutive steps that take their samples from different lanes, so that as many worker processes have
lanes of their own."""


@dataclass(frozen=True)
class StreamedBatchSampler(GlobalBatchSampler):
    """Decide an order for data that is read a row group at a time: neighbours in the order are neighbours on the disk,
    and each row group is read about once an epoch. This order too is a function of (seed, epoch) alone, and its
    position is the global step.

    The row groups, in an order drawn for the epoch and each with its rows in a drawn order, make one list of rows. The
    list is a ring whose beginning is drawn too. The list is cut into lanes of equal length. A lane serves one slice of
    the global batch in every eighth step. Within a lane, rows are shuffled window by window. The N mod B rows at the
    list's end are left out; every row is equally likely to be left out, with one row group, with few, and with many.

    Args:
        group_sizes: rows of each row group.
        lanes: number of lanes, at most 8·B. See `readers`.
        window: rows of a window, rounded up to what a lane gives to a whole number of steps.
    """

    group_sizes: tuple[int, ...] = ()
    lanes: int = 64
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.group_sizes) != self.samples:
            raise ValueError(f"row groups of {sum(self.group_sizes)} rows in all, for {self.samples} samples")

    @property
    def slices(self) -> int:
        """Number of parts of the global batch that have lanes of their own."""
        return min(max(1, self.lanes // TURNS), self.images_per_step)

    def _slice_bounds(self) -> list[int]:
        """Return the first image of each slice of the global batch, and the end of the last slice."""
        return [i * self.images_per_step // self.slices for i in range(self.slices + 1)]

    def _slices_of(self, number: int) -> list[int]:
        """Return the slices that have images in micro-batch `number` of a global batch."""
        bounds, images, begin = self._slice_bounds(), self.images_per_step, number * self.micro_batch
        end, found = begin + self.micro_batch, set[int]()
        for first in range(begin // images * images, end, images):  # place of the first image of each copy
            low, high = begin - first, end - first
            found.update(i for i in range(self.slices) if bounds[i] < high and low < bounds[i + 1])
        return sorted(found)

    def _windows(self) -> list[int]:
        """Return the rows of a window in the lanes of each slice. A window spans whole steps, so that it never begins
        in the middle of a micro-batch."""
        return [-(-self.window // (end - begin)) * (end - begin) for begin, end in pairwise(self._slice_bounds())]

    def epoch(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        sizes = torch.tensor(self.group_sizes)
        starts = sizes.cumsum(0) - sizes
        drawn = torch.randperm(len(sizes), generator=generator)
        sizes, starts = sizes[drawn], starts[drawn]
        # A row group is read as a whole, so any order of its rows costs the same. Where a row group is longer than a
        # lane, the windows alone would give its rows nearly the same order in each epoch.
        within = torch.empty(self.samples, dtype=torch.int64)
        for rows_of_group in within.split(sizes.tolist()):
            torch.randperm(len(rows_of_group), generator=generator, out=rows_of_group)
        begin = int(torch.randint(self.samples, (), generator=generator))
        rows = (starts.repeat_interleave(sizes) + within).roll(-begin)
        order = torch.empty(self.steps_per_epoch, self.images_per_step, dtype=torch.int64)
        bounds, used = self._slice_bounds(), 0
        for (begin, end), window in zip(pairwise(bounds), self._windows(), strict=True):
            for turn in range(TURNS):
                part = order[turn::TURNS, begin:end]
                lane = rows[used : used + part.numel()]
                used += part.numel()
                windows = [w[torch.randperm(len(w), generator=generator)] for w in lane.split(window)]
                if windows:
                    part.copy_(torch.cat(windows).view(part.shape))
        return order.flatten()

    def lanes_of_workers(self, workers: int) -> dict[tuple[int, int], set[tuple[int, int]]]:
        """Return, by (rank, worker process), the lanes that the worker alternates between. A worker loads every
        `workers`th micro-batch of its rank."""
        workers = max(1, workers)
        touched = [self._slices_of(number) for number in range(self.global_batch // self.micro_batch)]
        lanes: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for count in range(math.lcm(TURNS * self.micro_steps, workers)):
            step, micro_step = divmod(count, self.micro_steps)
            for rank in range(self.world_size):
                found = lanes.setdefault((rank, count % workers), set())
                found.update((i, step % TURNS) for i in touched[micro_step * self.world_size + rank])
        return lanes

    def readers(self, workers: int) -> int:
        """Return the largest number of worker processes that share a lane, and so read the same row groups: 1 where
        each micro-batch has slices of its own (from 8·B/b lanes on) and `workers` divides 8·A."""
        shared = Counter(lane for lanes in self.lanes_of_workers(workers).values() for lane in lanes)
        return max(shared.values())

    def row_groups_of_a_worker(self, workers: int) -> int:
        """Return the largest number of row groups that one of this rank's worker processes needs at the same time."""
        lanes = max(len(lanes) for (rank, _), lanes in self.lanes_of_workers(workers).items() if rank == self.rank)
        # The smallest row group, except for the short ones at the ends of files.
        smallest = max(1, sorted(self.group_sizes)[len(self.group_sizes) // 10])
        # Each lane needs the row groups of a window, which begins and ends within a row group, and one that another
        # lane shares, which this worker never reads to its end. Where workers share lanes, no row group is read to its
        # end here, and one more is still held that lies before the window.
        more = 2 if self.readers(workers) == 1 else 3
        return min(len(self.group_sizes), lanes * (-(-max(self._windows()) // smallest) + more))
