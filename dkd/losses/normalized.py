"""Compute Normalised Knowledge Distillation (NKD).

Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels", ICCV 2023.

p = softmax(z), y is the label, and p̂ = softmax(z / T) of the logits without the label's:

    L_NKD = (1/B) Σ_i [ −p_T,y log p_S,y − γ T² Σ_{c≠y} p̂_T,c log p̂_S,c ]
"""

from __future__ import annotations

import torch
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.decoupled import of_other_classes
from dkd.losses.feature_pairs import as_list, check_classes, check_logit_pair, no_autocast


class NKD(nn.Module):
    """Compute L_NKD as a mean over the global batch.

    Args:
        temperature: T, of the classes but the label.
        gamma: γ, the weight of their part.

    The module is called as DKD, and raises the same errors.
    """

    def __init__(self, temperature: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.temperature, self.gamma = temperature, gamma

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gamma={self.gamma}"

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, layout: BatchLayout | None = None
    ) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(student), *as_list(teacher), labels], loss=self)
        check_logit_pair(student, teacher)
        check_classes(labels, student)
        with no_autocast(student.device):
            s, t = full_precision(student), full_precision(teacher.detach())
            label = labels[:, None]
            of_label = t.softmax(1).gather(1, label)[:, 0] * s.log_softmax(1).gather(1, label)[:, 0]
            s_others, t_others = (of_other_classes(z / self.temperature, labels) for z in (s, t))
            # p·log q is 0 at p = 0, but is computed as 0·∞.
            probability = t_others.exp()
            others = (probability * s_others).masked_fill(probability == 0, 0.0).sum(1)
            return layout.mean(-of_label - self.gamma * self.temperature**2 * others)
