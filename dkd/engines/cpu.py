"""FSDP2 and DeepSpeed on CPUs, for development and tests. On a GPU nothing here is used.

Accelerate chooses FSDP or DeepSpeed only for kinds of devices it knows as accelerators: on CPUs it runs DDP, or one
process that knows of
no other, and says nothing. Two private methods stand in the way; both are replaced while the Accelerator is made.
`engine.py` checks afterwards that it is the engine asked for, so a release of Accelerate that changes them ends in an
error, not in another training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Inside, an Accelerator of several processes takes CPUs for devices that FSDP and DeepSpeed can use, with gloo
    between them."""
    kept = {name: getattr(PartialState, name) for name in ("_prepare_backend", "set_device")}

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    try:
        PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device
        yield
    finally:
        for name, method in kept.items():
            setattr(PartialState, name, method)


def without_shared_memory_op() -> None:
    """DeepSpeed compiles an extension for CPUs when its communication starts, and lets ranks wait for each other's
    shared memory. Only its inference uses it; told that it does not fit this machine, DeepSpeed goes on without a
    compiler and without that wait."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
