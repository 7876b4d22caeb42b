"""Read `torchvision:NAME`: a classification data set of torchvision.datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dkd.data.sources.base import DataError, IndexedSource, no_labels
from dkd.data.sources.decoding import naming_errors, to_rgb_tensor
from dkd.data.sources.labels import refuse_several_labels
from dkd.library_internals.torchvision import LABEL_ATTRIBUTES
from dkd.text import did_you_mean


class TorchvisionSource(IndexedSource):
    """Read a data set of torchvision whose items are (PIL image, label).

    Args:
        name: a class of torchvision.datasets.
        training: whether to take the part for training, or the one for validation.
        root: the folder where the data set looks for its files; nothing is downloaded.
        labels: whether labels are read.

    Raises:
        DataError: there is no such data set, its files are missing, or it has no list of labels.
    """

    def __init__(self, name: str, training: bool, root: str, labels: bool = True) -> None:
        self.dataset, self.name = _open_part(name, training, root), f"torchvision:{name}"
        if labels:
            self._read_labels(name)
        else:
            self.labels = no_labels(len(self.dataset))

    def _read_labels(self, name: str) -> None:
        dataset = self.dataset
        labels = next((getattr(dataset, key) for key in LABEL_ATTRIBUTES if hasattr(dataset, key)), None)
        if labels is None:
            raise DataError(
                f"torchvision:{name} has no list of labels; is it a classification data set? Set data.labels=false to "
                "read its images alone"
            )
        if np.ndim(labels) > 1:  # the attributes of CelebA
            refuse_several_labels(f"{self.name}: its list of labels")
        self.labels = np.asarray(np.asarray(labels).tolist(), dtype=np.int64)
        self.class_names = _read_names(dataset, int(self.labels.max(initial=0)))

    def image(self, index: int) -> torch.Tensor:
        with naming_errors(f"{self.name}: image {index}"):
            return to_rgb_tensor(self.dataset[index][0])


def _read_names(dataset: Any, largest_label: int) -> list[str] | None:
    """Return the names of the classes, or None where the data set has none that fit its labels. ImageNet's are tuples
    of synonyms."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or len(names) <= largest_label:
        return None
    return [", ".join(map(str, name)) if isinstance(name, list | tuple) else str(name) for name in names]


def _open_part(name: str, training: bool, root: str) -> Any:
    import torchvision

    if name not in torchvision.datasets.__all__:
        raise DataError(f"torchvision has no data set {name!r}{did_you_mean(name, torchvision.datasets.__all__)}")
    # Data sets of torchvision take `train`, or a `split` whose names differ.
    parts: list[dict[str, Any]] = [
        {"train": training},
        *({"split": split} for split in (("train", "trainval") if training else ("val", "test"))),
    ]
    problems = []
    for part in parts:
        try:
            return getattr(torchvision.datasets, name)(root, **part)
        except TypeError:
            continue  # the data set does not take this argument
        except (RuntimeError, FileNotFoundError, ValueError) as error:
            problems.append(str(error).replace("You can use download=True to download it", "dkd does not download it"))
    raise DataError(
        f"torchvision:{name} cannot be opened under data.root={root!r}: "
        f"{problems[0] if problems else 'unknown arguments'}"
    )
