"""FSDP2: every rank keeps a shard of the student's weights, gradients and optimizer state."""

from __future__ import annotations

from typing import ClassVar

from accelerate.utils import DistributedType

from dkd.engines.accelerated import AcceleratedEngine


class Fsdp2Engine(AcceleratedEngine):
    """The student's blocks are gathered one after the other, when a forward or backward reaches them."""

    kinds: ClassVar = (DistributedType.FSDP,)
