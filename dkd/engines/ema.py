"""An exponential moving average of the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dkd.engines.sharded_weights import local_part, plain_name, release_gathered
from dkd.library_internals.torch import lerp_lists


class WeightAverage:
    """Averages parameters and floating-point buffers: average ← decay·average + (1 − decay)·value, once an optimizer
    step.

    Each rank averages what it keeps: its shards, where the engine shards the weights.

    Args:
        model: the model being trained; its tensors are read, and swapped only inside `applied`.
        decay: between 0 and 1.
        wrapped: the model as the engine wraps it; None: it does not.
    """

    def __init__(self, model: nn.Module, decay: float, wrapped: nn.Module | None = None) -> None:
        self.decay, self._wrapped = decay, wrapped or model
        kept = dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self._names, self._tensors = [plain_name(name) for name in kept], list(kept.values())
        self._live = [local_part(t) for t in self._tensors]
        self._average = [t.detach().clone() for t in self._live]

    def named(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name in the plain model, the model's tensor, the average of what this rank keeps of it)."""
        return zip(self._names, self._tensors, self._average, strict=True)

    @torch.no_grad()
    def update(self) -> None:
        lerp_lists(self._average, [t.detach() for t in self._live], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the average. All ranks come together: under ZeRO-3 it is a collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        release_gathered(self._wrapped)
        for live, average in zip(self._live, self._average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)
