"""Build models by name, load their weights, and wrap them so that they yield features.

This package knows nothing of losses or training.
"""

from dkd.models.blocks import block_classes, blocks
from dkd.models.freezing import FreezingError, batch_norms, freeze
from dkd.models.heads import head_keys
from dkd.models.inspection import (
    ModelCost,
    ModuleRow,
    build_on_meta,
    model_cost,
    module_rows,
    output_shapes,
    tap_dtypes,
    unreached_parameters,
)
from dkd.models.registry import ModelSpec, UnknownModelError, build_model, known_names
from dkd.models.stated import StatedClasses, StatedInput, stated_class_count, stated_classes, stated_input
from dkd.models.student_file import load_student, read_description, save_student, student_spec
from dkd.models.tapped import (
    ADAPTERS,
    Adapter,
    LogitsOnly,
    TapError,
    TappedModel,
    adapted_key,
    adapted_keys,
    adapter_name,
    run_adapter,
)
from dkd.models.weights import (
    AS_BUILT,
    PRETRAINED,
    Fingerprint,
    Head,
    WeightsError,
    check_weights,
    head_size,
    load_weights,
    stream_weights,
    weights_fingerprint,
)

__all__ = [
    "ADAPTERS",
    "AS_BUILT",
    "PRETRAINED",
    "Adapter",
    "Fingerprint",
    "FreezingError",
    "Head",
    "LogitsOnly",
    "ModelCost",
    "ModelSpec",
    "ModuleRow",
    "StatedClasses",
    "StatedInput",
    "TapError",
    "TappedModel",
    "UnknownModelError",
    "WeightsError",
    "adapted_key",
    "adapted_keys",
    "adapter_name",
    "batch_norms",
    "block_classes",
    "blocks",
    "build_model",
    "build_on_meta",
    "check_weights",
    "freeze",
    "head_keys",
    "head_size",
    "known_names",
    "load_student",
    "load_weights",
    "model_cost",
    "module_rows",
    "output_shapes",
    "read_description",
    "run_adapter",
    "save_student",
    "stated_class_count",
    "stated_classes",
    "stated_input",
    "stream_weights",
    "student_spec",
    "tap_dtypes",
    "unreached_parameters",
    "weights_fingerprint",
]
