"""Compute gradient-based Attention Transfer. Source: Zagoruyko & Komodakis, ICLR 2017, section 3.2.

A network attends to the places of its input where its loss would change, sample by sample: J_i = ∂ℓ_i / ∂x_i, with ℓ_i
the cross-entropy of sample i with its label. Over the B samples of the global batch:

    transfer    (1/B) Σ_i ½ ‖J_S,i − J_T,i‖₂
                student S against teacher T; J_T is a constant
    symmetric   (1/B) Σ_i ½ ‖J_i − flip(∂ℓ(flip x)_i / ∂(flip x)_i)‖₂
                one network against itself on the mirrored image; no teacher

`squared` takes ½ ‖·‖₂² instead, whose gradient the paper writes out below its equation. Differentiating J takes a
second backward through the network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import check_labels, check_logits, no_autocast


class GradientAttention(nn.Module):
    """Compute the gradient-based AT loss over the global batch.

    Args:
        form: `transfer` or `symmetric`.
        squared: ½ ‖·‖₂² instead of ½ ‖·‖₂.

    The module is called with the student's logits (b, K); the teacher's logits (`transfer`), or the student's own
    logits of the mirrored images (`symmetric`); the images (b, 3, H, W), which require gradient and which all these
    logits were computed from, mirrored by `images.flip(-1)`; and labels (b,) or class probabilities (b, K). It returns
    a scalar with the same meaning over ranks as AttentionTransfer's. BatchNorm in training mode lets one sample's loss
    depend on its neighbours' pixels; J includes that share.

    Raises:
        ValueError: the images require no gradient; logits or labels have other shapes.
        BatchMismatchError: on all ranks, when shapes differ between ranks.

    Example:
        >>> images.requires_grad_()
        >>> gradient_at = GradientAttention()
        >>> loss = cross_entropy + beta * gradient_at(student(images), teacher(images), images, labels)
    """

    def __init__(self, form: str = "transfer", squared: bool = False) -> None:
        super().__init__()
        if form not in ("transfer", "symmetric"):
            raise ValueError(f"form={form!r}: must be one of transfer, symmetric")
        self.form, self.squared = form, squared

    def extra_repr(self) -> str:
        return f"form={self.form!r}, squared={self.squared}"

    def forward(
        self,
        student: torch.Tensor,
        other: torch.Tensor,
        images: torch.Tensor,
        labels: torch.Tensor,
        layout: BatchLayout | None = None,
    ) -> torch.Tensor:
        layout = layout or BatchLayout.agree([student, other, images, labels], loss=self)
        for logits in (student, other):
            check_logits(logits)
            check_labels(labels, logits)
        if not images.requires_grad:
            raise ValueError("the images require no gradient: call images.requires_grad_() before the models see them")
        own = input_gradient(student, images, labels, differentiable=True)
        # Through `flip`, the mirrored loss is a function of the images themselves: its gradient is mirrored back.
        wanted = input_gradient(other, images, labels, differentiable=self.form == "symmetric")
        with no_autocast(images.device):
            difference = full_precision(own - wanted).flatten(1)
            if self.squared:
                return layout.mean(0.5 * difference.square().sum(1))
            return layout.mean(0.5 * torch.linalg.vector_norm(difference, dim=1))


def input_gradient(
    logits: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, differentiable: bool
) -> torch.Tensor:
    """Return J, (b, 3, H, W): ∂(Σ_i ℓ_i)/∂x. The losses are summed, so that J_i does not depend on the number of
    samples.

    Args:
        logits: (b, K), computed from `images`.
        images: (b, 3, H, W), which require gradient.
        labels: (b,), or class probabilities (b, K).
        differentiable: whether J can be differentiated in turn; else J is a constant.
    """
    with no_autocast(images.device):
        logits = full_precision(logits)
        targets = labels.to(logits.dtype) if labels.is_floating_point() else labels
        loss = F.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=differentiable, retain_graph=True)
    return gradient if differentiable else gradient.detach()
