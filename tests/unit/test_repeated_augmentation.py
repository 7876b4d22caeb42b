"""Images that a global batch holds several times: which, where, and with which augmentation."""

from collections import Counter

import pytest
import torch
import yaml
from few_images import write_images
from interrupted import outcome, train_in_starts
from safetensors.torch import save_file
from test_evaluation import recipe_in
from test_streaming import SIZES
from test_teacher_cache import values_of

from dkd.cli import main
from dkd.config.loading import validate
from dkd.data import (
    DeviceImages,
    DeviceTrainLoader,
    GlobalBatchSampler,
    StreamedBatchSampler,
    TrainLoader,
    build_pipeline,
    open_row_groups,
    open_source,
)
from dkd.models import ModelSpec, build_model
from dkd.rng import derive_seed
from dkd.training.summary import summarize_streaming
from dkd.training.trainer import Trainer

KINDS = {"shuffled": (GlobalBatchSampler, ()), "streamed": (StreamedBatchSampler, (SIZES, 16, 8))}


def orders(kind, world=1, micro_batch=24, repeats=3, **more):
    make, own = KINDS[kind]
    return [make(100, 7, 24, micro_batch, rank, world, *own, repeats=repeats, **more) for rank in range(world)]


def batches(kind, *arguments, steps=(0, 12), **more):
    """The global batches that all ranks compute together, in the order of places."""
    per_rank = [list(order.micro_batches(*steps)) for order in orders(kind, *arguments, **more)]
    keys = [key for micro_batches in zip(*per_rank, strict=True) for keys in micro_batches for key in keys]
    return [keys[i : i + 24] for i in range(0, len(keys), 24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "micro_batch"), [(1, 6), (2, 12), (3, 8), (4, 2), (2, 4), (12, 2)])
def test_ranks_and_micro_steps_only_say_who_computes_which_samples(kind, world, micro_batch):
    assert batches(kind, world, micro_batch) == batches(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_holds_each_of_its_images_as_often_as_asked_and_an_epoch_in_one_batch_only(kind):
    found = batches(kind)
    assert [order.steps_per_epoch for order in orders(kind)] == [4]  # N // B, as without copies
    for batch in found:
        # Copy k of image i is at place k · B/R + i.
        assert [index for _, index in batch] == 3 * [index for _, index in batch[:8]]
        assert set(Counter(index for _, index in batch).values()) == {3}
        assert [draw % 3 for draw, _ in batch] == [0] * 8 + [1] * 8 + [2] * 8
    for epoch in range(3):
        images = {index for batch in found[4 * epoch : 4 * epoch + 4] for _, index in batch}
        assert len(images) == orders(kind)[0].images_per_epoch == 32
    # No augmentation comes twice in a run.
    assert len({key for batch in found for key in batch}) == 12 * 24
    assert {draw // 3 for draw, _ in found[3]} == {0}
    assert {draw // 3 for draw, _ in found[4]} == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_lie_on_different_ranks_as_in_deit(kind):
    for order in orders(kind, 3, 8):
        for keys in order.micro_batches(0, 4):
            assert len({index for _, index in keys}) == 8
            assert {draw % 3 for draw, _ in keys} == {order.rank}


@pytest.mark.parametrize("kind", KINDS)
def test_any_step_can_be_the_first_and_a_period_repeats_the_copies_too(kind):
    assert batches(kind, steps=(5, 12)) == batches(kind)[5:]
    repeated = batches(kind, period=2)
    assert repeated[8:] == repeated[:4]
    assert repeated[:8] == batches(kind)[:8]


@pytest.mark.parametrize("kind", KINDS)
def test_one_copy_is_the_order_without_copies(kind):
    make, own = KINDS[kind]
    assert batches(kind, repeats=1) == list(make(100, 7, 24, 24, 0, 1, *own).micro_batches(0, 12))
    with pytest.raises(ValueError, match="5 copies of each image do not divide 24"):
        orders(kind, repeats=5)


def test_images_are_drawn_anew_in_each_epoch_and_about_equally_often():
    seen = torch.zeros(1797)
    order = GlobalBatchSampler(1797, 0, 512, 512, repeats=4)
    for (epoch_keys,) in zip(order.micro_batches(0, 3 * 200), strict=True):
        seen[[index for _, index in epoch_keys[:128]]] += 1
    assert seen.sum() == 3 * 200 * 128
    assert 20 < seen.min() <= seen.max() < 70  # 384 of 1,797 images an epoch, in 200 epochs: 43, and 6 by chance


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_have_pixels_of_their_own_that_depend_on_neither_ranks_nor_workers(tmp_path, in_memory):
    if in_memory:
        source = open_source("digits", training=True)
    else:
        write_images(tmp_path / "a.parquet", 100, pixels=32)
        source = open_source(str(tmp_path / "a.parquet"), training=True)
    transform = build_pipeline("cifar", image_size=32).train

    def images(world, workers):
        loaded = []
        for rank in range(world):
            order = GlobalBatchSampler(len(source), 1, 24, 12 // world, rank, world, repeats=3)
            loaded.append(list(TrainLoader(source, transform, order, workers, image_size=32).steps(3, 5)))
        return torch.cat([batch.images for batches in zip(*loaded, strict=True) for batch in batches])

    found = images(1, 0)
    for world, workers in ((2, 0), (4, 2), (1, 3)):
        assert torch.equal(images(world, workers), found)
    keys = [key for keys in GlobalBatchSampler(len(source), 1, 24, 24, repeats=3).micro_batches(3, 5) for key in keys]
    for (draw, index), image in zip(keys, found, strict=True):
        wanted = transform.of_batch(source.image(index)[None], [derive_seed(1, draw, index)])[0]
        assert torch.equal(image, wanted)
    copies = found[:24].view(3, 8, -1)
    assert all((copies[a] != copies[b]).any(1).sum() > 5 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(("micro_batch", "workers"), [(20, 4), (40, 4), (8, 3), (80, 1)])
def test_a_streamed_order_reads_each_row_group_about_once_for_each_reader(tmp_path, monkeypatch, micro_batch, workers):
    from pyarrow import parquet

    write_images(tmp_path / "a.parquet", 2000, pixels=4, row_group=20)
    read, read_row_group = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda file, group, **more: (read.append(group), read_row_group(file, group, **more))[1],
    )
    source = open_row_groups(str(tmp_path / "a.parquet"), training=True)
    sizes = tuple(source.sizes.tolist())
    order = StreamedBatchSampler(2000, 0, 80, micro_batch, 0, 1, sizes, 16, 30, repeats=4)
    keys = list(order.micro_batches(0, order.steps_per_epoch))
    used = {index // 20 for each in keys for _, index in each}
    seen = set()
    for worker in range(workers):
        source = open_row_groups(str(tmp_path / "a.parquet"), training=True)  # as in a process of its own
        source.keep(order.row_groups_of_a_worker(workers), order.repeats)
        for each in keys[worker::workers]:
            for _, index in each:
                source.image(index)
                seen.add(index)
    assert len(seen) == order.images_per_epoch == 500
    assert len(read) <= order.readers(workers) * (len(used) + 16)
    notes = " ".join(summarize_streaming(order, source, workers, 1))
    assert f"note: up to {order.readers(workers)} worker processes read the same row groups, for the copies" in notes


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path):
    values = recipe_in(
        tmp_path / "whole",
        data={"repeated_augmentation": 4, "mixup": 0.2},
        train={"micro_batch": 16, "max_steps": 7},
        checkpoint={"every_steps": 2},
    )
    whole = train_in_starts(values)
    values["run"] = {**values["run"], "dir": str(tmp_path / "interrupted")}
    assert train_in_starts(values, [3, 6, None]) == whole
    assert len(whole[0]) == 7


def test_a_teachers_cache_serves_the_copies_and_another_number_of_copies_has_another_cache(tmp_path):
    write_images(tmp_path / "few.parquet", 100)
    save_file(build_model(ModelSpec("wrn_16_1", 10)).state_dict(), tmp_path / "teacher.safetensors")

    def train(folder, repeats=4, **changes):
        values = values_of(tmp_path / "teacher.safetensors", tmp_path / "few.parquet", tmp_path / folder, **changes)
        values["data"]["repeated_augmentation"] = repeats
        trainer = Trainer.from_recipe(validate(values))
        trainer.fit()
        stored = trainer.parts.step.teaching.stored.get("")
        return outcome(trainer), None if stored is None else (stored.cache.read_steps, stored.cache.computed_steps)

    cache = {"teacher__cache": {"dir": str(tmp_path / "cache")}}
    live, _ = train("live")
    filled, computed = train("fill", **cache)
    read, was_read = train("read", **cache)
    assert (computed, was_read) == ((0, 12), (12, 0))
    assert filled == read == live
    assert train("others", repeats=2, **cache)[1] == (0, 12)
    assert train("none", repeats=1, **cache)[1] == (0, 12)


def test_the_start_reports_the_images_of_an_epoch(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    values = recipe_in(tmp_path / "run", data={"repeated_augmentation": 4}, train={"max_steps": 1})
    recipe.write_text(yaml.safe_dump(values))
    assert main(["train", str(recipe)]) == 0
    assert "each epoch has 336 of 1348 images, drawn anew, 4 times each" in capsys.readouterr().err


def test_images_on_the_device_are_the_same():
    source, transform = open_source("digits", training=True), build_pipeline("cifar", image_size=16).train
    held = DeviceImages(source, transform, torch.device("cpu"))
    for rank in range(2):
        order = GlobalBatchSampler(len(source), 1, 24, 6, rank, 2, repeats=3)
        ours, theirs = DeviceTrainLoader(held, order), TrainLoader(source, transform, order)
        for a, b in zip(ours.steps(3, 6), theirs.steps(3, 6), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
