"""Build CIFAR ResNets. Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

The models are those of the distillation literature: a 1×1 convolution where the shape changes (option B), and ×4
variants of four times the width. Taps: `layer1`, `layer2`, `layer3` are the three stages, after their last ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

DEPTHS_AND_WIDTHS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    **{f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)},
}


class BasicBlock(nn.Module):
    """Compute conv-norm-relu-conv-norm, add the shortcut, and apply relu."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class CifarResNet(nn.Module):
    """Compute a stem, three stages of n basic blocks, the mean over positions, and a linear head; the depth is 6n + 2.

    Args:
        depth: 6n + 2.
        widths: channels of the stem and the three stages.
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 10, norm: str = "batch"
    ) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth={depth}: must be 6n + 2")
        layer = norm_layer(norm)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = layer(widths[0])
        self.layer1 = _make_stage(blocks, widths[0], widths[1], 1, layer)
        self.layer2 = _make_stage(blocks, widths[1], widths[2], 2, layer)
        self.layer3 = _make_stage(blocks, widths[2], widths[3], 2, layer)
        self.pool = GlobalMean()
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.pool(x))


def _make_stage(blocks: int, channels_in: int, channels: int, stride: int, norm: NormLayer) -> nn.Sequential:
    return nn.Sequential(
        *(
            BasicBlock(channels_in if i == 0 else channels, channels, stride if i == 0 else 1, norm)
            for i in range(blocks)
        )
    )
