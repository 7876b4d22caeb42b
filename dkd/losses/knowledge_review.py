"""Compute ReviewKD. Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.

Stages 1 … L of the student, from shallow to deep, are fused from the deepest one on (ABF, attention-based fusion): with
x_l the stage l after a 1×1 convolution to a middle width m, and y_(l+1) the deeper result at the resolution of stage l,

    (a, b) = sigmoid(conv1x1([x_l, y_(l+1)])),   y_l = a·x_l + b·y_(l+1),   S_l = conv3x3(y_l)

with BatchNorm after each of the convolutions but that of (a, b). S_l is compared with the teacher's stage T_l at
several resolutions (HCL, hierarchical context loss): itself, and average-pooled to 4, 2 and 1 where that is smaller,
with the weights 1, 1/2, 1/4, 1/8, divided by their sum:

    L = Σ_l  Σ_k w_k · mse(pool_k S_l, pool_k T_l) / Σ_k w_k
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_forms import FeatureForm, Shape
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast
from dkd.losses.formed_features import FormedFeatures
from dkd.losses.sample_form import PairShapes

_LEVELS = (4, 2, 1)


class ReviewAdapter(nn.Module):
    """Fuses the student's stages, from the deepest one on.

    Args:
        form: maps.
        shapes: (student, teacher) of each pair, from shallow to deep, (C, H, W).
        width: the middle width m; None: that of the student's deepest stage, at most 512.

    The module is called with two lists of features. It returns a map of the teacher's shape for each pair.
    """

    def __init__(self, form: FeatureForm, shapes: Sequence[tuple[Shape, Shape]], width: int | None = None) -> None:
        super().__init__()
        width = width or min(512, shapes[-1][0][0])
        self.form = form
        self.stages = nn.ModuleList(
            _Fusion(student[0], width, teacher[0], fuses=number < len(shapes) - 1)
            for number, (student, teacher) in enumerate(shapes)
        )

    def forward(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        deeper = None
        for stage, s, t in reversed(list(zip(self.stages, student, teacher, strict=True))):
            output, deeper = stage(self.form.student(s, s), deeper, self.form.teacher(t, t).shape[2:])
            found.insert(0, output)
        return found


class _Fusion(nn.Module):
    """Fuses a stage with the deeper ones (ABF)."""

    def __init__(self, inputs: int, width: int, outputs: int, fuses: bool) -> None:
        super().__init__()
        reduce = nn.Conv2d(inputs, width, 1, bias=False)
        expand = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        for layer in (reduce, expand):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(width))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(outputs))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(
        self, stage: torch.Tensor, deeper: torch.Tensor | None, resolution: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fused = self.reduce(stage)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            shares = self.attention(torch.cat([fused, deeper], 1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        if tuple(fused.shape[2:]) != tuple(resolution):
            fused = F.interpolate(fused, tuple(resolution), mode="nearest")
        return self.expand(fused), fused


class ReviewKD(FormedFeatures, nn.Module):
    """Compute the hierarchical context loss as a mean over the global batch.

    The module is called with what ReviewAdapter yields and the teacher's features, two lists. It returns a scalar with
    the same meaning over ranks as AttentionTransfer's.

    Args:
        form: what features are brought into; None: maps.
        weights: one weight for each pair; None: 1.

    Raises:
        ValueError: the shapes make no pair.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(self, form: FeatureForm | None = None, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.form, self.weights = form or FeatureForm(), weights

    def extra_repr(self) -> str:
        return f"form={self.form}, weights={self.weights}"

    def compared_shapes(self, shapes: PairShapes) -> PairShapes:
        """Return the teacher's shapes alone: what is compared has its resolution."""
        return [(teacher, teacher) for _, teacher in shapes]

    def forward(self, student: Features, teacher: Features, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        pairs = as_pairs(student, teacher, self.weights)
        with no_autocast(pairs[0][0].device):
            return torch.stack([w * layout.mean(self._compare(s, t)) for s, t, w in pairs]).sum()

    def _compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return (b,), the distance of each sample's maps at all resolutions."""
        student, teacher = full_precision(student), self.form.teacher(full_precision(teacher.detach()), student)
        difference = student - teacher
        total, weight, sum_of_weights = difference.square().flatten(1).mean(1), 1.0, 1.0
        for level in _LEVELS:
            if level < difference.shape[2]:
                weight /= 2
                # Pooling is linear: the difference of pooled maps is the pooled difference.
                pooled = F.adaptive_avg_pool2d(difference, level)
                total = total + weight * pooled.square().flatten(1).mean(1)
                sum_of_weights += weight
        return total / sum_of_weights
