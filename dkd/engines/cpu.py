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

from dkd.library_internals.accelerate import PREPARE_BACKEND


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Inside, an Accelerator of several processes takes CPUs for devices that FSDP and DeepSpeed can use, with gloo
    between them."""
    kept = {name: getattr(PartialState, name) for name in (PREPARE_BACKEND, "set_device")}

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    try:
        setattr(PartialState, PREPARE_BACKEND, prepare_backend)
        PartialState.set_device = set_device
        yield
    finally:
        for name, method in kept.items():
            setattr(PartialState, name, method)
