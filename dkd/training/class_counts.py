"""Exact counts of an evaluation for each class: right answers, and which class was taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MOST_CLASSES_OF_A_MATRIX = 1000
"""Classes up to which an evaluation keeps the confusion matrix: 8 bytes for each pair of classes, 8 MB on each rank."""


@dataclass(frozen=True)
class ClassCounts:
    """Holds whole numbers for each class, over a data set.

    Args:
        counts: int64 (K, 3): of each class the samples, and those whose first class, or one of whose first five
            classes, is right.
        confusion: int64 (K, K): samples of the class of the row for which the class of the column came first; None for
            more classes than `MOST_CLASSES_OF_A_MATRIX`.
    """

    counts: torch.Tensor
    confusion: torch.Tensor | None

    @classmethod
    def zeros(cls, classes: int, device: torch.device) -> ClassCounts:
        """Return counts of no sample."""
        matrix = None
        if classes <= MOST_CLASSES_OF_A_MATRIX:
            matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        return cls(torch.zeros(classes, 3, dtype=torch.int64, device=device), matrix)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count samples, in place.

        Args:
            logits: (b, K).
            labels: int64 (b,), on the same device.
        """
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        right = ranked == labels[:, None]
        rows = torch.stack([torch.ones_like(labels), right[:, 0].long(), right.any(1).long()], dim=1)
        self.counts.index_add_(0, labels, rows)
        if self.confusion is not None:
            places = labels * logits.shape[1] + ranked[:, 0]
            self.confusion.view(-1).index_add_(0, places, torch.ones_like(places))

    def over_ranks(self) -> ClassCounts:
        """Return the counts of all ranks, on the CPU. A collective: one all-reduce of whole numbers, and so exact."""
        parts = [self.counts] if self.confusion is None else [self.counts, self.confusion]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat)
            split = flat.split([part.numel() for part in parts])
            parts = [summed.view_as(part) for summed, part in zip(split, parts, strict=True)]
        counts, *matrix = (part.cpu() for part in parts)
        return ClassCounts(counts, matrix[0] if matrix else None)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Return samples, and those right at first and among the first five, of all classes."""
        samples, top1, top5 = self.counts.sum(0).tolist()
        return samples, top1, top5

    def facts(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return what JSON can hold: `classes`, one mapping for each class, and `confusion`, the rows of the matrix or
        None. The accuracy of a class without samples is None.

        Args:
            names: of the classes; None: they have none.
        """
        several = len(self.counts) > 5
        classes = []
        for label, (samples, top1, top5) in enumerate(self.counts.tolist()):
            named = {} if names is None or label >= len(names) else {"name": names[label]}
            classes.append(
                {
                    "label": label,
                    **named,
                    "samples": samples,
                    "top1_correct": top1,
                    "top5_correct": top5 if several else None,
                    "top1": top1 / samples if samples else None,
                    "top5": top5 / samples if samples and several else None,
                }
            )
        return {"classes": classes, "confusion": None if self.confusion is None else self.confusion.tolist()}
