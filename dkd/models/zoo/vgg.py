"""Build VGG for CIFAR as in the distillation literature, with a norm after every convolution and one linear layer.

Source: Simonyan & Zisserman, ICLR 2015. Taps: `block0` (full resolution) to `block4`, each after its last ReLU and
before the pooling that follows; AT and SP were published with `block1` to `block4`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

CONVOLUTIONS: dict[str, tuple[int, int, int, int, int]] = {
    "vgg8_cifar": (1, 1, 1, 1, 1),
    "vgg11_cifar": (1, 1, 2, 2, 2),
    "vgg13_cifar": (2, 2, 2, 2, 2),
    "vgg16_cifar": (2, 2, 3, 3, 3),
    "vgg19_cifar": (2, 2, 4, 4, 4),
}
_WIDTHS = (64, 128, 256, 512, 512)


class CifarVgg(nn.Module):
    """Compute five blocks of 3×3 convolutions, with 2×2 max pooling after the first three, the mean over positions, and
    a linear head.

    Args:
        convolutions: number of convolutions of each block.
        num_classes: number of outputs.
        norm: `batch` or `group`.
    """

    def __init__(
        self, convolutions: tuple[int, int, int, int, int], num_classes: int = 10, norm: str = "batch"
    ) -> None:
        super().__init__()
        layer = norm_layer(norm)
        inputs = (3, *_WIDTHS)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _make_block(inputs[i], _WIDTHS[i], convolutions[i], layer) for i in range(5)
        )
        self.pool = GlobalMean()
        self.classifier = nn.Linear(_WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (9 * module.out_channels)))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W), with sides of at least 8 pixels."""
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(block(x), 2)
        # At 32×32 the literature's networks do not pool here: blocks 3 and 4 are both 4×4.
        return self.classifier(self.pool(self.block4(self.block3(x))))


def _make_block(channels_in: int, channels: int, convolutions: int, norm: NormLayer) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        layers += [
            nn.Conv2d(channels_in if i == 0 else channels, channels, 3, padding=1),
            norm(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)
