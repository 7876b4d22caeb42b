"""Read the evaluation.json of a run: its last evaluation, with what is counted for each class.

    {"steps": 21, "epoch": 1.0, "samples": 449, "top1": 0.11, ...,
     "classes": [{"label": 0, "name": "zero", "samples": 45, "top1_correct": 40, "top1": 0.89, ...}, ...],
     "confusion": [[40, 0, 5, ...], ...]}

metrics.jsonl has a line for each evaluation, and would become large with these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dkd import atomic_files


@dataclass(frozen=True)
class EvaluationFile:
    """Holds what an evaluation.json states.

    Args:
        steps: optimizer steps before the evaluation.
        names: of the classes; their labels where they have no names.
        samples, correct: int64 (K,), of each class the samples, and those whose first class is right.
        confusion: int64 (K, K), samples of the class of the row that were taken for the class of the column; None where
            there are too many classes.
    """

    steps: int
    names: Sequence[str]
    samples: np.ndarray
    correct: np.ndarray
    confusion: np.ndarray | None

    @property
    def accuracies(self) -> list[float | None]:
        """Return the share of right answers of each class, 0 to 1; None for a class without samples."""
        return [
            int(right) / int(samples) if samples else None
            for right, samples in zip(self.correct, self.samples, strict=True)
        ]

    def confused_pairs(self) -> list[tuple[int, int, int]]:
        """Return (class, the class that it was taken for, samples) of all pairs of different classes that were
        confused, the most samples first; none without a matrix."""
        if self.confusion is None:
            return []
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        rows, columns = np.nonzero(wrong)
        found = [(int(row), int(column), int(wrong[row, column])) for row, column in zip(rows, columns, strict=True)]
        return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def read_evaluation(path: Path) -> tuple[EvaluationFile | None, str | None]:
    """Return what an evaluation.json states and None; or None and why it cannot be read. A file that is not there is no
    problem: (None, None)."""
    if not path.exists() and not path.is_symlink():
        return None, None
    facts, reason = atomic_files.read_json(path)
    if reason is not None:
        return None, reason
    try:
        return _parse(facts), None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        return None, f"{str(path)!r} is damaged: {type(error).__name__}: {error}"


def _parse(facts: Mapping[str, Any]) -> EvaluationFile:
    """Return what the mapping of the file states. Raises KeyError, TypeError, ValueError, AttributeError or
    OverflowError for one that is damaged."""
    classes = facts["classes"]
    names = [str(each.get("name", label)) for label, each in enumerate(classes)]
    samples, correct = (
        np.array([_count(each[key]) for each in classes], dtype=np.int64) for key in ("samples", "top1_correct")
    )
    matrix = facts["confusion"]
    confusion = None
    if matrix is not None:
        confusion = np.array([[_count(number) for number in row] for row in matrix], dtype=np.int64)
        if confusion.shape != (len(classes), len(classes)):
            raise ValueError(f"a confusion matrix of shape {confusion.shape} for {len(classes)} classes")
    return EvaluationFile(_count(facts["steps"]), names, samples, correct, confusion)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value
