"""The weights of an objective's terms at a step, in one tensor on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dkd.library_internals.torch import is_transformed

if TYPE_CHECKING:
    from dkd.distillation.objective import Weight


class LossWeights:
    """Holds the weights (K,) of K terms. They are sent to the device only where one has changed.

    Args:
        weights: of each term, as functions of the global step.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = list(weights)
        self._tensor: torch.Tensor | None = None
        self._written: list[float] = []
        self._is_held = False

    def at(self, step: int, like: torch.Tensor) -> torch.Tensor:
        """Return the weights at a step, (K,), of the type and on the device of `like`. Inside of `hold`, those that
        were written last."""
        tensor = self._tensor
        numbers = self._written if self._is_held else self._numbers(step)
        fits = tensor is not None and tensor.dtype == like.dtype and tensor.device == like.device
        if tensor is not None and fits and numbers == self._written:
            return tensor
        made = _send(numbers, like)
        if type(made) is torch.Tensor and not made.is_inference() and not is_transformed(like):
            self._tensor, self._written = made, numbers
        return made

    def hold(self, step: int) -> None:
        """Write the weights at a step into the tensor that `at` returned last, which it returns from now on: a captured
        graph reads them there. The tensor is that of every step then, so that no backward may follow a later write."""
        tensor, numbers, self._is_held = self._tensor, self._numbers(step), True
        assert tensor is not None
        if numbers != self._written:
            tensor.copy_(_send(numbers, tensor))
            self._written = numbers

    def _numbers(self, step: int) -> list[float]:
        return [weight(step) for weight in self._weights]


def _send(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Return numbers in a tensor as `like`."""
    made = torch.tensor(numbers, dtype=like.dtype)
    if like.device.type == "cpu":
        return made
    # From page-locked memory, for which the host need not wait.
    return (made.pin_memory() if like.device.type == "cuda" else made).to(like.device, non_blocking=True)
