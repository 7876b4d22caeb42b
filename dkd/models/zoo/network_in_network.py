"""Build Network in Network for CIFAR: `nin_wide` has the paper's channels, `nin_thin` half of them.

Source: Lin et al., ICLR 2014. The AT paper does not specify its NIN-wide (1 M parameters) and NIN-thin (0.2 M) further;
these models have the same structure and size. `norm: none` builds them without normalisation, as in the AT paper's
experiments with gradient-based attention. Taps: `block1`, `block2`, `block3`, after their last ReLU, at 1/1, 1/2 and
1/4 of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer
from dkd.models.zoo.pooling import GlobalMean

WIDTHS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int]]] = {
    "nin_wide": ((192, 160, 96), (192, 192, 192), (192, 192)),
    "nin_thin": ((96, 80, 48), (96, 96, 96), (96, 96)),
}


class NetworkInNetwork(nn.Module):
    """Compute three blocks, each a wide convolution and 1×1 convolutions, with 3×3 max and mean pooling between the
    blocks. One 1×1 convolution makes the classes, which are averaged over positions.

    Args:
        widths: channels of the convolutions of each block.
        num_classes: number of outputs.
        norm: `batch`, `group` or `none`.
    """

    def __init__(
        self,
        widths: tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int]],
        num_classes: int = 10,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        layer: NormLayer = (lambda channels: nn.Identity()) if norm == "none" else norm_layer(norm)
        bias = norm == "none"
        self.block1 = _make_block(3, widths[0], 5, layer, bias)
        self.block2 = _make_block(widths[0][-1], widths[1], 5, layer, bias)
        self.block3 = _make_block(widths[1][-1], widths[2], 3, layer, bias)
        self.classifier = nn.Conv2d(widths[2][-1], num_classes, 1)
        self.pool = GlobalMean()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, num_classes) of images (b, 3, H, W)."""
        x = F.max_pool2d(self.block1(x), 3, 2, 1)
        x = F.avg_pool2d(self.block2(x), 3, 2, 1)
        return self.pool(self.classifier(self.block3(x)))


def _make_block(channels_in: int, widths: tuple[int, ...], kernel: int, norm: NormLayer, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, channels in enumerate(widths):
        size = kernel if i == 0 else 1
        layers += [
            nn.Conv2d(channels_in, channels, size, padding=size // 2, bias=bias),
            norm(channels),
            nn.ReLU(inplace=True),
        ]
        channels_in = channels
    return nn.Sequential(*layers)
