"""Compute the loss of soft targets (KD).

Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.

L_KD = T² · (1/B) Σ_i KL( softmax(z_T,i / T) ‖ softmax(z_S,i / T) )
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

    The module is called with logits (b, K) of the student and of the teacher. It returns a scalar with the same meaning
    over ranks as AttentionTransfer's. A class whose logit is −∞ for the teacher, such as a class that is masked out,
    has probability 0 and adds nothing.

    Raises:
        ValueError: the logits differ in shape, or have another shape than (b, K).
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher)], loss=self)
        check_logit_pair(student, teacher)
        with no_autocast(student.device):
            log_student = F.log_softmax(full_precision(student) / self.temperature, dim=1)
            log_teacher = F.log_softmax(full_precision(teacher.detach()) / self.temperature, dim=1)
            by_class = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
            # p·log(p/q) is 0 at p = 0, but is computed as 0·∞.
            by_class = by_class.masked_fill(log_teacher.exp() == 0, 0.0)
            return self.temperature**2 * layout.mean(by_class.sum(1))
