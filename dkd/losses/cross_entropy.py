"""Compute the cross-entropy with the labels, as a mean over the global batch.

With class weights w, as `torch.nn.functional.cross_entropy(weight=w, reduction="mean")` on the whole global batch:

    labels         Σ_i w_{y_i} ℓ_i / Σ_i w_{y_i}
    probabilities  (1/B) Σ_i Σ_c w_c y_ic (−log p_ic)       (mixup and CutMix)

With label smoothing ε, w_{y_i} ℓ_i is (1 − ε) w_{y_i} (−log p_{i,y_i}) + (ε/K) Σ_c w_c (−log p_ic).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dkd.global_batch import BatchLayout, full_precision
from dkd.global_batch.collectives import sum_over_ranks, world_size
from dkd.losses.feature_pairs import as_list, check_labels, check_logits, no_autocast


class CrossEntropy(nn.Module):
    """Compute (1/B) Σ_i CE(z_i, y_i). The mean over a rank's own rows equals it only when all ranks hold equally many
    rows, and with class weights not even then.

    Args:
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
        weight: the weight of each class, K numbers from 0; None: all are 1.

    The module is called with logits (b, K) and integer labels (b,) or class probabilities (b, K). It returns a scalar
    with the same meaning over ranks as AttentionTransfer's. With class weights, one call is the mean over the rows of
    all ranks; where a step has several calls on each rank, `begin_step` makes it the mean over all of the step's rows.

    Raises:
        ValueError: logits or labels have other shapes, or the weights are no weights of these classes.
        BatchMismatchError: on all ranks, when shapes differ between ranks.
    """

    weight: torch.Tensor | None

    def __init__(self, label_smoothing: float = 0.0, weight: Sequence[float] | torch.Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        weights = None if weight is None else torch.as_tensor(weight, dtype=torch.float64)
        if weights is not None and (
            weights.dim() != 1 or not weights.isfinite().all() or (weights < 0).any() or not weights.any()
        ):
            raise ValueError("weight must be one finite number from 0 for each class, and not 0 for all of them")
        self._shown = "" if weights is None else f", weight of {len(weights)} classes with sum {weights.sum():g}"
        self.register_buffer("weight", weights, persistent=False)
        self._mean_weight: torch.Tensor | None = None

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}{self._shown}"

    @property
    def of_whole_steps(self) -> bool:
        """Return whether a step's calls need to know of each other: DistillationStep then calls `begin_step`."""
        return self.weight is not None

    def begin_step(self, labels: Sequence[torch.Tensor]) -> None:
        """Compute the mean weight of the labels of a whole step, which the calls up to the next step divide by. A
        collective of all ranks. Each rank has equally many rows in each micro-step.

        Args:
            labels: of each micro-step on this rank, integers (b,), on the device of the logits; probabilities need no
                mean.
        """
        self._mean_weight = None
        if self.weight is None or any(part.is_floating_point() for part in labels):
            return
        mean = self._weigh(torch.cat(list(labels))).mean()
        self._mean_weight = sum_over_ranks(mean) / world_size() if world_size() > 1 else mean

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, layout: BatchLayout | None = None) -> torch.Tensor:
        layout = layout or BatchLayout.agree([*as_list(logits), labels], loss=self)
        check_logits(logits)
        check_labels(labels, logits)
        if self.weight is not None and len(self.weight) != logits.shape[1]:
            raise ValueError(f"weight has {len(self.weight)} classes, the logits have {logits.shape[1]}")
        with no_autocast(logits.device):
            logits = full_precision(logits)
            if labels.is_floating_point():
                labels = labels.to(logits.dtype)
            if self.weight is None:
                return self._mean(logits, labels, layout)
            weight = self.weight.to(logits)
            per_sample = F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=self.label_smoothing)
            if labels.is_floating_point():
                return layout.mean(per_sample)
            mean = self._mean_weight
            if mean is None:
                mean = layout.sum(self._weigh(labels).sum()) / layout.total
            # Where all labels have weight 0, nothing is to be learned from them; with label smoothing, the terms of the
            # other classes would stay, and be divided by 0.
            share = torch.where(mean > 0, 1 / mean, torch.zeros_like(mean)).to(logits.dtype)
            return layout.mean(per_sample) * share

    def _mean(self, logits: torch.Tensor, labels: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Return `layout.mean` of the loss of each sample, without class weights. torch adds the samples up by the same
        operation that computes their losses; it would divide by the labels that are not -100, and not by B."""
        layout.check(logits)
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return loss * layout.factor

    def _weigh(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the weight of each label, in float64."""
        assert self.weight is not None
        return self.weight.to(labels.device)[labels]
