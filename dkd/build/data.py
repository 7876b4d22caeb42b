"""From a recipe to its images: sources, transforms, the order of samples, worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dkd import machine
from dkd.config import Recipe
from dkd.config.derived import classes, data_seed, micro_batch, teacher_views
from dkd.config.image_sizes import sizes_by_epoch
from dkd.config.messages import shown
from dkd.config.schema import DataSection
from dkd.data import (
    CropAndFlip,
    DataError,
    DeviceEvaluationLoader,
    DeviceImages,
    DeviceTrainLoader,
    EvaluationLoader,
    GlobalBatchSampler,
    ImagePipeline,
    ImageSource,
    MixupCutmix,
    Normalize,
    RowGroups,
    StreamedBatchSampler,
    TrainLoader,
    build_pipeline,
    in_memory,
    is_in_memory,
    open_row_groups,
    open_source,
    pixels_in_memory,
)
from dkd.data.sampler import TURNS
from dkd.data.samples import Batch, Samples
from dkd.data.sources import has_labels, set_aside, split_spec
from dkd.launch import Launch

MOST_WORKERS = 16
"""Worker processes of a rank, unless the recipe asks for more: above it, the rank itself is what takes the time."""


def build_image_pipeline(recipe: Recipe) -> ImagePipeline:
    """Return transforms and the student's normalisation."""
    data = recipe.data
    normalize = _normalize(data.normalization)
    sizes = sizes_by_epoch(data.train_image_size)
    return build_pipeline(data.transforms, data.validation_transforms, data.image_size, normalize, sizes)


def describe_input(pipeline: ImagePipeline, class_names: list[str] | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what student.json states of the student's input and output, and of the images it was trained on.

    Args:
        class_names: of the data, in the order of the logits; None: not known.
        facts: of `data_facts`.
    """
    normalize = pipeline.normalize
    return {
        "image_size": pipeline.image_size,
        "normalization": {"mean": list(normalize.mean), "std": list(normalize.std)},
        **({} if class_names is None else {"class_names": list(class_names)}),
        "training_data": dict(facts),
    }


def teacher_normalize(recipe: Recipe, student: Normalize) -> dict[str, Normalize]:
    """Return each teacher's own normalisation, or the student's, by name."""
    return {
        name: _normalize(view.teacher.normalization if view.teacher is not None else None) or student
        for name, view in teacher_views(recipe)
    }


def _normalize(section: object) -> Normalize | None:
    return None if section is None else Normalize(tuple(section.mean), tuple(section.std))  # type: ignore[attr-defined]


def open_part(data: DataSection, part: str) -> ImageSource:
    """Open data.train, or a data.validation that is a name. Raises DataError."""
    spec = data.train if part == "train" else data.validation
    assert isinstance(spec, str), "validation images that have no place of their own"
    image, label, labels = data.image_column, data.label_column, data.labels
    # The validation data may be of another kind.
    if data.streaming and (part == "train" or split_spec(spec)[0] in ("parquet", "hub")):
        return open_row_groups(spec, training=part == "train", image_column=image, label_column=label, labels=labels)
    return open_source(
        spec, training=part == "train", root=data.root, image_column=image, label_column=label, labels=labels
    )


def open_labelled(recipe: Recipe, spec: str, training: bool) -> ImageSource:
    """Open images that `evaluation.knn` names, with their labels. Raises DataError.

    Args:
        training: which part to take where a data set has two.
    """
    data, knn = recipe.data, recipe.evaluation.knn
    label = data.label_column if knn is None or knn.label_column is None else knn.label_column
    image = data.image_column
    if data.streaming and split_spec(spec)[0] in ("parquet", "hub"):
        return open_row_groups(spec, training=training, image_column=image, label_column=label)
    return open_source(spec, training=training, root=data.root, image_column=image, label_column=label)


def open_parts(recipe: Recipe) -> tuple[ImageSource, ImageSource | None]:
    """Open the training images, and those of the validation: named, or drawn from the training images, or None where
    nothing is evaluated. Raises DataError."""
    data = recipe.data
    training = open_part(data, "train")
    if isinstance(data.validation, float):
        return set_aside(training, data.validation, data_seed(recipe))
    return training, None if data.validation is None else open_part(data, "validation")


def open_validation_part(recipe: Recipe) -> ImageSource | None:
    """Open the validation images alone, as `open_parts` does. Raises DataError."""
    data = recipe.data
    return open_part(data, "validation") if isinstance(data.validation, str) else open_parts(recipe)[1]


def decode_into_memory(data: DataSection, source: ImageSource, local_world_size: int) -> ImageSource:
    """Return the training images decoded once, where `data.in_memory` allows it and they fit; else the source as it is.

    Args:
        local_world_size: ranks of this machine; each keeps images of its own.

    Raises:
        DataError: an image cannot be read, or the images have several sizes and `data.in_memory` asks for them.
    """
    if data.in_memory is False or data.streaming:
        return source
    asked = data.in_memory in (True, "device")
    limit = None if asked else memory_for_images(local_world_size)
    try:
        decoded = in_memory(source, limit_bytes=limit)
    except DataError:
        if data.on_error == "raise" or asked:
            raise
        return source  # read one by one; broken images are skipped
    if decoded is None and asked:
        raise DataError(f"data.in_memory is {shown(data.in_memory)}, but the images have several sizes")
    return decoded or source


def memory_for_images(local_world_size: int) -> int:
    """Return the bytes that a rank's decoded images may take where the recipe does not ask for them: 1 GiB, and where
    memory is short, the rank's share of an eighth of it."""
    return min(2**30, machine.memory() // 8 // local_world_size)


def images_on_device(
    data: DataSection, source: ImageSource, transform: object, device: torch.device, used: int = 0
) -> DeviceImages | None:
    """Return a source's images on the device that trains, where `data.in_memory` asks for it, or leaves it open and
    they fit; else None.

    Args:
        transform: of the batches.
        used: bytes of other images there. Those of evaluations stay on the host where all would take more than an
            eighth of the device.

    Raises:
        DataError: they are asked for, and do not fit.
    """
    pixels = pixels_in_memory(source)
    if data.in_memory not in ("auto", "device") or pixels is None or not isinstance(transform, CropAndFlip):
        return None
    needed = len(pixels) * pixels.shape[1] * (transform.size + 2 * transform.padding) ** 2
    if device.type != "cuda":
        return DeviceImages(source, transform, device) if data.in_memory == "device" else None
    there = torch.cuda.get_device_properties(device).total_memory
    if used + needed > there / 8:
        if data.in_memory == "auto" or used:
            return None
        if needed > there / 2:
            raise DataError(
                f"data.in_memory=device: the images take {needed / 1e9:.1f} GB, more than half of the device's "
                f"{there / 1e9:.1f} GB; take true"
            )
    return DeviceImages(source, transform, device)


def loader_workers(data: DataSection, source: ImageSource, local_world_size: int) -> int:
    """Count the worker processes of this rank: as the recipe states; by default none for images in memory, else a share
    of the cores that the ranks of this machine may run on."""
    if data.workers != "auto":
        return data.workers
    if is_in_memory(source):
        return 0
    workers = max(1, machine.cores() // local_world_size)
    # For row groups, so many that each worker has lanes of its own (StreamedBatchSampler.readers).
    streamed = min(TURNS, 2 ** (workers.bit_length() - 1))
    return streamed if isinstance(source, RowGroups) else min(MOST_WORKERS, workers)


def build_sampler(recipe: Recipe, source: ImageSource, launch: Launch) -> GlobalBatchSampler:
    """Return the order of training samples, and which of them this rank computes."""
    train, data = recipe.train, recipe.data
    b = micro_batch(recipe, launch.world_size)
    batches = (len(source), data_seed(recipe), train.global_batch, b, launch.rank, launch.world_size)
    repeating: dict[str, Any] = {"period": data.augmentation_period, "repeats": data.repeated_augmentation}
    if isinstance(source, RowGroups):
        sizes = tuple(source.sizes.tolist())
        lanes, window = data.stream_lanes, data.shuffle_window
        return StreamedBatchSampler(*batches, sizes, lanes, window, **repeating)
    return GlobalBatchSampler(*batches, **repeating)


@dataclass(frozen=True)
class KnnSources:
    """Holds the images that the k-NN accuracy is measured on.

    Args:
        bank: among which neighbours are looked for.
        queries: whose classes are voted for; their labels are the bank's classes.
        classes: number of classes.
    """

    bank: ImageSource
    queries: ImageSource
    classes: int


@dataclass(frozen=True)
class KnnLoaders:
    """Holds this rank's batches of the images that the k-NN accuracy is measured on. Fields as KnnSources."""

    bank: EvaluationLoader
    queries: EvaluationLoader
    classes: int


@dataclass(frozen=True)
class DataParts:
    """Holds the images of a training, on one rank.

    Args:
        pipeline: transforms and the student's normalisation.
        teacher_normalize: of each teacher's input, by name.
        mixing: mixup and CutMix of micro-batches, or None.
        workers: worker processes of this rank that load training images.
        validation: None: nothing is evaluated.
        facts: number and fingerprint of the training images.
        class_names: in the order of the labels; None: the data do not name them.
        knn: None: the k-NN accuracy is not measured.
    """

    sampler: GlobalBatchSampler
    train_loader: TrainLoader | DeviceTrainLoader
    validation: EvaluationLoader | None
    pipeline: ImagePipeline
    teacher_normalize: Mapping[str, Normalize]
    mixing: MixupCutmix | None
    workers: int
    facts: Mapping[str, Any]
    class_names: list[str] | None = None
    knn: KnnLoaders | None = None


def build_data(
    recipe: Recipe,
    training: ImageSource,
    validation: ImageSource | None,
    launch: Launch,
    dtype: torch.dtype,
    device: torch.device,
    knn: KnnSources | None = None,
) -> DataParts:
    """Return samplers, loaders and transforms. No worker process starts before a loader is iterated over.

    Args:
        training, validation: opened; no validation: nothing is evaluated.
        dtype: of the models' inputs.
        device: that trains. For a GPU, batches are loaded into page-locked memory, for a faster copy.
        knn: opened, where the recipe asks for it.
    """
    pipeline, data, local = build_image_pipeline(recipe), recipe.data, launch.local_world_size
    sampler, workers = build_sampler(recipe, training, launch), loader_workers(data, training, local)
    replaces, pin = data.on_error == "skip", device.type == "cuda"
    # On the device, images of one size are kept.
    held = None if len(pipeline.by_epoch) > 1 else images_on_device(data, training, pipeline.train, device)
    evaluated: list[DeviceImages] = []

    def evaluation_loader(source: ImageSource) -> EvaluationLoader:
        size, own_workers = pipeline.image_size, loader_workers(data, source, local)
        batch, rank, world = recipe.evaluation.batch, launch.rank, launch.world_size
        if held is not None:
            used = sum(each.bytes for each in (held, *evaluated))
            images = _evaluated_on_device(data, source, pipeline, device, local, used)
            if images is not None:
                evaluated.append(images)
                return DeviceEvaluationLoader(source, images, batch, rank, world)
        return EvaluationLoader(source, pipeline.validation, batch, rank, world, own_workers, pin, size)

    return DataParts(
        sampler,
        TrainLoader(training, pipeline.train, sampler, workers, pin, replaces, by_epoch=pipeline.by_epoch)
        if held is None
        else DeviceTrainLoader(held, sampler),
        None if validation is None else evaluation_loader(validation),
        pipeline,
        teacher_normalize(recipe, pipeline.normalize),
        build_mixing(recipe, dtype),
        workers,
        data_facts(training),
        training.class_names,
        None if knn is None else KnnLoaders(evaluation_loader(knn.bank), evaluation_loader(knn.queries), knn.classes),
    )


def _evaluated_on_device(
    data: DataSection,
    source: ImageSource,
    pipeline: ImagePipeline,
    device: torch.device,
    local_world_size: int,
    used: int,
) -> DeviceImages | None:
    """Return images of an evaluation on the device that trains; None where they do not fit, or one cannot be read,
    which the evaluation then reports."""
    try:
        decoded = in_memory(source, memory_for_images(local_world_size))
        return None if decoded is None else images_on_device(data, decoded, pipeline.validation, device, used)
    except DataError:
        return None


def build_mixing(recipe: Recipe, dtype: torch.dtype = torch.float32) -> MixupCutmix | None:
    """Return mixup and CutMix of micro-batches, or None for a recipe without them.

    Args:
        dtype: of the weights that mixed images have of each class.
    """
    data = recipe.data
    if not data.mixup and not data.cutmix:
        return None
    return MixupCutmix(classes(recipe), data.mixup, data.cutmix, dtype, data.labels)


SAMPLED_IMAGES = 64
"""Images by which the content of a data set is recognised."""


def sampled_content(source: ImageSource, pipeline: ImagePipeline, seed: int) -> dict[str, str]:
    """Return fingerprints of some training images: `pixels`, as they are decoded, and `augmented`, as models see them.
    Other images under the same labels show there, and so do another decoder, or transforms of another version.

    Raises:
        DataError: one cannot be read.
    """
    count = min(SAMPLED_IMAGES, len(source))
    if isinstance(source, RowGroups):  # a row group is read as a whole: neighbours, from few of them
        groups = min(4, len(source.sizes))
        firsts = np.concatenate([[0], np.cumsum(source.sizes)])[:: max(1, len(source.sizes) // groups)][:groups]
        indices = [int(first) + i for first in firsts for i in range(count // groups) if int(first) + i < len(source)]
    else:
        indices = [i * len(source) // count for i in range(count)]
    pixels, augmented = hashlib.sha256(), hashlib.sha256()
    samples = Samples(source, pipeline.train, seed)
    for index in indices:
        image = source.image(index).contiguous()
        pixels.update(f"{index} {tuple(image.shape)}".encode() + image.numpy().tobytes())
        batch = samples.__getitems__([(0, index)])
        assert isinstance(batch, Batch)
        augmented.update(f"{index}".encode() + batch.images.contiguous().numpy().tobytes())
    return {"pixels": pixels.hexdigest(), "augmented": augmented.hexdigest()}


def data_facts(source: ImageSource) -> dict[str, Any]:
    """Return the number of images, and a fingerprint of what the order of samples rests on: labels, or for images
    without labels their places, and row groups where they count."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    if not has_labels(source):
        digest.update(source.places)
    if isinstance(source, RowGroups):
        digest.update(source.sizes.tobytes())
    return {"images": len(source), "sha256": digest.hexdigest()}
