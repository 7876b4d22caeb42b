"""Give the batches of one rank from images that lie on the device that trains.

Images that fit there are resized and padded once. A step then sends places of crops to the device, and no pixels: one
gather makes the batch. Order, draws and pixels are those of `TrainLoader` and `EvaluationLoader`, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dkd.data.loader import EvaluationLoader
from dkd.data.sampler import GlobalBatchSampler
from dkd.data.samples import Batch, augmentation_seeds
from dkd.data.sources import ImageSource, pixels_in_memory
from dkd.data.transforms import CropAndFlip

_AT_ONCE = 4096
"""Images that are resized and padded at a time."""


class DeviceImages:
    """Hold all images of a source on a device, and crop batches of them.

    Args:
        source: with all images decoded.
        transform: of the batches.
        device: where the images are kept.

    Raises:
        ValueError: the images are not decoded.
    """

    def __init__(self, source: ImageSource, transform: CropAndFlip, device: torch.device) -> None:
        pixels = pixels_in_memory(source)
        if pixels is None:
            raise ValueError("only decoded images can be kept on a device")
        self.transform, self.device = transform, device
        side = transform.size + 2 * transform.padding
        self._padded = torch.empty(len(pixels), pixels.shape[1], side, side, dtype=torch.uint8, device=device)
        for first in range(0, len(pixels), _AT_ONCE):
            part = pixels[first : first + _AT_ONCE]
            self._padded[first : first + len(part)].copy_(transform.padded(part))
        self._labels = torch.as_tensor(source.labels, dtype=torch.int64).to(device)

    @property
    def bytes(self) -> int:
        """Return the bytes of the images."""
        return self._padded.numel()

    def batch(self, indices: Sequence[int], seeds: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 images (b, 3, H, W) and int64 labels (b,) of some samples, on the device.

        Args:
            indices: places of the samples; −1: a blank image with the label 0.
            seeds: one for each image, from which its crop and flip are drawn; None: what a seed of 0 draws.
        """
        count, size = len(indices), self.transform.size
        top, left, mirrored = self.transform.draws(np.zeros(count) if seeds is None else seeds)
        numbers = torch.stack([torch.tensor(indices), *map(torch.from_numpy, (top, left, mirrored))])
        if self.device.type == "cuda":  # from page-locked memory, for which the host need not wait
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
        samples, tops, lefts, flips = numbers[:, :, None, None]
        steps = _steps(size, self.device)
        # Where an image is mirrored, its columns are read from the last one to the first.
        columns = lefts + torch.where(flips == 1, size - 1 - steps, steps)
        rows = tops + steps[:, None]
        channels = _steps(self._padded.shape[1], self.device)[None, :, None, None]
        wanted = samples.clamp_min(0) if min(indices, default=0) < 0 else samples
        places = wanted[:, None], channels, rows[:, None], columns[:, None]
        images, labels = self._padded[places], self._labels[wanted[:, 0, 0]]
        if wanted is samples:
            return images, labels
        blank = samples < 0
        return images.masked_fill_(blank[:, None], 0), labels.masked_fill_(blank[:, 0, 0], 0)


@functools.lru_cache(maxsize=16)
def _steps(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, device=device)


class DeviceTrainLoader:
    """Give the micro-batches that a TrainLoader gives, from images on the device.

    Args:
        images: of the source that the TrainLoader would read.
        order: which rank computes which samples.
    """

    shared_bytes = 0
    """No worker process shares memory."""
    timeout: float | None = None
    """Nothing is waited for."""

    def __init__(self, images: DeviceImages, order: GlobalBatchSampler) -> None:
        self.order, self.images = order, images

    def steps(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of steps first_step … last_step − 1, `order.micro_steps` of them a step."""
        for keys in self.order.micro_batches(first_step, last_step):
            seeds = augmentation_seeds(self.order.seed, keys)
            images, labels = self.images.batch([index for _, index in keys], seeds)
            yield Batch(images, labels, len(keys))


class DeviceEvaluationLoader(EvaluationLoader):
    """Give the batches that an EvaluationLoader gives, from images on the device.

    Args:
        source: of the images, decoded.
        images: the same on the device.
        batch, rank, world_size: as for EvaluationLoader.
    """

    def __init__(
        self, source: ImageSource, images: DeviceImages, batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(source, images.transform, batch, rank, world_size)
        self._images = images

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.keys:
            valid = [index for _, index in keys if index >= 0]
            missing = [-1] * (len(keys) - len(valid))
            images, labels = self._images.batch([*valid, *missing], None)
            yield Batch(images, labels, len(valid))
