"""Data sets from files, folders and libraries: images and labels, and what is refused."""

import io

import numpy as np
import pytest
import torch
from few_images import png, write_images, write_parquet
from PIL import Image
from reference_material import require_cifar10

from dkd.data import (
    DataError,
    in_memory,
    open_source,
)
from dkd.data.sources import check_labels, match_classes, to_rgb_tensor


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
    match_classes(train.class_names, validation)
    assert validation.labels.tolist() == [1, 2]
    assert validation.class_names == ["cat", "dog", "fish"]
    with pytest.raises(DataError, match="names classes that the training data do not have: cat"):
        match_classes(["dog", "fish"], train)


def test_postscript_is_not_an_image(tmp_path):
    write_parquet(
        tmp_path / "a.parquet",
        [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "path": "x.jpg"}, None],
        [0, 1],
    )
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
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            np.array([2051, count, 28, 28], ">i4").tobytes() + bytes(count * 784)
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([2049, count], ">i4").tobytes() + bytes(range(count))
        )
    train = open_source("torchvision:FashionMNIST", training=True, root=str(tmp_path))
    assert (len(train), train.labels.tolist(), tuple(train.image(0).shape)) == (3, [0, 1, 2], (3, 28, 28))
    assert len(open_source("torchvision:FashionMNIST", training=False, root=str(tmp_path))) == 2


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(DataError, match=r"labels go from 0 to 9, but data.classes is 9"):
        check_labels(open_source("digits", training=True), 9)


def test_cifar10_parquet_is_what_it_says():
    source = open_source(str(require_cifar10() / "test-*.parquet"), training=False)
    assert len(source) == 10_000
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert source.image(0).shape == (3, 32, 32)


def test_folders_are_read_in_torchvisions_order(tmp_path):
    from torchvision.datasets import ImageFolder

    for path in (
        "b/2.png",
        "b/10.png",
        "b/sub/1.PNG",
        "b/sub-a/1.jpg",
        "b/sub/deep/3.png",
        "a/x.png",
        "a/notes.txt",
        "c c/1.webp",
    ):
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / path, "PNG")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "dogs").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "dogs" / "1.png")
    (tmp_path / "set" / "d").symlink_to(tmp_path / "dogs")
    source, theirs = open_source(f"folder:{tmp_path / 'set'}", training=True), ImageFolder(str(tmp_path / "set"))
    assert list(zip(source.paths.to_pylist(), source.labels.tolist(), strict=True)) == theirs.samples
    assert source.class_names == theirs.classes == ["a", "b", "c c", "d"]
    assert source.labels.dtype == np.int64
    assert all(source.image(index).shape == (3, 4, 4) for index in range(len(source)))


def test_links_that_lead_back_end_and_nothing_is_indexed_twice(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name / "more").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / name / "more" / "1.png")
    cat = tmp_path / "set" / "cat"
    (cat / "parent").symlink_to(cat)
    (cat / "top").symlink_to(tmp_path / "set")
    (cat / "above").symlink_to(tmp_path)
    (cat / "again").symlink_to(cat / "more")
    (cat / "more" / "up").symlink_to("..")
    (cat / "dogs").symlink_to(tmp_path / "set" / "dog")
    source = open_source(f"folder:{tmp_path / 'set'}", training=True)
    assert source.paths.to_pylist() == [str(tmp_path / "set" / name / "more" / "1.png") for name in ("cat", "dog")]
    assert source.labels.tolist() == [0, 1]


def test_folders_that_hold_no_images_are_said(tmp_path):
    with pytest.raises(DataError, match="it holds no folder; images are expected as"):
        open_source(f"folder:{tmp_path}", training=True)
    (tmp_path / "cat").mkdir()
    with pytest.raises(
        DataError, match=r"no image in cat; images are expected as .*/CLASS/NAME, NAME ending in .jpg, "
    ):
        open_source(f"folder:{tmp_path}", training=True)


def test_a_pipe_in_a_folder_is_no_image(tmp_path):
    import os

    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match="it is no regular file"):
        open_source(f"folder:{tmp_path}", training=True).image(0)


def bmp(color):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (color,) * 3).save(file, "BMP")
    return file.getvalue()


def test_a_file_that_is_replaced_is_not_read_from_the_copy(tmp_path):
    """By one of the same size and time: as `cp -p`, `rsync -t` and archives leave them."""
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    from dkd.data.sources.data_files import content_mark

    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array([bmp(color) for color in (10, 20)], pa.binary()), "label": [0, 1]})
    pq.write_table(table, path, compression="NONE", use_dictionary=False, write_statistics=False)
    before, mark = path.stat(), content_mark([str(path)])
    assert [open_source(str(path), training=True).image(i).unique().tolist() for i in (0, 1)] == [[10], [20]]
    assert content_mark([str(path)]) == mark
    path.write_bytes(path.read_bytes().replace(bmp(20), bmp(30)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert [open_source(str(path), training=True).image(i).unique().tolist() for i in (0, 1)] == [[10], [30]]


def test_the_mark_of_large_files_reads_a_part_of_them(tmp_path, monkeypatch):
    import os

    from dkd.data.sources import data_files

    path = tmp_path / "a.tar"
    content = np.random.default_rng(0).integers(0, 256, 2**23, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    before, mark = path.stat(), data_files.content_mark([str(path)])
    read, pread = [], os.pread
    monkeypatch.setattr(data_files.os, "pread", lambda *arguments: (read.append(arguments[1]), pread(*arguments))[1])
    monkeypatch.setattr(data_files, "BLOCKS_IN_ALL", 64)
    marks = {data_files.content_mark([str(path)])}
    assert sum(read) < 2**19
    for place in (0, 2**22, 2**23 - 1):
        changed = content.copy()
        changed[max(0, place - 2**17) : place + 2**17] ^= 1  # another file, even if only in a part
        path.write_bytes(changed.tobytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        marks.add(data_files.content_mark([str(path)]))
    assert len(marks) == 4
    assert mark not in marks  # of other blocks
