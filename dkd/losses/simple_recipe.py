"""Compute SRD. Source: Miles & Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation" (Simple
Recipe Distillation), AAAI 2024.

S are the student's projected vectors (B, C), T the teacher's, both normalised by the batch, over the global batch:

    L_SRD = 2 log Σ_i Σ_j |S_ij − T_ij|^α

The sum is inside the logarithm, so that it is one sum over all samples: parts of a batch cannot be averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dkd.global_batch import BatchLayout, add_over_ranks, full_precision
from dkd.losses.feature_forms import FeatureForm
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast
from dkd.losses.formed_features import FormedFeatures
from dkd.losses.teacher_norm import TeacherNorm


class SRD(FormedFeatures, nn.Module):
    """Compute L_SRD over the global batch.

    Args:
        alpha: α.
        form: what features are brought into; None: vectors.
        weights: one weight for each pair; None: 1.

    The module is called as FeatureDistance; the adapter of the public code is `linear_bn`. The teacher's features are
    normalised over the samples of all ranks. It returns a scalar whose mean over ranks is L_SRD of the global batch.

    Raises:
        ValueError: the shapes make no pair.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    relational = True

    def __init__(
        self, alpha: float = 4.0, form: FeatureForm | None = None, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if alpha < 1:
            raise ValueError(f"alpha={alpha}: must be at least 1")
        self.alpha, self.form, self.weights = alpha, form or FeatureForm("vector"), weights
        self.teacher_norm = TeacherNorm("batch")

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, form={self.form}, weights={self.weights}"

    def forward(self, student: Features, teacher: Features, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        pairs = as_pairs(student, teacher, self.weights)
        with no_autocast(pairs[0][0].device):
            students = [self.form.student(full_precision(s), t) for s, t, _ in pairs]
            teachers = [self.form.teacher(full_precision(t.detach()), s) for s, t, _ in pairs]
            teachers = self.teacher_norm(teachers, layout)
            sums = []
            for s, t in zip(students, teachers, strict=True):
                if s.shape != t.shape:
                    raise ValueError(
                        f"features of shape {tuple(s.shape[1:])} and {tuple(t.shape[1:])} cannot be compared: the "
                        "student's need an adapter"
                    )
                sums.append((s - t).abs().pow(self.alpha).sum())
            logarithms = add_over_ranks(torch.stack(sums), layout).log()
            return 2 * (logarithms * logarithms.new_tensor([w for _, _, w in pairs])).sum()
