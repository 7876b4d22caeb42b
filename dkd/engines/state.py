"""Everything that training changes, as named tensors on the CPU: the same names and whole shapes under every engine and
on any number of ranks, so that what one launch saved another can read.

    model/NAME             parameters and buffers of the student
    average/NAME           their exponential moving average, where one is kept
    optimizer/NAME/KEY     the optimizer's state of a parameter: momentum_buffer, exp_avg, step, ...

The optimizer's settings are not among them: they are the recipe's, and the learning rate is a function of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dkd.checkpoints import SavedTensor
from dkd.engines.ema import WeightAverage
from dkd.engines.sharded_weights import plain_name, release_gathered
from dkd.library_internals.deepspeed import whole_shape

Tensors = dict[str, torch.Tensor]


class TrainingState:
    """Collects and restores the tensors of a student that is replicated on every rank (DDP) or in FSDP2's shards.

    Args:
        wrapped: the student as the engine wraps it.
        model: the same without the wrapper.
        optimizer: torch's own, over the parameters of `model`.
        average: the moving average of the weights, or None.
    """

    def __init__(
        self, wrapped: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None
    ) -> None:
        self._wrapped, self._model, self._optimizer, self._average = wrapped, model, optimizer, average
        self._counts_on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
        self._parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}

    def collect(self) -> Tensors:
        """Return copies on the CPU, so that training can continue while they are written. All ranks call it.

        Each rank copies its own shards, as DTensors, and a share of the tensors that every rank holds.
        """
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return {
            name: tensor.detach().to("cpu", copy=True)
            for turn, (name, tensor) in enumerate(self._live())
            if isinstance(tensor, DTensor) or turn % size == rank
        }

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None:
        """Replace the present state by what was saved. All ranks call it, before the first step.

        Args:
            saved: names of what was saved.
            load: fills tensors by name, in place.
        """
        release_gathered(self._wrapped)
        keys = optimizer_keys(saved)
        for name, parameter in self._parameters.items():
            for key in keys:
                tensor = saved.get(f"optimizer/{name}/{key}")
                if tensor is None:
                    continue
                if tensor.shape == tuple(parameter.shape):
                    made = torch.zeros_like(parameter, requires_grad=False)
                else:  # a number, such as AdamW's count of steps, which is on the device where a kernel reads it
                    where = parameter.device if self._counts_on_device else "cpu"
                    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=where)
                self._optimizer.state[parameter][key] = made
        load(dict(self._live()))

    def _live(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._model.state_dict().items():
            yield f"model/{plain_name(name)}", tensor.detach()
        for name, parameter in self._parameters.items():
            for key, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    yield f"optimizer/{name}/{key}", value
        if self._average is not None:
            for name, live, average in self._average.named():
                yield f"average/{name}", _sharded_alike(average, live)


def differences(saved: Mapping[str, SavedTensor], model: nn.Module, average: WeightAverage | None) -> list[str]:
    """Return what of a student and its average is missing in `saved` or has another shape, in words, and what is saved
    beyond them."""
    wanted = {
        f"model/{plain_name(name)}": whole_shape(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    if average is not None:
        wanted |= {f"average/{name}": whole_shape(live) for name, live, _ in average.named()}
    kept = {name: tensor.shape for name, tensor in saved.items() if name.startswith(("model/", "average/"))}
    found = [f"{name} is not in it" for name in wanted if name not in kept]
    found += [f"{name} is in it and not here" for name in kept if name not in wanted]
    return found + [
        f"{name} is {kept[name]} in it and {wanted[name]} here"
        for name in wanted
        if kept.get(name, wanted[name]) != wanted[name]
    ]


def optimizer_keys(saved: Mapping[str, SavedTensor]) -> list[str]:
    """Return what the optimizer keeps of a parameter, sorted: [momentum_buffer], or [exp_avg, exp_avg_sq, step]."""
    return sorted({name.rpartition("/")[2] for name in saved if name.startswith("optimizer/")})


def _sharded_alike(local: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return a rank's part as a DTensor that is sharded as `live` is; where `live` is no DTensor, the part itself."""
    if not isinstance(live, DTensor):
        return local
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )
