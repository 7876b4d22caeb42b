"""Read `folder:PATH`: images as PATH/CLASS/NAME.jpg, or without labels all images under PATH."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import torch

from dkd.data.sources.base import DataError, IndexedSource, no_labels
from dkd.data.sources.decoding import decode_pixels, naming_errors, read_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageFolder(IndexedSource):
    """Read the images PATH/CLASS/NAME.jpg, in subfolders of a class too, in the order of torchvision's ImageFolder.

    Args:
        path: the folder.
        labels: whether the folders in `path` are classes; else all images in `path` and its folders are read, sorted by
            folder and name, and have no label.

    Raises:
        DataError: the folder cannot be read; it holds no folder, or a class has no image; or there is no image at all.
    """

    def __init__(self, path: str, labels: bool = True) -> None:
        import pyarrow as pa

        classes = _find_classes(path) if labels else {"": _find_images(path)}
        # An Arrow array, since counting references to a million Python strings would copy them into each worker
        # process.
        self.paths = pa.array([image for images in classes.values() for image in images])
        """The path of each image, as an Arrow array of text."""
        if labels:
            self.labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
            self.class_names = list(classes)
        else:
            self.labels, self.places = no_labels(len(self.paths)), _mark_places(path, classes[""])

    def image(self, index: int) -> torch.Tensor:
        path = self.paths[index].as_py()
        with naming_errors(path):
            return decode_pixels(read_file(path))

    def name_of(self, index: int) -> str:
        return str(self.paths[index].as_py())


def _find_classes(path: str) -> dict[str, list[str]]:
    """Return the classes in a folder, each with the paths of its images. Raises DataError."""
    try:
        classes = _list_classes(path)
    except OSError as error:
        raise DataError(f"folder:{path}: {error}; images are expected as {path}/CLASS/NAME.jpg") from error
    if not classes:
        names = os.listdir(path)
        hint = ""
        if any(name.endswith(".parquet") for name in names):
            hint = f"; it holds parquet files: write '{path}/*.parquet'"
        elif any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            hint = "; for images without labels, set data.labels=false"
        raise DataError(f"folder:{path}: it holds no folder; images are expected as {path}/CLASS/NAME.jpg{hint}")
    if without := [name for name, images in classes.items() if not images]:
        raise DataError(
            f"folder:{path}: no image in {', '.join(without)}; images are expected as {path}/CLASS/NAME, NAME "
            f"ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    return classes


def _find_images(path: str) -> list[str]:
    """Return the paths of all images in a folder and its folders. Raises DataError."""
    try:
        images = list(_list_images(path, _folders_above(path)))
    except OSError as error:
        raise DataError(f"folder:{path}: {error}") from error
    if not images:
        raise DataError(f"folder:{path}: no image in it or its folders, NAME ending in {', '.join(IMAGE_SUFFIXES)}")
    return images


def _mark_places(path: str, images: list[str]) -> bytes:
    """Return a fingerprint of the paths below a folder, which stays the same where the folder itself is moved."""
    inside = "\0".join(image.removeprefix(path).lstrip(os.sep) for image in images)
    return hashlib.sha256(inside.encode(errors="surrogateescape")).digest()


def _list_classes(path: str) -> dict[str, list[str]]:
    """List the folders in `path`, sorted by name, each with the paths of its images. Links are followed, except to a
    folder that holds `path`, and never twice to one folder. Raises OSError."""
    with os.scandir(path) as entries:
        tops = {
            entry.name: os.path.join(path, entry.name)
            for entry in sorted(entries, key=lambda entry: entry.name)
            if entry.is_dir()
        }
    not_entered = _folders_above(path) | {_identify(os.stat(folder)) for folder in tops.values()}
    return {name: list(_list_images(top, set(not_entered))) for name, top in tops.items()}


def _folders_above(path: str) -> set[tuple[int, int]]:
    """Return what distinguishes a folder and those that hold it: a link to one of them would never end. Raises
    OSError."""
    above = [os.path.realpath(path)]
    while above[-1] != os.path.dirname(above[-1]):
        above.append(os.path.dirname(above[-1]))
    return {_identify(os.stat(folder)) for folder in above}


def _list_images(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """List the images in `top` and its folders except those `seen`, sorted by folder and name."""
    found: list[tuple[str, list[str]]] = []
    unread = [top]
    while unread:
        folder = unread.pop()
        names: list[str] = []
        with os.scandir(folder) as entries:
            # Folders come before links, and by name: a folder that two paths lead to has the same path on all machines.
            for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
                if not entry.is_dir():
                    if entry.name.lower().endswith(IMAGE_SUFFIXES):
                        names.append(entry.name)
                elif (identity := _identify(entry.stat())) not in seen:
                    seen.add(identity)
                    unread.append(entry.path)
        found.append((folder, sorted(names)))
    return (os.path.join(folder, name) for folder, names in sorted(found) for name in names)


def _identify(facts: os.stat_result) -> tuple[int, int]:
    """Return what distinguishes a folder from all others of this machine."""
    return facts.st_dev, facts.st_ino
