"""Read images and labels, augment images, and decide in which order ranks see them.

This package knows nothing of models or losses.
"""

from dkd.data.device_images import DeviceEvaluationLoader, DeviceImages, DeviceTrainLoader
from dkd.data.loader import EvaluationLoader, TrainLoader
from dkd.data.mixup import MixupCutmix
from dkd.data.parquet_stream import RowGroups, open_row_groups
from dkd.data.sampler import GlobalBatchSampler, StreamedBatchSampler
from dkd.data.sources import DataError, ImageSource, in_memory, is_in_memory, open_source, pixels_in_memory
from dkd.data.transforms import CropAndFlip, ImagePipeline, Normalize, build_pipeline

__all__ = [
    "CropAndFlip",
    "DataError",
    "DeviceEvaluationLoader",
    "DeviceImages",
    "DeviceTrainLoader",
    "EvaluationLoader",
    "GlobalBatchSampler",
    "ImagePipeline",
    "ImageSource",
    "MixupCutmix",
    "Normalize",
    "RowGroups",
    "StreamedBatchSampler",
    "TrainLoader",
    "build_pipeline",
    "in_memory",
    "is_in_memory",
    "open_row_groups",
    "open_source",
    "pixels_in_memory",
]
