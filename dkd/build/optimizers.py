"""The recipe's optimizer: torch's own, or timm's LAMB."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from dkd.config import Problem
from dkd.config.optimizers import LambSection, OptimizerSection, SgdSection
from dkd.installation import command_for
from dkd.models import TappedModel


def optimizer_problems(section: OptimizerSection) -> list[Problem]:
    """Return what an optimizer needs that is not installed."""
    if not isinstance(section, LambSection) or importlib.util.find_spec("timm") is not None:
        return []
    return [Problem("optimizer.name", f"lamb needs timm: {command_for('timm')}")]


def build_optimizer(
    section: OptimizerSection, model: nn.Module, fused: bool = False, in_graph: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of the parameters of `model` that are trained. `decay_norm_and_bias: false` keeps weight
    decay off everything of one dimension or less: biases, and the scales of normalisation layers. Adapters of losses
    have groups of their own where the section asks for other settings.

    Args:
        section: the recipe's.
        model: the parameters are on the device that trains.
        fused: whether one kernel updates all parameters; else a few, or on CPUs a few for each parameter. LAMB has no
            such kernel.
        in_graph: whether a captured graph makes the updates, which LAMB does not allow: it reads its number of steps
            on the host.
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
        optimizer = torch.optim.SGD(
            groups, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov, fused=fused or None
        )
        if fused and section.momentum:
            # A parameter that gets its first gradient later than others has no momentum, and torch's fused kernel
            # fails. From zero, the first step is the one without.
            for parameter in (each for group in groups for each in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if isinstance(section, LambSection):
        return _build_lamb(section, groups)
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


def _build_lamb(section: LambSection, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return timm's LAMB, which keeps its number of steps where AdamW does: beside the averages of each parameter.

    timm's own clipping of the gradient is off: `train.clip_grad_norm` clips by the norm of the whole gradient under
    every engine, also where a rank holds shards.
    """
    from timm.optim import Lamb

    betas = (section.betas[0], section.betas[1])
    optimizer: torch.optim.Optimizer = Lamb(
        groups, lr=section.lr, betas=betas, eps=section.eps, max_grad_norm=None, trust_clip=section.trust_clip
    )
    optimizer.register_step_pre_hook(lambda each, *_: _take_step(each))
    optimizer.register_step_post_hook(lambda each, *_: _keep_step(each))
    return optimizer


def _take_step(optimizer: torch.optim.Optimizer) -> None:
    """Give timm's LAMB the number of steps done, which it looks for in the settings of its groups. Those are no part of
    checkpoints: settings are the recipe's."""
    done = next((state["step"] for state in optimizer.state.values() if "step" in state), None)
    for group in optimizer.param_groups:
        if done is not None:
            group["step"] = done.clone()


def _keep_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                optimizer.state[parameter]["step"] = torch.as_tensor(group["step"], dtype=torch.float32)


def state_keys(section: OptimizerSection) -> list[str]:
    """Return the names of what the optimizer keeps of each parameter after a step, sorted."""
    if isinstance(section, SgdSection):
        return ["momentum_buffer"] if section.momentum else []
    return ["exp_avg", "exp_avg_sq", "step"]
