"""Use torch's private names. All were read in torch 2.14."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase

__all__ = [
    "COMPILED_PREFIX",
    "CONVOLUTIONS",
    "METADATA_GLOBALS",
    "METADATA_MEMORY_FORMAT",
    "NORMS_WITH_STATISTICS",
    "FakeTensorMode",
    "add_lists",
    "call_convolution",
    "change_count",
    "copy_lists",
    "group_timeout",
    "groups_made",
    "increase_lists",
    "is_compiled",
    "is_transformed",
    "lerp_lists",
    "make_inductor_deterministic",
    "members_alone",
    "norm_lists",
    "process_groups",
    "set_group_timeout",
    "shared_storage",
]

NORMS_WITH_STATISTICS = _NormBase
"""The common base of the layers that may keep running statistics: BatchNorm, SyncBatchNorm and InstanceNorm. torch has
no public name for this base; public bases would have to be listed, and a new one would be missed."""

CONVOLUTIONS = nn.modules.conv._ConvNd
"""The common base of all convolutions, transposed ones included. torch has no public name for this base."""

COMPILED_PREFIX = "_orig_mod."
"""The beginning of the names of a compiled module's parameters, which a checkpoint must not hold. torch.compile has no
public way to ask for the names of the plain module."""

METADATA_MEMORY_FORMAT = "_MEM_FORMAT_ENCODING"
"""The name of the Enum by which torch.distributed.checkpoint pickles a tensor's memory format."""

METADATA_GLOBALS = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        METADATA_MEMORY_FORMAT,
    },
    "collections": {"OrderedDict"},
}  # fmt: skip
"""Module to names of all that the metadata of torch.distributed.checkpoint pickles for tensors. torch publishes no such
list, which a restricted unpickler needs."""


def copy_lists(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into the target at the same place, in one kernel a device instead of one a tensor. torch has no
    public function for lists of tensors."""
    torch._foreach_copy_(targets, sources)


def add_lists(targets: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    """Add each of `others` to the target at the same place, in place, as `copy_lists` copies."""
    torch._foreach_add_(targets, others)


def increase_lists(targets: list[torch.Tensor], number: float) -> None:
    """Add a number to each target, in place, as `copy_lists` copies."""
    torch._foreach_add_(targets, number)


def lerp_lists(targets: list[torch.Tensor], ends: list[torch.Tensor], weight: float) -> None:
    """Move each target to target + weight · (end − target), in place, as `copy_lists` copies."""
    torch._foreach_lerp_(targets, ends, weight)


def norm_lists(tensors: list[torch.Tensor], order: float) -> list[torch.Tensor]:
    """Return the norm of each tensor, as `copy_lists` copies.

    Args:
        order: of the norm; math.inf: the largest absolute value.
    """
    return list(torch._foreach_norm(tensors, order))


def call_convolution(
    layer: nn.Module, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Call a convolution with other tensors in the place of its parameters. The public function,
    torch.func.functional_call, replaces the parameters for everyone meanwhile."""
    result: torch.Tensor = layer._conv_forward(images, weight, bias)  # type: ignore[operator]
    return result


def change_count(tensor: torch.Tensor) -> int:
    """Count the changes in place of a tensor so far. autograd finds such changes by this count, which has no public
    name. A tensor made in inference mode has none."""
    return tensor._version


def shared_storage(size: int) -> torch.UntypedStorage:
    """Return a storage of `size` bytes in a file of /dev/shm. torch's own collate functions make one in a worker
    process; the public `share_memory_` copies an existing storage instead. Raises RuntimeError where it does not
    fit."""
    return torch.UntypedStorage._new_shared(size)


def process_groups() -> list[dist.ProcessGroup]:
    """Return all process groups of this process. torch has no public list of them."""
    return list(dist.distributed_c10d._world.pg_map)


def set_group_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Set the timeout of a group's collectives from now on. torch 2.14 names the function `set_timeout`; earlier
    releases have only the private name."""
    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    change(timeout, group)


@contextmanager
def members_alone() -> Iterator[None]:
    """Inside, torch makes a new process group among its members alone, also where the default group is bound to a GPU.

    torch would then cut the new communicator out of the default one, which takes all ranks of the job; ranks that are
    no members, and do not call `new_group`, would be waited for. There is no public way to ask for a communicator of
    its own, and the attribute is not documented.
    """
    whole = dist.group.WORLD
    bound = whole.bound_device_id if whole is not None else None
    if whole is None or bound is None:
        yield
        return
    whole.bound_device_id = None
    try:
        yield
    finally:
        whole.bound_device_id = bound


def group_timeout(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return the timeout of a group's collectives on a kind of device. torch can set the timeout and not read it. None:
    the backend does not tell it."""
    try:
        found = group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None


def groups_made() -> int:
    """Return the number that torch puts into the name of the next process group that only its members make. Members
    whose numbers differ would wait for each other under different names; torch has no public way to ask. Releases
    before 2.12 or so count the groups that the rank is in."""
    world = dist.distributed_c10d._world
    return world.group_count + 10**6 * _counts_own_groups() * len(world.pg_names)


def _counts_own_groups() -> bool:
    """Return whether this torch names such groups by the groups that the rank is in. Read in torch 2.9."""
    return "pg_names" in inspect.getsource(dist.distributed_c10d._hash_ranks_to_str)


def is_compiled(module: nn.Module) -> bool:
    """Return whether `Module.compile` has been called. torch has no public way to ask."""
    return module._compiled_call_impl is not None


def is_transformed(tensor: torch.Tensor) -> bool:
    """Return whether torch.func transforms (grad, vmap, jvp) follow a tensor. torch has no public way to ask."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def make_inductor_deterministic() -> None:
    """Let Inductor choose kernels without measuring them, so that equal runs get equal kernels. torch offers this
    setting in a private module only; torch 2.9 does not have it."""
    settings = importlib.import_module("torch._inductor.config")  # takes a while
    if hasattr(settings, "deterministic"):
        settings.deterministic = True  # type: ignore[attr-defined]
