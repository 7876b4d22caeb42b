"""Choose the normalisation of a CIFAR model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

NormLayer = Callable[[int], nn.Module]

NORMS = ("batch", "group")


def norm_layer(kind: str) -> NormLayer:
    """Return a function from a number of channels to a normalisation layer.

    Args:
        kind: `batch`: BatchNorm2d. `group`: GroupNorm of 8 channels a group, or a few more where 8 does not divide
            them, and at least 2 groups; no batch statistics.

    Raises:
        ValueError: there is no such kind.
    """
    if kind == "batch":
        return nn.BatchNorm2d
    if kind == "group":
        return lambda channels: nn.GroupNorm(_count_groups(channels), channels)
    raise ValueError(f"norm={kind!r}: must be one of {', '.join(NORMS)}")


def _count_groups(channels: int) -> int:
    return next(groups for groups in range(max(2, channels // 8), 0, -1) if channels % groups == 0)
