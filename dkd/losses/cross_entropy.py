"""Compute the cross-entropy with the labels, as a mean over the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.losses.feature_pairs import check_labels, check_logits, no_autocast


class CrossEntropy(nn.Module):
    """Compute (1/B) Σ_i CE(z_i, y_i). The mean over a rank's own rows equals it only when all ranks hold equally many
    rows.

    Args:
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    The module is called with logits (b, K) and integer labels (b,) or class probabilities (b, K). It returns a scalar
    with the same meaning over ranks as AttentionTransfer's.

    Raises:
        ValueError: logits or labels have other shapes.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([logits, labels], loss=self)
        check_logits(logits)
        check_labels(labels, logits)
        with no_autocast(logits.device):
            logits = full_precision(logits)
            if labels.is_floating_point():
                labels = labels.to(logits.dtype)
            per_sample = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
            return layout.mean(per_sample)
