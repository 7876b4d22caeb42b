"""Look at the images that a recipe is to be written for: how a recipe names them, their number, classes and size."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dkd.data import DataError, ImageSource, open_source
from dkd.data.sources import check_labels, check_names, count_classes, match_classes, split_spec
from dkd.errors import InputError

TRAINING, VALIDATION = ("train", "training"), ("val", "valid", "validation", "test")
FRACTION = 0.1
"""Share of the training images that is set aside where there are no images for validation."""
_LOOKED_AT = 64


@dataclass(frozen=True)
class Images:
    """What a recipe needs to know of its images.

    Args:
        train, validation: as in a recipe.
        count: training images.
        classes: number of classes.
        class_names: None: the data do not name them.
        side: median of the shorter sides of some images, pixels.
        columns: `image_column` and `label_column` of data in columns, as they were asked for, or found.
        labels: whether the images have labels; else `classes` is the number of the teacher's.
    """

    train: str
    validation: str | float | None
    count: int
    classes: int
    class_names: list[str] | None
    side: int
    columns: dict[str, str]
    labels: bool = True


def look_at(data: str, validation: str | None, columns: Mapping[str, str | None], unlabelled: int = 0) -> Images:
    """Open the images and count them.

    Args:
        data: a name as in a recipe, or a folder of images, of parquet files, or of a saved data set.
        validation: the same, a fraction, or `none`; None: what lies beside the training images, or a fraction of them.
        columns: `image_column` and `label_column`; None: the only ones that fit.
        unlabelled: number of classes of images without labels; 0: the images have labels.

    Raises:
        DataError: the images cannot be opened.
    """
    train, beside = _find(data)
    chosen = _read_validation(validation) if validation is not None else beside
    labels = not unlabelled
    training = _open(train, True, columns, labels)
    classes = count_classes(training) if labels else unlabelled
    if labels:
        check_labels(training, classes)
    if validation is None and isinstance(chosen, str):
        chosen = _working(chosen, training, columns, labels)
    elif isinstance(chosen, str):
        match_classes(training.class_names, _open(chosen, False, columns, labels), _has_text_labels(training))
    found = {key: value for key in columns if isinstance(value := getattr(training, key, None), str)}
    side = _median_side(training)
    return Images(train, chosen, len(training), classes, training.class_names, side, found, labels)


def _open(spec: str, training: bool, columns: Mapping[str, str | None], labels: bool) -> ImageSource:
    image, label = columns["image_column"], columns["label_column"]
    return open_source(spec, training=training, image_column=image, label_column=label, labels=labels)


def _read_validation(text: str) -> str | float | None:
    if text in ("none", "null"):
        return None
    try:
        fraction = float(text)
    except ValueError:
        train, beside = _find(text)
        of_validation = isinstance(beside, str) and not text.startswith(("folder:", "hub:", "disk:"))
        return beside if of_validation and os.path.isdir(text) and not train.startswith("disk:") else train
    if not 0 < fraction < 1:
        raise InputError(f"--validation {text}: a fraction lies between 0 and 1")
    return fraction


def _find(data: str) -> tuple[str, str | float]:
    """Return the name of the training images in a recipe, and what validation is beside them. Raises DataError."""
    path = Path(data)
    if path.is_dir():
        return _find_in_folder(path)
    if path.is_file() and path.suffix not in (".parquet", ".tar"):
        raise DataError(f"{data!r} is a file of another kind than .parquet and .tar; name a folder PATH/CLASS/NAME.jpg")
    if not path.exists() and os.sep in data and ":" not in data and not any(c in data for c in "*?["):
        raise DataError(f"no such file or folder: {data!r}")
    kind, rest = split_spec(data)
    if kind == "folder":  # as it is written
        return data, FRACTION
    beside = data if kind in ("digits", "torchvision", "python") else FRACTION
    if kind in ("hub", "disk") and ":" not in rest:
        beside = data
    return data, beside


def _find_in_folder(path: Path) -> tuple[str, str | float]:
    if not path.is_dir():
        raise DataError(f"no such folder: {str(path)!r}")
    if (path / "dataset_dict.json").is_file():
        return f"disk:{path}", f"disk:{path}"
    if (path / "dataset_info.json").is_file():
        return f"disk:{path}", FRACTION
    names = sorted(os.listdir(path))
    if any(name.endswith(".parquet") for name in names):
        escaped = glob.escape(str(path))
        train, validation = (
            next(
                (f"{escaped}/{part}*.parquet" for part in parts if any(_is_part(n, part) for n in names)),
                None,
            )
            for parts in (TRAINING, VALIDATION)
        )
        return train or f"{escaped}/*.parquet", (validation or FRACTION) if train else FRACTION
    folders = {name.lower(): name for name in names if (path / name).is_dir()}
    train, validation = (next((folders[p] for p in parts if p in folders), None) for parts in (TRAINING, VALIDATION))
    if train is None:
        return f"folder:{path}", FRACTION
    return f"folder:{path / train}", f"folder:{path / validation}" if validation else FRACTION


def _has_text_labels(source: ImageSource) -> bool:
    return bool(getattr(source, "has_text_labels", False))


def _is_part(name: str, part: str) -> bool:
    return name.endswith(".parquet") and name.startswith(part)


def _working(validation: str, training: ImageSource, columns: Mapping[str, str | None], labels: bool) -> str | float:
    """Return the name of the validation images where they open and have the training images' classes, else a fraction
    of the training images."""
    names = [validation]
    if validation.startswith(("hub:", "disk:")):
        names.append(f"{validation}:test")
    for name in names:
        try:
            found = _open(name, False, columns, labels)
            match_classes(training.class_names, found, _has_text_labels(training))
            if found.class_names is not None:
                check_names(found.class_names)
        except DataError:
            continue
        return name
    return FRACTION


def _median_side(source: ImageSource) -> int:
    """Return the median of the shorter sides of some images, spread over the source. Raises DataError."""
    chosen = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).round().astype(int))
    return int(np.median([min(source.image(int(index)).shape[1:]) for index in chosen]))
