"""Cast a model's weights to the type that it computes in, all by one operation.

Under autocast, each convolution and linear layer casts its weight and its bias by itself, and each gradient is cast
back: two launches a tensor on a GPU, which for a small model take longer than what they cast. Here one operation casts
the weights of all such layers before the forward, and one their gradients after the backward, to the same bits.

Layers keep their parameters: only their own call takes the cast in the place of the parameter, and only under autocast,
where the parameter is still the one that was cast and has not been changed since. Whatever else reads a parameter, or
replaces it, finds what it would find without.

Gradients of weights arrive together, after the whole backward: an engine that exchanges them while the backward
computes would wait for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dkd.library_internals.torch import call_convolution, change_count, copy_lists, is_transformed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WeightCasts:
    """Calls a model under autocast.

    The first call that succeeds casts nothing: it notes which layers run under autocast, and leaves out those whose
    parameters something changes unseen, by `.data`.

    Args:
        model: called with images.
        dtype: of the autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._layers: list[nn.Module] | None = None

    def __call__(self, images: torch.Tensor) -> Any:
        """Return what the model returns, inside of an autocast to the type."""
        if self._layers is None:
            return self._choose(images)
        layers = [layer for layer in self._layers if _is_plain(layer)]
        weights = _weights_of(layers)
        if not weights or is_transformed(images) or any(is_transformed(weight) for weight in weights):
            return self._model(images)
        casts = _CastTogether.apply(self._dtype, *weights)
        cast_of = {
            id(weight): _Cast(weight, change_count(weight), cast) for weight, cast in zip(weights, casts, strict=True)
        }
        device = images.device.type
        try:
            for layer in layers:
                vars(layer)["forward"] = partial(_forward, layer, cast_of, device, self._dtype)
            return self._model(images)
        finally:
            for layer in layers:
                vars(layer).pop("forward", None)

    def _choose(self, images: torch.Tensor) -> Any:
        called: set[nn.Module] = set()
        device = images.device.type

        def note(layer: nn.Module, inputs: Any) -> None:
            if _casts(device, self._dtype):
                called.add(layer)

        layers = [layer for layer in self._model.modules() if _is_plain(layer)]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            with _DataReads() as reads:
                found = self._model(images)
        finally:
            for hook in hooks:
                hook.remove()
        self._layers = [
            layer
            for layer in layers
            if layer in called and not any(id(parameter) in reads.read for parameter in layer.parameters())
        ]
        return found


@dataclass(frozen=True)
class _Cast:
    weight: torch.Tensor
    changes: int
    cast: torch.Tensor


def _is_plain(layer: nn.Module) -> bool:
    """Return whether autocast casts the layer's parameters, and the layer does nothing else with them. Classes derived
    from torch's own, and layers whose forward was replaced, may."""
    return type(layer) in (nn.Linear, *_CONVOLUTIONS) and "forward" not in vars(layer)


def _weights_of(layers: list[nn.Module]) -> list[torch.Tensor]:
    """Return the parameters of float32 that the layers' own calls read; of several layers with one parameter, once."""
    found = [getattr(layer, name) for layer in layers for name in ("weight", "bias")]
    return list({id(w): w for w in found if isinstance(w, nn.Parameter) and w.dtype == torch.float32}.values())


def _casts(device: str, dtype: torch.dtype) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype


def _forward(
    layer: nn.Module, cast_of: dict[int, _Cast], device: str, dtype: torch.dtype, images: torch.Tensor
) -> torch.Tensor:
    """Call a layer with casts in the place of its parameters."""
    take: Callable[[Any], Any] = partial(_take, cast_of) if _casts(device, dtype) else _same
    weight, bias = take(layer.weight), take(layer.bias)
    return F.linear(images, weight, bias) if type(layer) is nn.Linear else call_convolution(layer, images, weight, bias)


def _take(cast_of: dict[int, _Cast], parameter: Any) -> Any:
    """Return the cast of a parameter, or where it is another one by now, or was changed, the parameter itself."""
    found = cast_of.get(id(parameter))
    fits = found is not None and found.weight is parameter and found.changes == change_count(parameter)
    return found.cast if found is not None and fits else parameter


def _same(parameter: Any) -> Any:
    return parameter


class _DataReads(TorchFunctionMode):
    """Notes tensors whose `data` is read: what changes them by it leaves no trace."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            self.read.add(id(args[0]))
        return func(*args, **(kwargs or {}))


class _CastTogether(torch.autograd.Function):
    """Cast tensors of float32 to another type, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that got no gradient keeps none
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        copy_lists(casts, list(weights))
        # Else frozen layers would be differentiated through.
        ctx.mark_non_differentiable(*(c for c, asked in zip(casts, ctx.needs_input_grad[1:], strict=True) if not asked))
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled():  # for second derivatives
            promoted = [grad.float() for grad in given]
        else:
            promoted = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
            if given:
                copy_lists(promoted, given)
        each = iter(promoted)
        return None, *(None if grad is None else next(each) for grad in grads)
