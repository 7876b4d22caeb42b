"""Transform images between their source and the model: torchvision's v2 transforms on uint8, a sample at a time, then
normalisation of a batch, on the device that trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torchvision.transforms import v2

Stages = str | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True)
class Normalize:
    """Compute (image/255 − mean) / std of uint8 (b, 3, H, W), in float32 or in another type.

    Args:
        mean, std: three numbers each, on the scale 0 to 1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        scale, shift = _scale_and_shift(self, images.device, dtype)
        numbers = images.to(dtype)
        # The result goes into the same memory, unless the memory is the caller's: new memory of this size costs as much
        # as the arithmetic.
        return torch.addcmul(shift, numbers, scale, out=None if numbers is images else numbers)


@functools.cache
def _scale_and_shift(
    normalize: Normalize, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    # Both stay on the device: a copy from the host in every step would make the host wait for the device.
    scale = torch.tensor([1 / (255 * s) for s in normalize.std], dtype=dtype, device=device)
    shift = torch.tensor(
        [-m / s for m, s in zip(normalize.mean, normalize.std, strict=True)], dtype=dtype, device=device
    )
    return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)


@runtime_checkable
class BatchTransform(Protocol):
    """Transform whole batches, which is several times as fast on small images as one image after the other."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Transform one image, or several images of one shape. Randomness is drawn from torch's default generator."""
        ...

    def of_batch(self, images: torch.Tensor, seeds: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return uint8 (b, 3, H, W) from (b, 3, h, w). The randomness of an image depends on its seed alone, not on the
        other images.

        Args:
            images: uint8 (b, 3, h, w).
            seeds: one for each image.
        """
        ...


class CropAndFlip:
    """Resize, pad with black, crop at a random place, flip at random.

    Args:
        size: side of the result, pixels; images of another size are resized to it first.
        padding: pixels on each side; 0: no crop.
        flip: whether half of the images are mirrored.
    """

    def __init__(self, size: int, padding: int = 0, flip: bool = False) -> None:
        self.size, self.padding, self.flip = size, padding, flip
        self._fit = _resize((size, size))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        several = images if images.dim() == 4 else images[None]
        out = self.of_batch(several, torch.randint(2**62, (len(several),)).tolist())
        return out if images.dim() == 4 else out[0]

    def of_batch(self, images: torch.Tensor, seeds: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Transform a batch; see BatchTransform."""
        pixels = self.padded(images).numpy()
        top, left, mirrored = self.draws(seeds)
        if self.padding:
            places = np.lib.stride_tricks.sliding_window_view(pixels, (self.size, self.size), axis=(2, 3))
            pixels = places[np.arange(len(top)), :, top, left]
        if self.flip:
            pixels = pixels.copy() if not self.padding else pixels  # without padding, they are the caller's
            pixels[mirrored == 1] = pixels[mirrored == 1][..., ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def padded(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 (b, 3, size + 2·padding, size + 2·padding), of which all crops are parts."""
        around = (self.padding, self.padding)
        fitted = self._fit(images)
        return torch.from_numpy(np.pad(fitted.numpy(), ((0, 0), (0, 0), around, around))) if self.padding else fitted

    def draws(self, seeds: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, for each image, int64 (b,) each: the first row and the first column of the crop within `padded`, and
        whether the crop is mirrored, 1 or 0."""
        # Successive divisions take independent numbers out of one seed of 63 random bits.
        places = 2 * self.padding + 1
        drawn, top = np.divmod(np.array(seeds, dtype=np.uint64), places)
        drawn, left = np.divmod(drawn, places)
        mirrored = drawn % 2 if self.flip else np.zeros_like(drawn)
        return top.astype(np.int64), left.astype(np.int64), mirrored.astype(np.int64)


class ResizedCropAndFlip:
    """Crop and flip as torchvision's RandomResizedCrop and RandomHorizontalFlip do, with the same draws and the same
    pixels, in half the time on an image whose pixels have their three colours side by side, as decoders leave them.

    Args:
        size: side of the result, pixels.
    """

    def __init__(self, size: int) -> None:
        self._crop = v2.RandomResizedCrop(size, antialias=True)
        self._size = [size, size]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Return uint8 (3, size, size) from (3, h, w). Randomness is drawn from torch's default generator."""
        place = self._crop.make_params([image])
        top, left = place["top"], place["left"]
        region = image[:, top : top + place["height"], left : left + place["width"]]
        # Resizing works on pixels with their colours side by side, in one piece of memory; it would bring anything else
        # into that form and back.
        whole = region.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        resized = v2.functional.resize_image(whole, self._size, antialias=True)
        return resized.flip(-1) if torch.rand(1) < 0.5 else resized


class _Contiguous(torch.nn.Module):
    """Lay channels one after the other in memory, on which the last bit of some of torchvision's transforms depends."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.contiguous()


Transform = Callable[[torch.Tensor], torch.Tensor]
"""From uint8 (3, H, W) to uint8 (3, size, size). Randomness is drawn from torch's default generator, or, by a
BatchTransform, from a seed for each image."""


@dataclass(frozen=True)
class EpochTransform:
    """Hold how training images are transformed from an epoch on.

    Args:
        epoch: the first one.
        image_size: side of an image, pixels.
        transform: makes images of that size.
    """

    epoch: int
    image_size: int
    transform: Transform


@dataclass(frozen=True)
class ImagePipeline:
    """Hold the transforms of a recipe.

    Args:
        by_epoch: of training images, the first one from epoch 0 on.
        validation: of other images.
        image_size: side of an image that is not for training, pixels.
        normalize: applied to batches, on the device.
    """

    by_epoch: tuple[EpochTransform, ...]
    validation: Transform
    image_size: int
    normalize: Normalize

    @property
    def train(self) -> Transform:
        """Return the transform of training images in the last epochs."""
        return self.by_epoch[-1].transform

    @property
    def train_size(self) -> int:
        """Return the largest side of a training image, in pixels."""
        return max(each.image_size for each in self.by_epoch)

    @property
    def sizes(self) -> list[int]:
        """Return every side of an image that the models see, in pixels, each once: that of evaluations first."""
        return list(dict.fromkeys([self.image_size, *(each.image_size for each in self.by_epoch)]))

    def describe_sizes(self) -> str:
        """Return the sizes in words."""
        first, *later = (f"{each.image_size}×{each.image_size}" for each in self.by_epoch)
        changes = [f"from epoch {each.epoch} on {size}" for each, size in zip(self.by_epoch[1:], later, strict=True)]
        other = [] if self.sizes == [self.image_size] else [f"evaluated at {self.image_size}×{self.image_size}"]
        return ", ".join([first, *changes, *other])


CIFAR = Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS = Normalize((0.305, 0.305, 0.305), (0.376, 0.376, 0.376))


def build_pipeline(
    stages: Stages,
    validation_stages: Stages | None = None,
    image_size: int | None = None,
    normalize: Normalize | None = None,
    train_sizes: Mapping[int, int] | None = None,
) -> ImagePipeline:
    """Build the transforms of a preset, or transforms by name.

    Args:
        stages: `imagenet`, `cifar`, `digits`, or a list of names of torchvision.transforms.v2 with their arguments; an
            argument `image_size` stands for the size of the images.
        validation_stages: the transforms of validation images, where `stages` is a list.
        image_size: side of an image, pixels; None: the last of `train_sizes`, or the preset's.
        normalize: None: the preset's.
        train_sizes: side of training images from an epoch on, by epochs, which rise from 0; None: image_size.

    Raises:
        ValueError: a transform is unknown, or does not take its arguments.
    """
    sizes = train_sizes or {}
    image_size = image_size or (list(sizes.values())[-1] if sizes else None)
    if isinstance(stages, str):
        size = image_size or {"imagenet": 224, "cifar": 32, "digits": 32}[stages]
        presets: dict[str, Callable[[int], tuple[Transform, Transform, Normalize]]]
        presets = {"imagenet": _imagenet, "cifar": _cifar, "digits": _digits}
        make = presets[stages]
        _, validation, default = make(size)
        made = tuple(EpochTransform(epoch, side, make(side)[0]) for epoch, side in (sizes or {0: size}).items())
        return ImagePipeline(made, validation, size, normalize or default)
    if validation_stages is None or isinstance(validation_stages, str) or image_size is None or normalize is None:
        raise ValueError(
            "a list of transforms needs a list of validation transforms, an image size and a normalisation"
        )
    named = tuple(
        EpochTransform(epoch, side, transforms_by_name(stages, side))
        for epoch, side in (sizes or {0: image_size}).items()
    )
    return ImagePipeline(named, transforms_by_name(validation_stages, image_size), image_size, normalize)


def _resize(size: int | Sequence[int]) -> v2.Transform:
    return v2.Resize(size, antialias=True)


def _cifar(size: int) -> tuple[BatchTransform, BatchTransform, Normalize]:
    """Build four pixels of padding at 32, a random crop, and a random flip. CIFAR's own 32 pixels are not resized."""
    return CropAndFlip(size, size // 8, flip=True), CropAndFlip(size), CIFAR


def _imagenet(size: int) -> tuple[ResizedCropAndFlip, v2.Transform, Normalize]:
    """Build a random resized crop and a random flip; for validation, the shorter side is resized to 256/224 of the size
    before a centre crop."""
    validation = v2.Compose([_resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    return ResizedCropAndFlip(size), validation, IMAGENET


def _digits(size: int) -> tuple[BatchTransform, BatchTransform, Normalize]:
    """Build a resize of 8×8 digits, and a random crop. Nothing is flipped: a digit is not its mirror image."""
    return CropAndFlip(size, size // 8), CropAndFlip(size), DIGITS


IMAGE_SIZE = "image_size"
"""The argument of a transform that stands for the size of the images."""


def transforms_by_name(stages: Sequence[str | Mapping[str, Any]], image_size: int = 224) -> v2.Transform:
    """Build torchvision's transforms, applied one after the other.

    Args:
        stages: names, or names with arguments.
        image_size: what the argument `image_size` stands for.

    Raises:
        ValueError: a name is unknown, or a transform does not take its arguments.
    """
    transforms = []
    for stage in stages:
        name, arguments = (stage, {}) if isinstance(stage, str) else next(iter(stage.items()))
        factory = getattr(v2, name, None)
        if not (isinstance(factory, type) and issubclass(factory, v2.Transform)):
            raise ValueError(f"{name!r} is not a transform of torchvision.transforms.v2")
        if name == "Normalize":
            raise ValueError("Normalize is not a transform of single images here; give data.normalization")
        if not isinstance(arguments, Mapping):
            raise ValueError(f"{name}: arguments are written as {{name: value}}, not {arguments!r}")
        try:
            transforms.append(factory(**{key: _with_size(value, image_size) for key, value in arguments.items()}))
        except Exception as error:  # a transform's own code may raise anything
            raise ValueError(f"{name}: {error}") from error
    return v2.Compose([_Contiguous(), *transforms])


def _with_size(value: Any, image_size: int) -> Any:
    """Return an argument of a transform, with the size of the images in the place of its name."""
    if isinstance(value, list):
        return [_with_size(each, image_size) for each in value]
    return image_size if value == IMAGE_SIZE else value
