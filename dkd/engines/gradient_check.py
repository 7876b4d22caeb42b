"""Whether a step's gradient is finite."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dkd.engines.sharded_weights import local_part
from dkd.library_internals.torch import norm_lists


def gradient_is_finite(model: nn.Module) -> bool:
    """Return whether the gradient is finite, once it has been averaged over ranks: the same answer on every rank. Waits
    for the gradient; where the engine shards it, a collective."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    kept = [local for gradient in gradients if (local := local_part(gradient)).numel() > 0]
    # The largest absolute values: unlike 2-norms, they are finite whenever all of a tensor is.
    largest = torch.stack(norm_lists(kept, math.inf)) if kept else torch.zeros(1)
    bad = (~torch.isfinite(largest)).any().to(torch.int32)
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        # As a flag: a maximum over ranks need not keep a NaN.
        bad = bad.to(gradients[0].device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bool(bad)
