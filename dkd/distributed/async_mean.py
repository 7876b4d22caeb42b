"""Means over ranks that no rank waits for: they travel while the next step computes, and are read one step later."""

from __future__ import annotations

import functools
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
    """Averages a step's numbers over ranks by one asynchronous all-reduce. All ranks make one together, of the same
    names in the same order.

    A GPU's numbers travel to the host on a stream of their own, into page-locked memory: the host that reads them after
    the next step has begun waits for this step alone, and the GPU for nothing.

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
        computed = [v for v in numbers if isinstance(v, torch.Tensor)]
        self._places = [i for i, v in enumerate(numbers) if isinstance(v, torch.Tensor)]
        self._known = [0.0 if isinstance(v, torch.Tensor) else v for v in numbers]
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._own = _Arriving(torch.stack(computed)) if computed else None
        self._mean: _Arriving | None = None
        if self._ranks > 1:
            summed = self._share(computed)
            self._mean = _Arriving(summed, dist.all_reduce(summed, async_op=True))

    def _share(self, computed: list[torch.Tensor]) -> torch.Tensor:
        """Return this rank's numbers over W, in one tensor on its device."""
        known = torch.tensor(self._known, dtype=torch.float64)
        if not computed:
            return known / self._ranks
        device = computed[0].device
        # From page-locked memory, for which the host need not wait.
        packed = (known.pin_memory() if device.type == "cuda" else known).to(device, non_blocking=True)
        places = _places(tuple(self._places), device)
        return packed.index_copy_(0, places, torch.stack(computed).double()) / self._ranks

    def read(self) -> StepValues[float]:
        """Return the means, the same on every rank. Waits for the all-reduce."""
        *means, self._place, self._place_squared = self._mean.numbers() if self._mean else self._numbers()
        return self._name(means)

    def in_step(self) -> bool:
        """Return whether all ranks put in values of the same step: the same answer on every rank. Call it after
        `read`."""
        return self._place_squared - self._place**2 < 0.5 / self._ranks

    def local(self) -> StepValues[float]:
        """Return what this rank put in."""
        return self._name(self._numbers()[:-2])

    def _numbers(self) -> list[float]:
        """Return what this rank put in, in order."""
        numbers = list(self._known)
        if self._own is not None:
            for place, number in zip(self._places, self._own.numbers(), strict=True):
                numbers[place] = number
        return numbers

    def _name(self, numbers: list[float]) -> StepValues[float]:
        terms = len(self._terms)
        return StepValues(
            dict(zip(self._terms, numbers[:terms], strict=True)), dict(zip(self._counts, numbers[terms:], strict=True))
        )


@functools.lru_cache(maxsize=64)
def _places(places: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(places, device=device)


class _Arriving:
    """Numbers on their way to the host.

    Args:
        numbers: (n,) on this rank's device, in new memory that nothing else writes.
        work: the collective that fills them; None: they are this rank's own.
    """

    def __init__(self, numbers: torch.Tensor, work: dist.Work | None = None) -> None:
        self._numbers, self._work = numbers, work
        self._event: torch.cuda.Event | None = None
        if numbers.device.type != "cuda":
            return
        stream = _stream_home(numbers.device)
        stream.wait_stream(torch.cuda.current_stream(numbers.device))
        with torch.cuda.stream(stream):
            if work is not None:
                work.wait()  # lets this stream wait, and not the host
            home = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            home.copy_(numbers, non_blocking=True)
            numbers.record_stream(stream)
            self._event = stream.record_event()
        self._numbers, self._work = home, None

    def numbers(self) -> list[float]:
        """Return the numbers. Waits for them."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


@functools.lru_cache(maxsize=8)
def _stream_home(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
