"""Which samples a batch holds, on which rank, and that their pixels depend on nothing else."""

import io

import numpy as np
import pytest
import torch
from few_images import write_parquet
from PIL import Image

from dkd.data import (
    EvaluationLoader,
    GlobalBatchSampler,
    TrainLoader,
    build_pipeline,
    open_source,
)
from dkd.rng import derive_seed


def epoch_of(order, step=0, steps=None):
    return [key for keys in order.micro_batches(step, step + (steps or order.steps_per_epoch)) for key in keys]


def all_ranks(world, micro_batch, **position):
    """The global batches that `world` ranks compute together, in the order of micro-batches."""
    orders = [GlobalBatchSampler(100, 7, 24, micro_batch, rank, world) for rank in range(world)]
    per_rank = [list(order.micro_batches(0, 8)) for order in orders]
    return [key for micro_batches in zip(*per_rank, strict=True) for keys in micro_batches for key in keys]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (1, 6), (2, 12), (2, 6), (4, 6), (4, 2), (3, 8)])
def test_ranks_and_micro_steps_only_say_who_computes_which_samples(world, micro_batch):
    assert all_ranks(world, micro_batch) == all_ranks(1, 24)


def test_an_epoch_visits_each_sample_at_most_once_and_epochs_differ():
    order = GlobalBatchSampler(100, 7, 24, 24)
    first, second = epoch_of(order), epoch_of(order, step=4)
    assert len({index for _, index in first}) == len(first) == 96
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in first] != [i for _, i in second]


def test_any_step_can_be_the_first():
    order = GlobalBatchSampler(100, 7, 24, 12, rank=1, world_size=2)
    everything = list(order.micro_batches(0, 12))
    for step in (1, 4, 7):
        assert list(order.micro_batches(step, 12)) == everything[step * order.micro_steps :]


def test_too_few_samples_and_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="do not fill one global batch"):
        GlobalBatchSampler(10, 0, 24, 24)
    with pytest.raises(ValueError, match="do not divide"):
        GlobalBatchSampler(100, 0, 24, 10)


def test_the_seed_of_a_sample_is_the_same_on_every_machine():
    assert derive_seed(0, 0, 0) != derive_seed(0, 0, 1) != derive_seed(0, 1, 0)
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1  # the published first output of splitmix64 from state 0
    assert len({derive_seed(0, 0, index) for index in range(10_000)}) == 10_000


@pytest.mark.parametrize("preset", ["digits", "cifar", "imagenet"])
def test_augmentation_does_not_depend_on_workers_ranks_or_position(preset):
    source = open_source("digits", training=True)
    pipeline = build_pipeline(preset, image_size=32)

    def images(world, workers, first):
        per_rank = [
            TrainLoader(
                source, pipeline.train, GlobalBatchSampler(len(source), 1, 16, 16 // world, rank, world), workers
            ).steps(first, first + 2)
            for rank in range(world)
        ]
        return torch.cat([batch.images for batches in zip(*per_rank, strict=True) for batch in batches])

    reference = images(1, 0, 3)
    assert reference.dtype == torch.uint8
    for world, workers in ((2, 0), (1, 2), (4, 1)):
        assert torch.equal(images(world, workers, 3), reference), (world, workers)
    assert not torch.equal(images(1, 0, 4)[:16], reference[:16])


@pytest.mark.parametrize("preset", ["digits", "cifar"])
def test_images_in_memory_and_on_disk_are_augmented_alike(preset):
    """A batch at a time where all are decoded, one by one elsewhere."""
    source = open_source("digits", training=True)

    class OnDisk:
        labels, class_names, image, images, neighbours = (
            source.labels,
            None,
            source.image,
            source.images,
            source.neighbours,
        )

        def __len__(self):
            return len(source)

    pipeline, order = build_pipeline(preset, image_size=32), GlobalBatchSampler(len(source), 1, 16, 16)
    for a, b in zip(*(TrainLoader(s, pipeline.train, order).steps(3, 6) for s in (source, OnDisk())), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    for a, b in zip(*(EvaluationLoader(s, pipeline.validation, 100, 1, 3) for s in (source, OnDisk())), strict=True):
        assert torch.equal(a.images[: a.valid], b.images[: b.valid])
        assert (a.valid, a.labels.tolist()) == (b.valid, b.labels.tolist())


def test_loading_leaves_the_random_state_of_training_alone():
    source = open_source("digits", training=True)
    batches = TrainLoader(source, build_pipeline("digits").train, GlobalBatchSampler(len(source), 1, 16, 16)).steps(
        0, 3
    )
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    next(batches)
    assert torch.equal(torch.rand(3), wanted)


def test_evaluation_batches_cover_each_sample_once_in_batches_of_one_shape():
    source = open_source("digits", training=False)
    for world, batch in ((1, 64), (2, 64), (4, 7), (3, 1000)):
        parts = [
            list(EvaluationLoader(source, build_pipeline("digits").validation, batch, rank, world))
            for rank in range(world)
        ]
        assert len({len(part) for part in parts}) == 1
        assert {len(b.images) for part in parts for b in part} == {min(batch, -(-449 // world))}
        labels = torch.cat([batch.labels[: batch.valid] for part in parts for batch in part])
        assert labels.tolist() == source.labels.tolist()


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_worker_processes_evaluate_neighbours_and_each_sample_once(workers):
    source = open_source("digits", training=False)
    for rank in range(2):
        keys = [
            [index for _, index in batch]
            for batch in EvaluationLoader(source, lambda image: image, 20, rank, 2, workers).keys
        ]
        of_workers = [[index for batch in keys[worker::workers] for index in batch] for worker in range(workers)]
        everything = [index for worker in of_workers for index in worker]
        first = rank * len(everything)
        assert everything == [index if index < 449 else -1 for index in range(first, first + len(everything))]


def test_batches_of_photographs_are_as_decoded_by_pillow_and_augmented_by_torchvision(tmp_path):
    """With worker processes and without: pixels, labels, and blank rows at the end."""
    from torchvision.transforms import v2

    generator = np.random.default_rng(0)
    cells = []
    for index in range(12):
        file = io.BytesIO()
        size = (40 + 5 * index, 60 - 3 * index, 3)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(
            file, "JPEG", quality=80, progressive=index % 2 == 1
        )
        cells.append({"bytes": file.getvalue(), "path": None})
    write_parquet(tmp_path / "a.parquet", cells, list(range(12)))
    source, pipeline, order = (
        open_source(str(tmp_path / "a.parquet"), training=True),
        build_pipeline("imagenet", image_size=32),
        GlobalBatchSampler(12, 3, 12, 4),
    )
    theirs = v2.Compose([v2.RandomResizedCrop(32, antialias=True), v2.RandomHorizontalFlip()])
    validation = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])

    def image(index):
        return torch.from_numpy(np.array(Image.open(io.BytesIO(cells[index]["bytes"])))).permute(2, 0, 1).contiguous()

    for workers in (0, 2):
        loaded = TrainLoader(source, pipeline.train, order, workers, image_size=32).steps(0, 1)
        for keys, batch in zip(order.micro_batches(0, 1), loaded, strict=True):
            assert batch.failure == ""
            for (epoch, index), made, label in zip(keys, batch.images, batch.labels, strict=True):
                torch.manual_seed(derive_seed(3, epoch, index))
                assert torch.equal(made, theirs(image(index)))
                assert label == index
        batches = list(EvaluationLoader(source, pipeline.validation, 5, workers=workers, image_size=32))
        assert sorted(label for batch in batches for label in batch.labels[: batch.valid].tolist()) == list(range(12))
        for batch in batches:
            assert batch.images[batch.valid :].count_nonzero() == batch.labels[batch.valid :].count_nonzero() == 0
            for made, label in zip(batch.images[: batch.valid], batch.labels, strict=False):
                assert torch.equal(made, validation(image(label)))
