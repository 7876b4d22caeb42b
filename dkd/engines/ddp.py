"""One process alone, and DDP."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from dkd.config import Recipe
from dkd.engines.accelerated import AcceleratedEngine
from dkd.models import TappedModel


class DdpEngine(AcceleratedEngine):
    """The student whole on every rank; gradients are averaged in buckets. Also of a launch of one process."""

    kinds: ClassVar = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)

    def _options(self, recipe: Recipe, on_cpu: bool, student_parameters: Any) -> dict[str, Any]:
        # Without this flag, Accelerate makes of N processes on CPUs N trainings that know nothing of each other.
        return {"cpu": on_cpu}

    def _after_wrapping(self, student: TappedModel) -> None:
        if isinstance(self.student, DistributedDataParallel):
            settle_buckets(self.student, student)


def settle_buckets(wrapped: DistributedDataParallel, student: torch.nn.Module) -> None:
    """Let DDP rebuild its buckets now, by a backward in which the model itself does not run.

    DDP rebuilds its buckets after its first backward, in the order in which gradients arrived. The last bits of a sum
    over
    four or more ranks depend on them: without this, the first step of every start would be summed as no other step, and
    a
    resumed run would differ from an uninterrupted one.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    before = student.__dict__.get("forward")
    student.forward = lambda images: torch.stack([p.sum() for p in parameters]).sum()
    try:
        # DDP moves an argument to its GPU, and fails without one.
        wrapped(torch.empty(0)).backward()
    finally:
        if before is None:
            del student.forward
        else:
            student.forward = before
    student.zero_grad()
