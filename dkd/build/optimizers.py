"""The recipe's optimizer: torch's own."""

from __future__ import annotations

import torch
from torch import nn

from dkd.config.schema import AdamWSection, SgdSection


def build_optimizer(section: SgdSection | AdamWSection, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the parameters of `model` that are trained. `decay_norm_and_bias: false` keeps weight
    decay off everything of one dimension or less: biases, and the scales of normalisation layers."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": section.weight_decay}]
    if not section.decay_norm_and_bias:
        decayed = [p for p in trained if p.dim() > 1]
        others = [p for p in trained if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if isinstance(section, SgdSection):
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov)
    return torch.optim.AdamW(groups, lr=section.lr, betas=(section.betas[0], section.betas[1]), eps=section.eps)


def state_keys(section: SgdSection | AdamWSection) -> list[str]:
    """Return the names of what the optimizer keeps of each parameter after a step, sorted."""
    if isinstance(section, SgdSection):
        return ["momentum_buffer"] if section.momentum else []
    return ["exp_avg", "exp_avg_sq", "step"]
