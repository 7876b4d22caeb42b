"""The state of a student under DeepSpeed's ZeRO, in the names and whole shapes of `state.py`.

DeepSpeed's own checkpoints are pickles of one world size. Its accessors of whole tensors are used instead: each is
gathered in turn, and kept by one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dkd.checkpoints import SavedTensor
from dkd.engines.ema import WeightAverage
from dkd.engines.sharded_weights import local_part, plain_name, release_gathered
from dkd.engines.state import Tensors, optimizer_keys
from dkd.library_internals.deepspeed import flat_parameters, parameters_by_flat, shard_of, whole_numel, whole_shape


class ZeroTrainingState:
    """Collects and restores the tensors of a student under ZeRO-1, 2 or 3, as `TrainingState` does for DDP and FSDP2.

    Args:
        wrapped: the DeepSpeed engine.
        model: the student in it.
        average: the moving average of the weights, or None.
    """

    def __init__(self, wrapped: Any, model: nn.Module, average: WeightAverage | None) -> None:
        self._engine, self._model, self._average = wrapped, model, average
        self._trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}

    def collect(self) -> Tensors:
        """Return whole tensors on the CPU, each on the one rank that is to write it. All ranks call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_optimizer_state()
        found: Tensors = {}
        rank, size, turn = dist.get_rank(), dist.get_world_size(), 0

        def keep(name: str, whole: torch.Tensor) -> None:
            nonlocal turn
            if turn % size == rank:
                found[name] = whole.detach().to("cpu", copy=True)
            turn += 1

        for name, tensor in self._model.state_dict(keep_vars=True).items():
            keep(f"model/{plain_name(name)}", _whole(tensor, _kept(tensor)))
        tensor_keys, numbers = self._optimizer_keys()
        for name, parameter in self._trained.items():
            for key in tensor_keys:
                keep(f"optimizer/{name}/{key}", safe_get_full_optimizer_state(parameter, key))
            for key, number in numbers.items():
                keep(f"optimizer/{name}/{key}", number)
        if self._average is not None:
            for name, live, average in self._average.named():
                keep(f"average/{name}", _whole(live, average))
        return found

    def restore(self, saved: Mapping[str, SavedTensor], load: Callable[[Tensors], None]) -> None:
        """Replace the present state, as `TrainingState.restore`. Each rank reads the whole state into the CPU's
        memory."""
        release_gathered(self._engine)
        whole = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in saved.items()
            if not name.startswith("rng/")
        }
        load(whole)
        self._make_optimizer_state(whole, optimizer_keys(saved))
        with torch.no_grad():
            for name, tensor in self._model.state_dict(keep_vars=True).items():
                _kept(tensor).copy_(_part(tensor, whole[f"model/{plain_name(name)}"]))  # what forwards read
            for name, parameter in self._trained.items():
                _set_optimized(parameter, _part(parameter, whole[f"model/{name}"]))  # what the optimizer updates
                for key in self._optimizer_keys()[0]:
                    if f"optimizer/{name}/{key}" in whole:
                        _set_optimizer_state(parameter, _part(parameter, whole[f"optimizer/{name}/{key}"]), key)
            if self._average is not None:
                for name, live, average in self._average.named():
                    average.copy_(_part(live, whole[f"average/{name}"]))

    def _flat_parameters(self) -> list[torch.Tensor]:
        """Return what torch's optimizer updates: a rank's part of many parameters, end to end."""
        return flat_parameters(self._engine.optimizer)

    def _optimizer_keys(self) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Return the names of what is kept of every element, and what is one number for all, in one order on all ranks,
        as collectives need it."""
        flat = self._flat_parameters()[0]
        state = {
            key: v
            for key, v in sorted(self._engine.optimizer.optimizer.state[flat].items())
            if isinstance(v, torch.Tensor)
        }
        shaped = [key for key, value in state.items() if value.shape == flat.shape]
        return shaped, {key: value for key, value in state.items() if key not in shaped}

    def _make_optimizer_state(self, whole: Tensors, keys: list[str]) -> None:
        """Make the optimizer's state, which DeepSpeed makes in the first step only, and fill it."""
        for key in keys:
            name, parameter = next((name, p) for name, p in self._trained.items() if f"optimizer/{name}/{key}" in whole)
            value = whole[f"optimizer/{name}/{key}"]
            elementwise = value.shape == whole_shape(parameter)
            for flat in self._flat_parameters():
                state = self._engine.optimizer.optimizer.state[flat]
                state[key] = torch.zeros_like(flat, requires_grad=False) if elementwise else value.clone()
        self._link_optimizer_state()

    def _link_optimizer_state(self) -> None:
        """Connect parameters with their part of the optimizer's state. ZeRO-1 and 2 do that once, after the first group
        of
        the first step: too early for other groups, which have no state yet."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero: Any = self._engine.optimizer
        for parameters, flat in parameters_by_flat(zero):
            lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _kept(parameter: torch.Tensor) -> torch.Tensor:
    """Return what this rank keeps: a flat, padded shard under ZeRO-3, else all of it."""
    return local_part(parameter)


def _whole(parameter: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the whole of a parameter, or of something that is sharded as it is. A collective under ZeRO-3."""
    if shard_of(parameter) is None:
        return kept
    parts = [torch.empty_like(kept) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, kept.contiguous())
    return torch.cat(parts)[: whole_numel(parameter)].view(whole_shape(parameter))


def _part(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return what this rank keeps of `whole`, sharded as `parameter` is: under ZeRO-3 flat, and padded with zeros."""
    whole = whole.to(_kept(parameter).device)
    if shard_of(parameter) is None:
        return whole
    part = torch.zeros_like(_kept(parameter), dtype=whole.dtype)
    mine = whole.flatten()[dist.get_rank() * part.numel() :][: part.numel()]
    part[: mine.numel()] = mine
    return part


def _set_optimized(parameter: torch.Tensor, part: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    (safe_set_local_fp32_param if shard_of(parameter) is not None else safe_set_full_fp32_param)(parameter, part)


def _set_optimizer_state(parameter: torch.Tensor, part: torch.Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    (safe_set_local_optimizer_state if shard_of(parameter) is not None else safe_set_full_optimizer_state)(
        parameter, part, key
    )
