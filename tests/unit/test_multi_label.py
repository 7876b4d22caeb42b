"""Images with several labels each are refused with a sentence, wherever the labels are."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from few_images import png

from dkd.data import DataError, open_row_groups, open_source

SEVERAL = {
    "class indices": [[0, 2], [1]],
    "one number for each class": [[1, 0, 1], [0, 1, 0]],
    "switches": [[True, False], [False, True]],
    "names of classes": [["cat", "dog"], ["cow"]],
}


def write(path, **columns):
    parquet.write_table(pa.table({"image": [png("RGB"), png("L")], **columns}), path)
    return str(path)


@pytest.mark.parametrize("labels", SEVERAL.values(), ids=SEVERAL)
@pytest.mark.parametrize("open_it", [open_source, open_row_groups])
def test_a_column_of_lists_is_refused(tmp_path, labels, open_it):
    spec = write(tmp_path / "a.parquet", tags=labels)
    with pytest.raises(DataError, match=r"column 'tags' holds several labels for an image \(multi-label\); dkd trains"):
        open_it(spec, training=True)
    with pytest.raises(DataError, match="column 'tags' holds several labels"):
        open_it(spec, training=True, label_column="tags")


def test_lists_beside_labels_are_no_labels(tmp_path):
    spec = write(tmp_path / "a.parquet", tags=SEVERAL["class indices"], embedding=[[0.1], [0.2]], label=[1, 0])
    assert open_source(spec, training=True).labels.tolist() == [1, 0]
    spec = write(tmp_path / "b.parquet", embedding=[[0.1], [0.2]])
    with pytest.raises(DataError, match=r"set data\.label_column; columns that fit: none"):
        open_source(spec, training=True)


class Several:
    def __init__(self, labels):
        self.labels = labels

    def __getitem__(self, index):
        return np.zeros((8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "labels", [[[0, 2], [1]], [[1, 0], [0, 1]], np.eye(3, dtype=int)], ids=["lists", "rows", "array"]
)
def test_a_data_set_of_ones_own_is_refused(monkeypatch, labels):
    monkeypatch.setattr(sys.modules[__name__], "several", lambda training: Several(labels), raising=False)
    monkeypatch.setitem(sys.modules, "module_of_several", sys.modules[__name__])
    with pytest.raises(DataError, match=r"its list of labels.* holds several labels for an image \(multi-label\)"):
        open_source("python:module_of_several:several", training=True)
