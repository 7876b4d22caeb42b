import io

import numpy as np
import pytest
import torch
from few_images import write_images
from PIL import Image
from reference_material import require_cifar10

from dkd.data import (
    BatchMixing,
    DataError,
    EvaluationBatches,
    Normalize,
    SampleOrder,
    StreamedOrder,
    TrainingBatches,
    build_pipeline,
    in_memory,
    open_row_groups,
    open_source,
)
from dkd.data.order import mix
from dkd.data.sources import check_class_names, check_labels, to_rgb_tensor


def epoch_of(order, step=0, steps=None):
    return [key for keys in order.micro_batches(step, step + (steps or order.steps_per_epoch)) for key in keys]


def all_ranks(world, micro_batch, **position):
    """The global batches that `world` ranks compute together, in the order of micro-batches."""
    orders = [SampleOrder(100, 7, 24, micro_batch, rank, world) for rank in range(world)]
    per_rank = [list(order.micro_batches(0, 8)) for order in orders]
    return [key for micro_batches in zip(*per_rank, strict=True) for keys in micro_batches for key in keys]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (1, 6), (2, 12), (2, 6), (4, 6), (4, 2), (3, 8)])
def test_ranks_and_micro_steps_only_say_who_computes_which_samples(world, micro_batch):
    assert all_ranks(world, micro_batch) == all_ranks(1, 24)


def test_an_epoch_visits_each_sample_at_most_once_and_epochs_differ():
    order = SampleOrder(100, 7, 24, 24)
    first, second = epoch_of(order), epoch_of(order, step=4)
    assert len({index for _, index in first}) == len(first) == 96
    assert {epoch for epoch, _ in first} == {0}
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in first] != [i for _, i in second]


def test_any_step_can_be_the_first():
    order = SampleOrder(100, 7, 24, 12, rank=1, world_size=2)
    everything = list(order.micro_batches(0, 12))
    for step in (1, 4, 7):
        assert list(order.micro_batches(step, 12)) == everything[step * order.micro_steps :]


def test_too_few_samples_and_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="do not fill one global batch"):
        SampleOrder(10, 0, 24, 24)
    with pytest.raises(ValueError, match="do not divide"):
        SampleOrder(100, 0, 24, 10)


def test_the_seed_of_a_sample_is_the_same_on_every_machine():
    assert mix(0, 0, 0) != mix(0, 0, 1) != mix(0, 1, 0)
    assert mix(0) == 0xE220A8397B1DCDAF >> 1  # the published first output of splitmix64 from state 0
    assert len({mix(0, 0, index) for index in range(10_000)}) == 10_000


@pytest.mark.parametrize("preset", ["digits", "cifar", "imagenet"])
def test_augmentation_does_not_depend_on_workers_ranks_or_position(preset):
    source = open_source("digits", training=True)
    pipeline = build_pipeline(preset, image_size=32)

    def images(world, workers, first):
        per_rank = [
            TrainingBatches(source, pipeline.train, SampleOrder(len(source), 1, 16, 16 // world, rank, world), workers).steps(
                first, first + 2
            )
            for rank in range(world)
        ]
        return torch.cat([batch.images for batches in zip(*per_rank, strict=True) for batch in batches])

    reference = images(1, 0, 3)
    assert reference.dtype == torch.uint8
    for world, workers in ((2, 0), (1, 2), (4, 1)):
        assert torch.equal(images(world, workers, 3), reference), (world, workers)
    assert not torch.equal(images(1, 0, 4)[:16], reference[:16])


def test_loading_leaves_the_random_state_of_training_alone():
    source = open_source("digits", training=True)
    batches = TrainingBatches(source, build_pipeline("digits").train, SampleOrder(len(source), 1, 16, 16)).steps(0, 3)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    next(batches)
    assert torch.equal(torch.rand(3), wanted)


def test_evaluation_batches_cover_each_sample_once_in_batches_of_one_shape():
    source = open_source("digits", training=False)
    for world, batch in ((1, 64), (2, 64), (4, 7), (3, 1000)):
        parts = [list(EvaluationBatches(source, build_pipeline("digits").validation, batch, rank, world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert {len(b.images) for part in parts for b in part} == {min(batch, -(-449 // world))}
        labels = torch.cat([batch.labels[: batch.valid] for part in parts for batch in part])
        assert labels.tolist() == source.labels.tolist()


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
def test_worker_processes_evaluate_neighbours_and_each_sample_once(workers):
    source = open_source("digits", training=False)
    for rank in range(2):
        keys = [[index for _, index in batch] for batch in EvaluationBatches(source, lambda image: image, 20, rank, 2, workers)._keys]
        of_workers = [[index for batch in keys[worker::workers] for index in batch] for worker in range(workers)]
        everything = [index for worker in of_workers for index in worker]
        first = rank * len(everything)
        assert everything == [index if index < 449 else -1 for index in range(first, first + len(everything))]


SIZES = (30, 12, 30, 5, 23)


def streamed(world=1, micro_batch=24, **more):
    orders = [StreamedOrder(100, 7, 24, micro_batch, rank, world, SIZES, **{"lanes": 16, "window": 8, **more}) for rank in range(world)]
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
    ("micro_batch", "lanes", "workers", "readers"), [(20, 16, 4, 1), (10, 32, 4, 1), (10, 16, 4, 2), (20, 16, 3, 3), (20, 16, 8, 1)]
)
def test_a_streamed_order_reads_each_row_group_about_once(tmp_path, monkeypatch, micro_batch, lanes, workers, readers):
    """Each rank and worker process in turn, with as many row groups in memory as the order asks for."""
    write_images(tmp_path / "a.parquet", 2000, pixels=4, row_group=20)
    source = open_row_groups(str(tmp_path / "a.parquet"), training=True)
    read = []
    column = source._column
    monkeypatch.setattr(source, "_column", lambda group: (read.append(group) if group not in source._kept else None, column(group))[1])
    world, reads, most = 2, 0, 0
    for rank in range(world):
        order = StreamedOrder(2000, 0, 40, micro_batch, rank, world, tuple(source.sizes.tolist()), lanes, 30)
        assert order.readers(workers) == readers
        batches = list(order.micro_batches(0, order.steps_per_epoch))
        for worker in range(workers):
            source._kept.clear()
            source.keep(order.row_groups_of_a_worker(workers))
            for keys in batches[worker::workers]:
                for _, index in keys:
                    source.image(index)
                most = max(most, len(source._kept))
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
    torch.manual_seed(mix(0, 0, index))
    return transform(source.image(index))


def test_a_batch_that_cannot_be_made_tells_why_where_the_trainer_asks_for_that(tmp_path):
    write_images(tmp_path / "a.parquet", 20, broken=[(index, "no image") for index in range(20)])
    source, transform = open_source(str(tmp_path / "a.parquet"), training=True), build_pipeline("cifar", image_size=16).train
    order = SampleOrder(20, 0, 10, 10)
    batch = next(TrainingBatches(source, transform, order, replace=True, image_size=16).steps(0, 1))
    assert batch.failure.startswith("100 images one after the other cannot be read, the last: ")
    assert batch.images.shape == (10, 3, 16, 16)
    fails = TrainingBatches(open_source("digits", training=True), lambda image: 1 / 0, order, image_size=16)
    assert next(fails.steps(0, 1)).failure == "ZeroDivisionError in loading: division by zero"
    with pytest.raises(DataError, match="100 images one after the other"):
        next(TrainingBatches(source, transform, order, replace=True).steps(0, 1))


def test_a_damaged_row_group_is_an_unreadable_image_for_each_of_its_rows(tmp_path):
    write_images(tmp_path / "a.parquet", 40, row_group=8)
    source = open_row_groups(str(tmp_path / "a.parquet"), training=True)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    offset = source._footers[str(tmp_path / "a.parquet")].row_group(2).column(0).data_page_offset
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
    order = StreamedOrder(4000, 0, 32, 32, 0, 1, (100,) * 40, 8, 64)
    lane = order.epoch(0).view(order.steps_per_epoch, 32)[0::8].flatten()  # one slice: every eighth step
    for window in lane.split(64):
        assert window.tolist() != sorted(window.tolist())
        assert len(window.div(100, rounding_mode="floor").unique()) <= 2


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_replaced_by_others_and_named(tmp_path, workers):
    broken = {3: "truncated", 4: "of zero bytes", 9: "no image", 11: "damaged in its EXIF"}
    write_images(tmp_path / "a.parquet", 40, broken=list(broken.items()))
    source, transform = open_source(str(tmp_path / "a.parquet"), training=True), build_pipeline("cifar", image_size=16).train
    order = SampleOrder(40, 0, 40, 10)
    blank, replaced = (list(TrainingBatches(source, transform, order, workers, replace=replace).steps(0, 1)) for replace in (False, True))
    for batches in (blank, replaced):
        named = sorted(message.split("image ")[1].split(" ")[0] for batch in batches for message in batch.unreadable)
        assert named == ["11", "3", "4", "9"]
        assert [batch.valid for batch in batches] == [10] * 4
    keys = [index for batch in order.micro_batches(0, 1) for _, index in batch]
    for place, index in enumerate(keys):
        (without, _), (image, label) = (
            (batches[place // 10].images[place % 10], batches[place // 10].labels[place % 10]) for batches in (blank, replaced)
        )
        if index not in broken:
            assert torch.equal(without, image)
            continue
        assert without.count_nonzero() == 0
        # Another image, with its own label, augmented as it always is in this epoch.
        wanted = [other for other in range(40) if other not in broken and torch.equal(augmented(source, transform, other), image)]
        assert len(wanted) == 1
        assert label == source.labels[wanted[0]]


def test_unreadable_images_do_not_count_in_an_evaluation(tmp_path):
    write_images(tmp_path / "a.parquet", 20, broken=[(3, "truncated"), (19, "no image")])
    source, transform = open_source(str(tmp_path / "a.parquet"), training=False), build_pipeline("cifar", image_size=16).validation
    batches = list(EvaluationBatches(source, transform, 8))
    assert [batch.valid for batch in batches] == [7, 8, 3]
    labels = [label for batch in batches for label in batch.labels[: batch.valid].tolist()]
    assert labels == [label for index, label in enumerate(source.labels.tolist()) if index not in (3, 19)]
    assert {batch.images.shape[0] for batch in batches} == {8}


def test_a_saved_data_set_and_tar_files_are_sources_too(tmp_path):
    import tarfile

    from datasets import DatasetDict, load_dataset

    write_images(tmp_path / "a.parquet", 9)
    wanted = open_source(str(tmp_path / "a.parquet"), training=True)
    saved = load_dataset("parquet", data_files={"train": str(tmp_path / "a.parquet")}, split="train")
    saved.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index, row in enumerate(saved):
            for name, content in ((f"{index:03}.png", row["image"]), (f"{index:03}.cls", str(row["label"]).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for spec in (f"disk:{tmp_path}/one", f"disk:{tmp_path}/splits", str(tmp_path / "*.tar")):
        source = open_source(spec, training=True)
        assert source.labels.tolist() == wanted.labels.tolist(), spec
        assert all(torch.equal(a, b) for a, b in zip(source.images(), wanted.images(), strict=True)), spec
    with pytest.raises(DataError, match="has no split 'validation', but train"):
        open_source(f"disk:{tmp_path}/splits", training=False)


def test_digits_are_split_without_overlap():
    train, validation = open_source("digits", training=True), open_source("digits", training=False)
    assert (len(train), len(validation)) == (1348, 449)
    assert train.image(0).shape == (3, 8, 8)
    assert set(np.unique(validation.labels)) == set(range(10))


def test_normalize_is_torchvisions():
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (4, 3, 5, 7), dtype=torch.uint8)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    wanted = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    torch.testing.assert_close(Normalize(mean, std)(images), wanted, rtol=1e-5, atol=1e-6)


def png(mode, size=(6, 4), color=0):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "TIFF" if mode == "CMYK" else "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_parquet(path, images, labels, label_name="label"):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), label_name: Value("int64")})
    Dataset.from_dict({"image": images, label_name: labels}, features=features).to_parquet(str(path))


def test_parquet_files_in_any_number_and_every_colour_mode(tmp_path):
    write_parquet(tmp_path / "a-0.parquet", [png("L", color=7), png("RGBA")], [0, 1])
    write_parquet(tmp_path / "a-1.parquet", [png("CMYK"), png("P")], [2, 1])
    source = open_source(str(tmp_path / "a-*.parquet"), training=True)
    assert source.labels.tolist() == [0, 1, 2, 1]
    assert all(source.image(i).shape == (3, 4, 6) for i in range(4))
    assert source.image(0).unique().tolist() == [7]
    held = in_memory(source)
    assert all(torch.equal(held.image(i), source.image(i)) for i in range(4))


def test_images_of_several_sizes_or_too_many_bytes_stay_on_disk(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png("RGB"), png("RGB", size=(5, 5))], [0, 1])
    source = open_source(str(tmp_path / "a.parquet"), training=True)
    assert in_memory(source) is None
    assert in_memory(open_source("digits", training=True), limit_bytes=None) is not None


def test_files_without_hugging_face_metadata_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, images in (("bytes", [png("L", color=9)["bytes"]]), ("struct", [png("L", color=9)])):
        pq.write_table(pa.table({"image": images, "label": [4]}), tmp_path / f"{name}.parquet")
        source = open_source(str(tmp_path / f"{name}.parquet"), training=True)
        assert source.labels.tolist() == [4]
        assert source.image(0).unique().tolist() == [9]


def test_sixteen_bits_are_scaled_and_other_depths_refused():
    assert to_rgb_tensor(Image.fromarray(np.full((2, 2), 20000, np.uint16))).unique().tolist() == [77]
    with pytest.raises(ValueError, match="32-bit numbers"):
        to_rgb_tensor(Image.new("F", (2, 2)))


def test_the_same_label_must_mean_the_same_class(tmp_path):
    for part, names in (("train", ("cat", "dog", "fish")), ("validation", ("dog", "fish"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / name / "1.png")
    train, validation = (open_source(f"folder:{tmp_path / part}", training=True) for part in ("train", "validation"))
    check_class_names(train, train)
    with pytest.raises(DataError, match="label 0 is 'cat' in the training data and 'dog' here"):
        check_class_names(train, validation)


def test_postscript_is_not_an_image(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "path": "x.jpg"}, None], [0, 1])
    source = open_source(str(tmp_path / "a.parquet"), training=True)
    with pytest.raises(DataError, match="no image in a known format"):
        source.image(0)
    with pytest.raises(DataError, match="image 1 is null"):
        source.image(1)


def test_an_unreadable_image_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png("RGB"), {"bytes": b"no image", "path": "x/broken.jpg"}], [0, 1])
    source = open_source(str(tmp_path / "a.parquet"), training=True)
    with pytest.raises(DataError, match=r"image 1 \(.*broken.jpg\) cannot be read"):
        source.image(1)


def test_columns_are_found_or_asked_for(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png("RGB")], [3], label_name="fine_label")
    assert open_source(str(tmp_path / "a.parquet"), training=True).labels.tolist() == [3]
    with pytest.raises(DataError, match=r"has no column 'label' fit for data.label_column; columns: image, fine_label"):
        open_source(str(tmp_path / "a.parquet"), training=True, label_column="label")


def test_folders_are_turned_by_their_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (6, 4)).save(tmp_path / name / "1.jpg", exif=exif)
    source = open_source(f"folder:{tmp_path}", training=True)
    assert source.labels.tolist() == [0, 1]
    assert source.image(0).shape == (3, 6, 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:/no/such/folder", "images are expected as"),
        ("torchvision:CIFAR1", "did you mean CIFAR10"),
        ("torchvision:CIFAR10", "cannot be opened under data.root"),
        ("nothing", "names no data set"),
    ],
)
def test_what_is_missing_is_said(spec, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_source(spec, training=True, root=str(tmp_path))


def test_torchvision_data_sets_open_by_name(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 3), ("t10k", 2)):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(np.array([2051, count, 28, 28], ">i4").tobytes() + bytes(count * 784))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + bytes(range(count)))
    train = open_source("torchvision:FashionMNIST", training=True, root=str(tmp_path))
    assert (len(train), train.labels.tolist(), tuple(train.image(0).shape)) == (3, [0, 1, 2], (3, 28, 28))
    assert len(open_source("torchvision:FashionMNIST", training=False, root=str(tmp_path))) == 2


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(DataError, match=r"labels go from 0 to 9, but data.classes is 9"):
        check_labels(open_source("digits", training=True), 9)


def test_transforms_by_name():
    pipeline = build_pipeline(
        [{"Resize": {"size": [10, 10]}}, "RandomHorizontalFlip"], [{"Resize": {"size": [10, 10]}}], 10, Normalize((0,) * 3, (1,) * 3)
    )
    assert pipeline.train(torch.zeros(3, 4, 4, dtype=torch.uint8)).shape == (3, 10, 10)
    with pytest.raises(ValueError, match="'Rezise' is not a transform"):
        build_pipeline(["Rezise"], ["Resize"], 10, Normalize((0,) * 3, (1,) * 3))
    with pytest.raises(ValueError, match=r"Resize: .*argument"):
        build_pipeline([{"Resize": {"sise": 3}}], [], 10, Normalize((0,) * 3, (1,) * 3))


def test_to_rgb_keeps_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(to_rgb_tensor(Image.fromarray(pixels)).permute(1, 2, 0).numpy(), pixels)


def test_cifar10_parquet_is_what_it_says():
    source = open_source(str(require_cifar10() / "test-*.parquet"), training=False)
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.image(0).shape == (3, 32, 32)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_depends_on_its_seed_alone_and_mixes_labels_as_images(mixup, cutmix):
    mixing = BatchMixing(10, mixup, cutmix)
    # One colour an image, its label's: so a mixed image's mean tells the mixed label.
    labels = torch.arange(6)
    images = (20 * labels).to(torch.uint8).view(6, 1, 1, 1).expand(6, 3, 16, 16)
    before = torch.get_rng_state()
    mixed, probabilities = mixing(images, labels, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    again = mixing(images, labels, seed=5)
    assert torch.equal(mixed, again[0])
    assert torch.equal(probabilities, again[1])
    assert not torch.equal(probabilities, mixing(images, labels, seed=6)[1])
    assert mixed.dtype == torch.float32
    assert torch.allclose(probabilities.sum(1), torch.ones(6))
    assert torch.allclose(mixed.mean((1, 2, 3)), 20 * probabilities @ torch.arange(10.0), atol=1e-3)


def test_mixing_without_a_way_to_mix_is_an_error():
    with pytest.raises(ValueError, match="neither mixup nor cutmix"):
        BatchMixing(10)
