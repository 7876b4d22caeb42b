"""Turn what a data set stores as labels into class indices, and check them.

A class index counts from 0. Where labels are text, or the source names its classes, the index is the place of the name
in `class_names`; the training data's names decide, and those of the validation data are matched with them by name.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from dkd.data.sources.base import DataError, ImageSource
from dkd.text import shorten

_MOST_SHOWN = 6
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"})
"""Names of the parts of a data set, which are no names of classes when several of them stand side by side."""


def refuse_several_labels(where: str) -> NoReturn:
    """Refuse data whose images have several labels each.

    Args:
        where: what holds them, for the error's message.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"{where} holds several labels for an image (multi-label); dkd trains with one class for each image: name data "
        "whose labels are one class index, or one name of a class, for each image"
    )


def encode_labels(
    column: Any, name: str, key: str, names: list[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Return class indices, int64 (N,), and the names of the classes, or None where there are none.

    Text is sorted, and a label becomes the place of its text among the different ones. Numbers stay as they are.

    Args:
        column: an Arrow column of whole numbers or of text.
        name, key: the data set and the column, for the error's message.
        names: of the classes, where the data set states them beside the column.

    Raises:
        DataError: a label is null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        raise DataError(f"{name}: {column.null_count} labels of column {key!r} are null")
    if pa.types.is_dictionary(column.type):  # pandas' categories
        column = column.cast(column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_numpy().astype(np.int64), names
    found = sorted(pc.unique(column).to_pylist())
    labels = pc.index_in(column, value_set=pa.array(found, type=column.type))
    return labels.to_numpy().astype(np.int64), found


def count_classes(source: ImageSource) -> int:
    """Return the number of classes that the training data show: of their names, or of class indices that have no gap.

    Raises:
        DataError: the labels are whole numbers that are no class indices; or the names are those of the parts of a data
            set.
    """
    if source.class_names is not None:
        check_names(source.class_names)
        _check_several(source.class_names)
        return len(source.class_names)
    values = np.unique(source.labels)
    if len(values) == 0:
        raise DataError("the data set is empty")
    if not np.array_equal(values, np.arange(len(values))):
        raise DataError(
            f"the labels are {_show(values)}, which are no class indices: those of {len(values)} classes are 0 … "
            f"{len(values) - 1}. Store indices from 0, or the names of the classes as text; or state data.classes, "
            "where classes between them have no images"
        )
    _check_several([str(value) for value in values])
    return len(values)


def count_places(source: ImageSource) -> int:
    """Return the number of classes that the labels of a source need: that of their names, or the largest label and
    one. Classes between them may have no images."""
    if source.class_names is not None:
        return len(source.class_names)
    return int(source.labels.max(initial=0)) + 1


def _check_several(names: list[str]) -> None:
    """Refuse a single class, which any model gets right: the place is too high. Raises DataError."""
    if len(names) == 1:
        raise DataError(
            f"all images are of one class, {names[0]!r}: name the folder that holds the folders of the classes, or "
            "other data"
        )


def check_names(names: list[str]) -> None:
    """Refuse the names of the parts of a data set as names of classes: the place is one folder too high. Raises
    DataError."""
    parts = [name for name in names if name.lower() in SPLIT_NAMES]
    if len(parts) > 1:
        raise DataError(
            f"the classes would be {', '.join(names[:_MOST_SHOWN])}{', ...' if len(names) > _MOST_SHOWN else ''}, but "
            f"{' and '.join(parts)} are names of parts of a data set: name one of these folders"
        )


def check_labels(source: ImageSource, classes: int) -> None:
    """Check that the source names as many classes as there are, and that every label is one of 0 … classes − 1. Raises
    DataError."""
    if len(source) == 0:
        raise DataError("the data set is empty")
    names = source.class_names
    if names is not None:
        check_names(names)
        _check_several(names)
        if len(names) != classes:
            raise DataError(
                f"it names {len(names)} classes ({shorten(', '.join(names), 120)}), but data.classes is {classes}; "
                "leave data.classes out to take the number from the data, or name other data"
            )
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= classes:
        values = np.unique(source.labels)
        hint = "" if low == 0 else "; a label is the index of a class, counted from 0"
        raise DataError(
            f"labels go from {low} to {high}, but data.classes is {classes}: they must lie in 0 … {classes - 1}{hint} "
            f"({len(values)} different labels here)"
        )


def match_classes(names: list[str] | None, source: ImageSource, texts: bool = False) -> None:
    """Give the labels of a source the indices that classes of the same names have in the training data. Both sources
    stay as they are where one has no names.

    Args:
        names: of the classes of the training data.
        source: of the validation images; it may lack classes. It is changed.
        texts: whether the training data's labels are text.

    Raises:
        DataError: the source names a class that the training data do not have.
    """
    theirs = source.class_names
    if (names is None) != (theirs is None) and (texts or getattr(source, "has_text_labels", False)):
        raise DataError(
            "its labels are text in one of training and validation data, and numbers in the other: which number means "
            "which name is not known; store both in the same way"
        )
    if theirs is not None and len(source) and not 0 <= source.labels.min() <= source.labels.max() < len(theirs):
        raise DataError(
            f"labels go from {source.labels.min()} to {source.labels.max()}, but it names {len(theirs)} classes: they "
            f"must lie in 0 … {len(theirs) - 1}; -1 stands for no label in some data sets"
        )
    if names is None or theirs is None or names == theirs:
        return
    place = {name: index for index, name in enumerate(names)}
    unknown = [name for name in theirs if name not in place]
    if unknown:
        raise DataError(
            f"it names classes that the training data do not have: {shorten(', '.join(unknown), 120)}; those of the "
            f"training data are {shorten(', '.join(names), 120)}"
        )
    source.labels = np.array([place[name] for name in theirs], dtype=np.int64)[source.labels]
    source.class_names = names


def _show(values: np.ndarray) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= _MOST_SHOWN else [*texts[:3], "...", *texts[-2:]])
