"""The distillation losses, each in one short file with its formula beside the code, and the objective that weighs them."""

from dkd.losses.attention_transfer import AttentionTransfer
from dkd.losses.cross_entropy import CrossEntropy
from dkd.losses.gradient_attention import GradientAttention
from dkd.losses.objective import FeatureTerm, InputGradientTerm, LabelTerm, LogitTerm, Objective
from dkd.losses.similarity_preserving import SimilarityPreserving
from dkd.losses.soft_targets import SoftTargets

__all__ = [
    "AttentionTransfer",
    "CrossEntropy",
    "FeatureTerm",
    "GradientAttention",
    "InputGradientTerm",
    "LabelTerm",
    "LogitTerm",
    "Objective",
    "SimilarityPreserving",
    "SoftTargets",
]
