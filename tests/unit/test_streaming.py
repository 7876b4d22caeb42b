"""Row groups read where they lie, in an order made for that; and images that cannot be read, from any source."""

import pyarrow.parquet as parquet
import pytest
import torch
from few_images import write_images
from reference_material import require_cifar10

from dkd.data import (
    DataError,
    EvaluationLoader,
    GlobalBatchSampler,
    StreamedBatchSampler,
    TrainLoader,
    build_pipeline,
    open_row_groups,
    open_source,
)
from dkd.rng import derive_seed

SIZES = (30, 12, 30, 5, 23)


def streamed(world=1, micro_batch=24, **more):
    orders = [
        StreamedBatchSampler(100, 7, 24, micro_batch, rank, world, SIZES, **{"lanes": 16, "window": 8, **more})
        for rank in range(world)
    ]
    per_rank = [list(order.micro_batches(0, 12)) for order in orders]
    return [key for micro_batches in zip(*per_rank, strict=True) for keys in micro_batches for key in keys]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 6), (2, 12), (4, 6), (4, 2), (3, 8), (12, 1)])
def test_a_streamed_order_too_says_only_who_computes_which_samples(world, micro_batch):
    assert streamed(world, micro_batch) == streamed()


@pytest.mark.parametrize("lanes", [1, 8, 16, 64, 1000])
def test_a_streamed_epoch_visits_each_sample_at_most_once_and_epochs_differ(lanes):
    keys = streamed(lanes=lanes)
    epochs = [[index for epoch, index in keys if epoch == wanted] for wanted in range(3)]
    assert [len(epoch) for epoch in epochs] == [96, 96, 96]
    assert [len(set(epoch)) for epoch in epochs] == [96, 96, 96]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("micro_batch", "lanes", "workers", "readers"),
    [(20, 16, 4, 1), (10, 32, 4, 1), (10, 16, 4, 2), (20, 16, 3, 3), (20, 16, 8, 1)],
)
def test_a_streamed_order_reads_each_row_group_about_once(tmp_path, monkeypatch, micro_batch, lanes, workers, readers):
    """Each rank and worker process in turn, with as many row groups in memory as the order asks for."""
    from pyarrow import parquet

    write_images(tmp_path / "a.parquet", 2000, pixels=4, row_group=20)
    source = open_row_groups(str(tmp_path / "a.parquet"), training=True)
    read, read_row_group = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda file, group, **more: (read.append(group), read_row_group(file, group, **more))[1],
    )
    world, reads, most = 2, 0, 0
    for rank in range(world):
        order = StreamedBatchSampler(2000, 0, 40, micro_batch, rank, world, tuple(source.sizes.tolist()), lanes, 30)
        assert order.readers(workers) == readers
        batches = list(order.micro_batches(0, order.steps_per_epoch))
        for worker in range(workers):
            source = open_row_groups(str(tmp_path / "a.parquet"), training=True)  # as in a process of its own
            source.keep(order.row_groups_of_a_worker(workers))
            for keys in batches[worker::workers]:
                for _, index in keys:
                    source.image(index)
                most = max(most, source.kept)
            assert most <= order.row_groups_of_a_worker(workers) < 100 / world
            reads += len(read)
            read.clear()
    # 100 row groups; those at the ends of lanes are read for both lanes.
    assert 100 <= reads <= readers * (100 + lanes)


def test_row_groups_are_the_images_that_datasets_reads(tmp_path):
    for number, count in enumerate((30, 7)):
        write_images(tmp_path / f"{number}.parquet", count, row_group=8, seed=number)
    ours = open_row_groups(str(tmp_path / "*.parquet"), training=True)
    theirs = open_source(str(tmp_path / "*.parquet"), training=True)
    assert ours.sizes.tolist() == [8, 8, 8, 6, 7]
    assert ours.labels.tolist() == theirs.labels.tolist()
    for index in (36, 0, 29, 30, 8, 7):
        assert torch.equal(ours.image(index), theirs.image(index))
    assert all(torch.equal(a, b) for a, b in zip(ours.images(), theirs.images(), strict=True))


def test_class_names_of_row_groups_are_those_of_the_file():
    source = open_row_groups(str(require_cifar10() / "test-*.parquet"), training=False)
    assert source.class_names == open_source(str(require_cifar10() / "test-*.parquet"), training=False).class_names
    assert len(source.class_names) == 10


@pytest.mark.parametrize(("spec", "message"), [
    ("digits", "data.streaming reads parquet files and hub:NAME, not 'digits'"),
    ("none-*.parquet", "no file matches"),
    ("{tmp}/broken.parquet", "cannot be read as parquet"),
])  # fmt: skip
def test_what_cannot_be_streamed_is_said(tmp_path, spec, message):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=message):
        open_row_groups(spec.format(tmp=tmp_path), training=True)


def augmented(source, transform, index):
    return transform.of_batch(source.image(index)[None], [derive_seed(0, 0, index)])[0]


def test_a_batch_that_cannot_be_made_tells_why_where_the_trainer_asks_for_that(tmp_path):
    write_images(tmp_path / "a.parquet", 20, broken=[(index, "no image") for index in range(20)])
    source, transform = (
        open_source(str(tmp_path / "a.parquet"), training=True),
        build_pipeline("cifar", image_size=16).train,
    )
    order = GlobalBatchSampler(20, 0, 10, 10)
    batch = next(TrainLoader(source, transform, order, replace=True, image_size=16).steps(0, 1))
    assert batch.failure.startswith("100 images one after the other cannot be read, the last: ")
    assert batch.images.shape == (10, 3, 16, 16)
    fails = TrainLoader(open_source("digits", training=True), lambda image: 1 / 0, order, image_size=16)
    assert next(fails.steps(0, 1)).failure == "ZeroDivisionError in loading: division by zero"
    with pytest.raises(DataError, match="100 images one after the other"):
        next(TrainLoader(source, transform, order, replace=True).steps(0, 1))


def test_a_damaged_row_group_is_an_unreadable_image_for_each_of_its_rows(tmp_path):
    write_images(tmp_path / "a.parquet", 40, row_group=8)
    source = open_row_groups(str(tmp_path / "a.parquet"), training=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    offset = parquet.read_metadata(tmp_path / "a.parquet").row_group(2).column(0).data_page_offset
    content[offset : offset + 30] = b"\xff" * 30
    (tmp_path / "a.parquet").write_bytes(content)
    for index in range(40):
        if 16 <= index < 24:
            with pytest.raises(DataError, match=r"row group 2 of .*a\.parquet cannot be read"):
                source.image(index)
        else:
            source.image(index)
    assert source.neighbours(3) == range(8)
    assert source.neighbours(17) == range(40)


def test_files_that_differ_in_columns_or_classes_are_refused_and_empty_ones_left_out(tmp_path):
    import pyarrow.parquet as parquet

    write_images(tmp_path / "a.parquet", 8)
    table = parquet.read_table(tmp_path / "a.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    assert len(open_row_groups(str(tmp_path / "*.parquet"), training=True)) == 8
    parquet.write_table(table.rename_columns(["img", "label"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet has another image column than .*a.parquet: img, not image"):
        open_row_groups(str(tmp_path / "*.parquet"), training=True)


def test_rows_are_shuffled_within_windows_of_a_lane():
    order = StreamedBatchSampler(4000, 0, 32, 32, 0, 1, (100,) * 40, 8, 64)
    lane = order.epoch(0).view(order.steps_per_epoch, 32)[0::8].flatten()  # one slice: every eighth step
    for window in lane.split(64):
        assert window.tolist() != sorted(window.tolist())
        assert len(window.div(100, rounding_mode="floor").unique()) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_by_others_and_named(tmp_path, workers):
    broken = {3: "truncated", 4: "of zero bytes", 9: "no image", 11: "damaged in its EXIF"}
    write_images(tmp_path / "a.parquet", 40, broken=list(broken.items()))
    source, transform = (
        open_source(str(tmp_path / "a.parquet"), training=True),
        build_pipeline("cifar", image_size=16).train,
    )
    order = GlobalBatchSampler(40, 0, 40, 10)
    blank, replaced = (
        list(TrainLoader(source, transform, order, workers, replace=replace).steps(0, 1)) for replace in (False, True)
    )
    for batches in (blank, replaced):
        named = sorted(message.split("image ")[1].split(" ")[0] for batch in batches for message in batch.unreadable)
        assert named == ["11", "3", "4", "9"]
        assert [batch.valid for batch in batches] == [10] * 4
    keys = [index for batch in order.micro_batches(0, 1) for _, index in batch]
    for place, index in enumerate(keys):
        (without, _), (image, label) = (
            (batches[place // 10].images[place % 10], batches[place // 10].labels[place % 10])
            for batches in (blank, replaced)
        )
        if index not in broken:
            assert torch.equal(without, image)
            continue
        assert without.count_nonzero() == 0
        # Another image, with its own label, augmented as it always is in this epoch.
        wanted = [
            other
            for other in range(40)
            if other not in broken and torch.equal(augmented(source, transform, other), image)
        ]
        assert len(wanted) == 1
        assert label == source.labels[wanted[0]]


def test_unreadable_images_do_not_count_in_an_evaluation(tmp_path):
    write_images(tmp_path / "a.parquet", 20, broken=[(3, "truncated"), (19, "no image")])
    source, transform = (
        open_source(str(tmp_path / "a.parquet"), training=False),
        build_pipeline("cifar", image_size=16).validation,
    )
    batches = list(EvaluationLoader(source, transform, 8))
    assert [batch.valid for batch in batches] == [7, 8, 3]
    labels = [label for batch in batches for label in batch.labels[: batch.valid].tolist()]
    assert labels == [label for index, label in enumerate(source.labels.tolist()) if index not in (3, 19)]
    assert {batch.images.shape[0] for batch in batches} == {8}


@pytest.mark.parametrize("sizes", [(1797,), (1000, 797), (1000, 790, 7), (300,) * 5 + (297,), (100,) * 17 + (97,)])
def test_every_sample_comes_about_equally_often_however_many_row_groups(sizes):
    """1,536 of 1,797 rows an epoch: over 50 epochs a row comes 42.7 times, and with a standard deviation of 2.5 as by a
    coin."""
    order = StreamedBatchSampler(1797, 0, 512, 512, 0, 1, sizes)
    seen = torch.zeros(1797)
    positions = []
    for epoch in range(50):
        indices = order.epoch(epoch)
        assert len(indices) == len(indices.unique()) == 1536
        seen[indices] += 1
        positions.append(torch.full((1797,), torch.nan).index_copy(0, indices, torch.arange(1536.0)))
    assert 28 < seen.min() <= seen.max() <= 50
    assert seen.std() < 3.2
    # Where a row comes in one epoch says nothing about where it comes in another.
    pairs = [torch.stack([a, b])[:, ~(a + b).isnan()] for i, a in enumerate(positions[:12]) for b in positions[:i]]
    correlations = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    assert correlations.mean().abs() < 0.06
    assert correlations.abs().mean() < 0.15


def test_a_row_is_left_out_as_often_in_a_short_row_group_as_in_a_long_one():
    order = StreamedBatchSampler(1000, 0, 400, 400, 0, 1, (790, 200, 10))
    seen = torch.zeros(1000)
    for epoch in range(400):
        seen[order.epoch(epoch)] += 1
    assert [round(part.mean().item() / 400, 1) for part in seen.split([790, 200, 10])] == [0.8, 0.8, 0.8]


def test_few_row_groups_are_told_of_at_the_start(tmp_path):
    from dkd.training.summary import summarize_streaming

    def said(row_group):
        write_images(tmp_path / "a.parquet", 160, pixels=4, row_group=row_group)
        source = open_row_groups(str(tmp_path / "a.parquet"), training=True)
        order = StreamedBatchSampler(160, 0, 16, 16, 0, 1, tuple(source.sizes.tolist()), 8, 8)
        return " ".join(summarize_streaming(order, source, 1, 1))

    assert "1 row group in an order drawn anew each epoch, 8 lanes" in said(160)
    assert "note: 1 row group for 8 lanes: several worker processes read and hold the same ones" in said(160)
    assert "note: 4 row groups for 8 lanes" in said(40)
    assert "note:" not in said(20)


@pytest.mark.parametrize("opened", [open_source, open_row_groups])
def test_a_path_in_a_cell_leads_only_to_files_of_the_data_set(tmp_path, opened):
    import os

    import pyarrow as pa
    import pyarrow.parquet as parquet
    from few_images import encoded

    folder, outside = tmp_path / "set", tmp_path / "outside.png"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "set_of_another").mkdir()
    image = encoded(torch.full((4, 4, 3), 77, dtype=torch.uint8).numpy())
    for path in (outside, folder / "sub" / "inside.png", tmp_path / "set_of_another" / "a.png"):
        path.write_bytes(image)
    (folder / "link.png").symlink_to(outside)
    (folder / "linked_folder").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    refused = {
        str(outside): "leads out of the data set's folder",
        "../outside.png": "leads out of the data set's folder",
        "../set_of_another/a.png": "leads out of the data set's folder",
        "link.png": "leads out of the data set's folder",
        "linked_folder/outside.png": "leads out of the data set's folder",
        "sub": "is no regular file|Is a directory",
        "none.png": "No such file",
        "pipe.png": "is no regular file",
    }
    paths = ["sub/inside.png", *refused]
    cells = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    parquet.write_table(pa.table({"image": cells, "label": pa.array(range(len(paths)))}), folder / "a.parquet")
    source = opened(str(folder / "a.parquet"), training=True)
    assert source.image(0).unique().tolist() == [77]
    for index, message in enumerate(refused.values(), 1):
        with pytest.raises(DataError, match=f"image {index} .*{message}"):
            source.image(index)
