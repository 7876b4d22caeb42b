"""Open sources by the names that a recipe gives them. The docstring of dkd/data/sources lists the names."""

from __future__ import annotations

import os

from dkd.data.sources.base import DataError, ImageSource
from dkd.data.sources.data_files import matching_files, open_data_files
from dkd.data.sources.digits import Digits
from dkd.data.sources.folder import ImageFolder
from dkd.data.sources.hugging_face import open_from_hub, open_saved, saved_place
from dkd.data.sources.torchvision import TorchvisionSource
from dkd.data.sources.user_data import UserSource


def open_source(
    spec: str,
    *,
    training: bool,
    root: str = "data",
    image_column: str | None = None,
    label_column: str | None = None,
    labels: bool = True,
) -> ImageSource:
    """Open the source that `spec` names.

    Args:
        spec: the name, as a recipe gives it.
        training: which part to take where a data set has two (digits, torchvision, hub).
        root: the folder where torchvision's data sets look for their files.
        image_column, label_column: columns of parquet and hub data; None: the first image column, and the only other
            whole-number column.
        labels: whether labels are read; else every image has the label `NO_LABEL`, and classes have no names.

    Raises:
        DataError: something is missing or does not fit; the message states what, and what there is.
    """
    kind, rest = split_spec(spec)
    match kind:
        case "digits":
            return Digits(training, labels)
        case "folder":
            return ImageFolder(rest, labels)
        case "torchvision":
            return TorchvisionSource(rest, training, root, labels)
        case "disk":
            return open_saved(rest, training, image_column, label_column, labels)
        case "python":
            return UserSource(rest, training, labels)
        case "hub":
            return open_from_hub(rest, training, image_column, label_column, labels)
    return open_data_files(kind, rest, image_column, label_column, labels)


def check_spec(spec: str) -> None:
    """Check what costs nothing to check: `spec` names a kind of data set, and its files exist. Raises DataError."""
    kind, rest = split_spec(spec)
    if kind in ("parquet", "webdataset"):
        matching_files(rest)
    folder = saved_place(rest)[0] if kind == "disk" else rest
    if kind in ("folder", "disk") and not os.path.isdir(folder):
        raise DataError(f"no such folder: {folder!r}")


def same_images(training: str, validation: str) -> str | None:
    """Return in which way two names lead to the same images, or None where they do not, as far as the names show.
    `digits`, torchvision's data sets and the user's own code have parts of their own."""
    kind, rest = split_spec(training)
    other_kind, other = split_spec(validation)
    if kind != other_kind or kind in ("digits", "torchvision", "python"):
        return None
    if kind == "hub":
        return f"both are hub:{rest}" if _named_split(rest, True) == _named_split(other, False) else None
    if kind == "disk":
        return _same_saved(saved_place(rest), saved_place(other))
    if kind == "folder":
        here, there = (os.path.realpath(path) for path in (rest, other))
        if here == there:
            return f"both are {rest!r}"
        inside = {os.path.commonpath([here, there])} & {here, there}
        return f"{rest!r} and {other!r} lie one in the other" if inside else None
    shared = {os.path.realpath(file) for file in matching_files(rest)} & {
        os.path.realpath(file) for file in matching_files(other)
    }
    return f"both have the file {min(shared)!r}" if shared else None


def _named_split(name: str, training: bool) -> tuple[str, str]:
    name, _, split = name.partition(":")
    return name, split or ("train" if training else "validation")


def _same_saved(training: tuple[str, str | None], validation: tuple[str, str | None]) -> str | None:
    """Compare two places of saved data sets, (folder, split). A folder of splits has the parts `train` and
    `validation`; one without has one part."""
    (here, split), (there, other) = training, validation
    if os.path.realpath(here) != os.path.realpath(there):
        return None
    if os.path.isfile(os.path.join(here, "dataset_dict.json")):
        split, other = split or "train", other or "validation"
    return f"both are disk:{here}" if split == other else None


def split_spec(spec: str) -> tuple[str, str]:
    """Split `spec` into the kind of data set and the rest, which names one of that kind. Raises DataError."""
    if spec == "digits":
        return "digits", ""
    kind, colon, rest = spec.partition(":")
    if colon and rest and kind in ("folder", "torchvision", "hub", "disk", "python"):
        return kind, rest
    for suffix, files in ((".parquet", "parquet"), (".tar", "webdataset")):
        if spec.endswith(suffix):
            return files, spec
    if os.path.isdir(spec):
        parquet = any(name.endswith(".parquet") for name in os.listdir(spec))
        right = f"'{spec}/*.parquet'" if parquet else f"folder:{spec}"
        raise DataError(f"{spec!r} is a folder: write {right}, or disk:{spec} for what save_to_disk has written")
    raise DataError(
        f"{spec!r} names no data set: write files or globs that end in .parquet or .tar, hub:NAME[:SPLIT], disk:PATH, "
        "folder:PATH, torchvision:NAME, python:MODULE:CALLABLE or digits"
    )


def runs_user_code(spec: str) -> bool:
    """Return whether opening `spec` imports a module that it names."""
    return spec.startswith("python:")
