"""Read images and labels from what a recipe names. Images are uint8 tensors (3, H, W), labels are whole numbers.

    train-*.parquet            files or globs, in Hugging Face's image layout       data_files.py
    train-*.tar                files or globs, in WebDataset's layout               data_files.py
    hub:NAME[@CONFIG][:SPLIT]  a data set of the Hugging Face hub                   hugging_face.py
    disk:PATH[:SPLIT]          what `save_to_disk` of `datasets` wrote              hugging_face.py
    folder:PATH                PATH/CLASS/*.jpg                                     folder.py
    torchvision:NAME           torchvision.datasets.NAME                            torchvision.py
    python:MODULE:CALLABLE     what your own callable returns for training=True or False   user_data.py
    digits                     scikit-learn's 1,797 handwritten digits              digits.py

Images of every source are turned by their EXIF orientation and made RGB. Every source can be read without labels, and
then needs none: `folder:PATH` is all images under PATH, a column of labels may be missing.
"""

from dkd.data.sources.base import NO_LABEL, DataError, ImageSource, has_labels
from dkd.data.sources.decoding import decode_pixels, to_rgb_tensor
from dkd.data.sources.labels import check_labels, check_names, count_classes, count_places, match_classes
from dkd.data.sources.memory import in_memory, is_in_memory, pixels_in_memory
from dkd.data.sources.names import check_spec, open_source, runs_user_code, same_images, split_spec
from dkd.data.sources.parts import PartOfSource, set_aside

__all__ = [
    "NO_LABEL",
    "DataError",
    "ImageSource",
    "PartOfSource",
    "check_labels",
    "check_names",
    "check_spec",
    "count_classes",
    "count_places",
    "decode_pixels",
    "has_labels",
    "in_memory",
    "is_in_memory",
    "match_classes",
    "open_source",
    "pixels_in_memory",
    "runs_user_code",
    "same_images",
    "set_aside",
    "split_spec",
    "to_rgb_tensor",
]
