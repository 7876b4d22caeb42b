"""Define what every source of images offers, and the error that a source raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from dkd.errors import InputError

NO_LABEL = -1
"""The label of every image of a source that is read without labels."""


class DataError(InputError):
    """A data set is missing or is not what the recipe states, or an image cannot be read."""


class ImageSource(Protocol):
    """Give images with labels, by index."""

    labels: np.ndarray
    """The classes of all images, int64 (N,); all of them `NO_LABEL` where the images are read without labels."""
    class_names: list[str] | None
    """The names of the classes, in the order of the labels; None where the source does not name them."""
    places: bytes
    """A fingerprint of where the images lie, relative to the source; empty where images have no places of their own."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> torch.Tensor:
        """Return one image as uint8 (3, H, W). Raises DataError."""
        ...

    def images(self) -> Iterator[torch.Tensor]:
        """Yield all images in order, which some sources do faster than one by one. Raises DataError."""
        ...

    def neighbours(self, index: int) -> range:
        """Return the indices of images that cost little to read once image `index` has been read."""
        ...

    def name_of(self, index: int) -> str:
        """Return what people find an image by: its path where it has one, else its index."""
        ...


class IndexedSource:
    """Read each image by its index. A subclass sets `labels` and defines `image`."""

    labels: np.ndarray
    class_names: list[str] | None = None
    places: bytes = b""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> torch.Tensor:
        """Return one image as uint8 (3, H, W). Raises DataError."""
        raise NotImplementedError

    def images(self) -> Iterator[torch.Tensor]:
        """Yield all images in order. Raises DataError."""
        return (self.image(index) for index in range(len(self)))

    def neighbours(self, index: int) -> range:
        """Return all indices: each image costs the same."""
        return range(len(self))

    def name_of(self, index: int) -> str:
        """Return the image's index, for sources whose images have no names."""
        return str(index)


def no_labels(images: int) -> np.ndarray:
    """Return the labels of so many images that have none, int64 (N,)."""
    return np.full(images, NO_LABEL, dtype=np.int64)


def has_labels(source: ImageSource) -> bool:
    """Return whether any image of a source has a label."""
    return bool(np.any(source.labels != NO_LABEL))
