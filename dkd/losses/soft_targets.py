"""Compute the loss of soft targets (KD), also of standardised logits (KD-LS).

Sources: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015; Sun et al., "Logit
Standardization in Knowledge Distillation", CVPR 2024.

L_KD = T² · (1/B) Σ_i KL( softmax(z_T,i / T) ‖ softmax(z_S,i / T) )

Standardised, each sample's logits are (z − mean(z)) / std(z) first, over its K classes, with the standard deviation of
K − 1 degrees of freedom, as the public code has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import as_list, check_logit_pair, needs_plain_autograd, no_autocast


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
            student, teacher = full_precision(student), teacher.detach()
            if self.standardize:
                student, teacher = standardized(student), standardized(full_precision(teacher))
            layout.check(student)
            factor = self.temperature**2 * layout.factor
            if needs_plain_autograd([student, teacher]):
                teacher = full_precision(teacher)
                return _divergence_by_autograd(student, teacher, self.temperature, factor)
            value: torch.Tensor = _Divergence.apply(student, teacher, self.temperature, factor)
            return value


class _Divergence(torch.autograd.Function):
    """Compute factor · Σ_i KL(softmax(z_T,i / T) ‖ softmax(z_S,i / T)) by few operations, and its derivative
    factor / T · (softmax(z_S / T) − softmax(z_T / T))."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float, factor: float
    ) -> torch.Tensor:
        # Stacked, the teacher's logits are promoted to the precision of the student's, which is full.
        logs = torch.stack([student, teacher]).div_(temperature).log_softmax(2)
        of_student, of_teacher = logs.exp()
        # p·log(p/q) is 0 at p = 0, but is computed as 0·∞.
        terms = (logs[1] - logs[0]).mul_(of_teacher).masked_fill_(of_teacher == 0, 0.0)
        ctx.save_for_backward(student, of_student, of_teacher)
        # Not saved: it may come from torch.inference_mode, and no gradient reaches it.
        ctx.teacher, ctx.temperature, ctx.factor = teacher, temperature, factor
        return terms.sum() * factor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, of_student, of_teacher = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            teacher = full_precision(ctx.teacher)
            value = _divergence_by_autograd(student, teacher, ctx.temperature, ctx.factor)
            return *torch.autograd.grad(value, student, grads[0], create_graph=True), None, None, None
        return (of_student - of_teacher).mul_(grads[0] * (ctx.factor / ctx.temperature)), None, None, None


def _divergence_by_autograd(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, factor: float
) -> torch.Tensor:
    """Return what `_Divergence` computes, by operations that autograd follows."""
    logs = [F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher)]
    return divergence(*logs).sum() * factor


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
