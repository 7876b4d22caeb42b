"""Distributed knowledge distillation for vision models.

The losses work in any training loop; the trainer is `dkd train` (see `dkd --help`).

    from dkd import AttentionTransfer, SimilarityPreserving, SoftTargets
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dkd.losses import AttentionTransfer, CrossEntropy, GradientAttention, SimilarityPreserving, SoftTargets
    from dkd.models import load_student

__all__ = [
    "AttentionTransfer",
    "CrossEntropy",
    "GradientAttention",
    "SimilarityPreserving",
    "SoftTargets",
    "load_student",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `dkd --help` and a recipe's errors should not wait for it.
    if name not in __all__:
        raise AttributeError(f"module 'dkd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("dkd.models" if name == "load_student" else "dkd.losses"), name)
