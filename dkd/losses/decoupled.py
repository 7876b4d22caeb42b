"""Compute Decoupled Knowledge Distillation (DKD). Source: Zhao et al., CVPR 2022.

p = softmax(z / T) are probabilities of the K classes, y is the label, and p̂ = softmax of the same logits without the
label's:

    TCKD = KL( (p_T,y, 1 − p_T,y) ‖ (p_S,y, 1 − p_S,y) )          of the label against all other classes
    NCKD = KL( p̂_T ‖ p̂_S )                                        between the other classes
    L_DKD = T² · (1/B) Σ_i ( α TCKD_i + β NCKD_i )

With r = 1 − p_T,y, KL( p_T ‖ p_S ) = TCKD + r NCKD, as the paper shows, so that with w = β − α r

    α TCKD + β NCKD            = α KL( p_T ‖ p_S ) + w NCKD
    its derivative by z_S      = ( α (p_S − p_T) + w (p̂_S − p̂_T) ) / T          p̂ of the label: 0

Both divergences of both models are computed by the same operations, of which a GPU then launches few.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import (
    as_list,
    check_classes,
    check_logit_pair,
    needs_plain_autograd,
    no_autocast,
)
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
        layout.check(student)
        factor = self.temperature**2 * layout.factor
        with no_autocast(student.device):
            student, teacher = full_precision(student), teacher.detach()
            # The closed form subtracts where β < α, and loses digits there.
            if needs_plain_autograd([student, teacher, labels]) or self.beta < self.alpha or student.shape[1] < 2:
                return self.plainly(student, teacher, labels) * factor
            value: torch.Tensor = _Decoupled.apply(self, student, teacher, labels)
            return value * factor

    def plainly(self, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return Σ_i (α TCKD_i + β NCKD_i) by operations that autograd follows."""
        s, t = student / self.temperature, full_precision(teacher) / self.temperature
        target = divergence(_of_label(s, labels), _of_label(t, labels))
        others = divergence(of_other_classes(s, labels), of_other_classes(t, labels))
        return (self.alpha * target + self.beta * others).sum()


class _Decoupled(torch.autograd.Function):
    """Compute Σ_i (α TCKD_i + β NCKD_i), and its derivative, as the head of this file has them."""

    @staticmethod
    def forward(
        ctx: Any, loss: DKD, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        # Stacked, the teacher's logits are promoted to the precision of the student's, which is full.
        logits = torch.stack([student, teacher]).div_(loss.temperature).repeat(2, 1, 1, 1)
        places = labels[:, None]
        logits[1].scatter_(2, places.expand(2, -1, -1), -torch.inf)
        logs = logits.log_softmax(3)  # (2, 2, b, K): of all classes and of those but the label; of student and teacher
        probabilities = logs.exp()
        of_teacher = probabilities[:, 1]
        # p·log(p/q) is 0 at p = 0, but is computed as 0·∞.
        terms = (logs[:, 1] - logs[:, 0]).mul_(of_teacher).masked_fill_(of_teacher == 0, 0.0)
        whole, others = terms.sum(2)
        # Not as 1 − p, which has no digits left where p is near 1.
        rest = of_teacher[0].scatter(1, places, 0.0).sum(1)
        weights = torch.rsub(rest, loss.beta, alpha=loss.alpha)  # β − α r
        ctx.save_for_backward(student, labels, probabilities, weights)
        # Not saved: it may come from torch.inference_mode, and no gradient reaches it.
        ctx.loss, ctx.teacher = loss, teacher
        total = weights * others
        # A product of 0 and ∞ is no number.
        return (total if loss.alpha == 0 else total.add_(whole, alpha=loss.alpha)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, labels, probabilities, weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            value = ctx.loss.plainly(student, ctx.teacher, labels)
            return None, *torch.autograd.grad(value, student, grads[0], create_graph=True), None, None
        whole, others = probabilities[:, 0] - probabilities[:, 1]
        slope = whole.mul_(ctx.loss.alpha).addcmul_(others, weights[:, None])
        return None, slope.mul_(grads[0] / ctx.loss.temperature), None, None


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
