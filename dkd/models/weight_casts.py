"""Cast a model's weights to the type that it computes in, all by one operation.

Under autocast, each convolution and linear layer casts its weight and its bias by itself, and each gradient is cast
back: two launches a tensor on a GPU, which for a small model take longer than what they cast. Here one operation casts
the weights of all such layers before the forward, and one their gradients after the backward, to the same bits where
a weight is read by its layer alone.

Layers keep their parameters: only their own call takes the cast in the place of the parameter, and only under autocast,
where the parameter is still the one that was cast and has not been changed since. Whatever else reads a parameter, or
replaces it, finds what it would find without. Changes that torch does not count, by `.data` and not by
`torch.no_grad()`, are seen where a forward makes them in the first call; one that first makes them later has an effect
from its next call on.

Gradients of weights arrive together, after the whole backward: an engine that exchanges them while the backward
computes would wait for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    parameters something changes by `.data`.

    Args:
        model: called with images.
        dtype: of the autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._calls: list[_Call] | None = None
        self._casts: dict[int, _Cast] = {}

    def __call__(self, images: torch.Tensor) -> Any:
        """Return what the model returns, inside of an autocast to the type."""
        if self._calls is None:
            return self._choose(images)
        calls = [call for call in self._calls if _is_plain(call.layer)]
        weights = _weights_of([call.layer for call in calls])
        if not weights or is_transformed(images) or any(is_transformed(weight) for weight in weights):
            return self._model(images)
        casts = _CastTogether.apply(self._dtype, *weights)
        self._casts = {id(w): _Cast(w, *_state(w), cast) for w, cast in zip(weights, casts, strict=True)}
        try:
            for call in calls:
                vars(call.layer)["forward"] = call
            return self._model(images)
        finally:
            for call in calls:
                if vars(call.layer).get("forward") is call:
                    del vars(call.layer)["forward"]
            self._casts = {}

    def cast_of(self, parameter: Any) -> Any:
        """Return the cast of a parameter, or where it is another one by now, or was changed, the parameter itself."""
        found = self._casts.get(id(parameter))
        if found is None or found.weight is not parameter or (found.changes, found.place) != _state(parameter):
            return parameter
        return found.cast

    def applies(self, device: str) -> bool:
        """Return whether layers on a kind of device cast to the type now."""
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == self._dtype

    def _choose(self, images: torch.Tensor) -> Any:
        called: set[nn.Module] = set()

        def note(layer: nn.Module, inputs: Any) -> None:
            if self.applies(images.device.type):
                called.add(layer)

        layers = [layer for layer in self._model.modules() if _is_plain(layer)]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            with _DataUses() as uses:
                found = self._model(images)
        finally:
            for hook in hooks:
                hook.remove()
        self._calls = [
            _Call(layer, self)
            for layer in layers
            if layer in called and not any(id(parameter) in uses.found for parameter in layer.parameters())
        ]
        return found


@dataclass(frozen=True)
class _Cast:
    weight: torch.Tensor
    changes: int
    place: int
    cast: torch.Tensor


def _state(parameter: torch.Tensor) -> tuple[int, int]:
    """Return what changes where a parameter does."""
    return change_count(parameter), parameter.data_ptr()


class _Call:
    """Stands in the place of a layer's `forward`, and takes casts in the place of parameters."""

    def __init__(self, layer: nn.Module, casts: WeightCasts) -> None:
        self.layer, self._casts = layer, casts

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer, casts = self.layer, self._casts
        if torch.compiler.is_compiling() or not casts.applies(input.device.type):
            usual: torch.Tensor = type(layer).forward(layer, input)
            return usual
        weight, bias = casts.cast_of(layer.weight), casts.cast_of(layer.bias)
        if type(layer) is nn.Linear:
            return F.linear(input, weight, bias)
        return call_convolution(layer, input, weight, bias)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether autocast casts the layer's parameters, and the layer does nothing else with them. Classes derived
    from torch's own, and layers whose forward was replaced, may."""
    return type(layer) in (nn.Linear, *_CONVOLUTIONS) and "forward" not in vars(layer)


def _weights_of(layers: list[nn.Module]) -> list[torch.Tensor]:
    """Return the parameters of float32 that the layers' own calls read; of several layers with one parameter, once."""
    found = [getattr(layer, name) for layer in layers for name in ("weight", "bias")]
    # Tensors of inference mode count no changes.
    ours = [w for w in found if isinstance(w, nn.Parameter) and w.dtype == torch.float32 and not w.is_inference()]
    return list({id(w): w for w in ours}.values())


class _DataUses(TorchFunctionMode):
    """Notes tensors whose `data` is read or set: what changes them by it, torch does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.data.__get__, torch.Tensor.data.__set__):  # type: ignore[attr-defined]
            self.found.add(id(args[0]))
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
