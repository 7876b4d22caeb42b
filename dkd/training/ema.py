"""An exponential moving average of the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Averages parameters and floating-point buffers: average ← decay·average + (1 − decay)·value, once an optimizer step.

    Args:
        model: the model being trained; its tensors are read, and swapped only inside `applied`.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
        self._average = [t.detach().clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._average, [t.detach() for t in self._live], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, average in zip(self._live, self._average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)
