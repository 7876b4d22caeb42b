"""Average maps over their positions, by a module, so that the pooled features can be tapped."""

from __future__ import annotations

import torch
from torch import nn


class GlobalMean(nn.Module):
    """Compute the mean over positions: (b, C, H, W) becomes (b, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))
