"""Whether a step's gradient is finite."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def gradient_is_finite(model: nn.Module) -> bool:
    """After all gradients of a step have been averaged over ranks: the same answer on every rank. Waits for the gradient; where the engine
    shards it, a collective."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return True
    # The largest absolute value: unlike the 2-norm, it is finite whenever all of them are.
    largest = torch.nn.utils.get_total_norm(gradients, math.inf)
    return bool(torch.isfinite(largest.full_tensor() if isinstance(largest, DTensor) else largest))
