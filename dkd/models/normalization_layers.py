"""The normalisation a CIFAR model is built with."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NormLayer = Callable[[int], nn.Module]

NORMS = ("batch", "group")


def norm_layer(kind: str) -> NormLayer:
    """`batch`: BatchNorm2d. `group`: GroupNorm of 8 channels a group, at least 2 groups; no batch statistics.

    Raises:
        ValueError: another kind.
    """
    if kind == "batch":
        return nn.BatchNorm2d
    if kind == "group":
        return lambda channels: nn.GroupNorm(max(2, channels // 8), channels)
    raise ValueError(f"norm={kind!r}: must be one of {', '.join(NORMS)}")
