"""Read `digits`: scikit-learn's 1,797 handwritten digits, 8×8 pixels of 17 levels of gray."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import torch

from dkd.data.sources.base import DataError, no_labels
from dkd.data.sources.memory import InMemorySource
from dkd.installation import command_for


class Digits(InMemorySource):
    """Hold the digits of one part. Every fourth digit is for validation, which leaves 1,348 for training and 449 for
    validation. Without `labels`, they have none. Raises DataError where scikit-learn is not installed."""

    def __init__(self, training: bool, labels: bool = True) -> None:
        pixels, classes = _read_digits()
        chosen = (np.arange(len(classes)) % 4 != 3) == training
        gray = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)  # 17 levels of gray, 0 … 16
        images = torch.from_numpy(gray)[:, None].expand(-1, 3, -1, -1).contiguous()
        super().__init__(images, classes[chosen] if labels else no_labels(len(images)))


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (N, 8, 8) pixels from 0 to 16 and (N,) labels, read from scikit-learn's file: importing scikit-learn, with
    SciPy and pandas, takes longer than everything that a test does with the digits. Raises DataError."""
    package = importlib.util.find_spec("sklearn")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    if not folders:
        raise DataError(f"digits needs scikit-learn: {command_for('digits')}")
    path = os.path.join(folders[0], "datasets", "data", "digits.csv.gz")
    if not os.path.isfile(path):  # another release may keep the file elsewhere
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images, digits.target.astype(np.int64)
    table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
