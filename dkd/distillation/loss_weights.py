"""The weights of an objective's terms at a step, in one tensor on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dkd.distillation.objective import Weight


class LossWeights:
    """Holds the weights (K,) of K terms. The tensor stays the same one from step to step, and is written only where a
    weight has changed: a GPU does not wait for the host, and a captured graph reads the weights of each step.

    Args:
        weights: of each term, as functions of the global step.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = list(weights)
        self._tensor: torch.Tensor | None = None
        self._written: list[float] = []
        self.are_written_before = False
        """Whether the weights of a step are written before it, by `write`: a graph that captured the writing would
        write the same weights in each step."""

    def at(self, step: int, like: torch.Tensor) -> torch.Tensor:
        """Return the weights at a step, (K,), of the type and on the device of `like`."""
        tensor = self._tensor
        if tensor is None or tensor.dtype != like.dtype or tensor.device != like.device:
            self._tensor = tensor = torch.zeros(len(self._weights), dtype=like.dtype, device=like.device)
            self._written = []
        return tensor if self.are_written_before and self._written else self.write(step)

    def write(self, step: int) -> torch.Tensor:
        """Write the weights at a step into the tensor that `at` returned before, and return it."""
        tensor, numbers = self._tensor, [weight(step) for weight in self._weights]
        assert tensor is not None
        if numbers != self._written:
            fresh = torch.tensor(numbers, dtype=tensor.dtype)
            # From page-locked memory, for which the host need not wait.
            tensor.copy_(fresh.pin_memory() if tensor.device.type == "cuda" else fresh, non_blocking=True)
            self._written = numbers
        return tensor
