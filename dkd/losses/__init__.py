"""Compute the distillation losses. Each loss is one short file, with the formula beside the code."""

from dkd.losses.attention_transfer import AttentionTransfer
from dkd.losses.correlation_congruence import CorrelationCongruence
from dkd.losses.cross_entropy import CrossEntropy
from dkd.losses.decoupled import DKD
from dkd.losses.dist import DIST
from dkd.losses.gradient_attention import GradientAttention
from dkd.losses.kernel_alignment import CKA
from dkd.losses.normalized import NKD
from dkd.losses.probabilistic_transfer import PKT
from dkd.losses.relational import RelationalLoss
from dkd.losses.relational_angle import RKDAngle
from dkd.losses.relational_distance import RKDDistance
from dkd.losses.similarity_preserving import SimilarityPreserving
from dkd.losses.soft_targets import SoftTargets

__all__ = [
    "CKA",
    "DIST",
    "DKD",
    "NKD",
    "PKT",
    "AttentionTransfer",
    "CorrelationCongruence",
    "CrossEntropy",
    "GradientAttention",
    "RKDAngle",
    "RKDDistance",
    "RelationalLoss",
    "SimilarityPreserving",
    "SoftTargets",
]
