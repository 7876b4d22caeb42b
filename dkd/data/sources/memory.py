"""Hold all images of a source decoded, in one tensor."""

from __future__ import annotations

import numpy as np
import torch

from dkd.data.sources.base import ImageSource, IndexedSource


class InMemorySource(IndexedSource):
    """Hold images that are all decoded.

    Args:
        pixels: uint8 (N, 3, H, W).
        labels: int64 (N,).
        class_names: in the order of the labels; None: not known.
        places: of the source that the images were decoded from.
    """

    def __init__(
        self, pixels: torch.Tensor, labels: np.ndarray, class_names: list[str] | None = None, places: bytes = b""
    ) -> None:
        self.pixels, self.labels, self.class_names, self.places = pixels, labels, class_names, places

    def image(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def in_memory(source: ImageSource, limit_bytes: int | None = 2**30) -> ImageSource | None:
    """Decode all images of `source` once into one uint8 tensor.

    Returns None where that is not possible: the images have several sizes, or need more than `limit_bytes`; None: any
    number of bytes. Raises DataError for an image that cannot be read.
    """
    if isinstance(source, InMemorySource):
        return source
    first = source.image(0)
    if limit_bytes is not None and len(source) * first.numel() > limit_bytes:
        return None
    pixels = torch.empty(len(source), *first.shape, dtype=torch.uint8)
    for index, image in enumerate(source.images()):
        if image.shape != first.shape:
            return None
        pixels[index] = image
    return InMemorySource(pixels, source.labels, source.class_names, source.places)


def is_in_memory(source: ImageSource) -> bool:
    """Return whether all images of `source` are decoded."""
    return isinstance(source, InMemorySource)


def pixels_in_memory(source: ImageSource) -> torch.Tensor | None:
    """Return uint8 (N, 3, H, W) of a source whose images are all decoded; None for any other source."""
    return source.pixels if isinstance(source, InMemorySource) else None
