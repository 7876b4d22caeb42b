"""Read `python:MODULE:CALLABLE`: a data set made by the user's own code."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dkd.data.sources.base import DataError, IndexedSource, no_labels
from dkd.data.sources.decoding import to_rgb_tensor
from dkd.data.sources.labels import refuse_several_labels
from dkd.user_code import UserCodeError, describe_error, load_callable


class UserSource(IndexedSource):
    """Read the object that the user's own callable returns for `training`.

    The object has `labels` (or `targets`), a whole number for each image, and `data[i]`, which is an image or a tuple
    that begins with an image: a PIL image, or uint8 pixels, (3, H, W) as a tensor or (H, W, 3) as an array of NumPy.

    Args:
        name: MODULE:CALLABLE.
        training: what the callable is called with.
        labels: whether labels are read; else the object needs a length and no labels.

    Raises:
        DataError: the callable raises, or returns something else.
    """

    def __init__(self, name: str, training: bool, labels: bool = True) -> None:
        try:
            self._data = load_callable(name)(training=training)
        except UserCodeError as error:
            raise DataError(str(error)) from error
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise DataError(f"{name!r} cannot be opened with training={training}: {describe_error(error)}") from error
        self._name = name
        if labels:
            self._read_labels(name)
        elif hasattr(self._data, "__len__") and hasattr(self._data, "__getitem__"):
            self.labels = no_labels(len(self._data))
        else:
            raise DataError(f"{name!r} returned {type(self._data).__name__}, without a length and images by index")

    def _read_labels(self, name: str) -> None:
        labels = getattr(self._data, "labels", getattr(self._data, "targets", None))
        if labels is None or not hasattr(self._data, "__getitem__"):
            raise DataError(
                f"{name!r} returned {type(self._data).__name__}, without `labels` (or `targets`) and images by index; "
                "for images without labels, set data.labels=false"
            )
        try:
            found = np.asarray(labels)
        except ValueError:  # lists of several lengths
            refuse_several_labels(f"{name!r}: its list of labels")
        if found.ndim > 1 and found.shape[1] != 1:
            refuse_several_labels(f"{name!r}: its list of labels, of shape {found.shape},")
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
