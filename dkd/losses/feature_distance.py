"""Compare features themselves: FitNet and its kin.

Sources: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015; Miles, Elezi & Deng, "VkD", CVPR 2024.

For one pair (S, T) of features in one form, the student's after its adapter, n numbers each, over the B samples of the
global batch:

    mse          (1/B) Σ_i (1/n) ‖S_i − T_i‖²
    smooth_l1    (1/B) Σ_i (1/n) Σ_j h(S_ij − T_ij),  h(x) = x²/2 for |x| < 1, else |x| − 1/2
    cosine       (1/B) Σ_i 1 − cos(S_i, T_i),  over the channels, as a mean over the places of a map

Pairs are summed. FitNet is `mse` with a regressor (conv1x1_bn_relu in the public code); VkD is `smooth_l1` with an
orthogonal projection and a teacher normalised by its channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_forms import FeatureForm
from dkd.losses.feature_pairs import Features, as_list, as_pairs, no_autocast
from dkd.losses.formed_features import FormedFeatures
from dkd.losses.teacher_norm import TeacherNorm

DISTANCES = ("mse", "smooth_l1", "cosine")


class FeatureDistance(FormedFeatures, nn.Module):
    """Compute the distance of features as a mean over the global batch.

    Args:
        distance: as above.
        form: what features are brought into.
        teacher_norm: how the teacher's are normalised.
        weights: one weight for each pair; None: 1.

    The module is called with one feature of the student and one of the teacher, or with equal-length lists. What an
    adapter yields stands in the place of the student's features. It returns a scalar with the same meaning over ranks
    as AttentionTransfer's.

    Raises:
        ValueError: the shapes make no pair.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(
        self,
        distance: str = "mse",
        form: FeatureForm | None = None,
        teacher_norm: TeacherNorm | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if distance not in DISTANCES:
            raise ValueError(f"distance={distance!r}: must be one of {', '.join(DISTANCES)}")
        self.distance, self.form, self.weights = distance, form or FeatureForm(), weights
        self.teacher_norm = teacher_norm or TeacherNorm()

    def extra_repr(self) -> str:
        return f"distance={self.distance!r}, form={self.form}, weights={self.weights}"

    def forward(self, student: Features, teacher: Features, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        pairs = as_pairs(student, teacher, self.weights)
        with no_autocast(pairs[0][0].device):
            formed = [
                (self.form.student(full_precision(s), t), self.form.teacher(full_precision(t.detach()), s), w)
                for s, t, w in pairs
            ]
            normalized = self.teacher_norm([t for _, t, _ in formed])
            values = [w * layout.mean(self._compare(s, t)) for (s, _, w), t in zip(formed, normalized, strict=True)]
            return torch.stack(values).sum()

    @property
    def measures(self) -> bool:
        """Return whether statistics of the teacher have to be measured before the first call."""
        return self.teacher_norm.kind == "standardize"

    def measure(self, teacher: Features) -> None:
        """Add features of this rank to the statistics, at the teacher's own resolution."""
        self.teacher_norm.measure([self.form.teacher(full_precision(t.detach()), t) for t in as_list(teacher)])

    def finish_measuring(self) -> None:
        """Set the statistics from what all ranks have measured. A collective of all ranks."""
        self.teacher_norm.finish_measuring()

    def _compare(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return (b,), the distance of each sample."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"features of shape {tuple(student.shape[1:])} and {tuple(teacher.shape[1:])} cannot be compared: the "
                "student's need an adapter"
            )
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(student, teacher, dim=1).reshape(len(student), -1).mean(1)
        if self.distance == "mse":
            return (student - teacher).square().flatten(1).mean(1)
        return F.smooth_l1_loss(student, teacher, reduction="none").flatten(1).mean(1)
