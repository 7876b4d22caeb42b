"""The normalisation a CIFAR model is built with."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NormLayer = Callable[[int], nn.Module]

NORMS = ("batch", "group")


def norm_layer(kind: str) -> NormLayer:
    """`batch`: BatchNorm2d. `group`: GroupNorm of 8 channels a group, or a few more where 8 does not divide them, at
    least 2 groups; no batch statistics.

    Raises:
        ValueError: another kind.
    """
    if kind == "batch":
        return nn.BatchNorm2d
    if kind == "group":
        return lambda channels: nn.GroupNorm(_groups(channels), channels)
    raise ValueError(f"norm={kind!r}: must be one of {', '.join(NORMS)}")


def _groups(channels: int) -> int:
    return next(groups for groups in range(max(2, channels // 8), 0, -1) if channels % groups == 0)
