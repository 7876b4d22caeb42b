"""Network in Network for CIFAR. Lin et al., ICLR 2014; `nin_wide` has its channels, `nin_thin` half of them.

The AT paper's NIN-wide (1 M parameters) and NIN-thin (0.2 M) are not specified further; these are of their kind and
size. `norm: none` builds them without normalisation, as its experiments with gradient-based attention were made. Taps:
`block1`, `block2`, `block3`, after their last ReLU, at 1/1, 1/2 and 1/4 of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.models.zoo.normalization_layers import NormLayer, norm_layer

WIDTHS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int]]] = {
    "nin_wide": ((192, 160, 96), (192, 192, 192), (192, 192)),
    "nin_thin": ((96, 80, 48), (96, 96, 96), (96, 96)),
}


class NetworkInNetwork(nn.Module):
    """Three blocks, each a wide convolution and 1×1 convolutions, 3×3 max and mean pooling between them; one 1×1
    convolution makes the classes, averaged over positions.

    Args:
        widths: channels of the convolutions of each block.
        num_classes: outputs.
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
        self.block1 = _block(3, widths[0], 5, layer, bias)
        self.block2 = _block(widths[0][-1], widths[1], 5, layer, bias)
        self.block3 = _block(widths[1][-1], widths[2], 3, layer, bias)
        self.classifier = nn.Conv2d(widths[2][-1], num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, H, W) -> logits (b, num_classes)."""
        x = F.max_pool2d(self.block1(x), 3, 2, 1)
        x = F.avg_pool2d(self.block2(x), 3, 2, 1)
        return self.classifier(self.block3(x)).mean((2, 3))


def _block(channels_in: int, widths: tuple[int, ...], kernel: int, norm: NormLayer, bias: bool) -> nn.Sequential:
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
