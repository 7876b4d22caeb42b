"""Build MobileNet V1 for ImageNet. Source: Howard et al., 2017, arXiv 1704.04861, table 1.

Taps: `stage1` to `stage4`, after their last ReLU, at 1/4 to 1/32 of the image (56, 28, 14 and 7 pixels of 224).
"""

from __future__ import annotations

import torch
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

# Channels and stride of each pair of convolutions, by stage; the first stage begins with the stem.
_STAGES = (((64, 1), (128, 2), (128, 1)), ((256, 2), (256, 1)), ((512, 2), *((512, 1),) * 5), ((1024, 2), (1024, 1)))


class MobileNetV1(nn.Module):
    """Compute a 3×3 stem, thirteen pairs of a depthwise 3×3 convolution and a 1×1 convolution, the mean over positions,
    and a linear head.

    Args:
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(self, num_classes: int = 1000, norm: str = "batch") -> None:
        super().__init__()
        layer = norm_layer(norm)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), layer(32), nn.ReLU(inplace=True))
        channels, stages = 32, []
        for stage in _STAGES:
            pairs = []
            for out, stride in stage:
                pairs.append(_make_separable(channels, out, stride, layer))
                channels = out
            stages.append(nn.Sequential(*pairs))
        self.stage1, self.stage2, self.stage3, self.stage4 = stages
        self.pool = GlobalMean()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.fc(self.pool(x))


def _make_separable(channels_in: int, channels: int, stride: int, norm: NormLayer) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False),
        norm(channels_in),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_in, channels, 1, bias=False),
        norm(channels),
        nn.ReLU(inplace=True),
    )
