"""Build ShuffleNet V1 (Zhang et al., CVPR 2018) and V2 (Ma et al., ECCV 2018) for CIFAR, as in the distillation
literature: a 1×1 stem of 24 channels, and no pooling before the stages.

Taps: `layer1`, `layer2`, `layer3`, at 1/2, 1/4 and 1/8 of the image, after their last ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

V2_WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "shufflenetv2_x0_5": (48, 96, 192, 1024),
    "shufflenetv2": (116, 232, 464, 1024),
}


def _make_conv(channels_in: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Reorder the channels of (b, C, H, W), so that channels of different groups become neighbours."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class _V1Block(nn.Module):
    """Compute a grouped 1×1 convolution, a shuffle, a depthwise 3×3 convolution, and a grouped 1×1 convolution. With
    stride 2, the pooled input is concatenated with the branch; else the input is added."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int, norm: NormLayer) -> None:
        super().__init__()
        inner = channels // 4
        # The stem's 24 channels are not divided among groups.
        self.groups = 1 if channels_in == 24 else groups
        self.stride = stride
        self.conv1 = _make_conv(channels_in, inner, groups=self.groups)
        self.bn1 = norm(inner)
        self.conv2 = _make_conv(inner, inner, 3, stride, groups=inner)
        self.bn2 = norm(inner)
        self.conv3 = _make_conv(inner, channels, groups=groups)
        self.bn3 = norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.bn1(self.conv1(x)), inplace=True)
        branch = _shuffle(branch, self.groups) if self.groups > 1 else branch
        branch = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(branch)), inplace=True)))
        if self.stride == 2:
            return F.relu(torch.cat([branch, F.avg_pool2d(x, 3, 2, 1)], 1), inplace=True)
        return F.relu(branch + x, inplace=True)


class CifarShuffleNetV1(nn.Module):
    """Compute ShuffleNet V1 with three groups.

    Args:
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(self, num_classes: int = 10, norm: str = "batch") -> None:
        super().__init__()
        layer, groups = norm_layer(norm), 3
        self.conv1 = _make_conv(3, 24)
        self.bn1 = layer(24)
        self.layer1 = self._make_stage(24, 240, 4, groups, layer)
        self.layer2 = self._make_stage(240, 480, 8, groups, layer)
        self.layer3 = self._make_stage(480, 960, 4, groups, layer)
        self.pool = GlobalMean()
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _make_stage(channels_in: int, channels: int, blocks: int, groups: int, norm: NormLayer) -> nn.Sequential:
        first = _V1Block(channels_in, channels - channels_in, 2, groups, norm)
        return nn.Sequential(first, *(_V1Block(channels, channels, 1, groups, norm) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(x)))))


class _V2Block(nn.Module):
    """Keep half of the channels, pass the other half through 1×1, depthwise 3×3 and 1×1 convolutions, and shuffle both
    halves."""

    def __init__(self, channels: int, norm: NormLayer) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _make_conv(half, half)
        self.bn1 = norm(half)
        self.conv2 = _make_conv(half, half, 3, groups=half)
        self.bn2 = norm(half)
        self.conv3 = _make_conv(half, half)
        self.bn3 = norm(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, branch = x.chunk(2, 1)
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(branch)), inplace=True)))
        branch = F.relu(self.bn3(self.conv3(branch)), inplace=True)
        return _shuffle(torch.cat([kept, branch], 1), 2)


class _V2DownBlock(nn.Module):
    """Compute both halves of the output from the whole input, at half the resolution."""

    def __init__(self, channels_in: int, channels: int, norm: NormLayer) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _make_conv(channels_in, channels_in, 3, 2, groups=channels_in)
        self.bn1 = norm(channels_in)
        self.conv2 = _make_conv(channels_in, half)
        self.bn2 = norm(half)
        self.conv3 = _make_conv(channels_in, half)
        self.bn3 = norm(half)
        self.conv4 = _make_conv(half, half, 3, 2, groups=half)
        self.bn4 = norm(half)
        self.conv5 = _make_conv(half, half)
        self.bn5 = norm(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))), inplace=True)
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)), inplace=True)))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _shuffle(torch.cat([left, right], 1), 2)


class CifarShuffleNetV2(nn.Module):
    """Compute ShuffleNet V2.

    Args:
        widths: channels of the three stages and of the last 1×1 convolution.
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(self, widths: tuple[int, int, int, int], num_classes: int = 10, norm: str = "batch") -> None:
        super().__init__()
        layer = norm_layer(norm)
        self.conv1 = _make_conv(3, 24)
        self.bn1 = layer(24)
        self.layer1 = self._make_stage(24, widths[0], 3, layer)
        self.layer2 = self._make_stage(widths[0], widths[1], 7, layer)
        self.layer3 = self._make_stage(widths[1], widths[2], 3, layer)
        self.conv2 = _make_conv(widths[2], widths[3])
        self.bn2 = layer(widths[3])
        self.pool = GlobalMean()
        self.linear = nn.Linear(widths[3], num_classes)

    @staticmethod
    def _make_stage(channels_in: int, channels: int, blocks: int, norm: NormLayer) -> nn.Sequential:
        return nn.Sequential(
            _V2DownBlock(channels_in, channels, norm), *(_V2Block(channels, norm) for _ in range(blocks))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(F.relu(self.bn2(self.conv2(x)), inplace=True)))
