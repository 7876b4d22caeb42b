"""What losses keep from step to step beside parameters, in checkpoints: a queue, a memory bank, measured statistics.

loss/TERM/BUFFER       equal on all ranks, or a DTensor of which each rank holds its part
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dkd.checkpoints import SavedTensor
from dkd.engines.base import Tensors, TrainingTensors

LOSSES = "loss/"


class WithLossState:
    """Collects and restores what losses keep, together with what an engine trains: the same under every engine.

    Args:
        trained: of student, optimizer and moving average.
        state: `Objective.state`, which is asked anew each time: a loss may put another tensor in a buffer's place.
    """

    def __init__(self, trained: TrainingTensors, state: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._trained, self._read = trained, state

    def _state(self) -> Tensors:
        return {LOSSES + name: tensor.detach() for name, tensor in sorted(self._read().items())}

    def collect(self) -> Tensors:
        """Copy this rank's part to the CPU. All ranks call it together."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = {
            name: tensor.to("cpu", copy=True)
            for turn, (name, tensor) in enumerate(self._state().items())
            if isinstance(tensor, DTensor) or turn % size == rank
        }
        return {**self._trained.collect(), **own}

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None:
        """Put what was saved in the place of the present state. All ranks call it together, before the first step."""
        self._trained.restore({name: each for name, each in saved.items() if not name.startswith(LOSSES)}, load)
        if state := self._state():
            load(state)


def loss_differences(saved: Mapping[str, SavedTensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what of the losses' state is missing in `saved` or has another shape, in words, and what is saved beyond
    it."""
    kept = {name.removeprefix(LOSSES): each.shape for name, each in saved.items() if name.startswith(LOSSES)}
    found = [f"what the loss keeps as {name} is not in it" for name in state if name not in kept]
    found += [f"{name}, which a loss kept, is in it and not here" for name in kept if name not in state]
    return found + [
        f"what the loss keeps as {name} is {kept[name]} in it and {tuple(tensor.shape)} here"
        for name, tensor in state.items()
        if name in kept and tuple(kept[name]) != tuple(tensor.shape)
    ]
