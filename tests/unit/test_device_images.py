"""Images on the device that trains: the batches of the other loaders, to the bit."""

import json

import numpy as np
import pytest
import torch
import yaml

from dkd.cli import main
from dkd.config import RecipeError
from dkd.config.loading import validate
from dkd.data import (
    CropAndFlip,
    DeviceEvaluationLoader,
    DeviceImages,
    DeviceTrainLoader,
    EvaluationLoader,
    GlobalBatchSampler,
    TrainLoader,
    build_pipeline,
    open_source,
)
from dkd.data.sources.memory import InMemorySource
from dkd.rng import derive_seed, derive_seeds

CPU = torch.device("cpu")


def colours(count=97, side=32):
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (count, 3, side, side), dtype=np.uint8))
    return InMemorySource(pixels, generator.integers(0, 10, count))


SOURCES = {
    "cifar, images of its own size": (colours, "cifar"),
    "cifar, images that are resized": (lambda: open_source("digits", training=True), "cifar"),
    "digits, which are not mirrored": (lambda: open_source("digits", training=True), "digits"),
}


def equal(ours, theirs):
    assert torch.equal(ours.images, theirs.images)
    assert ours.images.is_contiguous()
    assert torch.equal(ours.labels, theirs.labels)
    assert ours.valid == theirs.valid


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_training_are_those_of_the_loader(case, world):
    make, preset = SOURCES[case]
    source, pipeline = make(), build_pipeline(preset)
    images = DeviceImages(source, pipeline.train, CPU)
    seen = set()
    for rank in range(world):
        order = GlobalBatchSampler(len(source), 3, 16, 4, rank, world)
        # Over the end of an epoch.
        first = order.steps_per_epoch - 2
        loaders = TrainLoader(source, pipeline.train, order), DeviceTrainLoader(images, order)
        for theirs, ours in zip(*(each.steps(first, first + 5) for each in loaders), strict=True):
            equal(ours, theirs)
            seen.add(ours.images.sum().item())
    assert len(seen) == 5 * 4  # of different images


@pytest.mark.parametrize("case", SOURCES)
def test_batches_of_evaluation_are_those_of_the_loader(case):
    make, preset = SOURCES[case]
    source, pipeline = make(), build_pipeline(preset)
    images = DeviceImages(source, pipeline.validation, CPU)
    for rank in range(3):
        theirs = EvaluationLoader(source, pipeline.validation, 10, rank, 3)
        ours = DeviceEvaluationLoader(source, images, 10, rank, 3)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            equal(one, other)


def test_a_crop_without_padding_is_the_image_and_a_mirrored_one():
    source = colours(side=8)
    for transform in (CropAndFlip(8), CropAndFlip(8, flip=True)):
        order = GlobalBatchSampler(len(source), 0, 8, 8)
        loaders = TrainLoader(source, transform, order), DeviceTrainLoader(DeviceImages(source, transform, CPU), order)
        for theirs, ours in zip(*(each.steps(0, 3) for each in loaders), strict=True):
            equal(ours, theirs)


def test_many_seeds_at_once_are_those_of_one_at_a_time():
    last = np.array([0, 1, 2, 17, 2**40, 2**62])
    for numbers in ((0,), (5, 7), (2**63 - 1, 3, 2**40)):
        assert derive_seeds(numbers, last).tolist() == [derive_seed(*numbers, int(n)) for n in last]


def recipe(folder, **changes):
    return {
        "run": {"dir": str(folder), "trackers": []},
        "data": {
            "train": "digits",
            "validation": "digits",
            "classes": 10,
            "transforms": "cifar",
            "mixup": 0.4,
            "cutmix": 1.0,
            **changes,
        },
        "student": {"name": "resnet8"},
        "train": {"global_batch": 64, "micro_batch": 32, "epochs": 2, "max_steps": 24, "precision": "fp32"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "schedule": {"name": "constant"},
        "checkpoint": {"every_steps": 10},
    }


def train(path, **changes):
    path.mkdir()
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe(path / "run", **changes)))
    assert main(["train", str(path / "recipe.yaml")]) == 0
    lines = [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]
    clocks = ("images_per_second", "data_wait", "seconds")
    kept = [{k: v for k, v in line.items() if k not in clocks} for line in lines if "step" in line]
    return kept, (path / "run" / "student.safetensors").read_bytes()


def test_a_training_with_mixed_images_is_the_same_to_the_bit(tmp_path, capsys):
    """The images are mixed after they were cropped, in either way."""
    plain, on_device = (
        train(tmp_path / name, in_memory=value) for name, value in (("plain", True), ("device", "device"))
    )
    assert capsys.readouterr().err.count("the training images are held by cpu, 6 MB") == 1
    assert [line["loss"] for line in plain[0] if "loss" in line]
    assert plain == on_device


def test_images_that_are_not_cropped_and_mirrored_alone_cannot_be_there(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.in_memory.*transforms=cifar or digits alone"):
        validate(recipe(tmp_path, in_memory="device", transforms="imagenet"))
    with pytest.raises(RecipeError, match=r"data\.in_memory.*does not go with data\.streaming"):
        validate(recipe(tmp_path, in_memory="device", streaming=True, train="parquet:x"))
    with pytest.raises(RecipeError, match=r"data\.in_memory"):
        validate(recipe(tmp_path, in_memory="gpu"))
