"""Build MobileNetV2 for CIFAR, with the strides that the distillation literature uses for 32×32 images.

Source: Sandler et al., CVPR 2018. Taps: `blocks.1`, `blocks.2`, `blocks.4`, `blocks.6`, the linear outputs of
bottlenecks (no ReLU), at 1/2, 1/4, 1/8 and 1/16 of the image.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

WIDTHS: dict[str, float] = {"mobilenetv2_x0_5": 0.5, "mobilenetv2_x1_0": 1.0}
# Expansion, channels, repeats, stride of the first repeat.
_GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """Compute a 1×1 convolution to `expansion` times the channels, a depthwise 3×3 convolution, and a 1×1 convolution
    back without an activation. The result is added to the input where the shapes allow."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int, norm: NormLayer) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.adds = stride == 1 and channels_in == channels
        self.conv = nn.Sequential(
            nn.Conv2d(channels_in, inner, 1, bias=False),
            norm(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False),
            norm(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1, bias=False),
            norm(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class CifarMobileNetV2(nn.Module):
    """Compute a stem of stride 2, seven groups of inverted residuals, 1,280 channels, the mean over positions, and a
    linear head.

    Args:
        width: factor of all channels except the last.
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(self, width: float = 1.0, num_classes: int = 10, norm: str = "batch") -> None:
        super().__init__()
        layer = norm_layer(norm)
        channels = int(32 * width)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, padding=1, bias=False), layer(channels), nn.ReLU(inplace=True)
        )
        groups = []
        for expansion, out, repeats, stride in _GROUPS:
            blocks = []
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, int(out * width), stride if i == 0 else 1, expansion, layer))
                channels = int(out * width)
            groups.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(groups)
        last = int(1280 * max(1.0, width))
        self.conv2 = nn.Sequential(nn.Conv2d(channels, last, 1, bias=False), layer(last), nn.ReLU(inplace=True))
        self.pool = GlobalMean()
        self.classifier = nn.Sequential(nn.Linear(last, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = self.conv1(x)
        for group in self.blocks:
            x = group(x)
        return self.classifier(self.pool(self.conv2(x)))
