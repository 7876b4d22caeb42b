"""BatchNorm's running statistics, so that they do not depend on how many ranks compute a step.

Once an optimizer step, running ← mean over all B/b micro-batches of ((1 − m)·running + m·batch statistic): every
micro-batch starts from the same old values, and the results are averaged over micro-steps and ranks in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dkd.library_internals.torch import NORMS_WITH_STATISTICS, add_lists, copy_lists, increase_lists

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormStatistics:
    """Applies the rule above to every normalisation layer of `model` that tracks running statistics. Layers that are in
    eval mode at the first step, frozen ones, keep theirs.

    Args:
        model: the model being trained.
        micro_steps: A.
        world_size: W.
        restorable: whether `forget_step` may be called.
    """

    def __init__(self, model: nn.Module, micro_steps: int, world_size: int, restorable: bool = False) -> None:
        self._layers = [
            m for m in model.modules() if isinstance(m, NORMS_WITH_STATISTICS) and m.running_mean is not None
        ]
        self._statistics: list[torch.Tensor] = []
        self._counters: list[torch.Tensor] = []
        self._unread: list[Any] = []
        self._unread_counters: list[torch.Tensor] = []
        self._begun = False
        self._micro_steps, self._world_size, self._restorable = micro_steps, world_size, restorable
        self._old: list[torch.Tensor] = []
        self._sum: list[torch.Tensor] = []

    def _select_layers(self) -> None:
        layers = [m for m in self._layers if m.training]
        self._statistics = [s for m in layers for s in (m.running_mean, m.running_var) if s is not None]
        counting = [m for m in layers if m.num_batches_tracked is not None]
        # torch's own layers read the count only where they average all batches alike.
        self._unread = [m for m in counting if type(m) in _PLAIN and m.momentum is not None]
        self._unread_counters = [m.num_batches_tracked for m in self._unread]
        self._counters = [c for m in counting if (c := m.num_batches_tracked) is not None]
        self._begun = True

    @torch.no_grad()
    def start_step(self) -> None:
        """Keep the values before the step where a micro-batch or the step may have to be forgotten."""
        if not self._begun:
            self._select_layers()
        if (self._micro_steps > 1 or self._restorable) and self._statistics:
            self._old = [s.clone() for s in (*self._statistics, *self._counters)]
        if self._micro_steps > 1 and self._statistics:
            self._sum = [torch.zeros_like(s) for s in self._statistics]

    @torch.no_grad()
    def forget_micro_batch(self) -> None:
        """Restore the values before a forward that does not count."""
        if self._micro_steps > 1:
            self.forget_step()

    @torch.no_grad()
    def forget_step(self) -> None:
        """Restore the values before a step that does not count. Has no effect where they were not kept."""
        if self._old:
            copy_lists([*self._statistics, *self._counters], self._old)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, a forward of the model leaves out the counts of batches that nothing reads: `finish_step` counts them
        all at once, which is one launch on a GPU and not one a layer."""
        for layer in self._unread:
            layer.num_batches_tracked = None
        try:
            yield
        finally:
            for layer, counter in zip(self._unread, self._unread_counters, strict=True):
                layer.num_batches_tracked = counter

    @torch.no_grad()
    def finish_micro_batch(self) -> None:
        """Add a micro-batch's statistics to the step's, and restore the values that the next one starts from."""
        if self._micro_steps > 1 and self._statistics:
            add_lists(self._sum, self._statistics)
            self.forget_micro_batch()

    @torch.no_grad()
    def finish_step(self) -> None:
        """Set the running statistics to the mean over micro-steps and ranks. A collective when W > 1."""
        if self._micro_steps == 1:
            pairs = zip(self._unread, self._unread_counters, strict=True)
            if unread := [counter for layer, counter in pairs if layer.training]:
                increase_lists(unread, 1)
        elif self._counters:
            increase_lists(self._counters, 1)
        if not self._statistics or (self._micro_steps == 1 and self._world_size == 1):
            return
        flat = torch.cat([s.flatten() for s in (self._sum if self._micro_steps > 1 else self._statistics)])
        if self._world_size > 1:
            dist.all_reduce(flat)
        flat /= self._micro_steps * self._world_size
        copy_lists(
            self._statistics,
            [
                part.view_as(s)
                for part, s in zip(flat.split([s.numel() for s in self._statistics]), self._statistics, strict=True)
            ],
        )
