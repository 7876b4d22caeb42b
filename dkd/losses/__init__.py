"""Compute the distillation losses. Each loss is one short file, with the formula beside the code."""

from dkd.losses.attention_transfer import AttentionTransfer
from dkd.losses.binary_cross_entropy import BinaryCrossEntropy
from dkd.losses.contrastive import CRD
from dkd.losses.correlation_congruence import CorrelationCongruence
from dkd.losses.cross_entropy import CrossEntropy
from dkd.losses.decoupled import DKD
from dkd.losses.dist import DIST
from dkd.losses.embedding_queue import EmbeddingQueue
from dkd.losses.feature_distance import FeatureDistance
from dkd.losses.gradient_attention import GradientAttention
from dkd.losses.kernel_alignment import CKA
from dkd.losses.knowledge_review import ReviewKD
from dkd.losses.normalized import NKD
from dkd.losses.probabilistic_transfer import PKT
from dkd.losses.relational import RelationalLoss
from dkd.losses.relational_angle import RKDAngle
from dkd.losses.relational_distance import RKDDistance
from dkd.losses.similarity_preserving import SimilarityPreserving
from dkd.losses.simple_recipe import SRD
from dkd.losses.soft_targets import SoftTargets
from dkd.losses.variational import VID

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
    "BinaryCrossEntropy",
    "CorrelationCongruence",
    "CrossEntropy",
    "EmbeddingQueue",
    "FeatureDistance",
    "GradientAttention",
    "RKDAngle",
    "RKDDistance",
    "RelationalLoss",
    "ReviewKD",
    "SimilarityPreserving",
    "SoftTargets",
]
