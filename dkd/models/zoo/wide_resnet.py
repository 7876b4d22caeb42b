"""Build Wide ResNets. Source: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016.

Taps: `block1`, `block2`, `block3` are the three groups, before the next norm and ReLU; AT and SP were published with
these taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

DEPTHS_AND_WIDTHS: dict[str, tuple[int, int]] = {
    f"wrn_{depth}_{width}": (depth, width) for depth, width in ((16, 1), (16, 2), (16, 8), (40, 1), (40, 2))
}


class PreActivationBlock(nn.Module):
    """Compute norm-relu-conv-norm-relu-conv, and add the shortcut. Where the width changes, the shortcut convolves the
    activated input."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.bn1 = norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if channels_in != channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Compute a stem of 16 channels, three groups of n blocks of 16k, 32k, 64k channels, the mean over positions, and a
    linear head; the depth is 6n + 4.

    Args:
        depth: 6n + 4.
        width: k.
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, norm: str = "batch") -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth={depth}: must be 6n + 4")
        layer = norm_layer(norm)
        blocks = (depth - 4) // 6
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.block1 = _make_group(blocks, channels[0], channels[1], 1, layer)
        self.block2 = _make_group(blocks, channels[1], channels[2], 2, layer)
        self.block3 = _make_group(blocks, channels[2], channels[3], 2, layer)
        self.bn1 = layer(channels[3])
        self.pool = GlobalMean()
        self.fc = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.pool(F.relu(self.bn1(x), inplace=True)))


def _make_group(blocks: int, channels_in: int, channels: int, stride: int, norm: NormLayer) -> nn.Sequential:
    def block(i: int) -> nn.Module:
        return PreActivationBlock(channels_in if i == 0 else channels, channels, stride if i == 0 else 1, norm)

    return nn.Sequential(*map(block, range(blocks)))
