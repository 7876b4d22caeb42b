"""The student's weights, wherever the engine keeps them: whole on every rank (DDP, ZeRO-1, ZeRO-2) or a shard on each
(FSDP2, ZeRO-3)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dkd.library_internals.deepspeed import release_whole_weights, shard_of, whole_numel
from dkd.library_internals.torch import COMPILED_PREFIX
from dkd.models import ADAPTERS, adapter_name


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this rank keeps of a parameter, sharing its memory."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    # DeepSpeed's ZeRO-3 hangs the shard onto the parameter, which is empty between uses.
    shard = shard_of(parameter)
    return shard.detach() if shard is not None else parameter.detach()


def numel(parameter: torch.Tensor) -> int:
    """Count the elements of the whole parameter."""
    return whole_numel(parameter)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Count the parameters: (kept on this rank, in all), with what shards are padded by."""
    parameters = list(model.parameters())
    return sum(local_part(p).numel() for p in parameters), sum(numel(p) for p in parameters)


def release_gathered(wrapped: nn.Module) -> None:
    """Release the whole weights that FSDP2 (its root's) and ZeRO-3 keep after a forward, so that the next one sees what
    the shards hold then. All ranks call it, before they write into shards."""
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    release_whole_weights(wrapped)


def plain_name(name: str) -> str:
    """Return the name of a parameter or buffer in the plain model: without the prefixes of DDP, torch.compile and
    TappedModel. The names of adapters, which are no part of the model, begin with ADAPTERS."""
    name = name.removeprefix("module.").removeprefix(COMPILED_PREFIX)
    return adapter_name(name) or name.removeprefix("model.")


def full_state(accelerator: Accelerator, wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """Return the whole state of the student's model, without adapters, on the CPU of the main process; the others,
    which write none of it, get nothing and copy nothing. A collective under sharding: all ranks call it."""
    state = accelerator.get_state_dict(wrapped) or {}
    if not accelerator.is_main_process:
        return {}
    # Copies on CPUs too: the weights may be swapped before they are written.
    named = {plain_name(name): value for name, value in state.items()}
    return {name: value.detach().to("cpu", copy=True) for name, value in named.items() if not name.startswith(ADAPTERS)}
