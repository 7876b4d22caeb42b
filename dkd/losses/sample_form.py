"""State what a loss reads of a teacher's features sample by sample, so that it can be stored in their place.

A loss (or the adapter that is trained for it) of this kind has three methods:

    sample_forms(shapes)              what is read of each pair
    take_samples(teacher, shapes)     the teacher's features -> one tensor (b, ...) for each pair
    give_samples(samples, shapes)     these -> what the loss is called with in the place of the teacher's features

`shapes` are those of one sample's features of each pair, (student, teacher).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

Shape = tuple[int, ...]
PairShapes = Sequence[tuple[Shape, Shape]]


@dataclass(frozen=True)
class SampleForm:
    """Describe what a loss reads of one teacher feature.

    Args:
        what: in a word or two, such as `attention map`.
        facts: plain values on which it depends, beside the feature.
        shape: of one sample.
        promoted: whether it is computed in full precision, and not in the feature's own type.
        large: whether it is as large as the feature itself.
    """

    what: str
    facts: dict[str, Any]
    shape: Shape
    promoted: bool = True
    large: bool = field(default=False)


@runtime_checkable
class ReadsSamples(Protocol):
    """Be a loss, or an adapter, that states what it reads of the teacher."""

    def sample_forms(self, shapes: PairShapes) -> list[SampleForm]: ...

    def take_samples(self, teacher: Sequence[torch.Tensor], shapes: PairShapes) -> list[torch.Tensor]: ...

    def give_samples(self, samples: Sequence[torch.Tensor], shapes: PairShapes) -> Any: ...


class WholeFeatures:
    """Store features as they are, for losses that state nothing else."""

    def sample_forms(self, shapes: PairShapes) -> list[SampleForm]:
        """Return the features' own shapes."""
        return [SampleForm("feature", {}, tuple(teacher), promoted=False, large=True) for _, teacher in shapes]

    def take_samples(self, teacher: Sequence[torch.Tensor], shapes: PairShapes) -> list[torch.Tensor]:
        """Return the features."""
        return list(teacher)

    def give_samples(self, samples: Sequence[torch.Tensor], shapes: PairShapes) -> Any:
        """Return the features."""
        return list(samples)
