"""Compute the loss of soft targets (KD), also of standardised logits (KD-LS).

Sources: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015; Sun et al., "Logit
Standardization in Knowledge Distillation", CVPR 2024.

L_KD = T² · (1/B) Σ_i KL( softmax(z_T,i / T) ‖ softmax(z_S,i / T) )

Standardised, each sample's logits are (z − mean(z)) / std(z) first, over its K classes, with the standard deviation of
K − 1 degrees of freedom, as the public code has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import as_list, check_logit_pair, no_autocast


class SoftTargets(nn.Module):
    """Compute T²·KL between the softened outputs of teacher and student, as a mean over the global batch.

    Args:
        temperature: T.
        standardize: whether each sample's logits are standardised first.

    The module is called with logits (b, K) of the student and of the teacher. It returns a scalar with the same meaning
    over ranks as AttentionTransfer's. A class whose logit is −∞ for the teacher, such as a class that is masked out,
    has probability 0 and adds nothing. Equal logits of a sample have no standard deviation, and stay equal.

    Raises:
        ValueError: the logits differ in shape, or have another shape than (b, K).
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(self, temperature: float = 4.0, standardize: bool = False) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.temperature, self.standardize = temperature, standardize

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}" + (", standardize=True" if self.standardize else "")

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        check_logit_pair(student, teacher)
        with no_autocast(student.device):
            student, teacher = full_precision(student), full_precision(teacher.detach())
            if self.standardize:
                student, teacher = standardized(student), standardized(teacher)
            log_student = F.log_softmax(student / self.temperature, dim=1)
            log_teacher = F.log_softmax(teacher / self.temperature, dim=1)
            return self.temperature**2 * layout.mean(divergence(log_student, log_teacher))


def divergence(log_student: torch.Tensor, log_teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher ‖ student) of each row (b,) of log-probabilities (b, K)."""
    by_class = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    # p·log(p/q) is 0 at p = 0, but is computed as 0·∞.
    return by_class.masked_fill(log_teacher.exp() == 0, 0.0).sum(1)


def standardized(logits: torch.Tensor) -> torch.Tensor:
    """Return logits (b, K) with mean 0 and standard deviation 1 in each row; equal logits become 0."""
    centered = logits - logits.mean(1, keepdim=True)
    variance = centered.square().sum(1, keepdim=True) / max(1, logits.shape[1] - 1)
    varies = variance > 0
    return torch.where(varies, centered * torch.where(varies, variance, 1.0).rsqrt(), 0.0 * centered)
