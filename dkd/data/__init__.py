"""Images and labels: where they come from, how they are augmented, in which order ranks see them.

Knows nothing of models or losses.
"""

from dkd.data.batches import EvaluationBatches, TrainingBatches
from dkd.data.mixing import BatchMixing
from dkd.data.order import SampleOrder, StreamedOrder
from dkd.data.row_groups import RowGroups, open_row_groups
from dkd.data.sources import DataError, ImageSource, in_memory, is_in_memory, open_source
from dkd.data.transforms import ImagePipeline, Normalize, build_pipeline

__all__ = [
    "BatchMixing",
    "DataError",
    "EvaluationBatches",
    "ImagePipeline",
    "ImageSource",
    "Normalize",
    "RowGroups",
    "SampleOrder",
    "StreamedOrder",
    "TrainingBatches",
    "build_pipeline",
    "in_memory",
    "is_in_memory",
    "open_row_groups",
    "open_source",
]
