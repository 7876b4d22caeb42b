"""Models by name, their weights, and the wrapper that yields features.

Knows nothing of losses or training.
"""

from dkd.models.exported import load_student, save_student
from dkd.models.inspection import ModuleRow, module_rows
from dkd.models.registry import ModelSpec, UnknownModelError, build_model, known_names
from dkd.models.tapped import TapError, TappedModel
from dkd.models.weights import WeightsError, load_weights, weights_fingerprint

__all__ = [
    "ModelSpec",
    "ModuleRow",
    "TapError",
    "TappedModel",
    "UnknownModelError",
    "WeightsError",
    "build_model",
    "known_names",
    "load_student",
    "load_weights",
    "module_rows",
    "save_student",
    "weights_fingerprint",
]
