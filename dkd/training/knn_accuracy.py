"""The result of a k-NN evaluation: how often the neighbours of a sample's features name its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnnAccuracy:
    """Counts over the query images.

    Args:
        samples: query images.
        top1_correct, top5_correct: those whose first class is right, and those of whose first five classes one is; None
            for fewer than six classes.
        bank: images whose features are the neighbours.
        k: neighbours that vote.
        unreadable: images of both data sets that could not be read, and do not count.
    """

    samples: int
    top1_correct: int
    top5_correct: int | None
    bank: int
    k: int
    unreadable: int = 0

    @property
    def top1(self) -> float:
        """Fraction of query images whose first class is right."""
        return self.top1_correct / self.samples

    @property
    def top5(self) -> float | None:
        """Fraction of query images whose first five classes hold the right one; None for fewer than six classes."""
        return None if self.top5_correct is None else self.top5_correct / self.samples

    def facts(self) -> dict[str, Any]:
        """Return what JSON can hold of it, by the names that the line of an evaluation has."""
        return {"knn_top1": self.top1, "knn_top5": self.top5}

    def describe(self) -> str:
        """Return the numbers in one line."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.4f}"
        skipped = f"; {self.unreadable} images cannot be read and do not count" if self.unreadable else ""
        counts = f"{self.top1_correct}/{self.samples}"
        return f"k-NN of {self.k} among {self.bank} images: top-1 {self.top1:.4f} ({counts}){top5}{skipped}"
