"""Compute the distillation losses. Each loss is one short file, with the formula beside the code."""

from dkd.losses.attention_transfer import AttentionTransfer
from dkd.losses.cross_entropy import CrossEntropy
from dkd.losses.gradient_attention import GradientAttention
from dkd.losses.similarity_preserving import SimilarityPreserving
from dkd.losses.soft_targets import SoftTargets

__all__ = [
    "AttentionTransfer",
    "CrossEntropy",
    "GradientAttention",
    "SimilarityPreserving",
    "SoftTargets",
]
