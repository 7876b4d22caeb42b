"""Compute Decoupled Knowledge Distillation (DKD). Source: Zhao et al., CVPR 2022.

p = softmax(z / T) are probabilities of the K classes, y is the label, and p̂ = softmax of the same logits without the
label's:

    TCKD = KL( (p_T,y, 1 − p_T,y) ‖ (p_S,y, 1 − p_S,y) )          of the label against all other classes
    NCKD = KL( p̂_T ‖ p̂_S )                                        between the other classes
    L_DKD = T² · (1/B) Σ_i ( α TCKD_i + β NCKD_i )
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import as_list, check_classes, check_logit_pair, no_autocast
from dkd.losses.soft_targets import divergence


class DKD(nn.Module):
    """Compute L_DKD as a mean over the global batch.

    Args:
        alpha: α, the weight of TCKD.
        beta: β, the weight of NCKD.
        temperature: T.

    The module is called with logits (b, K) of the student and of the teacher, and labels (b,). It returns a scalar with
    the same meaning over ranks as AttentionTransfer's.

    Raises:
        ValueError: the logits differ in shape, or have another shape than (b, K); the labels are no classes (b,), such
            as the class weights of mixed images.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, layout: BatchLayout | None = None
    ) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher), labels], loss=self)
        check_logit_pair(student, teacher)
        check_classes(labels, student)
        with no_autocast(student.device):
            s, t = full_precision(student) / self.temperature, full_precision(teacher.detach()) / self.temperature
            target = divergence(_of_label(s, labels), _of_label(t, labels))
            others = divergence(of_other_classes(s, labels), of_other_classes(t, labels))
            return self.temperature**2 * layout.mean(self.alpha * target + self.beta * others)


def _of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (b, 2) of the label and of all other classes together. Neither is computed as the
    logarithm of 1 − p, which has no digits left where p is near 1."""
    rest = _without_label(logits, labels).logsumexp(1)
    return torch.stack([logits.gather(1, labels[:, None])[:, 0], rest], 1).log_softmax(1)


def of_other_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (b, K − 1) of the classes but the label, among themselves."""
    return F.log_softmax(_without_label(logits, labels), dim=1)


def _without_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the logits (b, K − 1) of the other classes, in order."""
    rows, classes = logits.shape
    place = torch.arange(classes - 1, device=logits.device).expand(rows, -1)
    return logits.gather(1, place + (place >= labels[:, None]).long())
