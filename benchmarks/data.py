"""What images cost, and what a data set of ImageNet's size costs before the first one.

python -m benchmarks.data                        CPU time an image and images/s, on images made for it
python -m benchmarks.data --photos 'imagenet/train-*.parquet' --small 'cifar10/train-*.parquet'
python -m benchmarks.data --imagenet-index       1,281,167 rows with tiny images: start, order, memory, resuming

The first compares ways from encoded images to normalised batches, by worker processes: torchvision's usual pipeline (an
image folder,
transforms on PIL images); dkd's loading as it was before its decoder, views and shared memory; dkd's map-style source
and its streaming.
CPU time is that of the rank and all its workers: what a machine with more cores can do. Images/s depend on what else
runs. Each way is
measured in turn, several times, and ratios are of one run. The pixels of all images are compared with those of the way
before.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGENET_ROWS, ROWS_PER_FILE, ROWS_PER_GROUP = 1_281_167, 4358, 100
BATCH = 64


def write_images(folder: Path, count: int, sizes: list[tuple[int, int]], row_group: int = ROWS_PER_GROUP) -> str:
    """JPEG files of smooth noise as parquet; returns their glob."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    generator = np.random.default_rng(0)
    encoded = []
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        coarse = Image.fromarray(generator.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    folder.mkdir()
    table = pa.table({"image": pa.array(encoded, pa.binary()), "label": pa.array(np.arange(count) % 10)})
    parquet.write_table(table, folder / "train-0.parquet", row_group_size=row_group)
    return str(folder / "train-*.parquet")


def image_folder(pattern: str, folder: Path) -> Path:
    """The same images as files, FOLDER/LABEL/N.jpg."""
    from dkd.data.parquet_stream import open_row_groups

    source = open_row_groups(pattern, training=True)
    for index in range(len(source)):
        path = folder / str(source.labels[index]) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(source, index))
    return folder


def torchvision_batches(folder: Path, preset: str, workers: int) -> Iterator[torch.Tensor]:
    """What most training scripts do."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    from dkd.data.transforms import CIFAR, IMAGENET

    normalize = IMAGENET if preset == "imagenet" else CIFAR
    crop = v2.RandomResizedCrop(224) if preset == "imagenet" else v2.RandomCrop(32, padding=4)
    stages = [crop, v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    data = ImageFolder(str(folder), v2.Compose([*stages, v2.Normalize(normalize.mean, normalize.std)]))

    def shuffled() -> Iterator[list[int]]:  # for ever: to fork workers for each epoch of few images would cost too much
        while True:
            for indices in torch.randperm(len(data)).split(BATCH):
                if len(indices) == BATCH:
                    yield indices.tolist()

    for images, _ in torch.utils.data.DataLoader(data, batch_sampler=_Once(shuffled()), num_workers=workers):
        yield images


def dkd_batches(
    pattern: str, preset: str, workers: int, streaming: bool, in_memory: bool, normalized: bool = True
) -> Iterator[torch.Tensor]:
    from dkd.data import TrainLoader, build_pipeline, open_row_groups, open_source
    from dkd.data import in_memory as decoded

    pipeline = build_pipeline(preset)
    source: Any = open_row_groups(pattern, training=True) if streaming else open_source(pattern, training=True)
    if in_memory:
        source = decoded(source)
    for batch in TrainLoader(
        source, pipeline.train, order_of(source, BATCH), workers, image_size=pipeline.image_size
    ).steps(0, 10**6):
        yield pipeline.normalize(batch.images) if normalized else batch.images


class Before(torch.utils.data.Dataset[Any]):
    """Load images as dkd did before: Pillow decodes, pixels are transposed, torchvision's transforms follow one
    another, images are stacked, and a batch reaches the rank as a file in /dev/shm. Keys are pairs of epoch and
    index."""

    def __init__(self, pattern: str, preset: str, streaming: bool) -> None:
        from torchvision.transforms import v2

        from dkd.data import build_pipeline, open_row_groups, open_source

        self.source: Any = open_row_groups(pattern, training=True) if streaming else open_source(pattern, training=True)
        self.of_one: Any = None if preset == "imagenet" else build_pipeline(preset).train
        self.transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])

    def __getitems__(self, keys: list[tuple[int, int]]) -> torch.Tensor:
        from dkd.data.sources import to_rgb_tensor
        from dkd.rng import derive_seed

        images = []
        for epoch, index in keys:
            with Image.open(io.BytesIO(encoded_image(self.source, index))) as opened:
                image = to_rgb_tensor(opened).contiguous()
            if self.of_one is not None:
                images.append(self.of_one.of_batch(image[None], [derive_seed(0, epoch, index)])[0])
            else:
                torch.default_generator.manual_seed(derive_seed(0, epoch, index))
                images.append(self.transform(image))
        out = torch.zeros(len(images), *images[0].shape, dtype=torch.uint8)
        torch.stack(images, out=out)
        return out


def encoded_image(source: Any, index: int) -> bytes:
    """Return the bytes that a parquet file, opened in either way, holds of an image."""
    from dkd.data import RowGroups

    cell = source.cell(index) if isinstance(source, RowGroups) else source.dataset[index][source.image_column]
    return cell if isinstance(cell, bytes) else cell["bytes"]


def order_of(source: Any, batch: int, global_batch: int | None = None) -> Any:
    from dkd.data import GlobalBatchSampler, RowGroups, StreamedBatchSampler

    if isinstance(source, RowGroups):
        return StreamedBatchSampler(len(source), 0, global_batch or batch, batch, 0, 1, tuple(source.sizes.tolist()))
    return GlobalBatchSampler(len(source), 0, global_batch or batch, batch)


def before_batches(pattern: str, preset: str, workers: int, streaming: bool) -> Iterator[torch.Tensor]:
    from dkd.data import RowGroups, build_pipeline

    data, pipeline = Before(pattern, preset, streaming), build_pipeline(preset)
    order = order_of(data.source, BATCH)
    if isinstance(data.source, RowGroups):
        data.source.keep(order.row_groups_of_a_worker(workers))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (pipeline.normalize.mean, pipeline.normalize.std))
    scale, shift = 1 / (255 * std), -mean / std
    keys = order.micro_batches(0, 10**6)
    loader = torch.utils.data.DataLoader(data, batch_sampler=_Once(keys), num_workers=workers, collate_fn=_as_it_is)
    for images in loader:
        yield torch.addcmul(shift, images.float(), scale)


class _Once:
    def __init__(self, keys: Iterator[Any]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return self.keys


def _as_it_is(batch: Any) -> Any:
    return batch


def different_pixels(pattern: str, preset: str, streaming: bool, workers: int) -> tuple[int, int]:
    """Count the images of one epoch that were compared with those of the way before, and those that differ."""
    from dkd.data import TrainLoader, build_pipeline

    before = Before(pattern, preset, streaming)
    rows = len(before.source)
    batch = max(size for size in range(1, 65) if rows % size == 0)
    order = order_of(before.source, batch, rows)
    loaded = TrainLoader(before.source, build_pipeline(preset).train, order, workers).steps(0, 1)
    compared = different = 0
    for keys, ours in zip(order.micro_batches(0, 1), loaded, strict=True):
        theirs = before.__getitems__(keys)
        compared += len(keys)
        different += int((ours.images != theirs).flatten(1).any(1).sum())
    return compared, different


def cpu_seconds() -> float:
    """Return the CPU time that this process and its live workers have used, seconds."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def cost(batches: Iterator[torch.Tensor], seconds: float) -> tuple[float, float]:
    """Measure the CPU time of an image, microseconds, and images a second."""
    for _ in range(4):  # workers are up, files are in memory
        next(batches)
    begun, used, count = time.monotonic(), cpu_seconds(), 0
    while time.monotonic() - begun < seconds:
        next(batches)
        count += BATCH
    return (cpu_seconds() - used) / count * 1e6, count / (time.monotonic() - begun)


def measure(
    title: str, pattern: str, preset: str, folder: Path, workers: list[int], seconds: float, rounds: int
) -> int:
    """Print a table. Returns how many images differ from what the way before makes of them."""
    files = image_folder(pattern, folder)
    ways: dict[str, Callable[[int], Iterator[torch.Tensor]]] = {
        "torchvision": lambda n: torchvision_batches(files, preset, n),
        "before": lambda n: before_batches(pattern, preset, n, False),
        "before, streaming": lambda n: before_batches(pattern, preset, n, True),
        "map-style": lambda n: dkd_batches(pattern, preset, n, False, False),
        "streaming": lambda n: dkd_batches(pattern, preset, n, True, False),
    }
    if preset == "cifar":
        ways["in memory"] = lambda n: dkd_batches(pattern, preset, n, False, True)
    else:
        ways["map-style, uint8"] = lambda n: dkd_batches(pattern, preset, n, False, False, normalized=False)
    print(
        f"\n{title}: CPU µs an image (torchvision's over it), images/s\n{'workers':>8}"
        + "".join(f"{name:>26}" for name in ways)
    )
    for number in workers:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                found[name].append(cost(way(number), seconds))
        medians = {
            name: [statistics.median(values) for values in zip(*results, strict=True)]
            for name, results in found.items()
        }
        cells = (f"{cpu:.0f} ({medians['torchvision'][0] / cpu:.2f}) {speed:.0f}/s" for cpu, speed in medians.values())
        print(f"{number:>8}" + "".join(f"{cell:>26}" for cell in cells), flush=True)
    wrong = 0
    for streaming in (False, True):
        compared, different = different_pixels(pattern, preset, streaming, max(workers))
        print(
            f"{'streaming' if streaming else 'map-style'}: {compared} images compared with the way before, {different} "
            "differ",
            flush=True,
        )
        wrong += different
    return wrong


def write_index(folder: Path) -> str:
    """ImageNet's number of rows, in as many files and row groups as its parquet form has, each image the same 8×8
    pixels."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    labels = np.random.default_rng(0).integers(0, 1000, IMAGENET_ROWS)
    for number, start in enumerate(range(0, IMAGENET_ROWS, ROWS_PER_FILE)):
        part = labels[start : start + ROWS_PER_FILE]
        table = pa.table({"image": pa.array([buffer.getvalue()] * len(part), pa.binary()), "label": pa.array(part)})
        parquet.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=ROWS_PER_GROUP)
    return str(folder / "train-*.parquet")


def megabytes(pids: list[int]) -> float:
    """Memory of processes, what they share counted once (PSS)."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


def index_on_a_rank(rank: int, world_size: int, pattern: str, streaming: bool, workers: int, results: Any) -> None:
    """What one rank does before its first batch, what it holds, and how it resumes in the middle of the second
    epoch."""
    from dkd.data import GlobalBatchSampler, RowGroups, StreamedBatchSampler, TrainLoader, open_row_groups, open_source

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in a training
    before = megabytes([os.getpid()])
    begun = time.monotonic()
    source: Any = open_row_groups(pattern, training=True) if streaming else open_source(pattern, training=True)
    opened = time.monotonic() - begun
    batches = (len(source), 0, 1024, 1024 // world_size, rank, world_size)
    order = GlobalBatchSampler(*batches)
    if isinstance(source, RowGroups):
        order = StreamedBatchSampler(*batches, tuple(source.sizes.tolist()))
    begun = time.monotonic()
    order.epoch(0)
    drawn = time.monotonic() - begun
    loaded = TrainLoader(source, lambda image: image, order, workers, image_size=8)
    begun = time.monotonic()
    from_start = loaded.steps(0, 3 * order.steps_per_epoch)
    next(from_start)
    first = time.monotonic() - begun
    for _ in range(30):
        next(from_start)
    pids = [os.getpid(), *(process.pid for process in multiprocessing.active_children() if process.pid)]
    held = megabytes(pids) - before
    del from_start
    middle = order.steps_per_epoch + order.steps_per_epoch // 2
    begun = time.monotonic()
    labels = next(loaded.steps(middle, middle + 2)).labels
    resumed = time.monotonic() - begun
    wanted = [index for _, index in list(order.micro_batches(middle - 1, middle + 1))[-1]]
    results.put(
        (
            rank,
            opened,
            drawn,
            first,
            len(pids) - 1,
            held,
            middle,
            resumed,
            labels.tolist() == source.labels[wanted].tolist(),
        )
    )


def imagenet_index(workers: int, world_size: int = 2) -> int:
    context = multiprocessing.get_context("spawn")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="dkd_index_") as name:
        os.environ["HF_HOME"] = f"{name}/cache"
        begun = time.monotonic()
        pattern = write_index(Path(name))
        print(
            f"{IMAGENET_ROWS:,} rows in {len(list(Path(name).glob('*.parquet')))} files written in "
            f"{time.monotonic() - begun:.0f} s"
        )
        print(
            f"{'':>26} {'rank':>5} {'open s':>8} {'order s':>8} {'first batch s':>14} {'workers':>8} {'MB':>6} "
            f"{'resumed at':>11} "
            f"{'first batch s':>14}  as without interruption"
        )
        for title, streaming in (
            ("map-style, first start", False),
            ("map-style, later starts", False),
            ("streaming", True),
        ):
            results = context.Queue()
            ranks = [
                context.Process(target=index_on_a_rank, args=(rank, world_size, pattern, streaming, workers, results))
                for rank in range(world_size)
            ]
            for process in ranks:
                process.start()
            for rank, opened, drawn, first, count, held, middle, resumed, equal in sorted(
                results.get(timeout=1800) for _ in ranks
            ):
                wrong += not equal
                print(
                    f"{title:>26} {rank:>5} {opened:>8.1f} {drawn:>8.2f} {first:>14.1f} {count:>8} {held:>6.0f} "
                    f"{middle:>11} "
                    f"{resumed:>14.1f}  {'yes' if equal else 'NO'}",
                    flush=True,
                )
            for process in ranks:
                process.join()
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", metavar="GLOB", help="parquet files of photographs (default: 400 images made for it)"
    )
    parser.add_argument("--small", metavar="GLOB", help="parquet files of 32×32 images (default: 10,000 made for it)")
    parser.add_argument("--imagenet-index", action="store_true", help="the costs of ImageNet's number of rows instead")
    parser.add_argument(
        "--workers", type=int, nargs="+", metavar="N", help="worker processes a rank (default 0 1 2; of the index 8)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement (default 5)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of which the median counts (default 3)")
    options = parser.parse_args()
    if options.imagenet_index:
        return imagenet_index((options.workers or [8])[0])
    torch.set_num_threads(1)
    from dkd.data.jpeg import jpeg_decoder

    print(f"JPEG files are decoded by {jpeg_decoder().name}; before, and in torchvision's pipeline, by Pillow")
    with tempfile.TemporaryDirectory(prefix="dkd_data_") as name:
        folder = Path(name)
        photos = options.photos or write_images(folder / "photos", 400, [(500, 375), (375, 500), (640, 480)])
        small = options.small or write_images(folder / "small", 10_000, [(32, 32)], row_group=1000)
        workers = options.workers or [0, 1, 2]
        wrong = measure(
            "photographs, random resized crop to 224",
            photos,
            "imagenet",
            folder / "photo_files",
            workers,
            options.seconds,
            options.rounds,
        )
        wrong += measure(
            "32×32, padded random crop",
            small,
            "cifar",
            folder / "small_files",
            workers,
            options.seconds,
            options.rounds,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
