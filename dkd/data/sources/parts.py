"""Take a part of a source's images: the fraction that is set aside for validation, and the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from dkd.data.sources.base import DataError, ImageSource, has_labels
from dkd.rng import derive_seed

_SPLIT = 0x5EED_5B17
"""Separates the draw of the validation images from all other draws of a run's seed."""


class PartOfSource:
    """Hold some of a source's images, in the source's order.

    Args:
        source: all images.
        indices: of the images of this part, int64 (n,), ascending.
    """

    def __init__(self, source: ImageSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.labels, self.class_names = source.labels[indices], source.class_names
        self.places = hashlib.sha256(source.places + np.ascontiguousarray(indices, dtype=np.int64).tobytes()).digest()

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> torch.Tensor:
        """Return one image as uint8 (3, H, W). Raises DataError."""
        return self.source.image(int(self.indices[index]))

    def images(self) -> Iterator[torch.Tensor]:
        """Yield all images in order. Raises DataError."""
        return (self.image(index) for index in range(len(self)))

    def neighbours(self, index: int) -> range:
        """Return all indices: each image costs the same."""
        return range(len(self))

    def name_of(self, index: int) -> str:
        """Return what people find the image by in the whole source."""
        return self.source.name_of(int(self.indices[index]))


def set_aside(source: ImageSource, fraction: float, seed: int) -> tuple[PartOfSource, PartOfSource]:
    """Draw a fraction of the images of each class for validation: the same images for the same seed and labels, on any
    machine and number of ranks. Images without labels are drawn from as those of one class are.

    Of a class of n images, n·fraction are drawn, rounded so that the sum over classes is that of the whole set (largest
    remainders first), at most n − 1: no class disappears from training.

    Args:
        source: whose images are read by index.
        fraction: between 0 and 1.
        seed: of the run.

    Returns:
        The training images and the validation images.

    Raises:
        DataError: the fraction is less than one image, or no class can spare any.
    """
    labels = source.labels
    present, counts = np.unique(labels, return_counts=True)
    shares = counts * fraction
    taken = np.minimum(np.floor(shares).astype(np.int64), counts - 1)
    missing = round(len(labels) * fraction) - int(taken.sum())
    for place in np.argsort(-(shares - np.floor(shares)), kind="stable"):
        if missing <= 0:
            break
        if taken[place] < counts[place] - 1:
            taken[place] += 1
            missing -= 1
    if not taken.any():
        among = f" in {len(present)} classes" if has_labels(source) else ""
        raise DataError(
            f"{fraction:g} of {len(labels)} training images{among} leaves none for validation: take a larger fraction, "
            "or name validation data"
        )
    drawn = [
        np.flatnonzero(labels == label)[_permutation(int(count), derive_seed(seed, _SPLIT, int(label)))[:number]]
        for label, count, number in zip(present, counts, taken, strict=True)
    ]
    of_validation = np.zeros(len(labels), dtype=bool)
    of_validation[np.concatenate(drawn)] = True
    training, validation = (np.flatnonzero(chosen) for chosen in (~of_validation, of_validation))
    return PartOfSource(source, training), PartOfSource(source, validation)


def _permutation(count: int, seed: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
