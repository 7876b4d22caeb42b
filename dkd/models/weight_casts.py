"""Cast a model's weights to the type that it computes in, all by one operation.

Under autocast, each convolution and linear layer casts its weight and its bias by itself, and each gradient is cast
back: two launches a tensor on a GPU, which for a small model take longer than what they cast. Here one operation casts
all weights before the forward, and one all gradients after the backward. The results are the same bits.

Gradients of weights arrive together, after the whole backward: an engine that exchanges them while the backward
computes has nothing to gain from it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from dkd.library_internals.torch import copy_lists, parameters_replaced

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weights autocast casts, and which do nothing else with them. Classes derived from them may."""


class WeightCasts:
    """Calls a model under autocast.

    The first call casts nothing: it notes which layers run once, under autocast. A model may switch autocast off in a
    part of it, or call a layer of its own in another way.

    Args:
        model: called with images.
        dtype: of the autocast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._places: list[tuple[nn.Module, str]] | None = None

    def __call__(self, images: torch.Tensor) -> Any:
        """Return what the model returns, inside of an autocast to the type."""
        if self._places is None:
            return self._choose(images)
        if not self._places:
            return self._model(images)
        casts = _CastTogether.apply(self._dtype, *(getattr(layer, name) for layer, name in self._places))
        with parameters_replaced(self._places, casts):
            return self._model(images)

    def _choose(self, images: torch.Tensor) -> Any:
        calls: Counter[nn.Module] = Counter()
        device = images.device.type

        def note_call(layer: nn.Module, inputs: Any) -> None:
            is_cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == self._dtype
            calls[layer] += 1 if is_cast else 2

        layers = _own_layers(self._model)
        hooks = [layer.register_forward_pre_hook(note_call) for layer in layers]
        try:
            return self._model(images)
        finally:
            for hook in hooks:
                hook.remove()
            chosen = [layer for layer in layers if calls[layer] == 1]
            self._places = [(layer, name) for layer in chosen for name, _ in layer.named_parameters()]


def _own_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose weights are float32 and belong to no other module."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [
        module
        for module in model.modules()
        if type(module) in _LAYERS and all(owners[id(p)] == 1 and p.dtype == torch.float32 for p in module.parameters())
    ]


class _CastTogether(torch.autograd.Function):
    """Cast tensors of float32 to another type, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # a weight that got no gradient keeps none
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        copy_lists(casts, list(weights))
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
