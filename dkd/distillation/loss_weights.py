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

    def at(self, step: int, like: torch.Tensor) -> torch.Tensor:
        """Return the weights at a step, (K,), of the type and on the device of `like`."""
        numbers = [weight(step) for weight in self._weights]
        tensor = self._tensor
        if tensor is None or tensor.dtype != like.dtype or tensor.device != like.device:
            tensor, self._written = torch.zeros(len(numbers), dtype=like.dtype, device=like.device), []
        if numbers != self._written:
            fresh = torch.tensor(numbers, dtype=like.dtype)
            # From page-locked memory, for which the host need not wait.
            tensor.copy_(fresh.pin_memory() if like.device.type == "cuda" else fresh, non_blocking=True)
        self._tensor, self._written = tensor, numbers
        return tensor
