"""Bring features of a student and a teacher into one form: maps (b, C, H, W) of one resolution, or one vector (b, C)
for each sample.

    (b, C, H, W), (b, H, W, C)    a map; its vector is the mean over its places
    (b, N, C)                     tokens: the first ones are class tokens, the others make a square map; their vector is
                                  the mean over the others, or the first class token
    (b, C)                        a vector; as a map, it has one place
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from dkd.losses.attention_transfer import token_grid, tokens_of_both
from dkd.losses.sample_form import Shape

__all__ = ["FeatureForm", "Shape"]


@dataclass(frozen=True)
class FeatureForm:
    """Holds how the features of a pair are brought into one form.

    Args:
        kind: `map` or `vector`.
        class_tokens: for features of tokens (b, N, C): the number of tokens at the front that are no part of the image;
            two numbers are those of student and teacher; None: a map of tokens is an error, and the vector of tokens is
            the mean over all of them.
        pool: the vector of tokens: `mean`, or `class_token`, the first token.
        resize: where the resolutions of two maps differ: `error`; `pool`, the larger one is average-pooled; or
            `interpolate`, the student's is interpolated to the teacher's (bilinear, antialiased).
    """

    kind: Literal["map", "vector"] = "map"
    class_tokens: int | Sequence[int] | None = None
    pool: Literal["mean", "class_token"] = "mean"
    resize: Literal["error", "pool", "interpolate"] = "error"

    def student(self, feature: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the student's feature in this form, at the resolution that it is compared in."""
        if self.kind == "vector":
            return self._as_vector(feature, 0)
        own, other = self._as_map(feature, 0), self._as_map(teacher, 1)
        return self._resized(own, self._resolution(own.shape[2:], other.shape[2:]))

    def teacher(self, feature: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Return the teacher's feature in this form, at the resolution that it is compared in."""
        if self.kind == "vector":
            return self._as_vector(feature, 1)
        own, other = self._as_map(feature, 1), self._as_map(student, 0)
        return self._resized(own, self._resolution(other.shape[2:], own.shape[2:]))

    def shapes(self, student: Shape, teacher: Shape) -> tuple[Shape, Shape]:
        """Return the shapes, without the batch, of a pair in this form. Raises ValueError: they have no such form."""
        pair = torch.zeros(1, *student, device="meta"), torch.zeros(1, *teacher, device="meta")
        return tuple(self.student(*pair).shape[1:]), tuple(self.teacher(pair[1], pair[0]).shape[1:])

    def _as_map(self, feature: torch.Tensor, side: int) -> torch.Tensor:
        if feature.dim() == 2:
            return feature[:, :, None, None]
        tokens, found = tokens_of_both(self.class_tokens)[side], tuple(feature.shape[1:])
        shape = token_grid(found, tokens, square=True)
        if feature.dim() == 4:
            return feature if shape == found else feature.permute(0, 3, 1, 2)
        return feature[:, tokens:].transpose(1, 2).reshape(len(feature), *shape)

    def _as_vector(self, feature: torch.Tensor, side: int) -> torch.Tensor:
        if feature.dim() == 2:
            return feature
        if feature.dim() == 4:
            return self._as_map(feature, side).mean((2, 3))
        if feature.dim() != 3:
            raise ValueError(f"a feature of shape {tuple(feature.shape[1:])} is no map, no tokens and no vector")
        if self.pool == "class_token":
            return feature[:, 0]
        return feature[:, tokens_of_both(self.class_tokens)[side] or 0 :].mean(1)

    def _resolution(self, student: Sequence[int], teacher: Sequence[int]) -> tuple[int, int]:
        if tuple(student) == tuple(teacher) or self.resize == "interpolate":
            return teacher[0], teacher[1]
        if self.resize == "error":
            raise ValueError(
                f"resolutions differ: student {tuple(student)}, teacher {tuple(teacher)}; ask for resize='pool' or "
                "resize='interpolate'"
            )
        return min(student[0], teacher[0]), min(student[1], teacher[1])

    def _resized(self, feature: torch.Tensor, resolution: tuple[int, int]) -> torch.Tensor:
        if tuple(feature.shape[2:]) == resolution:
            return feature
        if self.resize == "pool":
            return F.adaptive_avg_pool2d(feature, resolution)
        return F.interpolate(feature, resolution, mode="bilinear", antialias=True)
