"""Distributed knowledge distillation for vision models.

    import dkd

    result = dkd.train("recipe.yaml", ["train.epochs=10"])    # what `dkd train` does
    dkd.evaluate(result.run_dir).result.top1                  # what `dkd evaluate` does
    student = dkd.load_student(result.student)                # a torch.nn.Module

The losses, and the step that combines them, work in any training loop:

    from dkd import AttentionTransfer, DistillationStep, Objective, SimilarityPreserving, SoftTargets
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dkd.config import Recipe, RecipeError, load_recipe
    from dkd.distillation import (
        DistillationStep,
        FeatureTerm,
        FrozenTeacher,
        InputGradientTerm,
        LabelTerm,
        LogitTerm,
        Objective,
    )
    from dkd.errors import DkdError, InputError, LostRankError, RunError, Stopped, TrainingError
    from dkd.global_batch import BatchLayout, gather_rows
    from dkd.launch import Launch
    from dkd.losses import (
        CKA,
        CRD,
        DIST,
        DKD,
        NKD,
        PKT,
        SRD,
        VID,
        AttentionTransfer,
        BinaryCrossEntropy,
        CorrelationCongruence,
        CrossEntropy,
        EmbeddingQueue,
        FeatureDistance,
        GradientAttention,
        RelationalLoss,
        ReviewKD,
        RKDAngle,
        RKDDistance,
        SimilarityPreserving,
        SoftTargets,
    )
    from dkd.models import TappedModel, load_student
    from dkd.training.entry import TrainResult, evaluate, train
    from dkd.training.trainer import Trainer

_MODULES = {
    "config": ("Recipe", "RecipeError", "load_recipe"),
    "distillation": (
        "DistillationStep",
        "FeatureTerm",
        "FrozenTeacher",
        "InputGradientTerm",
        "LabelTerm",
        "LogitTerm",
        "Objective",
    ),
    "errors": ("DkdError", "InputError", "LostRankError", "RunError", "Stopped", "TrainingError"),
    "global_batch": ("BatchLayout", "gather_rows"),
    "launch": ("Launch",),
    "losses": (
        "CKA",
        "DIST",
        "ReviewKD",
        "FeatureDistance",
        "EmbeddingQueue",
        "VID",
        "SRD",
        "CRD",
        "DKD",
        "NKD",
        "PKT",
        "AttentionTransfer",
        "BinaryCrossEntropy",
        "CorrelationCongruence",
        "CrossEntropy",
        "GradientAttention",
        "RelationalLoss",
        "RKDAngle",
        "RKDDistance",
        "SimilarityPreserving",
        "SoftTargets",
    ),
    "models": ("TappedModel", "load_student"),
    "training.entry": ("TrainResult", "evaluate", "train"),
    "training.trainer": ("Trainer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CKA",
    "CRD",
    "DIST",
    "DKD",
    "NKD",
    "PKT",
    "SRD",
    "VID",
    "AttentionTransfer",
    "BatchLayout",
    "BinaryCrossEntropy",
    "CorrelationCongruence",
    "CrossEntropy",
    "DistillationStep",
    "DkdError",
    "EmbeddingQueue",
    "FeatureDistance",
    "FeatureTerm",
    "FrozenTeacher",
    "GradientAttention",
    "InputError",
    "InputGradientTerm",
    "LabelTerm",
    "Launch",
    "LogitTerm",
    "LostRankError",
    "Objective",
    "RKDAngle",
    "RKDDistance",
    "Recipe",
    "RecipeError",
    "RelationalLoss",
    "ReviewKD",
    "RunError",
    "SimilarityPreserving",
    "SoftTargets",
    "Stopped",
    "TappedModel",
    "TrainResult",
    "Trainer",
    "TrainingError",
    "evaluate",
    "gather_rows",
    "load_recipe",
    "load_student",
    "train",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `dkd --help` and a recipe's errors do not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'dkd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dkd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
