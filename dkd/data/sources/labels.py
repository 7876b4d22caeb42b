"""Check the labels of a source."""

from __future__ import annotations

from dkd.data.sources.base import DataError, ImageSource


def check_labels(source: ImageSource, classes: int) -> None:
    """Check that every label is one of 0 … classes − 1. Raises DataError."""
    if len(source) == 0:
        raise DataError("the data set is empty")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels go from {low} to {high}, but data.classes is {classes}: they must lie in 0 … {classes - 1}"
        )


def check_class_names(train: ImageSource, validation: ImageSource) -> None:
    """Check that a label means the same class in both sources, where both name their classes. Raises DataError."""
    ours, theirs = train.class_names, validation.class_names
    if ours is not None and theirs is not None and ours != theirs:
        label = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        there, here = ((names[label] if label < len(names) else "no class") for names in (ours, theirs))
        raise DataError(
            f"label {label} is {there!r} in the training data and {here!r} here; both need the same classes"
        )
