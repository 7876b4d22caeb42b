"""Compute VID. Source: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019.

For one pair, μ is the student's feature after a regressor, T the teacher's, n numbers each, and σ_c² a variance that is
trained for each channel of the teacher, over the B samples of the global batch:

    L_VID = (1/B) Σ_i (1/n) Σ_j ½ [ (μ_ij − T_ij)² / σ_c(j)² + log σ_c(j)² ]

Pairs are summed. The variance is log(1 + exp(s_c)) + ε with ε = 1e-5, which begins as 5, as in the public code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_forms import FeatureForm, Shape
from dkd.losses.feature_pairs import Features, as_list, no_autocast
from dkd.losses.formed_features import FormedFeatures

_FIRST_VARIANCE, _LEAST_VARIANCE = 5.0, 1e-5


class VariationalAdapter(nn.Module):
    """Estimates the mean and the variance of each of the teacher's features from the student's.

    Args:
        form: maps.
        shapes: (student, teacher) of each pair in that form, (C, H, W).

    The module is called with two lists of features. It returns mean and variance of each pair in turn: (b, C, H, W) and
    (1, C, 1, 1).
    """

    def __init__(self, form: FeatureForm, shapes: Sequence[tuple[Shape, Shape]]) -> None:
        super().__init__()
        self.form = form
        self.regressors = nn.ModuleList(_regressor(student[0], teacher[0]) for student, teacher in shapes)
        first = math.log(math.expm1(_FIRST_VARIANCE - _LEAST_VARIANCE))
        self.scales = nn.ParameterList(torch.full((teacher[0],), first) for _, teacher in shapes)

    def forward(self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for s, t, regress, scale in zip(student, teacher, self.regressors, self.scales, strict=True):
            found += [regress(self.form.student(s, t)), (F.softplus(scale) + _LEAST_VARIANCE).view(1, -1, 1, 1)]
        return found


def _regressor(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 1, bias=False),
    )


class VID(FormedFeatures, nn.Module):
    """Compute L_VID as a mean over the global batch.

    Args:
        form: what features are brought into; None: maps.
        weights: one weight for each pair; None: 1.

    The module is called with what VariationalAdapter yields and the teacher's features. It returns a scalar with the
    same meaning over ranks as AttentionTransfer's.

    Raises:
        ValueError: these are not a mean and a variance for each of the teacher's features.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(self, form: FeatureForm | None = None, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.form, self.weights = form or FeatureForm("map", resize="pool"), weights

    def extra_repr(self) -> str:
        return f"form={self.form}, weights={self.weights}"

    def forward(
        self, student: Sequence[torch.Tensor], teacher: Features, layout: BatchLayout | None = None
    ) -> torch.Tensor:
        teachers = as_list(teacher)
        layout = layout or BatchLayout.agree([*student[::2], *teachers], loss=self)
        if len(student) != 2 * len(teachers):
            raise ValueError(f"VID needs a mean and a variance for each of {len(teachers)} features: its adapter's")
        weights = self.weights or [1.0] * len(teachers)
        with no_autocast(teachers[0].device):
            values = []
            for mean, variance, t, weight in zip(student[::2], student[1::2], teachers, weights, strict=True):
                mean, variance = full_precision(mean), full_precision(variance)
                wanted = self.form.teacher(full_precision(t.detach()), mean)
                per_number = 0.5 * ((mean - wanted).square() / variance + variance.log())
                values.append(weight * layout.mean(per_number.flatten(1).mean(1)))
            return torch.stack(values).sum()
