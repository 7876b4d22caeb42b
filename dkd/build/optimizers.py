"""The recipe's optimizer: torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dkd.config.schema import AdamWSection, SgdSection
from dkd.models import TappedModel


def build_optimizer(
    section: SgdSection | AdamWSection, model: nn.Module, fused: bool = False, in_graph: bool = False
) -> torch.optim.Optimizer:
    """Return SGD or AdamW over the parameters of `model` that are trained. `decay_norm_and_bias: false` keeps weight
    decay off everything of one dimension or less: biases, and the scales of normalisation layers. Adapters of losses
    have groups of their own where the section asks for other settings.

    Args:
        section: the recipe's.
        model: the parameters are on the device that trains.
        fused: whether one kernel updates all parameters; else a few, or on CPUs a few for each parameter.
        in_graph: whether a captured graph makes the updates.
    """
    own = section.adapters
    adapters = list(model.adapters.parameters()) if isinstance(model, TappedModel) else []
    if own.lr is None and own.weight_decay is None:
        adapters = []
    apart = {id(parameter) for parameter in adapters}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups = _groups(trained, section.weight_decay, section.decay_norm_and_bias)
    if adapters:
        decay = section.weight_decay if own.weight_decay is None else own.weight_decay
        # The trainer sets the learning rate of each step, times this factor.
        scale = 1.0 if own.lr is None else own.lr / section.lr
        of_adapters = _groups([p for p in adapters if p.requires_grad], decay, section.decay_norm_and_bias)
        groups += [{**group, "lr": section.lr * scale, "lr_scale": scale} for group in of_adapters]
    if isinstance(section, SgdSection):
        return torch.optim.SGD(
            groups, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov, fused=fused or None
        )
    betas = section.betas[0], section.betas[1]
    return torch.optim.AdamW(
        groups, lr=section.lr, betas=betas, eps=section.eps, fused=fused or None, capturable=in_graph
    )


class SteppedRates:
    """Sets the learning rate of each step.

    Args:
        optimizer: its groups may scale the rate by `lr_scale`.
        device: where the rates lie, for a captured graph, in tensors that stay the same ones; None: they are numbers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device | None = None) -> None:
        self._groups, self._written = optimizer.param_groups, float("nan")
        if device is not None:
            # The kernels of GPUs read float32.
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            for group in self._groups:
                group["lr"] = torch.zeros((), dtype=dtype, device=device)

    def write(self, rate: float) -> None:
        """Set the rate; nothing is written where it is that of the step before."""
        if rate == self._written:
            return
        for group in self._groups:
            own = rate * group.get("lr_scale", 1.0)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(own)  # by a kernel: a copy from the host would wait for the device
            else:
                group["lr"] = own
        self._written = rate


def _groups(parameters: list[nn.Parameter], weight_decay: float, everything_decays: bool) -> list[dict[str, Any]]:
    """Return the parameters in groups of one weight decay."""
    if everything_decays:
        return [{"params": parameters, "weight_decay": weight_decay}]
    decayed, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def state_keys(section: SgdSection | AdamWSection) -> list[str]:
    """Return the names of what the optimizer keeps of each parameter after a step, sorted."""
    if isinstance(section, SgdSection):
        return ["momentum_buffer"] if section.momentum else []
    return ["exp_avg", "exp_avg_sq", "step"]
