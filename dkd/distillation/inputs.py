"""Bring the micro-batches of a step to the device, mixed where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MicroBatch = Sequence[Any]
"""Images (b, 3, H, W), labels (b,), and whatever follows them."""
Mixing = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""(uint8 images (b, 3, H, W), labels (b,), seed) -> mixed images and labels (b,) or class weights (b, K)."""


@dataclass(frozen=True)
class Inputs:
    """Load micro-batches of this rank.

    Args:
        device: of the models.
        rank, world_size: r and W.
        mixing: applied to each micro-batch, on the device; None: nothing is mixed.
        seed_of_mixing: (step, place) -> the seed by which a micro-batch is mixed.
    """

    device: torch.device
    rank: int
    world_size: int
    mixing: Mixing | None
    seed_of_mixing: Callable[[int, int], int]

    def place(self, micro_step: int) -> int:
        """Return the place of a micro-batch in the global batch. Seeds depend on the place and not on who computes it,
        and the second pass repeats the first."""
        return micro_step * self.world_size + self.rank

    def load(self, batch: MicroBatch, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels of a micro-batch: the same in both passes."""
        images, labels, *_ = batch
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        if self.mixing is not None:
            images, labels = self.mixing(images, labels, self.seed_of_mixing(step, self.place(micro_step)))
        return images, labels
