"""The sections of the optimizers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dkd.config.key_types import Fraction, NonNegative, Number, Positive, Section, Switch

_Decay = Annotated[Number, Field(ge=0, lt=1)]


class AdapterOptimizerSection(Section):
    """Set the optimizer of what losses train beside the student, where that is not the student's."""

    lr: Positive | None = None
    """Learning rate, before the schedule's factor; null: `optimizer.lr`."""
    weight_decay: NonNegative | None = None
    """Weight decay; null: `optimizer.weight_decay`."""


class SgdSection(Section):
    """Set torch.optim.SGD."""

    name: Literal["sgd"]
    """The optimizer."""
    lr: Positive
    """Learning rate, before the schedule's factor."""
    momentum: Fraction = 0.9
    """Momentum."""
    nesterov: Switch = False
    """Whether Nesterov momentum is used."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    decay_norm_and_bias: Switch = True
    """Whether weight decay also applies to biases and to the parameters of normalisation layers."""
    adapters: AdapterOptimizerSection = AdapterOptimizerSection()
    """Settings for what losses train beside the student."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdSection:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        return self


class AdamWSection(Section):
    """Set torch.optim.AdamW."""

    name: Literal["adamw"]
    """The optimizer."""
    lr: Positive
    """Learning rate, before the schedule's factor."""
    betas: Annotated[list[_Decay], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Number added to the denominator."""
    weight_decay: NonNegative = 0.01
    """Weight decay."""
    decay_norm_and_bias: Switch = True
    """Whether weight decay also applies to biases and to the parameters of normalisation layers."""
    adapters: AdapterOptimizerSection = AdapterOptimizerSection()
    """Settings for what losses train beside the student."""


class LambSection(Section):
    """Set timm.optim.Lamb: AdamW's update of each weight tensor, scaled to the tensor's norm (You et al., ICLR 2020).
    It needs the extra `timm`, and whole weight tensors: DDP or FSDP2."""

    name: Literal["lamb"]
    """The optimizer."""
    lr: Positive
    """Learning rate, before the schedule's factor."""
    betas: Annotated[list[_Decay], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the averages of the gradient and of its square."""
    eps: Positive = 1e-6
    """Number added to the denominator."""
    weight_decay: NonNegative = 0.01
    """Weight decay. A tensor without weight decay is updated as by Adam, and not scaled."""
    trust_clip: Switch = False
    """Whether the trust ratio, the norm of a tensor over the norm of its update, is limited to 1."""
    decay_norm_and_bias: Switch = True
    """Whether weight decay also applies to biases and to the parameters of normalisation layers."""
    adapters: AdapterOptimizerSection = AdapterOptimizerSection()
    """Settings for what losses train beside the student."""


OptimizerSection = SgdSection | AdamWSection | LambSection
