"""Where images come from. Every source is a sequence of (image, label): uint8 tensors (3, H, W), and whole numbers.

    train-*.parquet            files or globs, in Hugging Face's image layout
    train-*.tar                files or globs, in WebDataset's layout
    hub:NAME[@CONFIG][:SPLIT]  a data set of the Hugging Face hub
    disk:PATH                  what `save_to_disk` of `datasets` wrote
    folder:PATH                PATH/CLASS/*.jpg
    torchvision:NAME           torchvision.datasets.NAME
    python:MODULE:CALLABLE     what your own callable returns for training=True or False
    digits                     scikit-learn's 1,797 handwritten digits

Images of every source are turned by their EXIF orientation and made RGB.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib.util
import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from dkd.data.jpeg import jpeg_decoder
from dkd.errors import InputError
from dkd.user_code import UserCodeError, describe_error, load_callable


class DataError(InputError):
    """A data set that is missing or is not what the recipe says, or an image that cannot be read."""


class ImageSource(Protocol):
    """A sequence of images with labels."""

    labels: np.ndarray
    """(N,) int64."""
    class_names: list[str] | None
    """What the labels mean, where the source says it."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W)."""
        ...

    def images(self) -> Iterator[torch.Tensor]:
        """All images in order; a source may read them faster so than one by one."""
        ...

    def neighbours(self, index: int) -> range:
        """Where another image can be had at little cost."""
        ...


def open_source(
    spec: str, *, training: bool, root: str = "data", image_column: str | None = None, label_column: str | None = None
) -> ImageSource:
    """The source that `spec` names.

    Args:
        spec: as above.
        training: which part to take where a data set has two (digits, torchvision, hub).
        root: where torchvision data sets look for their files.
        image_column, label_column: columns of parquet and hub data; None: the first image column, and the only other
            whole-number column.

    Raises:
        DataError: what is missing, with what there is.
    """
    kind, rest = split_spec(spec)
    if kind == "digits":
        return _Digits(training)
    if kind == "folder":
        return _Folder(rest)
    if kind == "torchvision":
        return _Torchvision(rest, training, root)
    if kind == "disk":
        return _saved_to_disk(rest, training, image_column, label_column)
    if kind == "python":
        return _UserData(rest, training)
    if kind == "hub":
        return _hub(rest, training, image_column, label_column)
    return _data_files(kind, rest, image_column, label_column)


def check_spec(spec: str) -> None:
    """The part of `open_source` that costs nothing: does `spec` name a kind of data set, and are there files? Raises
    DataError."""
    kind, rest = split_spec(spec)
    if kind in ("parquet", "webdataset"):
        matching_files(rest)
    if kind in ("folder", "disk") and not os.path.isdir(rest):
        raise DataError(f"no such folder: {rest!r}")


def split_spec(spec: str) -> tuple[str, str]:
    """Kind of data set, and which. Raises DataError."""
    if spec == "digits":
        return "digits", ""
    kind, colon, rest = spec.partition(":")
    if colon and rest and kind in ("folder", "torchvision", "hub", "disk", "python"):
        return kind, rest
    for suffix, files in ((".parquet", "parquet"), (".tar", "webdataset")):
        if spec.endswith(suffix):
            return files, spec
    raise DataError(
        f"{spec!r} names no data set: write files or globs that end in .parquet or .tar, hub:NAME[:SPLIT], disk:PATH, "
        "folder:PATH, "
        "torchvision:NAME, python:MODULE:CALLABLE or digits"
    )


def runs_user_code(spec: str) -> bool:
    """Whether opening `spec` imports a module that it names."""
    return spec.startswith("python:")


def check_class_names(train: ImageSource, validation: ImageSource) -> None:
    """Where both sources name their classes, a label must mean the same in both. Raises DataError."""
    ours, theirs = train.class_names, validation.class_names
    if ours is not None and theirs is not None and ours != theirs:
        label = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        there, here = ((names[label] if label < len(names) else "no class") for names in (ours, theirs))
        raise DataError(
            f"label {label} is {there!r} in the training data and {here!r} here; both need the same classes"
        )


def check_labels(source: ImageSource, classes: int) -> None:
    """Every label is one of 0 … classes − 1. Raises DataError."""
    if len(source) == 0:
        raise DataError("the data set is empty")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels go from {low} to {high}, but data.classes is {classes}: they must lie in 0 … {classes - 1}"
        )


def to_rgb_tensor(image: Image.Image) -> torch.Tensor:
    """Return uint8 (3, H, W), a view of rows of RGB pixels, turned by the image's EXIF orientation; grayscale of 8 or
    16 bits, palette and CMYK become RGB, alpha is dropped."""
    upright = ImageOps.exif_transpose(image) if image.getexif() else image
    if upright.mode.startswith("I;16"):
        # Pillow would cut 16 bits to 8 instead of scaling them.
        upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {upright.mode}), whose range nothing tells; store 8 or 16 bits"
        )
    return _of_rows(np.array(upright if upright.mode == "RGB" else upright.convert("RGB")))


def _of_rows(pixels: np.ndarray) -> torch.Tensor:
    """View uint8 (H, W, 3) as (3, H, W): a transposed copy would cost as much as half the decoding, and resizing would
    undo it."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_pixels(content: bytes) -> torch.Tensor:
    """Decode an image file's content to uint8 (3, H, W), as `to_rgb_tensor` makes it of Pillow's image. Raises what
    Pillow raises."""
    decoder = jpeg_decoder()
    header = decoder.header(content)
    if header is not None and header.plain:
        pixels = decoder.pixels(content, header)
        if pixels is not None:
            return _of_rows(pixels)
    with _open_image(io.BytesIO(content)) as image:
        if (
            header is not None
            and not header.plain
            and image.format == "JPEG"
            and image.getexif().get(_ORIENTATION, 1) == 1
        ):
            pixels = decoder.pixels(content, header)
            if pixels is not None:
                return _of_rows(pixels)
        return to_rgb_tensor(image)


class _Indexed:
    """What all sources share."""

    labels: np.ndarray
    class_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> torch.Tensor:
        raise NotImplementedError

    def images(self) -> Iterator[torch.Tensor]:
        return (self.image(index) for index in range(len(self)))

    def neighbours(self, index: int) -> range:
        return range(len(self))


class _InMemory(_Indexed):
    def __init__(self, pixels: torch.Tensor, labels: np.ndarray, class_names: list[str] | None = None) -> None:
        self.pixels, self.labels, self.class_names = pixels, labels, class_names

    def image(self, index: int) -> torch.Tensor:
        return self.pixels[index]


def in_memory(source: ImageSource, limit_bytes: int | None = 2**30) -> ImageSource | None:
    """`source` decoded once into one uint8 tensor, or None when that cannot be: images of several sizes, or more than
    `limit_bytes`."""
    if isinstance(source, _InMemory):
        return source
    first = source.image(0)
    if limit_bytes is not None and len(source) * first.numel() > limit_bytes:
        return None
    pixels = torch.empty(len(source), *first.shape, dtype=torch.uint8)
    for index, image in enumerate(source.images()):
        if image.shape != first.shape:
            return None
        pixels[index] = image
    return _InMemory(pixels, source.labels, source.class_names)


def is_in_memory(source: ImageSource) -> bool:
    return isinstance(source, _InMemory)


def pixels_in_memory(source: ImageSource) -> torch.Tensor | None:
    """uint8 (N, 3, h, w), of a source whose images are all decoded; else None."""
    return source.pixels if isinstance(source, _InMemory) else None


class _Digits(_InMemory):
    """Every fourth digit is for validation: 1,348 for training, 449 to measure."""

    def __init__(self, training: bool) -> None:
        pixels, labels = _read_digits()
        chosen = (np.arange(len(labels)) % 4 != 3) == training
        gray = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)  # 17 levels of gray, 0 … 16
        images = torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1).contiguous()
        super().__init__(images, labels[chosen])


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (N, 8, 8) pixels from 0 to 16 and (N,) labels. From scikit-learn's file: importing scikit-learn, with
    SciPy and pandas, takes longer than all that is done with the digits in a test. Raises DataError."""
    package = importlib.util.find_spec("sklearn")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    if not folders:
        raise DataError("digits needs scikit-learn: pip install 'dkd[digits]'")
    path = os.path.join(folders[0], "datasets", "data", "digits.csv.gz")
    if not os.path.isfile(path):  # another release may keep it elsewhere
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]


_ORIENTATION = 0x0112  # EXIF's tag
# Formats of data sets. Pillow would try them all by content, among them EPS, which it hands to Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def _open_image(file: Any) -> Image.Image:
    return Image.open(file, formats=_FORMATS)


class _HuggingFace(_Indexed):
    """Reads a `datasets.Dataset` with an image column and a label column. Images are decoded here, from their bytes.

    Args:
        folder: where cells that hold a path instead of bytes may lead to; None: nowhere.
    """

    def __init__(
        self, dataset: Any, name: str, image_column: str | None, label_column: str | None, folder: str | None = None
    ) -> None:
        from datasets import Image as ImageFeature

        self.name, self._folder = name, folder
        self.image_column, self.label_column = image_and_label_columns(
            dataset.features, name, image_column, label_column
        )
        # Files written without Hugging Face's metadata hold images as plain bytes, or as {bytes, path}.
        images = dataset.select_columns([self.image_column]).cast_column(self.image_column, ImageFeature())
        self.dataset = images.cast_column(self.image_column, ImageFeature(decode=False))
        self.class_names = getattr(dataset.features[self.label_column], "names", None)
        labels = dataset.select_columns([self.label_column]).with_format("arrow")[:][self.label_column]
        self.labels = whole_labels(labels, name, self.label_column)

    def image(self, index: int) -> torch.Tensor:
        return decode(self.name, index, self.dataset[index][self.image_column], self._folder)

    def images(self) -> Iterator[torch.Tensor]:
        index = 0
        for rows in self.dataset.iter(batch_size=1000):
            for encoded in rows[self.image_column]:
                yield decode(self.name, index, encoded, self._folder)
                index += 1


def decode(name: str, index: int, encoded: Mapping[str, Any] | bytes | None, folder: str | None = None) -> torch.Tensor:
    """Decode a cell of an image column, encoded bytes or {bytes, path}, to uint8 (3, H, W). Raises DataError, naming
    the image.

    Args:
        folder: the data set's, where a path without bytes may lead to a file; None: nowhere.
    """
    cell: Mapping[str, Any] = {"bytes": encoded, "path": None} if isinstance(encoded, bytes) else encoded or {}
    content: bytes | None = cell.get("bytes")
    path: str | None = cell.get("path")
    if content is None and path is None:
        raise DataError(f"{name}: image {index} is null")
    with _reading(f"{name}: image {index} ({path or 'no name'})"):
        return decode_pixels(_file_of_data_set(path or "", folder) if content is None else content)


def _file_of_data_set(path: str, folder: str | None) -> bytes:
    """Read the file that a cell names instead of holding its content. A data set may come from anybody: it must not
    choose which files of this machine are opened. Raises ValueError for a path that leads out of the data set's folder,
    by links too."""
    if folder is None:
        raise ValueError(
            "its cell holds a path and no bytes, and this kind of data set has no folder for it; store the images' "
            "bytes"
        )
    top = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(top, path))
    if os.path.commonpath([top, real]) != top:
        raise ValueError(
            f"its cell holds no bytes and a path that leads out of the data set's folder {folder!r}; store the images' "
            "bytes"
        )
    return read_file(real)


def read_file(path: str) -> bytes:
    """Read a regular file. Raises OSError, and ValueError for what is no regular file: a pipe would wait for ever."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        return file.read()


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever goes wrong with an image is a DataError that names it: damaged ones make Pillow raise errors of many
    kinds."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{what} cannot be read: it is no image in a known format") from error
    except Exception as error:
        raise DataError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def whole_labels(labels: Any, name: str, column: str) -> np.ndarray:
    """(N,) int64 from an Arrow column. Raises DataError for a label that is null."""
    if labels.null_count:
        raise DataError(f"{name}: {labels.null_count} labels of column {column!r} are null")
    return labels.to_numpy().astype(np.int64)


def image_and_label_columns(
    features: Mapping[str, Any], name: str, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """The columns asked for, or the only ones whose types fit. Raises DataError."""
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    def is_image(feature: Any) -> bool:
        bytes_column = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        struct_column = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        return isinstance(feature, ImageFeature) or bytes_column or struct_column

    def is_label(feature: Any) -> bool:
        return isinstance(feature, ClassLabel) or (
            isinstance(feature, Value) and feature.dtype.lstrip("u").startswith("int")
        )

    found = []
    for key, asked, fits in (("image_column", image_column, is_image), ("label_column", label_column, is_label)):
        candidates = [column for column, feature in features.items() if fits(feature)]
        if asked is not None and asked not in candidates:
            raise DataError(
                f"{name} has no column {asked!r} fit for data.{key}; columns: {', '.join(features)}; fit: "
                f"{', '.join(candidates)}"
            )
        if asked is None and len(candidates) != 1:
            raise DataError(
                f"{name}: say data.{key}; columns that fit: {', '.join(candidates) or 'none'} (of "
                f"{', '.join(features)})"
            )
        found.append(asked or candidates[0])
    return found[0], found[1]


def _data_files(kind: str, pattern: str, image_column: str | None, label_column: str | None) -> ImageSource:
    """Parquet files, or tar files in the layout of WebDataset, by the reader of `datasets` of that name."""
    files = matching_files(pattern)
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        # `datasets` keeps a copy by name, paths and times of change. A file replaced by one with an old time would be
        # read from the copy.
        dataset = load_dataset(kind, name=f"dkd_{content_mark(files)}", data_files={"train": files}, split="train")
    except (DatasetGenerationError, pa.ArrowInvalid, OSError, ValueError) as error:
        raise DataError(f"{pattern!r} cannot be read as {kind}: {error.__cause__ or error}") from error
    except Exception as error:  # a .pth or .json in a tar raises what the library of its kind raises
        raise DataError(f"{pattern!r} cannot be read as {kind}: {describe_error(error)}") from error
    return _HuggingFace(dataset, pattern, image_column, label_column, common_folder(files))


_BLOCK, _BLOCKS_A_FILE, _BLOCKS_IN_ALL, _SMALL = 4096, 8, 4096, 2**20


def content_mark(files: Sequence[str]) -> str:
    """Compute a digest that differs when a file has been replaced, without reading terabytes: of each file its size and
    time of change, its end (where parquet keeps its footer, with the sizes and statistics of all row groups), and
    blocks spread evenly over it; of a file up to 1 MiB, all of it. Inode numbers and times of status changes are left
    out: they differ between machines that hold copies of the same files. Raises OSError."""
    blocks = max(_BLOCKS_A_FILE, _BLOCKS_IN_ALL // len(files))
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        digests = list(pool.map(lambda path: _content_digest(path, blocks), files))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _content_digest(path: str, blocks: int) -> bytes:
    with open(path, "rb") as file:
        facts = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        if facts.st_size <= _SMALL:
            digest.update(file.read())
            return digest.digest()
        tail = os.pread(file.fileno(), 8, facts.st_size - 8)
        footer = int.from_bytes(tail[:4], "little") + 8 if tail[4:] == b"PAR1" else _BLOCK
        digest.update(os.pread(file.fileno(), min(footer, facts.st_size), max(0, facts.st_size - footer)))
        for number in range(blocks):
            digest.update(os.pread(file.fileno(), _BLOCK, number * (facts.st_size - _BLOCK) // (blocks - 1)))
        return digest.digest()


def common_folder(files: Sequence[str]) -> str:
    """Find the folder that holds all files, in subfolders or not."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in files])


def matching_files(pattern: str) -> list[str]:
    """Sorted paths. Raises DataError when there is none."""
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise DataError(f"no file matches {pattern!r}")
    return files


def _saved_to_disk(path: str, training: bool, image_column: str | None, label_column: str | None) -> ImageSource:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(path)
    except (OSError, ValueError) as error:
        raise DataError(f"disk:{path} is no data set that `datasets` saved: {error}") from error
    except Exception as error:  # of its JSON files, when they hold something else
        raise DataError(f"disk:{path} is no data set that `datasets` saved: {describe_error(error)}") from error
    if isinstance(dataset, DatasetDict):
        split = "train" if training else "validation"
        if split not in dataset:
            raise DataError(f"disk:{path} has no split {split!r}, but {', '.join(dataset)}; write disk:{path}/SPLIT")
        dataset = dataset[split]
    return _HuggingFace(dataset, f"disk:{path}", image_column, label_column, path)


def hub_name(name: str, training: bool) -> tuple[str, str | None, str]:
    """NAME[@CONFIG][:SPLIT] -> name, configuration, split, which is by default that of the part. Raises DataError for
    an unknown one."""
    from datasets import get_dataset_split_names

    name, _, split = name.partition(":")
    name, _, configuration = name.partition("@")
    split = split or ("train" if training else "validation")
    splits = get_dataset_split_names(name, configuration or None)
    if split not in splits:
        whole = f"{name}@{configuration}" if configuration else name
        raise DataError(f"hub:{whole} has no split {split!r}; write hub:{whole}:SPLIT with one of {', '.join(splits)}")
    return name, configuration or None, split


@contextmanager
def loading_from_hub(name: str) -> Iterator[None]:
    """The hub's client raises its own errors for every way a download can fail; all of them mean the same here."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"hub:{name} cannot be loaded: {type(error).__name__}: {error}") from error


def _hub(spec: str, training: bool, image_column: str | None, label_column: str | None) -> ImageSource:
    from datasets import load_dataset

    with loading_from_hub(spec):
        name, configuration, split = hub_name(spec, training)
        dataset = load_dataset(name, configuration, split=split)
    return _HuggingFace(dataset, f"hub:{name}:{split}", image_column, label_column)


class _Folder(_Indexed):
    """Reads PATH/CLASS/NAME.jpg, in subfolders of a class too, in the order of torchvision's ImageFolder."""

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        try:
            classes = _classes_of_folder(path)
        except OSError as error:
            raise DataError(f"folder:{path}: {error}; images are expected as {path}/CLASS/NAME.jpg") from error
        if not classes:
            raise DataError(f"folder:{path}: it holds no folder; images are expected as {path}/CLASS/NAME.jpg")
        if without := [name for name, images in classes.items() if not images]:
            raise DataError(
                f"folder:{path}: no image in {', '.join(without)}; images are expected as {path}/CLASS/NAME, NAME "
                "ending in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        # A million Python strings would be copied into each worker process, as it counts references to them.
        self._paths = pa.array([image for images in classes.values() for image in images])
        self.labels = np.repeat(np.arange(len(classes)), [len(images) for images in classes.values()])
        self.class_names = list(classes)

    def image(self, index: int) -> torch.Tensor:
        path = self._paths[index].as_py()
        with _reading(path):
            return decode_pixels(read_file(path))


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def _classes_of_folder(path: str) -> dict[str, list[str]]:
    """List the folders in `path`, sorted by name, each with the paths of its images. Links are followed, but not to
    where `path` itself lies, nor twice to one folder. Raises OSError."""
    with os.scandir(path) as entries:
        tops = {
            entry.name: os.path.join(path, entry.name)
            for entry in sorted(entries, key=lambda entry: entry.name)
            if entry.is_dir()
        }
    above = [os.path.realpath(path)]
    while above[-1] != os.path.dirname(above[-1]):
        above.append(os.path.dirname(above[-1]))
    not_entered = {_identity(os.stat(folder)) for folder in (*above, *tops.values())}
    return {name: list(_images_below(top, set(not_entered))) for name, top in tops.items()}


def _images_below(top: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """List the images in `top` and its folders except those `seen`, sorted by folder and name."""
    found: list[tuple[str, list[str]]] = []
    unread = [top]
    while unread:
        folder = unread.pop()
        names: list[str] = []
        with os.scandir(folder) as entries:
            # Folders before links, and by name: a folder that two paths lead to has the same one on all machines.
            for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
                if not entry.is_dir():
                    if entry.name.lower().endswith(IMAGE_SUFFIXES):
                        names.append(entry.name)
                elif (identity := _identity(entry.stat())) not in seen:
                    seen.add(identity)
                    unread.append(entry.path)
        found.append((folder, sorted(names)))
    return (os.path.join(folder, name) for folder, names in sorted(found) for name in names)


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


class _Files(_Indexed):
    """A torchvision data set whose items are (PIL image, label)."""

    def __init__(self, dataset: Any, labels: Sequence[int], name: str) -> None:
        self.dataset, self.name = dataset, name
        self.labels = np.asarray(labels, dtype=np.int64)

    def image(self, index: int) -> torch.Tensor:
        with _reading(f"{self.name}: image {index}"):
            pixels = to_rgb_tensor(self.dataset[index][0])
        return pixels


class _Torchvision(_Files):
    def __init__(self, name: str, training: bool, root: str) -> None:
        import torchvision

        if name not in torchvision.datasets.__all__:
            near = difflib.get_close_matches(name, torchvision.datasets.__all__, n=1)
            raise DataError(f"torchvision has no data set {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        # Data sets of torchvision take `train`, or a `split` whose names differ.
        parts: list[dict[str, Any]] = [
            {"train": training},
            *({"split": split} for split in (("train", "trainval") if training else ("val", "test"))),
        ]
        dataset, problems = None, []
        for part in parts:
            try:
                dataset = getattr(torchvision.datasets, name)(root, **part)
                break
            except TypeError:
                continue  # it does not take this argument
            except (RuntimeError, FileNotFoundError, ValueError) as error:
                problems.append(
                    str(error).replace("You can use download=True to download it", "dkd does not download it")
                )
        if dataset is None:
            raise DataError(
                f"torchvision:{name} cannot be opened under data.root={root!r}: "
                f"{problems[0] if problems else 'unknown arguments'}"
            )
        labels = next(
            (getattr(dataset, key) for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None
        )
        if labels is None:
            raise DataError(f"torchvision:{name} has no list of labels; is it a classification data set?")
        super().__init__(dataset, np.asarray(labels).tolist(), f"torchvision:{name}")


class _UserData(_Indexed):
    """What the user's own callable returns for `training`: an object with `labels` (or `targets`), a whole number for
    each image, and
    `data[i]` that is an image, or a tuple that begins with one: a PIL image, or uint8 pixels (3, H, W) of torch or (H,
    W, 3) of numpy."""

    def __init__(self, name: str, training: bool) -> None:
        try:
            self._data = load_callable(name)(training=training)
        except UserCodeError as error:
            raise DataError(str(error)) from error
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise DataError(f"{name!r} cannot be opened with training={training}: {describe_error(error)}") from error
        self._name = name
        labels = getattr(self._data, "labels", getattr(self._data, "targets", None))
        if labels is None or not hasattr(self._data, "__getitem__"):
            raise DataError(
                f"{name!r} returned {type(self._data).__name__}, without `labels` (or `targets`) and images by index"
            )
        found = np.asarray(labels)
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise DataError(
                f"{name!r}: its labels are {found.dtype} of shape {found.shape}, not a whole number for each image"
            )
        if hasattr(self._data, "__len__") and len(self._data) != len(found):
            raise DataError(f"{name!r} has {len(found)} labels for {len(self._data)} images")
        self.labels = found.astype(np.int64)
        names = getattr(self._data, "classes", None)
        self.class_names = [str(each) for each in names] if isinstance(names, list | tuple) else None

    def image(self, index: int) -> torch.Tensor:
        try:
            item = self._data[index]
            found = item[0] if isinstance(item, tuple | list) else item
            if isinstance(found, Image.Image):
                return to_rgb_tensor(found)
            pixels = (
                found
                if isinstance(found, torch.Tensor)
                else torch.from_numpy(np.ascontiguousarray(found)).permute(2, 0, 1)
            )
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"image {index} of {self._name} cannot be read: {describe_error(error)}") from error
        if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3:
            raise DataError(
                f"image {index} of {self._name} is {pixels.dtype} {tuple(pixels.shape)}, not uint8 (3, H, W)"
            )
        return pixels
