"""Normalise the teacher's features before they are compared with the student's: channels of a teacher can differ in
size by orders of magnitude.

    none           as they are
    layer          each vector, or each place of a map, by its own mean and variance over the channels
    batch          each channel by its mean and variance over the batch
    standardize    each channel by its mean, and all by one standard deviation, the root of the mean variance of the
                   channels, both measured once. That is PHI-S (Ranzinger et al., "PHI-S: Distribution Balancing for
                   Label-Free Multi-Teacher Distillation", 2024) but for its rotation, which distances do not see
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout

NORMS = ("none", "layer", "batch", "standardize")
_LEAST = 1e-5
"""Added to variances, as torch's layers do."""


class TeacherNorm(nn.Module):
    """Normalises a list of the teacher's features, maps (b, C, H, W) or vectors (b, C).

    Args:
        kind: as above.
        widths: C of each feature; needed to `standardize`.

    Before it can `standardize`, all ranks call `measure` with features, and `finish_measuring`; until then, what it
    returns is NaN.
    """

    def __init__(self, kind: str = "none", widths: Sequence[int] = ()) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"teacher_norm={kind!r}: must be one of {', '.join(NORMS)}")
        if kind == "standardize" and not widths:
            raise ValueError("teacher_norm='standardize' needs the widths of the teacher's features")
        self.kind = kind
        self._sums: list[torch.Tensor] = []
        for number, width in enumerate(widths if kind == "standardize" else ()):
            self.register_buffer(f"mean_{number}", torch.zeros(width))
            # A loss of what was never measured is NaN, which ends a training.
            self.register_buffer(f"deviation_{number}", torch.full((), torch.nan))

    def extra_repr(self) -> str:
        return self.kind

    def measure(self, features: Sequence[torch.Tensor]) -> None:
        """Add features of this rank to what is measured."""
        sums = [_sums(feature) for feature in features]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums

    def finish_measuring(self) -> None:
        """Set the statistics from what all ranks have measured. A collective of all ranks."""
        layout = BatchLayout.even(1)
        for number, sums in enumerate(self._sums):
            rows, total, squares = layout.sum(sums).tensor_split([1, 1 + (len(sums) - 1) // 2])
            mean = total / rows
            variance = (squares / rows - mean.square()).clamp_min(0.0).mean()
            self.get_buffer(f"mean_{number}").copy_(mean)
            self.get_buffer(f"deviation_{number}").copy_(variance.sqrt())
        self._sums = []

    def forward(self, features: Sequence[torch.Tensor], layout: BatchLayout | None = None) -> list[torch.Tensor]:
        """Return the normalised features.

        Args:
            features: of the teacher.
            layout: `batch` takes its statistics over the rows of all ranks; None: over the rows of this call, as
                BatchNorm does.
        """
        return [self._normalize(feature, number, layout) for number, feature in enumerate(features)]

    def _normalize(self, feature: torch.Tensor, number: int, layout: BatchLayout | None) -> torch.Tensor:
        match self.kind:
            case "layer":
                return F.layer_norm(feature.movedim(1, -1), feature.shape[1:2], eps=_LEAST).movedim(-1, 1)
            case "batch":
                sums = _sums(feature)
                sums = sums if layout is None else layout.sum(sums)
                rows, total, squares = sums.tensor_split([1, 1 + feature.shape[1]])
                mean = total / rows
                variance = (squares / rows - mean.square()).clamp_min(0.0)
                return _scaled(feature, mean, (variance + _LEAST).rsqrt())
            case "standardize":
                mean, deviation = self.get_buffer(f"mean_{number}"), self.get_buffer(f"deviation_{number}")
                scale = torch.where(deviation == 0, torch.zeros_like(deviation), 1 / deviation)
                return _scaled(feature, mean, scale.expand_as(mean))
        return feature


def _sums(feature: torch.Tensor) -> torch.Tensor:
    """Return (1 + 2·C,) in float64: the number of places, and the sums over them of each channel and of its square."""
    places = feature.detach().movedim(1, -1).flatten(0, -2).double()
    return torch.cat([places.new_tensor([len(places)]), places.sum(0), places.square().sum(0)])


def _scaled(feature: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    shape = (1, -1) + (1,) * (feature.dim() - 2)
    return ((feature - mean.view(shape)) * scale.view(shape)).to(feature.dtype)
