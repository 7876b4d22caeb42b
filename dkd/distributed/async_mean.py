"""Means over ranks that no rank waits for: they travel while the next step computes, and are read one step later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

Number = torch.Tensor | float
N = TypeVar("N", bound=Number)


@dataclass
class StepValues(Generic[N]):
    """Holds the numbers of one optimizer step, by name.

    Terms have a mapping of their own: a loss may have any name, and its name is looked up among the terms alone.
    """

    terms: dict[str, N] = field(default_factory=dict)
    """Loss terms before their weights."""
    counts: dict[str, N] = field(default_factory=dict)
    """Everything else: the total loss, seconds, failures, wishes."""

    def add(self, terms: Mapping[str, N], counts: Mapping[str, N], micro_steps: int) -> None:
        """Add one micro-step's share of the step's means.

        Args:
            micro_steps: A, by which the values are divided.
        """
        for summed, values in ((self.terms, terms), (self.counts, counts)):
            for name, value in values.items():
                # Nothing is computed where there is one micro-step: on GPUs these would be a dozen launches a step.
                share = value if micro_steps == 1 else value / micro_steps
                summed[name] = summed[name] + share if name in summed else share  # type: ignore[operator,assignment]


class AsyncMean:
    """Packs a step's numbers into one tensor and averages it over ranks by one asynchronous all-reduce. All ranks make
    one together, of the same names in the same order.

    Args:
        step: the step that the numbers belong to.
        values: this rank's numbers.
    """

    def __init__(self, step: int, values: StepValues[Number] | StepValues[float] | StepValues[torch.Tensor]) -> None:
        self.step = step
        self._terms, self._counts = list(values.terms), list(values.counts)
        # The spread of the steps that ranks are at, in numbers so small that rounding cannot hide or feign one.
        place = float(step % 1024)
        numbers: list[Number] = [*values.terms.values(), *values.counts.values(), place, place**2]
        device = next((v.device for v in numbers if isinstance(v, torch.Tensor)), torch.device("cpu"))
        # full, not tensor: a number written by a kernel, where a copy from the host would wait for the device.
        self._local = torch.stack(
            [
                v.double() if isinstance(v, torch.Tensor) else torch.full((), v, dtype=torch.float64, device=device)
                for v in numbers
            ]
        )
        self._mean, self._work = self._local, None
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self._ranks > 1:
            self._mean = self._local / self._ranks
            self._work = dist.all_reduce(self._mean, async_op=True)

    def read(self) -> StepValues[float]:
        """Return the means, the same on every rank. Waits for the all-reduce."""
        if self._work is not None:
            self._work.wait()
        *means, self._place, self._place_squared = self._mean.tolist()
        return self._name(means)

    def in_step(self) -> bool:
        """Return whether all ranks put in values of the same step: the same answer on every rank. Call it after
        `read`."""
        return self._place_squared - self._place**2 < 0.5 / self._ranks

    def local(self) -> StepValues[float]:
        """Return what this rank put in."""
        return self._name(self._local.tolist()[:-2])

    def _name(self, numbers: list[float]) -> StepValues[float]:
        terms = len(self._terms)
        return StepValues(
            dict(zip(self._terms, numbers[:terms], strict=True)), dict(zip(self._counts, numbers[terms:], strict=True))
        )
