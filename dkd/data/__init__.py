"""Images and labels: where they come from, how they are augmented, in which order ranks see them.

Knows nothing of models or losses.
"""

from dkd.data.batches import EvaluationBatches, TrainingBatches
from dkd.data.mixing import BatchMixing
from dkd.data.order import SampleOrder
from dkd.data.sources import DataError, ImageSource, in_memory, is_in_memory, open_source
from dkd.data.transforms import ImagePipeline, Normalize, build_pipeline

__all__ = [
    "BatchMixing",
    "DataError",
    "EvaluationBatches",
    "ImagePipeline",
    "ImageSource",
    "Normalize",
    "SampleOrder",
    "TrainingBatches",
    "build_pipeline",
    "in_memory",
    "is_in_memory",
    "open_source",
]
