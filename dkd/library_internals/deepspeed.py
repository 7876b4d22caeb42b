"""Use what DeepSpeed does not document: attributes of sharded parameters, of its optimizers and of its list of
extensions. All were read in DeepSpeed 0.19.8. Importing this module does not import DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch


def shard_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return the flat, padded shard that this rank keeps of a parameter under ZeRO-3; None: it is not sharded.

    ZeRO-3 empties the parameter between uses. The public accessors copy, and offer no view of the shard.
    """
    shard: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return shard


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a whole tensor, also where ZeRO-3 shards it and its own shape is empty."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: torch.Tensor) -> int:
    """Count the elements of a whole tensor, also where ZeRO-3 shards it and it holds none."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def release_whole_weights(wrapped: Any) -> None:
    """Let a DeepSpeed engine free the whole weights that ZeRO-3 keeps after a forward. Without effect for any other
    module, and in the other stages."""
    release = getattr(wrapped, "empty_partition_cache", None)
    if release is not None:
        release()


def flat_parameters(zero: Any) -> list[torch.Tensor]:
    """Return the flat float32 tensors that torch's optimizer updates: this rank's part of many parameters, end to end.
    The optimizer's state is kept by these tensors, and DeepSpeed has no public way to fill the state before a step.

    Args:
        zero: the engine's optimizer, of ZeRO-1, 2 or 3.
    """
    return list(getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups)


def parameters_by_flat(zero: Any) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Return the parameters of each group together with the flat tensor that holds this rank's part of them, under
    ZeRO-1 and 2; an empty list under ZeRO-3.

    Args:
        zero: the engine's optimizer.
    """
    if not hasattr(zero, "bit16_groups"):
        return []
    return list(zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True))


def leave_out_shared_memory_op() -> None:
    """Report to DeepSpeed that its extension for CPUs does not fit this machine, so that DeepSpeed neither compiles the
    extension nor waits for the ranks' shared memory. There is no public switch."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
