"""Build ResNet-50 for CIFAR: the ImageNet network's bottleneck stages after a 3×3 stem without pooling.

Source: He et al., CVPR 2016. Taps: `layer1` to `layer4`, after their last ReLU, at 1/1 to 1/8 of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

BLOCKS: dict[str, tuple[int, int, int, int]] = {"resnet50_cifar": (3, 4, 6, 3)}
_EXPANSION = 4


class Bottleneck(nn.Module):
    """Compute 1×1-norm-relu-3×3-norm-relu-1×1-norm, add the shortcut, and apply relu. The 3×3 convolution has the
    stride."""

    def __init__(self, channels_in: int, inner: int, stride: int, norm: NormLayer) -> None:
        super().__init__()
        channels = _EXPANSION * inner
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = norm(channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class CifarBottleneckResNet(nn.Module):
    """Compute a stem of 64 channels, four stages of bottlenecks of 256 to 2,048 channels, the mean over positions, and
    a linear head.

    Args:
        blocks: number of blocks of each stage.
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int = 10, norm: str = "batch") -> None:
        super().__init__()
        layer = norm_layer(norm)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = layer(64)
        self.layer1 = _make_stage(blocks[0], 64, 64, 1, layer)
        self.layer2 = _make_stage(blocks[1], 256, 128, 2, layer)
        self.layer3 = _make_stage(blocks[2], 512, 256, 2, layer)
        self.layer4 = _make_stage(blocks[3], 1024, 512, 2, layer)
        self.pool = GlobalMean()
        self.linear = nn.Linear(512 * _EXPANSION, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.pool(x))


def _make_stage(blocks: int, channels_in: int, inner: int, stride: int, norm: NormLayer) -> nn.Sequential:
    later = (Bottleneck(_EXPANSION * inner, inner, 1, norm) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(channels_in, inner, stride, norm), *later)
