"""Describe one kind of numbers that a teacher yields for each sample, and the forms in which they are stored.

exact     as they were computed
bf16      what is float32 or float64, rounded to bfloat16
topk:N    of logits (K,), the N largest with their places, and one number for all others: the logarithm of the mean
          of their exponentials, so that the sum of probabilities stays what it was
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dkd.teacher_cache.key import digest_of


@dataclass(frozen=True, eq=False)
class Value:
    """Describe numbers of each sample.

    Args:
        name: for people, of letters, digits, dots and hyphens.
        facts: plain values on which the numbers depend, beside those of the key.
        shape: of one sample.
        dtype: in which they are computed, as far as is known before; sizes are counted by it. What is stored has the
            type in which it was computed.
        form: `exact`, `bf16` or `topk:N`.
    """

    name: str
    facts: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str = "exact"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    @cached_property
    def id(self) -> str:
        """Return the name under which the numbers are stored."""
        return f"{self.name}-{digest_of({'facts': self.facts, 'form': self.form}, 12)}"

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which numbers of a type are stored."""
        if self.form == "exact":
            return dtype
        return torch.uint8 if self._top else torch.bfloat16

    def stored_shape(self, dtype: torch.dtype) -> tuple[int, ...]:
        """Return the shape of what is stored of one sample, whose numbers are of a type."""
        if self._top is None:
            return self.shape
        # Values, places (4 bytes each), and the number of all others.
        return (self._top * (dtype.itemsize + 4) + dtype.itemsize,)

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that are stored of one sample, whose numbers are of a type."""
        return math.prod(self.stored_shape(dtype)) * self.stored_dtype(dtype).itemsize

    @property
    def bytes_per_sample(self) -> int:
        """Return the bytes that are stored of one sample, as far as is known before."""
        return self.row_bytes(self.dtype)

    @property
    def _top(self) -> int | None:
        return int(self.form.removeprefix("topk:")) if self.form.startswith("topk:") else None

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers (b, ...) as they are stored: (b, ...) of `stored_shape` and `stored_dtype`. Raises ValueError:
        they are not of this shape."""
        if tuple(numbers.shape[1:]) != self.shape:
            raise ValueError(f"{self.name}: numbers of shape {tuple(numbers.shape[1:])}, not {self.shape}")
        if self._top is None:
            return numbers.to(self.stored_dtype(numbers.dtype)).contiguous()
        largest, places = numbers.topk(self._top, dim=1)
        others = numbers.double().scatter(1, places, -math.inf)
        rest = (others.logsumexp(1) - math.log(self.shape[0] - self._top)).to(numbers.dtype)
        parts = (largest.contiguous(), places.to(torch.int32).contiguous(), rest[:, None].contiguous())
        return torch.cat([part.view(torch.uint8).reshape(len(numbers), -1) for part in parts], 1)

    def decode(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers (b, ...) of a type that were stored."""
        if self._top is None:
            return stored.to(dtype)
        size, rows = dtype.itemsize, len(stored)
        cut = [self._top * size, self._top * 4, size]
        largest, places, rest = (part.contiguous().flatten() for part in stored.split(cut, dim=1))
        full = rest.view(dtype)[:, None].expand(rows, *self.shape).clone()
        return full.scatter_(1, places.view(torch.int32).view(rows, -1).long(), largest.view(dtype).view(rows, -1))

    def as_read(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers as they will be once they were stored and read: a run that fills a cache trains with the same
        numbers as one that reads it."""
        if self.form == "exact":
            return numbers
        return in_order(self.decode(self.encode(numbers), numbers.dtype), memory_order(numbers))


def memory_order(numbers: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of numbers from the one whose steps in memory are longest to the shortest, such as (0, 2,
    3, 1) for channels_last; None: they lie in their own order. Sums over them depend on it in the last bits."""
    own, strides = tuple(range(numbers.dim())), numbers.stride()
    order = tuple(sorted(own, key=lambda dimension: -strides[dimension]))
    return None if order == own else order


def in_order(numbers: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    """Return the same numbers, which lie in memory in an order of `memory_order`."""
    if order is None:
        return numbers
    back = [order.index(dimension) for dimension in range(len(order))]
    return numbers.permute(*order).contiguous().permute(*back)
