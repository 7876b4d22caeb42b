"""Compute the binary cross-entropy of each class with the labels, as a mean over the global batch.

Source: Wightman, Touvron & Jégou, "ResNet strikes back: An improved training procedure in timm", 2021, section 2. The
targets and the defaults are those of timm's BinaryCrossEntropy.

With y_ic the 0 or 1 of a label, or the class probability of mixed images, K classes and label smoothing ε:

    t_ic = (1 − ε) y_ic + ε/K,   and with a threshold τ   t_ic = 1 where (1 − ε) y_ic + ε/K > τ, else 0

    L = (1/B) Σ_i (1/K) Σ_c [ −t_ic log σ(z_ic) − (1 − t_ic) log(1 − σ(z_ic)) ]

`sum_classes` leaves 1/K out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import as_list, check_labels, check_logits, no_autocast


class BinaryCrossEntropy(nn.Module):
    """Compute L as a mean over the global batch.

    Args:
        label_smoothing: ε, from 0 to less than 1.
        target_threshold: τ, from 0 to less than 1; None: targets stay as they are.
        sum_classes: whether the losses of an image's classes are summed, and not averaged.

    The module is called with logits (b, K) and integer labels (b,) or class probabilities (b, K). It returns a scalar
    with the same meaning over ranks as AttentionTransfer's.

    Raises:
        ValueError: a setting is out of range, or logits or labels have other shapes.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(
        self, label_smoothing: float = 0.0, target_threshold: float | None = None, sum_classes: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("label_smoothing", label_smoothing), ("target_threshold", target_threshold)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value}: must be from 0 to less than 1")
        self.label_smoothing, self.target_threshold = label_smoothing, target_threshold
        self.sum_classes = sum_classes

    def extra_repr(self) -> str:
        return (
            f"label_smoothing={self.label_smoothing}, target_threshold={self.target_threshold}, "
            f"sum_classes={self.sum_classes}"
        )

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(logits), labels], loss=self)
        check_logits(logits)
        check_labels(labels, logits)
        with no_autocast(logits.device):
            logits = full_precision(logits)
            targets = self.targets(labels, logits)
            of_classes = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            return layout.mean(of_classes.sum(1) if self.sum_classes else of_classes.mean(1))

    def targets(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the target (b, K) of each class, from 0 to 1, in the type of the logits.

        Args:
            labels: integers (b,) or class probabilities (b, K).
            logits: (b, K).
        """
        classes = logits.shape[1]
        if labels.is_floating_point():
            known = labels.to(logits.dtype)
        else:  # torch's one_hot reads the largest label on the host
            known = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
        targets = known * (1 - self.label_smoothing) + self.label_smoothing / classes
        return targets if self.target_threshold is None else (targets > self.target_threshold).to(logits.dtype)
