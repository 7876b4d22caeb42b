"""Keep checkpoints on disk: folders that appear complete or not at all, and named tensors in them."""

from dkd.checkpoints.folder import CheckpointError, CheckpointFolder, SharedCheckpointError
from dkd.checkpoints.tensors import SavedTensor, load_tensors, missing_file, save_tensors, saved_tensors

__all__ = [
    "CheckpointError",
    "CheckpointFolder",
    "SavedTensor",
    "SharedCheckpointError",
    "load_tensors",
    "missing_file",
    "save_tensors",
    "saved_tensors",
]
