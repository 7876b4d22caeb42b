"""Small numbers averaged over ranks without stopping for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

Numbers = Mapping[str, torch.Tensor | float]


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step, by name. A loss may be called anything: its name is looked up among the terms alone.

    Args:
        terms: the loss terms before their weights.
        counts: everything else, such as the total loss, seconds and failures.
    """

    terms: dict[str, float]
    counts: dict[str, float]


class AsyncMean:
    """Packs a step's scalars into one tensor and averages it over ranks by one asynchronous all-reduce; read it a step
    later.

    Args:
        step: what the numbers belong to.
        terms: loss terms on this rank; the same names in the same order on every rank.
        counts: other scalars on this rank, likewise.
    """

    def __init__(self, step: int, terms: Numbers, counts: Numbers) -> None:
        self.step = step
        self._terms, self._counts = list(terms), list(counts)
        # The spread of the steps that ranks are at, in numbers so small that rounding cannot hide or feign one.
        place = float(step % 1024)
        values = [*terms.values(), *counts.values(), place, place**2]
        device = next((v.device for v in values if isinstance(v, torch.Tensor)), torch.device("cpu"))
        # full, not tensor: a number written by a kernel, where a copy from the host would wait for the device.
        self._local = torch.stack(
            [
                v.double() if isinstance(v, torch.Tensor) else torch.full((), v, dtype=torch.float64, device=device)
                for v in values
            ]
        )
        self._mean, self._work = self._local, None
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self._ranks > 1:
            self._mean = self._local / self._ranks
            self._work = dist.all_reduce(self._mean, async_op=True)

    def read(self) -> StepNumbers:
        """The means, the same on every rank. Waits for the all-reduce."""
        if self._work is not None:
            self._work.wait()
        *means, self._place, self._place_squared = self._mean.tolist()
        return self._named(means)

    def in_step(self) -> bool:
        """Whether all ranks put in values of the same step: the answer is the same on every rank. After `read`."""
        return self._place_squared - self._place**2 < 0.5 / self._ranks

    def local(self) -> StepNumbers:
        """What this rank put in."""
        return self._named(self._local.tolist()[:-2])

    def _named(self, values: list[float]) -> StepNumbers:
        terms, counts = values[: len(self._terms)], values[len(self._terms) :]
        return StepNumbers(dict(zip(self._terms, terms, strict=True)), dict(zip(self._counts, counts, strict=True)))
