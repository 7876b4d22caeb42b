"""A teacher whose weights are cut into shards, one on each rank, by FSDP2.

A block of the model is gathered for its forward and released after it: a rank holds its shard of everything and
one block whole. The
features are those of the whole teacher, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dkd.distillation.teacher import FrozenTeacher
from dkd.library_internals.torch import CONVOLUTIONS
from dkd.models import blocks


def shard_mesh(mesh: str, device_type: str, local_world_size: int) -> DeviceMesh:
    """Return the ranks that share one teacher: of the whole `world`, or of each `node`. A collective.

    Args:
        mesh: `world` or `node`.
        device_type: such as cuda.
        local_world_size: ranks on a machine, the same on every one.
    """
    world_size = dist.get_world_size()
    if mesh == "world":
        return init_device_mesh(device_type, (world_size,))
    whole = init_device_mesh(
        device_type, (world_size // local_world_size, local_world_size), mesh_dim_names=("node", "local")
    )
    return whole["local"]


def shard(teacher: FrozenTeacher, mesh: DeviceMesh) -> None:
    """Cut every block, and what lies outside blocks, into shards over `mesh`. The teacher may be on the meta device."""
    for _, block in blocks(teacher.tapped.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The wrapper is the root: its forward ends properly even where it stops after the last tap.
    fully_shard(teacher.tapped, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def fill(model: nn.Module, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Copy whole tensors, one at a time, into the model's tensors of those names; of a shard, the rows it holds. No
    communication."""
    state = model.state_dict()
    for name, whole in weights:
        target = state.get(name)
        if isinstance(target, DTensor):
            part = distribute_tensor(whole.to(target.dtype), target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(part.to_local())
        elif target is not None:
            target.copy_(whole)


_HALF_PRECISION_LAYERS = (nn.Linear, CONVOLUTIONS, nn.MultiheadAttention)


def halve_weights(model: nn.Module) -> None:
    """Linear, convolution and attention weights in bfloat16, as autocast would round them for every forward; norms and
    all else stay."""
    for module in model.modules():
        if isinstance(module, _HALF_PRECISION_LAYERS):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
