"""Define the `losses` of a recipe: every key, its type, default and meaning."""

from dkd.config.losses.all_losses import ENSEMBLE, LOSSES, CustomLossSection, LossesSection, with_constant_weights
from dkd.config.losses.attention import AttentionTransferSection, GradientAttentionSection
from dkd.config.losses.features import (
    AdaptedSection,
    CrdSection,
    FeatureSection,
    FitNetSection,
    FormSection,
    QueueSection,
    ReviewSection,
    SrdSection,
    VidSection,
    VkdSection,
)
from dkd.config.losses.labels import BinaryCrossEntropySection, CrossEntropySection
from dkd.config.losses.logits import DistSection, DkdSection, NkdSection, OneClassSection, SoftTargetsSection
from dkd.config.losses.relations import (
    CkaSection,
    CorrelationCongruenceSection,
    PktSection,
    RelationsSection,
    RkdSection,
    SimilarityPreservingSection,
)
from dkd.config.losses.section import ComparingSection, LossSection, WeightSchedule

__all__ = [
    "ENSEMBLE",
    "LOSSES",
    "AdaptedSection",
    "AttentionTransferSection",
    "BinaryCrossEntropySection",
    "CkaSection",
    "ComparingSection",
    "CorrelationCongruenceSection",
    "CrdSection",
    "CrossEntropySection",
    "CustomLossSection",
    "DistSection",
    "DkdSection",
    "FeatureSection",
    "FitNetSection",
    "FormSection",
    "GradientAttentionSection",
    "LossSection",
    "LossesSection",
    "NkdSection",
    "OneClassSection",
    "PktSection",
    "QueueSection",
    "RelationsSection",
    "ReviewSection",
    "RkdSection",
    "SimilarityPreservingSection",
    "SoftTargetsSection",
    "SrdSection",
    "VidSection",
    "VkdSection",
    "WeightSchedule",
    "with_constant_weights",
]
