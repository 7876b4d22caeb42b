"""Read `hub:NAME`, `disk:PATH`, and all else that `datasets` reads into an image column and a label column."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dkd.data.sources.base import DataError, ImageSource, IndexedSource, no_labels
from dkd.data.sources.decoding import decode_cell
from dkd.data.sources.labels import encode_labels, refuse_several_labels
from dkd.user_code import describe_error


class HuggingFaceSource(IndexedSource):
    """Read a `datasets.Dataset` with an image column and a label column. Images are decoded here, from their bytes.

    Args:
        dataset: the data set.
        name: what messages call the data set.
        image_column, label_column: None: the only columns that fit.
        folder: the only place where a cell that holds a path instead of bytes may lead; None: nowhere.
        labels: whether labels are read; else a column of labels may be missing.

    Raises:
        DataError: no column fits, several do, or a label is null.
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        image_column: str | None,
        label_column: str | None,
        folder: str | None = None,
        labels: bool = True,
    ) -> None:
        from datasets import Image as ImageFeature

        self.name, self._folder, self.has_text_labels = name, folder, False
        self.image_column = find_image_column(dataset.features, name, image_column)
        # Files written without Hugging Face's metadata hold images as plain bytes, or as {bytes, path}.
        images = dataset.select_columns([self.image_column]).cast_column(self.image_column, ImageFeature())
        self.dataset = images.cast_column(self.image_column, ImageFeature(decode=False))
        self.label_column: str | None = None
        if labels:
            self._read_labels(dataset, label_column)
        else:
            self.labels = no_labels(len(dataset))

    def _read_labels(self, dataset: Any, asked: str | None) -> None:
        column = self.label_column = find_label_column(dataset.features, self.name, asked)
        named = getattr(dataset.features[column], "names", None)
        labels = dataset.select_columns([column]).with_format("arrow")[:][column]
        self.labels, self.class_names = encode_labels(labels, self.name, column, named)
        self.has_text_labels = named is None and self.class_names is not None
        check_text_labels(len(self.labels), self.class_names, self.name, column, asked=asked is not None)

    def image(self, index: int) -> torch.Tensor:
        return decode_cell(self.name, index, self.dataset[index][self.image_column], self._folder)

    def images(self) -> Iterator[torch.Tensor]:
        index = 0
        for rows in self.dataset.iter(batch_size=1000):
            for encoded in rows[self.image_column]:
                yield decode_cell(self.name, index, encoded, self._folder)
                index += 1

    def name_of(self, index: int) -> str:
        path = (self.dataset[index][self.image_column] or {}).get("path")
        return str(path or index)


def check_text_labels(rows: int, class_names: list[str] | None, name: str, column: str, asked: bool) -> None:
    """Refuse a column of text in which every row has another text, unless the recipe asks for that column: it holds
    file names or captions. Raises DataError.

    Args:
        rows: number of images.
        class_names: the different texts.
        name, column: the data set and the column.
        asked: whether the recipe names the column.
    """
    if class_names is not None and not asked and 2 < rows == len(class_names):
        raise DataError(
            f"{name}: column {column!r}, the only one that could hold labels, has another text in each of {rows} rows; "
            "set data.label_column to the column of the labels"
        )


def find_image_column(features: Mapping[str, Any], name: str, asked: str | None) -> str:
    """Return the name of the image column: the one asked for, or the only one whose type fits. Raises DataError."""
    return _select_column(features, name, "image_column", asked, [_is_image])


def find_label_column(features: Mapping[str, Any], name: str, asked: str | None) -> str:
    """Return the name of the label column: the one asked for, or the only one whose type fits. Raises DataError."""
    return _select_column(features, name, "label_column", asked, [_is_label, _is_text])


def _select_column(features: Mapping[str, Any], name: str, key: str, asked: str | None, kinds: list[Any]) -> str:
    """Return the column that was asked for, or the only one of the first kind that any column is of."""
    by_kind = [[column for column, feature in features.items() if fits(feature)] for fits in kinds]
    of_any = [column for columns in by_kind for column in columns]
    candidates = of_any if asked is not None else next(filter(None, by_kind), [])
    if asked is None and len(candidates) == 1 < len(of_any) and not _is_named(candidates[0], features):
        candidates = of_any  # a number beside text: an index, a width or a fold as well as a label
    several = [column for column, feature in features.items() if key == "label_column" and _is_label_list(feature)]
    if asked in several or (asked is None and not candidates and len(several) == 1):
        refuse_several_labels(f"{name}: column {asked or several[0]!r}")
    if asked is not None and asked not in candidates:
        raise DataError(
            f"{name} has no column {asked!r} fit for data.{key}; columns: {', '.join(features)}; fit: "
            f"{', '.join(candidates)}"
        )
    if asked is None and len(candidates) != 1:
        unlabelled = key == "label_column" and not candidates
        hint = "; for images without labels, set data.labels=false" if unlabelled else ""
        raise DataError(
            f"{name}: set data.{key}; columns that fit: {', '.join(candidates) or 'none'} (of {', '.join(features)})"
            f"{hint}"
        )
    return asked or candidates[0]


def _is_named(column: str, features: Mapping[str, Any]) -> bool:
    """Return whether a column of numbers states that it holds labels: by Hugging Face's type, or by its name."""
    words = column.lower().split("_")
    named = any(word in ("label", "labels", "class", "cls", "target", "targets", "category", "y") for word in words)
    return named or hasattr(features[column], "names")


def _is_image(feature: Any) -> bool:
    from datasets import Image, Value

    bytes_column = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
    struct_column = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or bytes_column or struct_column


def _is_label(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    whole_numbers = isinstance(feature, Value) and feature.dtype.lstrip("u").startswith("int")
    return isinstance(feature, ClassLabel) or whole_numbers


def _is_text(feature: Any) -> bool:
    from datasets import Value

    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_label_list(feature: Any) -> bool:
    """Return whether a column holds a list of labels in each row: of classes, whole numbers, texts or switches."""
    from datasets import Value

    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    switches = isinstance(inner, Value) and inner.dtype == "bool"
    return inner is not None and (switches or _is_label(inner) or _is_text(inner))


def saved_place(rest: str) -> tuple[str, str | None]:
    """Split PATH[:SPLIT] into the folder and the split; None: no split is named. A folder whose own name has a colon
    stays one."""
    path, colon, split = rest.rpartition(":")
    return (path, split) if colon and split and not os.path.isdir(rest) else (rest, None)


def open_saved(
    rest: str, training: bool, image_column: str | None, label_column: str | None, labels: bool = True
) -> ImageSource:
    """Open what `save_to_disk` of `datasets` wrote to a folder, PATH[:SPLIT]. A split that is left out is `train` or
    `validation`. Raises DataError."""
    from datasets import DatasetDict, load_from_disk

    path, asked = saved_place(rest)
    try:
        dataset = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(f"disk:{path} is no data set that `datasets` saved: {error}") from error
    except Exception as error:  # raised for the folder's JSON files, where they hold something else
        raise DataError(f"disk:{path} is no data set that `datasets` saved: {describe_error(error)}") from error
    if isinstance(dataset, DatasetDict):
        split = asked or ("train" if training else "validation")
        if split not in dataset:
            raise DataError(f"disk:{path} has no split {split!r}, but {', '.join(dataset)}; write disk:{path}:SPLIT")
        dataset = dataset[split]
    elif asked is not None:
        raise DataError(f"disk:{path} holds one data set, without splits such as {asked!r}; write disk:{path}")
    return HuggingFaceSource(dataset, f"disk:{path}", image_column, label_column, path, labels)


def open_from_hub(
    spec: str, training: bool, image_column: str | None, label_column: str | None, labels: bool = True
) -> ImageSource:
    """Download a data set of the Hugging Face hub, NAME[@CONFIG][:SPLIT], and open it. Raises DataError."""
    from datasets import load_dataset

    with loading_from_hub(spec):
        name, configuration, split = hub_name(spec, training)
        dataset = load_dataset(name, configuration, split=split)
    return HuggingFaceSource(dataset, f"hub:{name}:{split}", image_column, label_column, labels=labels)


def hub_name(name: str, training: bool) -> tuple[str, str | None, str]:
    """Split NAME[@CONFIG][:SPLIT] into name, configuration and split; a split that is left out is `train` or
    `validation`. Raises DataError for a split that the data set does not have."""
    from datasets import get_dataset_split_names

    name, _, split = name.partition(":")
    name, _, configuration = name.partition("@")
    split = split or ("train" if training else "validation")
    splits = get_dataset_split_names(name, configuration or None)
    if split not in splits:
        whole = f"{name}@{configuration}" if configuration else name
        raise DataError(f"hub:{whole} has no split {split!r}; write hub:{whole}:SPLIT with one of {', '.join(splits)}")
    return name, configuration or None, split


@contextmanager
def loading_from_hub(name: str) -> Iterator[None]:
    """Turn whatever the hub's client raises inside into a DataError: the client has an error of its own for every way a
    download can fail."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"hub:{name} cannot be loaded: {type(error).__name__}: {error}") from error
