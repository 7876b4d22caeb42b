"""Sections of the losses of logits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from dkd.config.key_types import NonNegative, Positive, Switch
from dkd.config.losses.section import ComparingSection, LossSection, Weight, describe_weight, fill_from_preset

DIST_PRESETS: dict[str, dict[str, Any]] = {
    "cifar": {"weight": 2, "beta": 1, "gamma": 1, "tau": 4},
    "imagenet": {"weight": 2, "beta": 1, "gamma": 1, "tau": 1},
}


class DistSection(ComparingSection):
    """Set DIST, the correlation of logits between classes and between samples; docs/reference/losses.md has its
    formula."""

    title: ClassVar = "DIST"
    preset: Literal["cifar", "imagenet"] | None = None
    """Where weight, beta, gamma and tau come from: the authors' settings for CIFAR-100 or for ImageNet."""
    weight: Weight
    """Weight of the loss."""
    beta: NonNegative = 1.0
    """β, the weight of the part between the classes of a sample."""
    gamma: NonNegative = 1.0
    """γ, the weight of the part between the samples of a class."""
    tau: Positive = 1.0
    """τ, which divides the logits."""

    _from_preset = model_validator(mode="before")(fill_from_preset(DIST_PRESETS))

    @property
    def needs_teacher_logits(self) -> bool:
        """Return True."""
        return True

    def describe(self) -> str:
        """Return the loss with its weight."""
        return f"DIST {describe_weight(self.weight)}, τ {self.tau:g}{self._describe_scope()}"


class SoftTargetsSection(LossSection):
    """Set the loss of soft targets (KD)."""

    title: ClassVar = "KD"
    alpha: Weight
    """α, the weight of the loss."""
    temperature: Positive = 4.0
    """T, which divides the logits."""
    standardize: Switch = False
    """Whether each sample's logits are standardised first, to mean 0 and standard deviation 1 over the classes."""

    @property
    def needs_teacher_logits(self) -> bool:
        """Return True."""
        return True

    def describe(self) -> str:
        """Return the loss with its weight and temperature."""
        standardized = ", standardised" if self.standardize else ""
        return f"KD α {describe_weight(self.alpha)}, T {self.temperature:g}{standardized}"


class OneClassSection(LossSection):
    """Be the base of losses of logits that tell the label's class from the others."""

    weight: Weight
    """Weight of the loss."""

    @property
    def reads_labels(self) -> bool:
        """Return True."""
        return True

    @property
    def needs_teacher_logits(self) -> bool:
        """Return True."""
        return True


class DkdSection(OneClassSection):
    """Set Decoupled Knowledge Distillation; docs/reference/losses.md has its formula. It needs one class for each
    sample, and so no mixup or CutMix."""

    title: ClassVar = "DKD"
    weight: Weight = 1.0
    """Weight of the loss."""
    alpha: NonNegative = 1.0
    """α, the weight of the part of the label against all other classes."""
    beta: NonNegative
    """β, the weight of the part between the other classes."""
    temperature: Positive = 4.0
    """T, which divides the logits."""

    def describe(self) -> str:
        """Return the loss with its weights and temperature."""
        weight = "" if self.weight == 1 else f" {describe_weight(self.weight)},"
        return f"DKD{weight} α {self.alpha:g}, β {self.beta:g}, T {self.temperature:g}"


class NkdSection(OneClassSection):
    """Set Normalised Knowledge Distillation; docs/reference/losses.md has its formula. It needs one class for each
    sample, and so no mixup or CutMix."""

    title: ClassVar = "NKD"
    weight: Weight = 1.0
    """Weight of the loss."""
    gamma: NonNegative = 1.5
    """γ, the weight of the part between the classes that are not the label's."""
    temperature: Positive = 1.0
    """T, which divides the logits of these classes."""

    def describe(self) -> str:
        """Return the loss with its weights and temperature."""
        weight = "" if self.weight == 1 else f" {describe_weight(self.weight)},"
        return f"NKD{weight} γ {self.gamma:g}, T {self.temperature:g}"
