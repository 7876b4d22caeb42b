"""What the feature losses accept: one pair of tensors, or equal-length lists of student and teacher tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

Features = torch.Tensor | Sequence[torch.Tensor]


def as_list(features: Features) -> list[torch.Tensor]:
    return [features] if isinstance(features, torch.Tensor) else list(features)


def as_pairs(student: Features, teacher: Features, weights: Sequence[float] | None) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """(student feature, teacher feature, weight) for each pair; weights default to 1.

    Raises:
        ValueError: when the lists or the weights differ in length, or are empty.
    """
    students, teachers = as_list(student), as_list(teacher)
    if len(students) != len(teachers) or not students:
        raise ValueError(f"{len(students)} student features and {len(teachers)} teacher features do not make pairs")
    pair_weights = [1.0] * len(students) if weights is None else list(weights)
    if len(pair_weights) != len(students):
        raise ValueError(f"{len(pair_weights)} weights for {len(students)} pairs")
    for s, t in zip(students, teachers, strict=True):
        if s.shape[0] != t.shape[0]:
            raise ValueError(f"student and teacher hold different rows: {tuple(s.shape)} and {tuple(t.shape)}")
    return list(zip(students, teachers, pair_weights, strict=True))


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """The losses compute in the precision of `full_precision`, whatever autocast the model runs under."""
    with torch.autocast(device.type, enabled=False):
        yield
